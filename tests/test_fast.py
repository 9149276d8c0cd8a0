"""The fast modules compute what the plain ones do, on every kind of processor, and free them.

tests/test_model.py and tests/test_generate.py run on both as well.

python -m pytest -q tests/test_fast.py
"""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from conftest import BASE, load_packed
from safetensors.torch import load_file, save_file
from test_model import KINDS, every_kind, greedy, random_tokens, relative

from generate import Stepper, Until, generate, generate_batch
from model import KVCache, Llama, ModelArgs, Skip
from skip import ImportanceProbe, mask_of
from tools import fast
from tools.fast import (
    DenseProduct,
    FBGEMMProduct,
    OneDNNProduct,
    Product,
    RecordedStepper,
    best_product,
    pack,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKED = (OneDNNProduct, FBGEMMProduct)
SHAPES = {
    "demo's": {"hidden_size": 128, "intermediate_size": 344, "vocab_size": 1600},
    "three query heads to one": {"hidden_size": 96, "num_attention_heads": 6},
    "heads narrower than the stream": {"hidden_size": 160, "head_dim": 8},
    "deep": {"hidden_size": 24, "num_hidden_layers": 9},
    "odd": {"hidden_size": 56, "intermediate_size": 77, "num_hidden_layers": 1, "vocab_size": 333},
    "large enough as it is": {"hidden_size": 512, "intermediate_size": 640},
}
# The norm of the difference by that of the logits. In half precision both round, each its way.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def processor(monkeypatch, avx512: bool, from_elements: int = 0) -> None:
    """Packs as on a processor with or without AVX-512 and its bfloat16."""
    if avx512 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX-512 with bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(fast, "PACK_FROM", from_elements)


def need_packing(dtype) -> None:
    if best_product(torch.zeros(8, 8, dtype=dtype)) is Product:
        pytest.skip("this build of PyTorch cannot pack")


def products(model: Llama) -> list:
    """All products of a packed model."""
    found = []
    for layer in model.layers:
        found += [layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj]
    return [*found, model.lm_head.product]


def check_equal(packed: Llama, plain: Llama, dtype) -> None:
    """Logits of a prefill, of a single token and of decoding, for one row and for several."""
    vocab = plain.args.vocab_size
    for shape in ((2, 24), (1, 1), (7, 1)):
        tokens = random_tokens(*shape, vocab=vocab)
        expected = plain(tokens)
        assert packed(tokens).dtype == expected.dtype == plain.dtype
        assert relative(packed(tokens), expected.double()) < TOLERANCE[dtype]
    mask = mask_of([(plain.args.n_layers - 1, 0), (0, 1)], plain.args.n_layers)
    tokens = random_tokens(3, 12, vocab=vocab)
    ours, its = KVCache(packed, 3, 12, [2, 0, 5]), KVCache(plain, 3, 12, [2, 0, 5])
    packed(tokens[:, :8], ours)
    plain(tokens[:, :8], its)
    for pos in range(8, 12):
        now = tokens[:, pos : pos + 1]
        expected = plain(now, its, pos, mask)
        assert relative(packed(now, ours, pos, mask), expected.double()) < TOLERANCE[dtype]


# ---------------------------------------------------------------- the whole model


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_computes_the_same(make_checkpoint, changes, dtype):
    folder = make_checkpoint(dtype=dtype, **changes)
    check_equal(load_packed(folder), Llama.from_pretrained(folder), dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_writes_the_same_tokens(make_checkpoint, shape, tied):
    folder = make_checkpoint(**shape, tie_word_embeddings=tied)
    plain, packed = Llama.from_pretrained(folder), pack(Llama.from_pretrained(folder))
    check_equal(packed, plain, torch.float32)
    prompt = random_tokens(9, vocab=plain.args.vocab_size).tolist()
    ids = greedy(plain, prompt, 24)
    assert greedy(packed, prompt, 24) == ids
    assert tied or len(set(ids)) > 4, "a text that repeats itself shows little"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{}, KINDS["biases"]], ids=["plain", "biases"])
@pytest.mark.parametrize("avx512", [True, False])
def test_packed_weights_compute_the_same(make_checkpoint, monkeypatch, changes, dtype, avx512):
    processor(monkeypatch, avx512)
    need_packing(dtype)
    folder = make_checkpoint(dtype=dtype, **changes)
    packed, plain = pack(Llama.from_pretrained(folder)), Llama.from_pretrained(folder)
    assert len(products(packed)) == 4 * 3 + 1
    assert all(isinstance(product, PACKED) for product in products(packed))
    check_equal(packed, plain, dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_made_in_memory_is_packed_too(monkeypatch, dtype, tied):
    """One that no folder was read for, and whose weights have gradients: its embedding stays."""
    monkeypatch.setattr(fast, "PACK_FROM", 0)
    torch.manual_seed(0)
    args = ModelArgs.from_config(BASE | {"tie_word_embeddings": tied})
    plain = Llama(args).to(dtype)
    packed = Llama(args).to(dtype)
    packed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        check_equal(pack(packed), plain, dtype)


def test_a_hook_sees_the_same_streams(folder):
    """Cosines and ratios of both models are the same to six digits."""
    found = []
    for model in (Llama.from_pretrained(folder), load_packed(folder)):
        probe = ImportanceProbe(3)
        model(random_tokens(2, 30), skip=Skip(mask_of([(1, 0)], 3), probe))
        found.append(probe.means())
    for plain, packed in zip(*found):
        assert torch.allclose(plain, packed, atol=1e-6) and plain.std() > 0.05


# ---------------------------------------------------------------- what stays in memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_packing_frees_the_plain_weights(make_checkpoint, monkeypatch, dtype, tied):
    """All but the norms', where the head is not tied to it the embedding's, and in half precision
    what one row reads as it is: small matrices, never a large one."""
    monkeypatch.setattr(fast, "PACK_FROM", 0)
    need_packing(dtype)
    model = Llama.from_pretrained(make_checkpoint(dtype=dtype, tie_word_embeddings=tied))
    alive = {name: weakref.ref(p.untyped_storage()) for name, p in model.tensors()}
    pack(model)
    gc.collect()
    as_they_are = [
        each.plain for each in products(model) if getattr(each, "plain", None) is not None
    ]
    assert dtype == torch.bfloat16 or not as_they_are
    assert all(weight.numel() < fast.PAD_FROM for weight in as_they_are)
    read = {weight.untyped_storage().data_ptr() for weight in as_they_are}
    kept = set()
    for name, storage in alive.items():
        if storage() is not None and storage().data_ptr() not in read:
            kept.add(name)
    expected = {name for name in alive if "norm" in name}
    if not tied:
        expected.add("model.embed_tokens.weight")
    assert kept == expected


def test_a_large_matrix_is_in_memory_once(make_checkpoint, monkeypatch):
    monkeypatch.setattr(fast, "PACK_FROM", 0)
    monkeypatch.setattr(fast, "PAD_FROM", 0)
    need_packing(torch.bfloat16)
    model = pack(Llama.from_pretrained(make_checkpoint(dtype=torch.bfloat16)))
    assert all(getattr(each, "plain", None) is None for each in products(model))


def leave_stale_embedding(folder: Path) -> None:
    """The embedding moves to the last shard, by the index; a copy of zeros stays in the first."""
    name, index = "model.embed_tokens.weight", folder / "model.safetensors.index.json"
    first, last = sorted(folder.glob("*.safetensors"))[::2]
    shard = load_file(first)
    save_file(load_file(last) | {name: shard[name]}, last, {"format": "pt"})
    save_file(shard | {name: torch.zeros_like(shard[name])}, first, {"format": "pt"})
    weight_map = json.loads(index.read_text())["weight_map"]
    assert weight_map.pop(name) == first.name
    index.write_text(json.dumps({"weight_map": weight_map | {name: last.name}}))  # the last of all


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("files", ["one file", "shards", "one file beside shards", "a stale copy"])
def test_a_tied_head_is_packed_and_its_embedding_stays_in_the_file(
    make_checkpoint, monkeypatch, dtype, files
):
    monkeypatch.setattr(fast, "PACK_FROM", 0)
    config = {"dtype": torch.bfloat16, "tie_word_embeddings": True}
    folder = make_checkpoint(**config, shards=1 if files == "one file" else 3)
    if files == "one file beside shards":
        other = make_checkpoint(**config, seed=1)
        (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    if files == "a stale copy":
        leave_stale_embedding(folder)
    plain, packed = (Llama.from_pretrained(folder, dtype=dtype) for _ in range(2))
    need_packing(plain.dtype)
    pack(packed)
    assert packed.dtype == plain.dtype == (dtype or torch.bfloat16)
    assert isinstance(packed.lm_head.product, PACKED)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        start = packed.embed_tokens.weight.data_ptr()
        lines = [line for line in mapped.read_text().splitlines() if str(folder) in line]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        assert any(low <= start < high for low, high in spans), "not a copy"
    check_equal(packed, plain, dtype or torch.bfloat16)


def test_a_small_tied_head_stays_the_embedding(make_checkpoint):
    model = pack(Llama.from_pretrained(make_checkpoint(tie_word_embeddings=True)))
    assert model.lm_head.weight is model.embed_tokens.weight


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("avx512", [True, False])
def test_a_packed_product_gives_a_row_the_same_whatever_rows_stand_beside_it(
    monkeypatch, dtype, avx512
):
    processor(monkeypatch, avx512)
    need_packing(dtype)
    if dtype == torch.float32 and not avx512:
        pytest.skip("one row has a product of its own, which rounds otherwise")
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=draw).to(dtype) for n in (96, 24))
    product = best_product(weight)(weight, None)
    x = x[:, None]  # decoding: (bsz, 1, in)
    rows = torch.cat([product(x[i : i + 1]) for i in range(24)])
    rounding = 2**-10 if isinstance(product, FBGEMMProduct) and dtype == torch.float16 else 0
    for n in (1, 2, 3, 4, 5, 6, 7, 24):
        assert torch.allclose(product(x[:n]), rows[:n], rtol=rounding, atol=rounding), n


@pytest.mark.parametrize("fewest", [1, 2, 6])
def test_rows_that_fill_up_a_product_change_nothing(fewest):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch cannot pack")
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(96, 64, generator=draw), torch.randn(96, generator=draw)
    product = OneDNNProduct(weight, bias)
    product.fewest = fewest
    for shape in [(n, 1) for n in range(1, 14)] + [(1, 5), (3, 5)]:
        x = torch.randn(*shape, 64, generator=draw)
        assert torch.allclose(product(x), x @ weight.T + bias, atol=1e-4), shape


def test_weights_that_float16_cannot_hold_are_not_packed_as_such(monkeypatch):
    processor(monkeypatch, avx512=False)
    for large in (1e5, -1e5):
        weight = torch.zeros((8, 8), dtype=torch.bfloat16)
        weight[3, 5] = large
        assert best_product(weight) is Product


# ---------------------------------------------------------------- compiled steps


@pytest.fixture(scope="module")
def compiler():
    why = fast.why_not_compiled()
    if why is not None:
        pytest.skip(f"no C++ compiler: {why}")


@pytest.mark.parametrize("changes", [{}, KINDS["biases"]], ids=["plain", "biases"])
def test_compiled_steps_decode_the_same_tokens(make_checkpoint, compiler, monkeypatch, changes):
    """What --compile makes of a CPU's steps: for each skip set its own function, found again."""
    monkeypatch.setattr(fast, "PACK_FROM", 0)
    folder = make_checkpoint(**changes, tie_word_embeddings=not changes)
    packed = load_packed(folder)
    stepper = RecordedStepper(packed, pack(Llama.from_pretrained(folder), DenseProduct))
    prompts = [random_tokens(n, vocab=packed.args.vocab_size).tolist() for n in (9, 5)]
    for skip in (mask_of([(0, 0), (2, 1)], 3), None, mask_of([(0, 0), (2, 1)], 3)):
        for rows in ([prompts[0]], prompts):
            found, expected = [
                generate_batch(each, [(KVCache(packed, 1, 0), rows)], Until(12), skip)
                for each in (stepper, Stepper(packed))
            ]
            assert [row.ids for row in found] == [row.ids for row in expected]
            for row, other in zip(found, expected):
                assert row.confidences == pytest.approx(other.confidences, rel=1e-4)
    assert [len(step.recorded) for step in stepper.recorded.values()] == [2, 2]


def test_generate_takes_the_compiled_steps_of_a_packed_model(
    make_checkpoint, compiler, monkeypatch
):
    monkeypatch.setattr(fast, "PACK_FROM", 0)
    folder = make_checkpoint()
    model = pack(Llama.from_pretrained(folder), compiles=True)
    plain = Llama.from_pretrained(folder)
    ran = []
    run = fast.compiled
    monkeypatch.setattr(fast, "compiled", lambda *args: ran.append(args) or run(*args))
    for skip in (None, mask_of([(0, 0), (2, 1)], 3), None):
        prompt = random_tokens(9).tolist()
        assert (
            generate(model, prompt, 12, skip=skip).ids == generate(plain, prompt, 12, skip=skip).ids
        )
    assert len(ran) == 2, "each skip set is compiled once"
    torch.manual_seed(3)
    assert len(generate(model, prompt, 8, temperature=1.0).ids) == 8 and len(ran) == 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_compiled_step_in_half_precision_is_as_sure(make_checkpoint, compiler, rows):
    """One row takes PyTorch's own products, several oneDNN's; oneDNN is on again afterwards."""
    folder = make_checkpoint(dtype=torch.bfloat16, hidden_size=128, intermediate_size=344)
    dense = pack(Llama.from_pretrained(folder), DenseProduct)
    found = []
    for compiles in (True, False):
        step = fast.StaticStep(dense, rows, 32, compiles)
        run = step.under(mask_of([(1, 0)], 3))
        tokens = torch.arange(5, 5 + rows)[:, None]
        before = KVCache(dense, rows, 8)
        before.fill(0)  # as if zeros had been written: in debug mode they are NaN
        step.load(before, tokens, 3)
        run()
        found.append((step.confidences, torch.stack(step.cache.layers)))
    (sure, written), (expected_sure, expected) = found
    assert relative(written, expected.double()) < TOLERANCE[torch.bfloat16]
    assert relative(sure, expected_sure.double()) < 0.1  # a logit's error is that of its exponent
    assert torch.backends.mkldnn.enabled


def test_a_skip_set_of_another_shape_is_not_compiled(folder):
    packed = load_packed(folder)
    stepper = RecordedStepper(packed, pack(Llama.from_pretrained(folder), DenseProduct))
    with pytest.raises(ValueError, match="skip: expected"):
        generate_batch(stepper, [(KVCache(packed, 1, 0), [[5, 6]])], Until(4), mask_of([], 2))
