"""A Llama decoder from raw safetensors, with a skip set: the model LiteStage speeds up.

One class, one forward, one layer loop. `skip` says for each decoder layer whether its attention
(MHSA) and its feed-forward (FFN) sub-layer run; a skipped sub-layer leaves the residual stream as
it was and costs nothing. Shapes use Llama's names: bsz, seqlen, dim, n_heads, n_kv_heads, head_dim.

    python -c "from model import Llama; print(Llama.from_pretrained('data/demo/model').args)"
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# Debug mode: cache slots start as NaN, so that reading one that was never written shows at once.
DEBUG = os.environ.get("LITESTAGE_DEBUG") == "1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PACK_FROM = 1 << 18  # elements; below, calling oneDNN costs more than it saves
EMBED = "model.embed_tokens.weight"


class InputError(ValueError):
    """A mistake of the user's: one line that names the file, key or flag; commands exit with 2."""


def expect(ok: bool, message: str) -> None:
    """Raises InputError with the message unless ok."""
    if not ok:
        raise InputError(message)


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises InputError if it is missing or holds anything else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e})") from None
    expect(isinstance(value, dict), f"{path}: expected an object, found {type(value).__name__}")
    return value


# ---------------------------------------------------------------- configuration

LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_NEEDS = {"default": (), "linear": ("factor",), "llama3": ("factor", *LLAMA3)}
OPTIONAL = ("n_kv_heads", "head_dim")  # n_heads and dim / n_heads when config.json has none


def entry(name: str, most=1 << 20, **default):
    """A ModelArgs field: its key in config.json, its largest value, its default if it has one."""
    return field(metadata={"key": name, "most": most}, **default)


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The shape of a Llama, named as in Llama's own code."""

    dim: int = entry("hidden_size")
    n_layers: int = entry("num_hidden_layers", 1 << 10)
    n_heads: int = entry("num_attention_heads")
    n_kv_heads: int = entry("num_key_value_heads")
    head_dim: int = entry("head_dim")
    hidden_dim: int = entry("intermediate_size")
    vocab_size: int = entry("vocab_size", 1 << 22)
    max_seq_len: int = entry("max_position_embeddings", 1 << 24, default=2048)
    norm_eps: float = entry("rms_norm_eps", 1.0, default=1e-6)
    rope_theta: float = entry("rope_theta", 1e12, default=10000.0)
    rope_scaling: dict | None = None
    tied: bool = entry("tie_word_embeddings", default=False)
    attention_bias: bool = entry("attention_bias", default=False)
    mlp_bias: bool = entry("mlp_bias", default=False)

    @classmethod
    def from_config(cls, config: dict, name: str = "config.json") -> "ModelArgs":
        """Reads and validates a Hugging Face `config.json`; InputError names the key."""
        for key, wanted, default in (("model_type", "llama", None), ("hidden_act", "silu", "silu")):
            found = config.get(key, default)
            expect(found == wanted, f"{name}: '{key}' must be '{wanted}', found {found!r:.60}")
        plain = config.get("quantization_config") is None
        expect(plain, f"{name}: 'quantization_config' found; expected plain weights")
        # transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        rope = config.get(key) or {}
        expect(isinstance(rope, dict), f"{name}: '{key}' must be an object, found {rope!r:.60}")
        kind = rope.get("rope_type", rope.get("type", None if "factor" in rope else "default"))
        fits = isinstance(kind, str) and kind in ROPE_NEEDS
        expect(fits, f"{name}: type of '{key}': expected {list(ROPE_NEEDS)}, found {kind!r:.60}")
        scaling = {k: read_number(rope, name, k, float, 1e9) for k in ROPE_NEEDS[kind]}
        ordered = kind != "llama3" or scaling[LLAMA3[0]] < scaling[LLAMA3[1]]
        expect(ordered, f"{name}: 'low_freq_factor' must be below 'high_freq_factor'")
        config = config | {"rope_theta": rope.get("rope_theta", config.get("rope_theta"))}
        args = {}
        for f in fields(cls):
            if f.name != "rope_scaling":
                key, default = f.metadata["key"], None if f.name in OPTIONAL else f.default
                args[f.name] = read_number(config, name, key, f.type, f.metadata["most"], default)
        dim, heads = args["dim"], args["n_heads"]
        kv_heads = args["n_kv_heads"] = args["n_kv_heads"] or heads
        divides = heads % kv_heads == 0
        expect(divides, f"{name}: 'num_key_value_heads' {kv_heads} must divide {heads} heads")
        divides = args["head_dim"] is not None or dim % heads == 0
        expect(divides, f"{name}: 'num_attention_heads' {heads} must divide 'hidden_size' {dim}")
        head_dim = args["head_dim"] = args["head_dim"] or dim // heads
        expect(head_dim % 2 == 0, f"{name}: 'head_dim' must be even, found {head_dim}")
        return cls(**args, rope_scaling={"rope_type": kind} | scaling if scaling else None)


def read_number(config: dict, name: str, key: str, kind: type, most, default=MISSING):
    """A number or flag of a configuration, or its default. Raises InputError naming the key."""
    value = default if config.get(key) is None else config[key]
    expect(value is not MISSING, f"{name}: missing key '{key}'")
    if value is None:
        return None
    fits = type(value) is kind or (kind is float and type(value) is int)
    wanted = "true or false" if kind is bool else f"{kind.__name__} above 0 and up to {most}"
    fits = fits and (kind is bool or 0 < value <= most)
    expect(fits, f"{name}: '{key}' must be {wanted}, found {value!r:.60}")
    return kind(value)


# ---------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed as a LayerNorm of (x, -x): that has the mean 0 and x's mean
    square as its variance, and is one fused operator on the CPU, where RMSNorm is six."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(torch.cat((x, -x), -1), (2 * self.dim,), eps=self.eps)
        return normed[..., : self.dim] * self.weight

    __call__ = forward  # without nn.Module's hooks: half a microsecond, 130 times a token


class Linear(nn.Module):
    """One product for several matrices of the checkpoint that share their input.

    `parts` maps their names to their output sizes, e.g. {"q_proj": 2048, "k_proj": 256, ...}.
    Takes (rows, in_features), gives (rows, out_features).
    """

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool = False):
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(sum(parts.values()), in_features))
        self.bias = nn.Parameter(torch.empty(sum(parts.values()))) if bias else None
        self.packed: Callable[[Tensor], Tensor] | None = None  # the same product, packed

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.packed is None else self.packed(x)

    __call__ = forward

    def pack(self) -> None:
        """Lays the weight out as this processor reads it fastest, and frees the plain one."""
        self.packed = packed_product(self.weight, self.bias)
        if self.packed is not None:
            self.weight = None
        elif self.weight.device.type == "cpu" and self.weight.dtype == torch.float32:
            self.weight.data = self.weight.t().contiguous().t()  # small: a fifth faster, cold

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Views of the parts by their names in a checkpoint."""
        sizes = list(self.parts.values())
        return {
            f"{prefix}{part}.{kind}": view
            for kind, whole in (("weight", self.weight), ("bias", self.bias))
            if whole is not None
            for part, view in zip(self.parts, whole.split(sizes))
        }


def packed_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """x (rows, in) -> x @ weight.T + bias on a packed weight; None where the plain one is best.

    oneDNN's product where the processor computes in this dtype; FBGEMM's, of a float16 weight and
    float32 rows, for half precision elsewhere. (Ours.)
    """
    half, avx512 = weight.dtype != torch.float32, torch.cpu._is_avx512_supported()
    native = not half or weight.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    onednn, fbgemm = torch.ops.mkldnn, "fbgemm" in torch.backends.quantized.supported_engines
    if weight.device.type != "cpu":
        return None
    # a bfloat16 from 2^-17 up is exactly a float16; a smaller one moves by 2^-25 at most
    if not native and fbgemm and weight.abs().max() <= torch.finfo(torch.float16).max:
        bias = None if bias is None else bias.float()
        packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x.float(), packed).to(x.dtype)
    if not native or weight.numel() < PACK_FROM or not hasattr(onednn, "_reorder_linear_weight"):
        return None
    # Without AVX-512 oneDNN is fastest when told that it is for one row. With it (but without
    # AMX) six rows fill its registers, and it reads weights faster for six than for fewer.
    fewest = 6 if avx512 and not (half and torch.cpu._is_amx_tile_supported()) else 1
    packed = onednn._reorder_linear_weight(weight, None if avx512 else 1)

    def product(x: Tensor) -> Tensor:
        rows = len(x)
        x = torch.cat([x] * (fewest // rows + 1))[:fewest] if rows < fewest else x
        return onednn._linear_pointwise(x, packed, bias, "none", [], "")[:rows]

    return product


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

    def forward(self, x: Tensor, bsz: int, rope, mask, kv, slots) -> Tensor:
        # x (bsz * seqlen, dim); mask ([bsz, 1,] seqlen, end), added to the scores; kv the cache
        heads, kv_heads = self.n_heads, self.n_kv_heads
        qkv = self.wqkv(x).view(bsz, -1, heads + 2 * kv_heads, self.head_dim)
        seqlen = qkv.shape[1]
        # rotary embedding in place, half-split as in HF: pairs are (i, i + head_dim / 2)
        cos, sin = rope  # ([bsz,] seqlen, 1, head_dim); sin's first half has rotate_half's minus
        qk = qkv[:, :, : heads + kv_heads]
        rotated = qk.roll(self.head_dim // 2, -1)
        qk.mul_(cos).addcmul_(rotated, sin)
        q, kv_now = qkv[:, :, :heads].transpose(1, 2), qkv[:, :, heads:].transpose(1, 2)
        if kv is not None:
            kv[:, :, slots] = kv_now
            kv_now = kv  # (bsz, 2 * n_kv_heads, end, head_dim)
        k, v = kv_now.chunk(2, 1)
        if seqlen == 1:  # a KV head's query heads as its queries: it is read once for all of them
            q = q.reshape(bsz, kv_heads, heads // kv_heads, self.head_dim)
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != kv_heads)
        out = out if seqlen == 1 else out.transpose(1, 2)
        return self.wo(out.reshape(bsz * seqlen, heads * self.head_dim))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        gate_up = {"gate_proj": args.hidden_dim, "up_proj": args.hidden_dim}
        self.w13 = Linear(args.dim, gate_up, args.mlp_bias)
        self.w2 = Linear(args.hidden_dim, {"down_proj": args.dim}, args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)  # each (bsz * seqlen, hidden_dim)
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

    layers: for each decoder layer a tensor (bsz, 2 * n_kv_heads, max_len, head_dim), the keys'
        heads first. A skipped attention writes nothing: its slots are holes.
    pad: rows of different length are right-aligned; row b's first pad[b] slots belong to no token
        of it and are not attended to, and its positions count from there.
    tokens: the ids whose slots, from 0, every layer has written in a prefill. Only these may be
        reused by a later stage.
    """

    def __init__(self, model: "Llama", bsz: int, max_len: int, pad: list[int] | None = None):
        args = model.args
        shape = (bsz, 2 * args.n_kv_heads, max_len, args.head_dim)
        like = {"dtype": model.dtype, "device": model.device}
        self.layers = [torch.zeros(shape, **like) for _ in range(args.n_layers)]
        self.rope = model.rope(torch.arange(max_len, device=model.device))
        self.max_len = max_len
        self.pad = torch.tensor(pad, device=model.device) if pad and any(pad) else None
        self.tokens: list[int] = []
        self.forget(0)

    def forget(self, start: int) -> None:
        """Only the tokens before `start` stay; in debug mode reading the others shows at once."""
        self.tokens = self.tokens[:start]
        if DEBUG:
            for kv in self.layers:
                kv[:, :, start:] = math.nan

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.layers = [kv[rows] for kv in self.layers]
        if self.pad is not None:
            self.pad = self.pad[rows]

    def grow(self, model: "Llama", max_len: int) -> None:
        """Makes room for more tokens; what `tokens` says is there stays."""
        larger = KVCache(model, 1, max_len)
        larger.copy_from(self, torch.arange(len(self.tokens), device=model.device)[None])
        self.layers, self.rope, self.max_len = larger.layers, larger.rope, max_len

    def copy_from(self, other: "KVCache", slots: Tensor, row: int = 0) -> None:
        """Copies slots (n, length) of another cache's one row to the rows from `row` on."""
        n, length = slots.shape
        for mine, its in zip(self.layers, other.layers):
            copied = its[0][:, slots]  # (2 * n_kv_heads, n, length, head_dim)
            mine[row : row + n, :, :length] = copied.transpose(0, 1)


class Llama(nn.Module):
    """The decoder. `model(tokens)` gives logits; see `forward`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(DecoderLayer(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        # a tied head is the embedding, or the same weights packed for the product
        self.head = None if args.tied else Linear(args.dim, {"lm_head": args.vocab_size})

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

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
        both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return tuple(table[..., None, :].to(self.dtype) for table in both)

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, pos=0, skip=None, probe=None, tails=()
    ) -> Tensor:
        """Logits (bsz, seqlen, vocab), or with `tails` (bsz, len(tails), vocab).

        tokens: (bsz, seqlen) ids, which stand in the cache's slots pos .. pos + seqlen - 1. A pos
            that is a tensor (1,) makes every shape independent of it, as a CUDA graph must have
            it: one token attends to the whole cache, under a mask.
        skip: (n_layers, 2), columns attention and FFN. 0 or False runs a sub-layer, True or 1
            leaves the residual stream as it was, any other number multiplies it (AdaSkip's rho).
        probe: called as probe(layer, sub, before, after), the residual stream (bsz, seqlen, dim)
            around every sub-layer that runs.
        tails: lengths of the texts the tokens end in, e.g. one per option. Each continues the
            common beginning and sees no other; only their last tokens get logits. Not with pad.
        """
        (bsz, seqlen), fixed = tokens.shape, torch.is_tensor(pos)
        end = cache.max_len if fixed else pos + seqlen
        slots = pos if fixed else slice(pos, end)
        positions, mask, pad = slots, None, cache and cache.pad
        lasts = [sum(tails[: i + 1]) - sum(tails) - 1 for i in range(len(tails))]
        if seqlen > 1 or fixed or pad is not None:
            keys = torch.arange(end, device=tokens.device)
            queries = keys[slots]  # (seqlen,)
            hidden = keys > queries[:, None]  # (seqlen, end): what is not seen; causal
            if len(tails) > 1:
                sizes, n = torch.tensor(tails, device=tokens.device), sum(tails)
                starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # (n,)
                hidden[-n:, -n:] |= starts[:, None] != starts
                positions = queries.clone()
                positions[-n:] -= starts  # every tail counts on from the common beginning
            if pad is not None:
                positions = (queries - pad[:, None]).clamp(min=0)  # (bsz, seqlen)
                hole = keys < pad[:, None, None, None]
                # a padding token sees itself, so that its softmax has something to normalise
                hidden = (hidden | hole) & (keys != queries[:, None])  # (bsz, 1, seqlen, end)
            mask = torch.zeros_like(hidden, dtype=self.dtype).masked_fill_(hidden, -math.inf)
        tables = self.rope(torch.arange(end, device=self.device)) if cache is None else cache.rope
        rope = [table[positions] for table in tables]
        skips = [(0, 0)] * len(self.layers) if skip is None else skip.tolist()
        if len(skips) != len(self.layers):
            raise ValueError(f"skip: expected ({len(self.layers)}, 2), found {tuple(skip.shape)}")
        x = F.embedding(tokens.flatten(), self.embed.weight).to(self.dtype)  # (bsz * seqlen, dim)
        for i, layer in enumerate(self.layers):
            for sub in (0, 1):
                skipped, before = skips[i][sub], x
                if skipped:
                    x = x if skipped == 1 else x * skipped
                    continue
                if sub == 0:
                    kv = None if cache is None else cache.layers[i][:, :, :end]
                    x = x + layer.attention(layer.attention_norm(x), bsz, rope, mask, kv, slots)
                else:
                    x = x + layer.ffn(layer.ffn_norm(x))
                if probe is not None:
                    probe(i, sub, *(stream.view(bsz, seqlen, -1) for stream in (before, x)))
        if tails:
            x = x.view(bsz, seqlen, -1)[:, lasts].flatten(0, 1)
        x = self.norm(x)
        logits = F.linear(x, self.embed.weight) if self.head is None else self.head(x)
        return logits.view(bsz, -1, self.args.vocab_size)

    def parts(self) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
        """(module, {name in a Hugging Face checkpoint: tensor or view}) of all that has weights."""
        yield self.embed, {EMBED: self.embed.weight}
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}."
            norms = (layer.attention_norm, "input"), (layer.ffn_norm, "post_attention")
            for norm, name in norms:
                yield norm, {f"{prefix}{name}_layernorm.weight": norm.weight}
            for linear in (layer.attention.wqkv, layer.attention.wo):
                yield linear, linear.tensors(prefix + "self_attn.")
            for linear in (layer.ffn.w13, layer.ffn.w2):
                yield linear, linear.tensors(prefix + "mlp.")
        yield self.norm, {"model.norm.weight": self.norm.weight}
        if not self.args.tied:
            yield self.head, self.head.tensors("")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a Hugging Face checkpoint, tensor or view) of all weights; needs pack=False."""
        for _, named in self.parts():
            yield from named.items()

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, pack: bool = True) -> "Llama":
        """Loads a Hugging Face checkpoint folder: config.json and safetensors, nothing else.

        dtype: what to compute in, a torch dtype; None is the one that is stored. pack: lay the
        weights out for speed (inference only); a tied embedding may then stay in its file, not to
        be written to meanwhile. Raises InputError, before anything is allocated, when the files
        do not hold exactly the tensors that the configuration asks for.
        """
        folder = Path(path)
        args = ModelArgs.from_config(read_json(folder / "config.json"), folder / "config.json")
        with torch.device("meta"):
            model = cls(args)
        files = find_tensors(folder, dict(model.tensors()), args.tied)
        dtype = dtype or STORED[files[EMBED][1]]
        model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        for module, named in model.parts():
            for name, target in named.items():
                target.copy_(read_tensor(files[name][0], name))
            if pack and isinstance(module, Linear):
                module.pack()
            if pack and args.tied and module is model.embed:
                model.head = packed_product(module.weight, None)
                if model.head is not None:  # to keep no second copy, rows are read from the file
                    module.weight.data = read_tensor(files[EMBED][0], EMBED, check=False)
        return model


# ---------------------------------------------------------------- checkpoint files


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor name: (stored dtype, shape)} of a file. Raises InputError when it is damaged."""
    try:
        with open(path, "rb") as f:
            lfs = f.read(24).startswith(b"version https://git-lfs")
        with safe_open(path, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (OSError, ValueError) as e:
        raise InputError(f"{path!s:.300}: cannot be read ({e!s:.100})") from None
    except SafetensorError as e:
        why = "a Git LFS pointer; run `git lfs pull`" if lfs else e
        raise InputError(f"{path}: not a whole safetensors file ({why})") from None


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a folder, with the tensors its index, if any, expects in each."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {folder / "model.safetensors": []}
    weight_map = read_json(index).get("weight_map")
    whole = isinstance(weight_map, dict) and weight_map
    expect(whole, f"{index}: missing key 'weight_map', the shard of every tensor")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        inside = isinstance(file, str) and Path(file).name == file
        expect(inside, f"{index}: '{name}' must name a file of this folder, found {file!r}")
        files.setdefault(folder / file, []).append(name)
    return files


def find_tensors(folder: Path, wanted: dict[str, Tensor], tied: bool) -> dict[str, tuple]:
    """{tensor name: (file, stored dtype)} for exactly the wanted names and shapes."""
    found, head = {}, None
    for file, names in weight_files(folder).items():
        header = read_header(file)
        for name in names:
            expect(name in header, f"{file}: '{name}' is not in this shard, where the index has it")
        for name, (stored, shape) in header.items():
            if name.endswith("rotary_emb.inv_freq"):  # old checkpoints store it; it is computed
                continue
            expect(stored in STORED, f"{file}: '{name}' is {stored}, expected {', '.join(STORED)}")
            if name == "lm_head.weight" and tied:
                head = file  # redundant, and fine if it equals the embedding
                continue
            expect(name in wanted, f"{file}: unexpected tensor '{name}' for this config.json")
            shapes = f"is {list(shape)}, config.json asks for {list(wanted[name].shape)}"
            expect(shape == wanted[name].shape, f"{file}: the shape of '{name}' {shapes}")
            found[name] = (file, stored)
    missing = [name for name in wanted if name not in found]
    expect(not missing, f"{folder}: missing, {len(missing)} in all: {', '.join(missing[:3])}")
    same = head is None or torch.equal(
        read_tensor(head, "lm_head.weight"), read_tensor(found[EMBED][0], EMBED)
    )
    expect(same, f"{head}: 'lm_head.weight' contradicts 'tie_word_embeddings' in config.json")
    return found


def read_tensor(file: Path, name: str, check: bool = True) -> Tensor:
    """One tensor, mapped: the file is opened anew, so that pages mapped before go back to the
    system and, unless it is checked, none is read before it is used."""
    with safe_open(file, "pt") as f:
        tensor = f.get_tensor(name)
    finite = not check or all(torch.isfinite(end) for end in tensor.aminmax())
    expect(finite, f"{file}: '{name}' has NaN or Inf weights")
    return tensor
