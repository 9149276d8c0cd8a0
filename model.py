"""A Llama decoder from raw safetensors, any of whose sub-layers can be skipped.

The plain model, as a textbook would write it; tools/fast.py has faster modules for the same place.
A decoder layer has two sub-layers, attention (MHSA) and feed-forward (FFN). A skipped one leaves
the residual stream as it was and costs nothing. Shapes use Llama's names.

    python -c "from model import Llama; print(Llama.from_pretrained('data/demo/model').args)"
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# Debug mode: cache slots start as NaN, so that reading one that was never written shows at once.
DEBUG = os.environ.get("LITESTAGE_DEBUG") == "1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"
LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_NEEDS = {"default": (), "linear": ("factor",), "llama3": ("factor", *LLAMA3)}


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


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The shape of a Llama, named as in Llama's own code."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_config(cls, config: dict, name: str = "config.json") -> "ModelArgs":
        """Reads and validates a Hugging Face `config.json`; InputError names the key."""
        for key, wanted, default in (("model_type", "llama", None), ("hidden_act", "silu", "silu")):
            found = config.get(key, default)
            expect(found == wanted, f"{name}: '{key}' must be '{wanted}', found {found!r:.60}")
        plain = config.get("quantization_config") is None
        expect(plain, f"{name}: 'quantization_config' found; expected plain weights")
        theta, scaling = read_rope(config, name)
        number = partial(read_number, config, name)
        dim = number("hidden_size", int, 1 << 20)
        heads = number("num_attention_heads", int, 1 << 20)
        kv_heads = number("num_key_value_heads", int, 1 << 20, heads)
        divides = heads % kv_heads == 0
        expect(divides, f"{name}: 'num_key_value_heads' {kv_heads} must divide {heads} heads")
        divides = config.get("head_dim") is not None or dim % heads == 0
        expect(divides, f"{name}: 'num_attention_heads' {heads} must divide 'hidden_size' {dim}")
        head_dim = number("head_dim", int, 1 << 20, dim // heads)
        expect(head_dim % 2 == 0, f"{name}: 'head_dim' must be even, found {head_dim}")
        return cls(
            dim=dim,
            n_layers=number("num_hidden_layers", int, 1 << 10),
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            hidden_dim=number("intermediate_size", int, 1 << 20),
            vocab_size=number("vocab_size", int, 1 << 22),
            max_seq_len=number("max_position_embeddings", int, 1 << 24, 2048),
            norm_eps=number("rms_norm_eps", float, 1.0, 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=number("tie_word_embeddings", bool, True, False),
            attention_bias=number("attention_bias", bool, True, False),
            mlp_bias=number("mlp_bias", bool, True, False),
        )


def read_rope(config: dict, name: str) -> tuple[float, dict | None]:
    """(theta, scaling or None): transformers 5 writes `rope_parameters`, earlier ones `rope_theta`
    and `rope_scaling`. Raises InputError naming the key."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    expect(isinstance(rope, dict), f"{name}: '{key}' must be an object, found {rope!r:.60}")
    unnamed = None if "factor" in rope else "default"
    kind = rope.get("rope_type", rope.get("type", unnamed))
    fits = isinstance(kind, str) and kind in ROPE_NEEDS
    expect(fits, f"{name}: type of '{key}': expected {list(ROPE_NEEDS)}, found {kind!r:.60}")
    both = {"rope_theta": config.get("rope_theta")} | rope
    theta = read_number(both, name, "rope_theta", float, 1e12, 10000.0)
    if kind == "default":
        return theta, None
    scaling = {"rope_type": kind}
    for need in ROPE_NEEDS[kind]:
        scaling[need] = read_number(rope, name, need, float, 1e9)
    ordered = kind != "llama3" or scaling["low_freq_factor"] < scaling["high_freq_factor"]
    expect(ordered, f"{name}: 'low_freq_factor' must be below 'high_freq_factor'")
    return theta, scaling


def read_number(config: dict, name: str, key: str, kind: type, most, default=None):
    """config[key], of a kind, above 0 and up to `most`; a bool may be False. Without a default it
    must be there. Raises InputError naming the key."""
    value = config.get(key)
    if value is None:
        expect(default is not None, f"{name}: missing key '{key}'")
        return default
    wanted = f"{kind.__name__} above 0 and up to {most}"
    if kind is bool:
        wanted = "true or false"
        fits = type(value) is bool
    else:
        fits = type(value) in (int, kind) and 0 < value <= most
    expect(fits, f"{name}: '{key}' must be {wanted}, found {value!r:.60}")
    return kind(value)


class Places(NamedTuple):
    """Where the tokens of one forward stand, and what each may attend to."""

    slots: slice | Tensor  # of the cache, to write to; (bsz, seqlen) if rows differ
    end: int  # slots 0 .. end - 1 of the cache are read
    rope: tuple[Tensor, Tensor]  # of the positions: cos, sin (1 or bsz, seqlen, 1, head_dim)
    mask: Tensor | None  # (1 or bsz, 1, seqlen, end), 0 or -inf; None if nothing is hidden


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x (bsz, seqlen, n, head_dim), half-split as in Hugging Face's code: pairs
    are (i, i + head_dim / 2). Rolling swaps the halves; one's minus sign is in sin."""
    cos, sin = rope
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    """Grouped-query self-attention: every n_heads / n_kv_heads query heads share a KV head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim = args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.q_proj = nn.Linear(args.dim, q_dim, bias=args.attention_bias)
        self.k_proj = nn.Linear(args.dim, kv_dim, bias=args.attention_bias)
        self.v_proj = nn.Linear(args.dim, kv_dim, bias=args.attention_bias)
        self.o_proj = nn.Linear(q_dim, args.dim, bias=args.attention_bias)

    def forward(self, x: Tensor, places: Places, kv: Tensor | None) -> Tensor:
        """x (bsz, seqlen, dim) -> the same; kv: this layer's part of the cache, see `KVCache`."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (bsz, seqlen, n_heads, head_dim)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (bsz, seqlen, n_kv_heads, head_dim)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q = rotate(q, places.rope).transpose(1, 2)  # (bsz, n_heads, seqlen, head_dim)
        k = rotate(k, places.rope).transpose(1, 2)
        v = v.transpose(1, 2)
        if kv is not None:
            write(kv, places.slots, torch.cat((k, v), 1))
            k, v = kv[:, :, : places.end].chunk(2, 1)  # (bsz, n_kv_heads, end, head_dim)
        out = F.scaled_dot_product_attention(q, k, v, places.mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def write(kv: Tensor, slots: slice | Tensor, new: Tensor) -> None:
    """Puts new keys and values (bsz, 2 * n_kv_heads, seqlen, head_dim) into slots of the cache."""
    if isinstance(slots, slice):
        kv[:, :, slots] = new
    else:  # every row has its own
        rows = torch.arange(len(kv), device=kv.device)[:, None]
        kv[rows, :, slots] = new.transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.dim, args.hidden_dim, bias=args.mlp_bias)
        self.down_proj = nn.Linear(args.hidden_dim, args.dim, bias=args.mlp_bias)
        self.up_proj = nn.Linear(args.dim, args.hidden_dim, bias=args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(args.dim, args.norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = nn.RMSNorm(args.dim, args.norm_eps)
        self.mlp = FeedForward(args)

    def forward(self, x: Tensor, places: Places, kv=None, skip_attention=False, skip_ffn=False):
        """The residual stream (bsz, seqlen, dim) after this layer."""
        if not skip_attention:
            x = x + self.self_attn(self.input_layernorm(x), places, kv)
        if not skip_ffn:
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Skip(NamedTuple):
    """What one forward leaves out: mask (n_layers, 2) bool, columns attention, FFN, is True for a
    skipped sub-layer. A hook stands in for every layer's forward, to watch or to change it:
    hook(i, layer, x, places, kv, skip_attention, skip_ffn) -> the residual stream after layer i."""

    mask: Tensor
    hook: Callable[..., Tensor] | None = None


class KVCache:
    """Keys and values of up to `max_len` tokens for each of `bsz` rows.

    layers: (bsz, 2 * n_kv_heads, max_len, head_dim) for each decoder layer, the keys' heads first.
        A skipped attention writes nothing: its slots are holes.
    pad: rows of different length are right-aligned; row b's first pad[b] slots belong to no token
        of it and are not attended to, and its positions count from there.
    tokens: the ids whose slots, from 0, all layers have written: a later stage may reuse these.
    """

    def __init__(self, model: "Llama", bsz: int, max_len: int, pad: list[int] | None = None):
        shape = (bsz, 2 * model.args.n_kv_heads, max_len, model.args.head_dim)
        like = {"dtype": model.dtype, "device": model.device}
        self.layers = [torch.zeros(shape, **like) for _ in model.layers]
        self.rope = model.rope(torch.arange(max_len, device=model.device))
        self.max_len = max_len
        self.pad = torch.tensor(pad, device=model.device) if pad and any(pad) else None
        self.tokens: list[int] = []
        self.forget(0)

    def forget(self, start: int) -> None:
        """Only the tokens before `start` stay; in debug mode reading the others shows at once."""
        self.tokens = self.tokens[:start]
        if DEBUG:
            self.fill(start, math.nan)

    def fill(self, start: int, value: float = 0.0) -> None:
        """Fills all slots from `start` on."""
        for kv in self.layers:
            kv[:, :, start:] = value

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
        self.folder: Path | None = None  # of the checkpoint it was read from
        start = torch.randn(args.vocab_size, args.dim)  # nn.Embedding's own loads torch._dynamo
        self.embed_tokens = nn.Embedding.from_pretrained(start, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(args) for _ in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.lm_head = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes a tied head the embedding."""
        if self.args.tied:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def forward(self, tokens: Tensor, cache=None, pos=0, skip=None, tails=()) -> Tensor:
        """Logits (bsz, seqlen, vocab), or with `tails` (bsz, len(tails), vocab).

        tokens: (bsz, seqlen) ids, which stand in the cache's slots pos .. pos + seqlen - 1; pos is
            a number, or a tensor (bsz,) if rows stand at different slots.
        skip: a bool mask (n_layers, 2), or a `Skip`, or None. ValueError for another shape.
        tails: lengths of the texts the tokens end in, e.g. one per option. Each continues the
            common beginning and sees no other; only their last tokens get logits. Not with pad.
        """
        places = self.place(tokens.shape[1], cache, pos, tails)
        x = self.hidden(tokens, places, cache, skip)
        if tails:
            lengths = torch.tensor(tails, device=x.device)
            x = x[:, lengths.cumsum(0) - lengths.sum() - 1]  # (bsz, len(tails), dim)
        return self.lm_head(self.norm(x))

    def hidden(self, tokens: Tensor, places: Places, cache=None, skip=None) -> Tensor:
        """The residual stream (bsz, seqlen, dim) after the last layer."""
        n_layers = len(self.layers)
        if skip is None:
            skip = torch.zeros(n_layers, 2, dtype=torch.bool)
        mask, hook = skip if isinstance(skip, Skip) else Skip(skip)
        fits = mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())
        if tuple(mask.shape) != (n_layers, 2) or not fits:
            found = f"{tuple(mask.shape)}, {mask.dtype}"
            raise ValueError(f"skip: expected ({n_layers}, 2), True or False, found {found}")
        x = self.embed_tokens(tokens)  # (bsz, seqlen, dim)
        for i, (layer, skipped) in enumerate(zip(self.layers, mask.tolist())):
            kv = None if cache is None else cache.layers[i]
            if hook:
                layer = partial(hook, i, layer)
            x = layer(x, places, kv, *skipped)
        return x

    def place(self, seqlen: int, cache: KVCache | None, pos, tails=()) -> Places:
        """Where the tokens of a forward stand; see `forward` for the arguments. If pos is a tensor,
        no shape depends on a number in it, as a CUDA graph wants it: the whole cache is read."""
        end = cache.max_len if torch.is_tensor(pos) else pos + seqlen
        keys = torch.arange(end, device=self.device)
        if torch.is_tensor(pos):
            slots = queries = pos[:, None] + keys[:seqlen]  # (bsz, seqlen)
        else:
            slots = slice(pos, end)
            queries = keys[None, slots]  # (1, seqlen)
        cos, sin = self.rope(keys) if cache is None else cache.rope
        pad = None if cache is None else cache.pad
        if seqlen == 1 and pad is None and not torch.is_tensor(pos):  # it sees all before it
            return Places(slots, end, (cos[queries], sin[queries]), None)
        positions = queries
        unseen = keys > queries[..., None]  # (1 or bsz, seqlen, end): causal
        if len(tails) > 1:
            lengths, n = torch.tensor(tails, device=self.device), sum(tails)
            starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)  # (n,)
            unseen[:, -n:, -n:] |= starts[:, None] != starts
            positions = queries.clone()
            positions[:, -n:] -= starts  # every tail counts on from the common beginning
        if pad is not None:
            positions = (queries - pad[:, None]).clamp(min=0)  # (bsz, seqlen)
            # a padding token sees itself, so that its softmax has something to normalise
            unseen = (unseen | (keys < pad[:, None, None])) & (keys != queries[..., None])
        mask = torch.zeros_like(unseen, dtype=self.dtype).masked_fill_(unseen, -math.inf)
        return Places(slots, end, (cos[positions], sin[positions]), mask[:, None])

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for `rotate`, each (*positions.shape, 1, head_dim), in the model's dtype."""
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
        angles = positions[..., None, None].float() * freqs  # (..., 1, head_dim / 2)
        cos = torch.cat((angles.cos(), angles.cos()), -1)
        sin = torch.cat((-angles.sin(), angles.sin()), -1)
        return cos.to(self.dtype), sin.to(self.dtype)

    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name in a Hugging Face checkpoint, parameter) of all weights; a tied head has none."""
        for name, parameter in self.named_parameters():
            yield name if name == HEAD else f"model.{name}", parameter

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None) -> "Llama":
        """Loads a Hugging Face checkpoint, config.json and safetensors. dtype: to compute in, None:
        as stored. Raises InputError, before anything is allocated, when the files do not hold
        exactly the tensors that config.json asks for."""
        folder = Path(path)
        args = ModelArgs.from_config(read_json(folder / "config.json"), folder / "config.json")
        with torch.device("meta"):
            model = cls(args)
        files = find_tensors(folder, dict(model.tensors()), args.tied)
        dtype = dtype or STORED[files[EMBED][1]]
        model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        model.tie()
        model.folder = folder
        for name, parameter in model.tensors():
            parameter.copy_(read_tensor(files[name][0], name))
        return model


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
    """The safetensors files of a folder, each with the tensors that the index wants of it. As in
    transformers, model.safetensors wins over an index; its list is empty: all of it counts."""
    index = folder / INDEX
    single = folder / "model.safetensors"
    if single.exists() or not index.exists():
        return {single: []}
    weight_map = read_json(index).get("weight_map")
    found = isinstance(weight_map, dict) and weight_map
    expect(found, f"{index}: missing key 'weight_map', the shard of every tensor")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        inside = isinstance(file, str) and Path(file).name == file
        expect(inside, f"{index}: '{name}' must name a file of this folder, found {file!r}")
        files.setdefault(folder / file, []).append(name)
    return files


def find_tensors(folder: Path, wanted: dict[str, Tensor], tied: bool) -> dict[str, tuple]:
    """{name: (file, a key of STORED)} of exactly the wanted names and shapes. Raises InputError."""
    known = wanted | {HEAD: wanted[EMBED]} if tied else wanted  # fine if it equals the embedding
    found = {}
    for file, names in weight_files(folder).items():
        header = read_header(file)
        for name in names or header:
            expect(name in header, f"{file}: '{name}' is not in this shard, where the index has it")
            stored, shape = header[name]
            if name.endswith("rotary_emb.inv_freq"):  # old checkpoints store it; it is computed
                continue
            expect(stored in STORED, f"{file}: '{name}' is {stored}, expected {', '.join(STORED)}")
            expect(name in known, f"{file}: unexpected tensor '{name}' for this config.json")
            shapes = f"is {list(shape)}, config.json asks for {list(known[name].shape)}"
            expect(shape == known[name].shape, f"{file}: the shape of '{name}' {shapes}")
            found[name] = (file, stored)
    missing = [name for name in wanted if name not in found]
    expect(not missing, f"{folder}: missing, {len(missing)} in all: {', '.join(missing[:3])}")
    if HEAD in found and tied:
        head = read_tensor(found[HEAD][0], HEAD)
        same = torch.equal(head, read_tensor(found[EMBED][0], EMBED))
        other = f"'{HEAD}' contradicts 'tie_word_embeddings' in config.json"
        expect(same, f"{found[HEAD][0]}: {other}")
    return found


def read_tensor(file: Path, name: str, check: bool = True) -> Tensor:
    """One tensor, mapped: the file is opened anew, so that pages mapped before go back to the
    system; unless it is checked, none is read before it is used."""
    with safe_open(file, "pt") as f:
        tensor = f.get_tensor(name)
    finite = not check or all(torch.isfinite(end) for end in tensor.aminmax())
    expect(finite, f"{file}: '{name}' has NaN or Inf weights")
    return tensor
