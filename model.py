"""A Llama decoder from raw safetensors, with a skip set: the model LiteStage speeds up.

One class, one forward, one layer loop. `skip` says for each decoder layer whether its attention
(MHSA) and its feed-forward (FFN) sub-layer run; a skipped sub-layer leaves the residual stream as
it was and costs nothing. Shapes use Llama's names: bsz, seqlen, dim, n_heads, n_kv_heads, head_dim.

    python -c "from model import Llama; print(Llama.from_pretrained('data/demo/model').args)"
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# Debug mode: cache slots start as NaN, so that reading one that was never written shows at once.
DEBUG = os.environ.get("LITESTAGE_DEBUG") == "1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EMBED = "model.embed_tokens.weight"


class InputError(ValueError):
    """A mistake of the user's: one line that names the file, key or flag; commands exit with 2."""


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises InputError if it is missing or holds anything else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a Llama, named as in Llama's own code."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int = 2048
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: dict, name: str = "config.json") -> "ModelArgs":
        """Reads and validates a Hugging Face `config.json`; InputError names the key."""

        def number(key, default=None, kind=int, most=1 << 20, where=config):
            value = where.get(key)
            value = default if value is None else value
            if value is None:
                raise InputError(f"{name}: missing key '{key}'")
            right_type = isinstance(value, int if kind is int else int | float)
            if not right_type or isinstance(value, bool) or not 0 < value <= most:
                wanted = "a positive integer" if kind is int else "a positive number"
                raise InputError(f"{name}: '{key}' must be {wanted} up to {most}, found {value!r}")
            return kind(value)

        def flag(key):
            value = config.get(key, False)
            if not isinstance(value, bool):
                raise InputError(f"{name}: '{key}' must be true or false, found {value!r}")
            return value

        for key, wanted in (("model_type", "llama"), ("hidden_act", "silu")):
            if config.get(key, wanted if key == "hidden_act" else None) != wanted:
                raise InputError(f"{name}: '{key}' must be '{wanted}', found {config.get(key)!r}")
        if config.get("quantization_config") is not None:
            raise InputError(f"{name}: 'quantization_config' found; only plain weights are read")
        dim, n_heads = number("hidden_size"), number("num_attention_heads")
        n_kv_heads = number("num_key_value_heads", n_heads)
        if n_heads % n_kv_heads:
            raise InputError(
                f"{name}: 'num_attention_heads' must be a multiple of 'num_key_value_heads', "
                f"found {n_heads} and {n_kv_heads}"
            )
        if config.get("head_dim") is None and dim % n_heads:
            raise InputError(
                f"{name}: 'hidden_size' must be a multiple of 'num_attention_heads', "
                f"found {dim} and {n_heads}"
            )
        head_dim = number("head_dim", max(dim // n_heads, 1))
        if head_dim % 2:
            raise InputError(f"{name}: 'head_dim' must be even, found {head_dim}")
        # transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            raise InputError(f"{name}: '{key}' must be an object, found {rope!r}")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        needs = {
            "default": (),
            "linear": ("factor",),
            "llama3": (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ),
        }
        if not isinstance(rope_type, str) or rope_type not in needs:
            raise InputError(
                f"{name}: '{key}' type must be one of {', '.join(needs)}, found {rope_type!r}"
            )
        scaling = {k: number(k, kind=float, most=1e9, where=rope) for k in needs[rope_type]}
        if scaling.get("high_freq_factor", 1) == scaling.get("low_freq_factor", 0):
            raise InputError(f"{name}: 'high_freq_factor' must differ from 'low_freq_factor'")
        theta_in = rope if "rope_theta" in rope else config
        return cls(
            dim=dim,
            n_layers=number("num_hidden_layers", most=1024),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            hidden_dim=number("intermediate_size"),
            vocab_size=number("vocab_size", most=1 << 22),
            max_seq_len=number("max_position_embeddings", 2048, most=1 << 24),
            norm_eps=number("rms_norm_eps", 1e-6, kind=float, most=1.0),
            rope_theta=number("rope_theta", 10000.0, kind=float, most=1e12, where=theta_in),
            rope_scaling={"rope_type": rope_type} | scaling if scaling else None,
            tied=flag("tie_word_embeddings"),
            attention_bias=flag("attention_bias"),
            mlp_bias=flag("mlp_bias"),
        )


# ---------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return self.weight * normed.to(x.dtype)


class Linear(nn.Module):
    """One product for several matrices of the checkpoint that share their input.

    `parts` maps their names to their output sizes, e.g. {"q_proj": 2048, "k_proj": 256, ...}.
    """

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool = False):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))
        self.bias = nn.Parameter(torch.empty(sum(parts.values()))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def tensors(self, prefix: str):
        """(checkpoint name, view into this module) of every part."""
        for kind in ("weight", "bias"):
            whole = getattr(self, kind)
            if whole is not None:
                views = whole.split(list(self.parts.values()))
                yield from ((f"{prefix}{p}.{kind}", v) for p, v in zip(self.parts, views))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding, as in HF: pairs are (i, i + head_dim / 2).

    x (bsz, seqlen, heads, head_dim); cos, sin broadcast to it; sin's first half carries the minus
    sign of rotate_half.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    """Grouped-query self-attention: every n_heads / n_kv_heads query heads share a KV head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.head_dim = args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        qkv = {"q_proj": q_dim, "k_proj": kv_dim, "v_proj": kv_dim}
        self.wqkv = Linear(args.dim, qkv, args.attention_bias)
        self.wo = Linear(q_dim, {"o_proj": args.dim}, args.attention_bias)

    def forward(self, x: Tensor, rope, mask, kv, pos) -> Tensor:
        bsz, seqlen, _ = x.shape
        heads, kv_heads = self.n_heads, self.n_kv_heads
        qkv = self.wqkv(x).view(bsz, seqlen, heads + 2 * kv_heads, self.head_dim)
        qk = apply_rope(qkv[:, :, : heads + kv_heads], *rope)
        q = qk[:, :, :heads].transpose(1, 2)  # (bsz, n_heads, seqlen, head_dim)
        k = qk[:, :, heads:].transpose(1, 2)  # (bsz, n_kv_heads, seqlen, head_dim)
        v = qkv[:, :, heads + kv_heads :].transpose(1, 2)
        if kv is not None:
            end = pos + seqlen
            kv[0][:, :, pos:end] = k
            kv[1][:, :, pos:end] = v
            k, v = kv[0][:, :, :end], kv[1][:, :, :end]  # (bsz, n_kv_heads, end, head_dim)
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=heads != kv_heads)
        return self.wo(out.transpose(1, 2).reshape(bsz, seqlen, heads * self.head_dim))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        gate_up = {"gate_proj": args.hidden_dim, "up_proj": args.hidden_dim}
        self.w13 = Linear(args.dim, gate_up, args.mlp_bias)
        self.w2 = Linear(args.hidden_dim, {"down_proj": args.dim}, args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)  # each (bsz, seqlen, hidden_dim)
        return self.w2(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn = FeedForward(args)


class KVCache:
    """Keys and values of up to `max_len` tokens for each of `bsz` rows.

    Rows of different length are right-aligned: row b's first `pad[b]` slots are holes that no
    token of it attends to, and its positions count from its own first token.

    tokens: (row 0's) token ids whose keys and values every layer has written in a prefill. Only
    these may be reused by a later stage; what was decoded under a skip set has holes.
    """

    def __init__(self, model: "Llama", bsz: int, max_len: int, pad: list[int] | None = None):
        args, weight = model.args, model.embed.weight
        shape = (bsz, args.n_kv_heads, max_len, args.head_dim)
        self.layers = [
            tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in "kv")
            for _ in range(args.n_layers)
        ]
        if DEBUG:
            for k, v in self.layers:
                k.fill_(math.nan), v.fill_(math.nan)
        self.pad = torch.tensor(pad, device=weight.device) if pad and any(pad) else None
        self.tokens: list[int] = []

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]
        if self.pad is not None:
            self.pad = self.pad[rows]


class Llama(nn.Module):
    """The decoder. `model(tokens)` gives logits; see `forward`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(DecoderLayer(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = None if args.tied else Linear(args.dim, {"lm_head": args.vocab_size})

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and (signed) sin, each (*positions.shape, 1, head_dim), in the model's dtype."""
        args = self.args
        exponents = torch.arange(0, args.head_dim, 2, device=positions.device).float()
        freqs = 1.0 / args.rope_theta ** (exponents / args.head_dim)
        scaling = args.rope_scaling or {}
        if scaling.get("rope_type") == "linear":
            freqs = freqs / scaling["factor"]
        elif scaling.get("rope_type") == "llama3":
            # Llama 3.1: long wavelengths are stretched by factor, short ones kept, between: both
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            freqs = (1 - smooth) * freqs / scaling["factor"] + smooth * freqs
        angles = positions[..., None].float() * freqs  # (..., head_dim / 2)
        cos, sin = angles.cos(), angles.sin()
        dtype = self.embed.weight.dtype
        cos = torch.cat((cos, cos), -1)[..., None, :].to(dtype)
        return cos, torch.cat((-sin, sin), -1)[..., None, :].to(dtype)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        pos: int = 0,
        skip: Tensor | None = None,
        probe: Callable | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits (bsz, seqlen, vocab), or (bsz, 1, vocab) of the last token only with `last`.

        tokens: (bsz, seqlen) ids, which stand in the cache's slots pos .. pos + seqlen - 1.
        skip: (n_layers, 2), columns attention and FFN. 0 or False runs a sub-layer, True or 1
            leaves the residual stream as it was, any other number multiplies it (AdaSkip's rho).
        probe: called as probe(layer, sub, before, after), the residual stream (bsz, seqlen, dim)
            around every sub-layer that runs.
        """
        seqlen = tokens.shape[1]
        slots = torch.arange(pos, pos + seqlen, device=tokens.device)
        positions, mask = slots, None
        if seqlen > 1 or (cache is not None and cache.pad is not None):
            keys = torch.arange(pos + seqlen, device=tokens.device)
            mask = keys <= slots[:, None]  # (seqlen, end): causal
        if cache is not None and cache.pad is not None:
            positions = (slots - cache.pad[:, None]).clamp(min=0)  # (bsz, seqlen)
            hole = keys < cache.pad[:, None, None, None]
            # a padding token sees itself, so that its softmax has something to normalise
            mask = (mask & ~hole) | (keys == slots[:, None])  # (bsz, 1, seqlen, end)
        rope = self.rope(positions)
        rows = [(0, 0)] * len(self.layers) if skip is None else skip.tolist()
        x = self.embed(tokens)  # (bsz, seqlen, dim)
        for i, (layer, (no_attention, no_ffn)) in enumerate(zip(self.layers, rows)):
            before = x
            if no_attention:
                x = x if no_attention == 1 else x * no_attention
            else:
                kv = None if cache is None else cache.layers[i]
                x = x + layer.attention(layer.attention_norm(x), rope, mask, kv, pos)
                if probe is not None:
                    probe(i, 0, before, x)
            before = x
            if no_ffn:
                x = x if no_ffn == 1 else x * no_ffn
            else:
                x = x + layer.ffn(layer.ffn_norm(x))
                if probe is not None:
                    probe(i, 1, before, x)
        x = self.norm(x[:, -1:] if last else x)
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def tensors(self):
        """(name in a Hugging Face checkpoint, tensor or view into this model), every one once."""
        yield EMBED, self.embed.weight
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}."
            yield prefix + "input_layernorm.weight", layer.attention_norm.weight
            yield from layer.attention.wqkv.tensors(prefix + "self_attn.")
            yield from layer.attention.wo.tensors(prefix + "self_attn.")
            yield prefix + "post_attention_layernorm.weight", layer.ffn_norm.weight
            yield from layer.ffn.w13.tensors(prefix + "mlp.")
            yield from layer.ffn.w2.tensors(prefix + "mlp.")
        yield "model.norm.weight", self.norm.weight
        if self.head is not None:
            yield from self.head.tensors("")

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, pack: bool = True) -> "Llama":
        """Loads a Hugging Face checkpoint folder: config.json and safetensors, nothing else.

        dtype: what to compute in, a torch dtype; None is the one that is stored. pack: lay the
        weights out for speed (inference only). Raises InputError, before anything is allocated,
        when the files do not hold exactly the tensors that the configuration asks for.
        """
        folder = Path(path)
        args = ModelArgs.from_config(read_json(folder / "config.json"), folder / "config.json")
        with torch.device("meta"):
            model = cls(args)
        files = find_tensors(folder, dict(model.tensors()), args.tied)
        dtype = dtype or STORED[files[EMBED][1]]
        model = model.to(dtype).to_empty(device=device).eval()
        with torch.no_grad():
            for name, target in model.tensors():
                tensor = read_tensor(files[name][0], name)
                if not all(torch.isfinite(end) for end in tensor.aminmax()):
                    raise InputError(f"{files[name][0]}: '{name}' has NaN or Inf weights")
                target.copy_(tensor)
        return model.requires_grad_(False)


# ---------------------------------------------------------------- checkpoint files


def open_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor name: (stored dtype, shape)} of one file. Raises InputError when it is damaged."""
    try:
        with open(path, "rb") as f:
            if f.read(24).startswith(b"version https://git-lfs"):
                raise InputError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
        with safe_open(path, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None
    except SafetensorError as e:
        raise InputError(f"{path}: not a whole safetensors file ({e})") from None


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a folder, with the tensors the index expects in each."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {folder / "model.safetensors": None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: missing key 'weight_map' with the shard of every tensor")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index}: '{name}' must lie in a file of this folder, found {file!r}")
        files.setdefault(folder / file, []).append(name)
    return files


def find_tensors(folder: Path, wanted: dict[str, Tensor], tied: bool) -> dict[str, tuple]:
    """{tensor name: (file, stored dtype)} for exactly the wanted names and shapes."""
    found, head = {}, None
    for file, expected in weight_files(folder).items():
        header = open_safetensors(file)
        for name in expected or ():
            if name not in header:
                raise InputError(f"{file}: '{name}' is not in the shard that the index names")
        for name, (stored, shape) in header.items():
            if name.endswith("rotary_emb.inv_freq"):  # old checkpoints store it; it is computed
                continue
            if name == "lm_head.weight" and tied:
                head = file  # redundant, and fine if it equals the embedding
                continue
            if name not in wanted:
                raise InputError(f"{file}: unexpected tensor '{name}' for this config.json")
            if stored not in STORED:
                raise InputError(
                    f"{file}: '{name}' is stored as {stored}; expected {', '.join(STORED)}"
                )
            if shape != tuple(wanted[name].shape):
                raise InputError(
                    f"{file}: '{name}' has shape {list(shape)}; config.json asks for "
                    f"{list(wanted[name].shape)}"
                )
            found[name] = (file, stored)
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: tensor '{missing[0]}'{more} missing from the weights")
    if head is not None and not torch.equal(
        read_tensor(head, "lm_head.weight"), read_tensor(found[EMBED][0], EMBED)
    ):
        raise InputError(
            f"{head}: 'lm_head.weight' differs from the embedding, but config.json has "
            "'tie_word_embeddings' true"
        )
    return found


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor; the file is opened anew, so that pages mapped before go back to the system."""
    with safe_open(file, "pt") as f:
        return f.get_tensor(name)


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's configuration, weights and tokenizer: what a result belongs to."""
    folder = Path(folder)
    files = {
        "config": [folder / "config.json"],
        "weights": sorted(weight_files(folder)),
        "tokenizer": [folder / "tokenizer.json", folder / "tokenizer.model"],
    }
    digests = {}
    for key, paths in files.items():
        total = hashlib.sha256()
        for path in filter(Path.exists, paths):
            with open(path, "rb") as f:
                total.update(hashlib.file_digest(f, "sha256").digest())
        digests[key] = total.hexdigest()
    return digests
