"""Speed, apart from the method: faster modules in the place of model.py's, recorded steps.

`pack(model)` replaces the plain layers of a loaded model by fast ones, for inference alone. They
compute the same: several matrices that share their input are one product, on weights laid out as
this processor reads them fastest; a norm is one operator; a token's keys and values are written
together. Nothing here is LiteStage's; tests/bench.md has what it gains.

    python -c "from model import Llama; from tools.fast import pack
    print(pack(Llama.from_pretrained('data/demo/model')))"
"""

import io
import math
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generate import Draft, Group, Said, Stepper, pick, read
from model import (
    EMBED,
    DecoderLayer,
    KVCache,
    Llama,
    Places,
    Skip,
    read_tensor,
    weight_files,
    write,
)

PACK_FROM = 1 << 18  # elements; below, calling oneDNN costs more than it saves
COMPILE = {"cpp_wrapper": True, "freezing": True}  # no interpreter; weights are constants
AS_THEY_ARE = {"freezing": False}  # weights are not copied, nor packed
# In float32 PyTorch would take MKL's products, slow on other processors than Intel's, unless it may
# write its own. In half precision it takes oneDNN's, which are better than what it writes.
OWN = {
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "max_autotune_report_choices_stats": False,
}
UNGUARDED = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
PAD_FROM = 1 << 22  # elements; below, more rows cost what reading faster saves

# ---------------------------------------------------------------- products


class Product:
    """x (..., in) -> x @ weight.T + bias, on the weight as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            weight = weight.t().contiguous().t()  # a fifth faster where the weight is not in cache
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class DenseProduct(nn.Module):
    """The same as a module: `compiled` makes constants of a module's weights alone."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def without_onednn(function: Callable, *args):
    """Calls a function with oneDNN off, but for what asks for it by name."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        return function(*args)
    finally:
        torch.backends.mkldnn.enabled = before


class OneDNNProduct:
    """The same on a weight packed by oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        avx512 = torch.cpu._is_avx512_supported()
        amx = torch.cpu._is_amx_tile_supported()
        half = weight.dtype != torch.float32
        # Without AVX-512 oneDNN is fastest when told that it is for one row. With it (but without
        # AMX) six rows fill its registers, and it reads a large weight faster for six than for
        # fewer. A small one in half precision PyTorch reads fastest itself for one row, as it is.
        fills = avx512 and not (half and amx)
        large = weight.numel() >= PAD_FROM
        self.fewest = 6 if fills and large else 1
        self.plain = weight if fills and half and not large else None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None if avx512 else 1)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        decoding = x.shape[1] == 1  # (bsz, 1, in)
        if decoding and rows == 1 and self.plain is not None:
            return without_onednn(F.linear, x, self.plain, self.bias)
        if decoding and rows < self.fewest:
            x = torch.cat([x] * (self.fewest // rows + 1))[: self.fewest]
            return self.product(x)[:rows]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class FBGEMMProduct:
    """The same on a float16 weight and float32 rows, packed by FBGEMM: half precision on a
    processor that does not compute in it. A bfloat16 from 2^-17 up is exactly a float16; a smaller
    one moves by 2^-25 at most."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        bias = None if bias is None else bias.float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed).to(x.dtype)


def product(*linears: nn.Linear, best=None) -> Callable[[Tensor], Tensor]:
    """One product for matrices that share their input; gives their outputs side by side. best: a
    class above, None: the fastest."""
    weight = linears[0].weight
    if len(linears) > 1:
        weight = torch.cat([linear.weight for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias for linear in linears])
    return (best or best_product(weight))(weight, bias)


def best_product(weight: Tensor) -> type:
    """Which of the classes above is fastest for a weight on this processor."""
    if weight.device.type != "cpu":
        return Product
    native = weight.dtype == torch.float32
    if weight.dtype == torch.bfloat16:
        native = torch.cpu._is_avx512_bf16_supported()
    low, high = weight.aminmax()
    fits = max(-low, high) <= torch.finfo(torch.float16).max
    if not native and fits and "fbgemm" in torch.backends.quantized.supported_engines:
        return FBGEMMProduct
    if native and weight.numel() >= PACK_FROM and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return OneDNNProduct
    return Product


# ---------------------------------------------------------------- modules


class FastNorm(nn.Module):
    """RMSNorm as a LayerNorm of (x, -x): that has the mean 0 and x's mean square as its variance,
    and is one fused operator on the CPU, where RMSNorm is six."""

    def __init__(self, plain: nn.RMSNorm):
        super().__init__()
        self.eps = plain.eps
        self.weight = plain.weight
        self.twice = torch.cat((plain.weight, plain.weight))
        self.dim = len(plain.weight)
        self.shape = (2 * self.dim,)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # it fuses the six itself
            return F.rms_norm(x, (self.dim,), self.weight, self.eps)
        both = torch.cat((x, -x), -1)  # (..., 2 * dim)
        normed = F.layer_norm(both, self.shape, self.twice, eps=self.eps)
        return normed.narrow(-1, 0, self.dim)

    __call__ = forward  # without nn.Module's hooks: half a microsecond, 130 times a token


class FastLayer(nn.Module):
    """A decoder layer on packed products; its parts have the names they have in
    `model.DecoderLayer`, so that a hook may call them. best: as in `product`."""

    def __init__(self, plain: DecoderLayer, best: type | None = None):
        super().__init__()
        attention = plain.self_attn
        self.head_dim = attention.head_dim
        self.n_heads = attention.q_proj.out_features // self.head_dim
        self.n_kv_heads = attention.k_proj.out_features // self.head_dim
        self.half = attention.head_dim // 2
        self.input_layernorm = FastNorm(plain.input_layernorm)
        self.post_attention_layernorm = FastNorm(plain.post_attention_layernorm)
        self.qkv_proj = product(attention.q_proj, attention.k_proj, attention.v_proj, best=best)
        self.o_proj = product(attention.o_proj, best=best)
        self.gate_up_proj = product(plain.mlp.gate_proj, plain.mlp.up_proj, best=best)
        self.down_proj = product(plain.mlp.down_proj, best=best)

    def forward(self, x: Tensor, places: Places, kv=None, skip_attention=False, skip_ffn=False):
        if not skip_attention:
            x = x + self.self_attn(self.input_layernorm(x), places, kv)
        if not skip_ffn:
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x

    __call__ = forward

    def self_attn(self, x: Tensor, places: Places, kv: Tensor | None) -> Tensor:
        bsz, seqlen, _ = x.shape
        heads = self.n_heads
        rotated = heads + self.n_kv_heads
        qkv = self.qkv_proj(x).view(bsz, seqlen, rotated + self.n_kv_heads, self.head_dim)
        cos, sin = places.rope
        qk = qkv[:, :, :rotated]  # queries and keys turn together, in place
        rolled = qk.roll(self.half, -1)
        qk.mul_(cos).addcmul_(rolled, sin)
        q = qkv[:, :, :heads].transpose(1, 2)  # (bsz, n_heads, seqlen, head_dim)
        both = qkv[:, :, heads:].transpose(1, 2)  # (bsz, 2 * n_kv_heads, seqlen, head_dim)
        if kv is not None:
            write(kv, places.slots, both)
            both = kv[:, :, : places.end]
        k, v = both.chunk(2, 1)
        if seqlen == 1:  # a KV head's query heads as its queries: it is read once for all of them
            q = q.reshape(bsz, self.n_kv_heads, heads // self.n_kv_heads, self.head_dim)
        shared = q.shape[1] != self.n_kv_heads
        out = F.scaled_dot_product_attention(q, k, v, places.mask, enable_gqa=shared)
        if seqlen > 1:
            out = out.transpose(1, 2)
        return self.o_proj(out.reshape(bsz, seqlen, heads * self.head_dim))

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class FastHead(nn.Module):
    """The head on a packed product. best: as in `product`."""

    def __init__(self, plain: nn.Linear, best: type | None = None):
        super().__init__()
        self.product = product(plain, best=best)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class MappedEmbedding(nn.Module):
    """An embedding whose rows are read from the checkpoint's file, which must not change meanwhile:
    a tied head that is packed leaves no other copy of the weights in memory."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        super().__init__()
        self.weight = weight
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).to(self.dtype)


def with_same_weights(plain: Llama) -> Llama:
    """Another plain model on one and the same memory."""
    with torch.device("meta"):
        model = Llama(plain.args)
    model.load_state_dict(plain.state_dict(), assign=True)
    model.tie()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def pack(model: Llama, best: type | None = None, compiles: bool = False) -> Llama:
    """Puts fast modules in the place of a loaded model's plain ones, and returns it.

    One module at a time, so that not all weights are there twice; afterwards only small ones are,
    in half precision, for one row. For inference alone: the packed weights have no gradient, and
    `model.tensors` finds them no more. best: the class of all its products; None: for each the
    fastest. compiles: `generate` decodes it by compiled steps; for a CPU with a C++ compiler, see
    `why_not_compiled`. (Ours.)
    """
    dense = pack(with_same_weights(model), DenseProduct) if compiles else None
    for i in range(len(model.layers)):
        model.layers[i] = FastLayer(model.layers[i], best)  # no variable keeps the plain one alive
    model.norm = FastNorm(model.norm)
    best = best or best_product(model.lm_head.weight)
    as_it_is = best in (Product, DenseProduct)
    if not as_it_is or not model.args.tied:
        model.lm_head = FastHead(model.lm_head, best)
        if model.args.tied and model.folder is not None:
            model.embed_tokens = MappedEmbedding(map_embedding(model), model.dtype)
    if dense is not None:
        recorded = RecordedStepper(model, dense)
        model.stepper = recorded.for_temperature
    return model


def map_embedding(model: Llama) -> Tensor:
    """The embedding (vocab, dim) in its file, no page of it read."""
    for file, names in weight_files(model.folder).items():
        if EMBED in names or not names:
            return read_tensor(file, EMBED, check=False)
    raise ValueError(f"{model.folder}: no {EMBED}")  # loading has found it before


# ---------------------------------------------------------------- recorded steps


def compiled(step: Callable[[], None], dtype: torch.dtype, rows: int) -> Callable[[], None]:
    """A function as C++, by torch.compile: pointwise operators are fused, and weights are constants
    of it, packed for this processor. It is called once here. Nothing is checked when it is called
    again, so all that it reads and writes must stay where it is, and of the shape it has now.
    dtype, rows: of its products. One row in half precision reads weights as they are: there
    PyTorch's own product is faster than oneDNN's."""
    options = COMPILE | OWN if dtype == torch.float32 else COMPILE
    step.__code__ = step.__code__.replace()  # results are kept by code: each has its own
    function = torch.compile(step, fullgraph=True, dynamic=False, options=UNGUARDED)
    if rows == 1 and dtype != torch.float32:
        options = COMPILE | AS_THEY_ARE
        function = partial(without_onednn, function)
    tables = io.StringIO()  # of what was tuned, which PyTorch prints
    with torch._inductor.config.patch(options), redirect_stderr(tables):
        function()
    return function


@torch.inference_mode()
def why_not_compiled() -> str | None:
    """What keeps `compiled` from working on this machine, in a few words; None: nothing."""
    x = torch.zeros(8)
    try:
        compiled(lambda: x.add_(1), x.dtype, 1)
    except Exception as e:  # no compiler, no headers, no place to write to: PyTorch has many names
        return f"{type(e).__name__}: {str(e).strip()}".splitlines()[0][:80]
    return None


class StaticStep:
    """A decoding step whose tensors stay where they are and keep their shapes, token after token.

    That is what a CUDA graph needs: on a GPU the step is recorded once for each skip set and then
    replayed without the interpreter. A CPU's is compiled if `compiles`, else it just runs; all to
    the same tokens. It attends to all of its own cache, (bsz, ..., size, ...), under a mask. Its
    results are `tokens` and `confidences`, each (bsz, 1).
    """

    def __init__(self, model: Llama, bsz: int, size: int, compiles: bool = False):
        self.model = model
        self.compiles = compiles
        self.cache = KVCache(model, bsz, size, pad=[1] * bsz)
        self.tokens = torch.zeros(bsz, 1, dtype=torch.long, device=model.device)
        self.pos = torch.zeros(bsz, dtype=torch.long, device=model.device)
        self.confidences = torch.zeros(bsz, 1, device=model.device)
        self.recorded: dict[str, Callable[[], None]] = {}  # by skip set

    def load(self, cache: KVCache, tokens: Tensor, pos: int) -> None:
        """Starts anew: the next step decodes what follows the tokens (bsz, 1) at slot pos."""
        for mine, its in zip(self.cache.layers, cache.layers):
            mine[:, :, :pos] = its[:, :, :pos]
        self.cache.fill(pos)  # it is masked, but a NaN would get through a mask
        self.cache.pad.copy_(torch.zeros_like(self.pos) if cache.pad is None else cache.pad)
        self.tokens.copy_(tokens)
        self.pos.fill_(pos)

    def under(self, skip: Tensor | None) -> Callable[[], None]:
        """The step that skips `skip`, recorded when it is first asked for."""
        key = str(skip if skip is None else skip.tolist())
        if key not in self.recorded:
            self.recorded[key] = self.record(skip)
        return self.recorded[key]

    def run(self, skip: Tensor | None) -> None:
        self.take(self.model(self.tokens, self.cache, self.pos, skip))

    def take(self, logits: Tensor) -> None:
        tokens, confidences = pick(logits)
        self.tokens.copy_(tokens)
        self.confidences.copy_(confidences)
        self.pos += 1

    def compile(self, skip: Tensor | None) -> Callable[[], None]:
        """The step as one function of C++; `load` sets anew what compiling it has changed."""
        self.run(skip)  # a skip set of another shape is refused here
        if skip is None:
            skip = torch.zeros(len(self.cache.layers), 2, dtype=torch.bool)
        skipped = skip.tolist()
        rows = len(self.tokens)
        return compiled(lambda: self.unrolled(skipped), self.model.dtype, rows)

    def unrolled(self, skipped: list[list[bool]]) -> None:
        """`run`, as a compiler can read it: what is skipped are numbers, not a tensor."""
        model = self.model
        places = model.place(1, self.cache, self.pos)
        x = model.embed_tokens(self.tokens)  # (bsz, 1, dim)
        for layer, kv, (attention, ffn) in zip(model.layers, self.cache.layers, skipped):
            x = layer(x, places, kv, attention, ffn)
        self.take(model.lm_head(model.norm(x)))

    def record(self, skip: Tensor | None) -> Callable[[], None]:
        if self.compiles:
            return self.compile(skip)
        if self.model.device.type != "cuda":
            return partial(self.run, skip)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up, which no graph may record
            self.run(skip)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(skip)
        return graph.replay


class RecordedStepper(Stepper):
    """A stepper that replays recorded steps where every step skips the same and is greedy.

    Finished rows stay in the batch: on a GPU they cost next to nothing. dense: the same model by
    `pack(model, DenseProduct)`, whose steps are compiled, on a CPU.
    """

    def __init__(self, model: Llama, dense: Llama | None = None):
        super().__init__(model)
        self.dense = dense
        self.recorded: dict[tuple[int, int], StaticStep] = {}  # by rows and slots
        self.now: StaticStep | None = None  # None: this batch decodes as usual

    def for_temperature(self, model: Llama, temperature: float) -> Stepper:
        """What `generate` asks its model for: this one, or a plain one where it is not greedy."""
        return self if temperature == 0 else Stepper(model, temperature)

    @torch.inference_mode()
    def start(self, groups: list[Group], room: int, skip) -> Said:
        self.record(groups, room, skip)
        said = super().start(groups, room, skip)
        if self.now is not None:
            began = time.perf_counter()
            self.now.load(self.cache, self.tokens, self.pos)
            self.prefill_s += time.perf_counter() - began
        return said

    def record(self, groups: list[Group], room: int, skip) -> None:
        """Makes the steps of this batch, if they are not there yet, which is not timed."""
        lengths = [len(prompt) for _, prompts in groups for prompt in prompts]
        self.now = None
        self.rows = list(range(len(lengths)))
        if not lengths or callable(skip) or isinstance(skip, Skip | Draft):
            return
        grid = 256 if self.dense is None else 128  # few sizes, so few recordings
        size = math.ceil((max(lengths) + room) / grid) * grid
        key = (len(lengths), size)
        if key not in self.recorded:
            compiles = self.dense is not None
            self.recorded[key] = StaticStep(self.dense or self.model, *key, compiles)
        self.now = self.recorded[key]
        self.now.under(skip)

    def keep(self, rows: list[int]) -> None:
        if self.now is None:
            super().keep(rows)
        else:
            self.rows = [self.rows[i] for i in rows]

    def advance(self, skip) -> Said:
        if self.now is None:
            return super().advance(skip)
        self.now.under(skip)()
        said = read(self.now.tokens, self.now.confidences)
        return [said[row] for row in self.rows]
