"""The decoder computes what the textbook and `transformers` compute, whatever path it takes.

python -m pytest -q tests/test_model.py
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import plain
import pytest
import torch
from conftest import BASE, ROOT, random_tensors
from safetensors.torch import load_file

import model as module
from model import InputError, KVCache, Llama, ModelArgs

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # so that all three bands of wavelengths occur
}
KINDS = {
    "gqa": {},
    "one kv head": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "head_dim": {"head_dim": 12},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention bias": {"attention_bias": True},
    "theta": {"rope_theta": 100.0},
}
every_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def stored(folder) -> tuple[dict, dict]:
    """The tensors and the configuration of a checkpoint, as they lie in its files."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors, json.loads((folder / "config.json").read_text())


def random_tokens(*shape, seed=0, vocab=BASE["vocab_size"]) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def distance(logits, expected) -> float:
    assert logits.shape == expected.shape
    return (logits.double() - expected.double()).abs().max().item()


def relative(logits, expected) -> float:
    assert logits.shape == expected.shape
    return ((logits.double() - expected).norm() / expected.norm()).item()


def greedy(llama, prompt: list[int], n: int) -> list[int]:
    """n tokens after a prompt, one at a time through a cache."""
    cache, ids = KVCache(llama, 1, len(prompt) + n), list(prompt)
    logits = llama(torch.tensor([ids]), cache)
    for pos in range(len(prompt), len(prompt) + n):
        ids.append(logits[0, -1].argmax().item())
        logits = llama(torch.tensor([ids[-1:]]), cache, pos)
    return ids[len(prompt) :]


# ---------------------------------------------------------------- against the oracles


@every_kind
def test_logits_are_the_textbooks(make_checkpoint, changes):
    folder, tokens = make_checkpoint(**changes), random_tokens(2, 40)
    expected, _ = plain.forward(*stored(folder), tokens)
    assert distance(Llama.from_pretrained(folder)(tokens), expected) < 1e-4


@every_kind
def test_32_greedy_tokens_are_the_textbooks(make_checkpoint, changes):
    folder, prompt = make_checkpoint(**changes), random_tokens(5).tolist()
    ids = greedy(Llama.from_pretrained(folder), prompt, 32)
    assert len(ids) == 32 and plain.follows(*stored(folder), prompt, ids)
    assert len(set(ids)) > 4, "a text that repeats itself shows little"


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_hold_the_same_model(make_checkpoint, folder, shards):
    tokens = random_tokens(1, 20)
    whole, parts = (
        Llama.from_pretrained(f)(tokens) for f in (folder, make_checkpoint(shards=shards))
    )
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_computed(make_checkpoint, dtype):
    folder, tokens = make_checkpoint(dtype=dtype), random_tokens(2, 40)
    expected, _ = plain.forward(*stored(folder), tokens)
    llama = Llama.from_pretrained(folder)
    logits = llama(tokens)
    assert llama.dtype == logits.dtype == dtype, "computes in what is stored"
    assert relative(logits, expected) < 2e-2
    exact = Llama.from_pretrained(folder, dtype=torch.float32)(tokens)
    assert distance(exact, expected) < 1e-4


def test_dtype_changes_what_is_computed_in(folder):
    tokens = random_tokens(2, 40)
    expected, _ = plain.forward(*stored(folder), tokens)
    logits = Llama.from_pretrained(folder, dtype=torch.bfloat16)(tokens)
    assert logits.dtype == torch.bfloat16
    assert relative(logits, expected) < 2e-2


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="a live comparison needs it")


@pytest.fixture(scope="session")
def saved(transformers, tmp_path_factory):
    """saved(changes, dtype, shard): a random model of `transformers`, and where it saved it."""

    def save(changes, dtype=torch.float32, **options):
        config = {k: v for k, v in (BASE | changes).items() if k != "model_type"}
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
        tensors = random_tensors(BASE | changes)
        missing, unexpected = theirs.load_state_dict(tensors, strict=False)
        assert not unexpected and missing == ["lm_head.weight"] * config["tie_word_embeddings"]
        theirs.tie_weights()
        theirs = theirs.to(dtype).requires_grad_(False)
        folder = tmp_path_factory.mktemp("saved")
        theirs.save_pretrained(folder, **options)
        return theirs, folder

    return save


@every_kind
def test_logits_and_greedy_tokens_are_those_of_transformers(saved, changes):
    theirs, folder = saved(changes)
    ours, tokens = Llama.from_pretrained(folder), random_tokens(2, 40)
    assert distance(ours(tokens), theirs(tokens).logits) < 1e-4
    prompt = random_tokens(1, 5)
    options = dict(max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert greedy(ours, prompt[0].tolist(), 32) == expected[0, 5:].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_transformers(saved, dtype):
    theirs, folder = saved({}, dtype)
    ours, tokens = Llama.from_pretrained(folder), random_tokens(2, 40)
    logits, expected = ours(tokens), theirs(tokens).logits.double()
    exact, _ = plain.forward(*stored(folder)[:1], BASE, tokens)
    assert ours.dtype == dtype
    assert relative(logits, expected) < 2e-2
    assert relative(logits, exact) < 1.3 * relative(expected, exact), "no coarser than theirs"


def test_shards_that_transformers_wrote_are_read(saved):
    theirs, folder = saved({}, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    tokens = random_tokens(1, 40)
    assert distance(Llama.from_pretrained(folder)(tokens), theirs(tokens).logits) < 1e-4


# ---------------------------------------------------------------- configuration and weights


@pytest.mark.parametrize("kind", ["gqa", "theta", "llama3", "linear"])
def test_both_spellings_of_the_rope_mean_the_same(kind):
    old = BASE | KINDS[kind]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = dict(old.get("rope_scaling") or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", None) or scaling["rope_type"]
    new["rope_parameters"] = scaling | {"rope_theta": old["rope_theta"]}
    args = ModelArgs.from_config(old)
    assert ModelArgs.from_config(new) == args
    assert args.rope_theta == old["rope_theta"]


def test_configuration_is_read_in_llamas_own_names():
    args = ModelArgs.from_config(BASE)
    assert (args.dim, args.hidden_dim, args.n_layers) == (32, 48, 3)
    assert (args.n_heads, args.n_kv_heads, args.head_dim) == (4, 2, 8)
    assert (args.vocab_size, args.max_seq_len, args.norm_eps) == (320, 512, 1e-5)
    assert not (args.tied or args.attention_bias or args.mlp_bias or args.rope_scaling)


def test_defaults_of_older_configurations():
    """Llama 1 and 2 had no such keys: as many KV heads as heads, theta 10000, an untied head."""
    absent = ("num_key_value_heads", "rope_theta", "tie_word_embeddings", "head_dim")
    args = ModelArgs.from_config({k: v for k, v in BASE.items() if k not in absent})
    assert (args.n_kv_heads, args.rope_theta, args.tied) == (4, 10000.0, False)


@every_kind
def test_every_weight_is_the_stored_one(make_checkpoint, changes):
    folder = make_checkpoint(**changes)
    tensors, _ = stored(folder)
    loaded = dict(Llama.from_pretrained(folder, pack=False).tensors())
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_tied_head_stored_twice_must_be_the_embedding(make_checkpoint):
    def store_head(tensors, change=0.0):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][7, 3] += change

    tokens = random_tokens(1, 9)
    once, twice = (
        Llama.from_pretrained(make_checkpoint(tie_word_embeddings=True, edit=edit))(tokens)
        for edit in (None, store_head)
    )
    assert torch.equal(once, twice)
    other = make_checkpoint(tie_word_embeddings=True, edit=lambda t: store_head(t, 0.1))
    with pytest.raises(InputError, match="lm_head.weight"):
        Llama.from_pretrained(other)


def test_an_untied_head_is_never_made_up(make_checkpoint):
    folder = make_checkpoint(edit=lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match="lm_head.weight"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_a_weight_is_never_left_random(make_checkpoint, name):
    folder = make_checkpoint(edit=lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=name):
        Llama.from_pretrained(folder)


# ---------------------------------------------------------------- the cache


@every_kind
def test_cached_equals_uncached(make_checkpoint, changes):
    llama, tokens = Llama.from_pretrained(make_checkpoint(**changes)), random_tokens(2, 24)
    cache = KVCache(llama, 2, 24)
    steps = [llama(tokens[:, i : i + 1], cache, i) for i in range(24)]
    assert distance(torch.cat(steps, 1), llama(tokens)) < 1e-4


@pytest.mark.parametrize("chunks", [(24,), (1, 23), (23, 1), (7, 1, 9, 7), (2,) * 12])
def test_chunked_prefill_equals_whole(llama, chunks):
    tokens, cache, parts, pos = random_tokens(1, 24), KVCache(llama, 1, 30), [], 0
    for n in chunks:
        parts.append(llama(tokens[:, pos : pos + n], cache, pos))
        pos += n
    assert distance(torch.cat(parts, 1), llama(tokens)) < 1e-4


def test_what_lies_behind_the_position_does_not_matter(llama):
    """A cache that another text has filled gives the same, from any position on."""
    tokens, cache = random_tokens(1, 12), KVCache(llama, 1, 40)
    llama(random_tokens(1, 40, seed=9), cache)
    llama(tokens[:, :7], cache)
    assert distance(llama(tokens[:, 7:], cache, 7), llama(tokens)[:, 7:]) < 1e-4


def test_rows_padded_on_the_left_equal_single_rows(llama):
    lengths, longest = (3, 11, 8, 1), 11
    rows = [random_tokens(1, n + 4, seed=n) for n in lengths]  # four more tokens to decode
    padding = [torch.full((1, longest - n), 5) for n in lengths]
    padded = torch.cat([torch.cat(pair, 1) for pair in zip(padding, rows)])
    cache = KVCache(llama, 4, longest + 4, [longest - n for n in lengths])
    parts = [llama(padded[:, :longest], cache)]
    parts += [llama(padded[:, i : i + 1], cache, i) for i in range(longest, longest + 4)]
    logits = torch.cat(parts, 1)
    for row, n, tokens in zip(logits, lengths, rows):
        assert distance(row[longest - n :], llama(tokens)[0]) < 1e-4
    assert logits.isfinite().all(), "padding has no softmax over nothing"


def test_only_the_last_logits_on_request(llama):
    tokens = random_tokens(2, 9)
    logits = llama(tokens, tails=[1])
    assert logits.shape == (2, 1, 320)
    assert distance(logits, llama(tokens)[:, -1:]) < 1e-5


@pytest.mark.parametrize("pos", [0, 5])
def test_tails_continue_what_stands_before_them_and_see_no_other(llama, pos):
    """One forward over a beginning and three tails, after 0 or 5 cached tokens, gives the logits
    that follow each text alone; the first tail's slots are those of its text."""
    start, tails = random_tokens(1, 9), [random_tokens(1, n, seed=n) for n in (3, 1, 4)]
    cache = KVCache(llama, 1, 40)
    if pos:
        llama(start[:, :pos], cache)
    tokens = torch.cat([start[:, pos:], *tails], 1)
    logits = llama(tokens, cache, pos, tails=[tail.shape[1] for tail in tails])
    texts = [torch.cat([start, tail], 1) for tail in tails]
    expected = torch.cat([llama(text)[:, -1:] for text in texts], 1)
    assert logits.shape == (1, 3, 320) and distance(logits, expected) < 1e-5
    more = random_tokens(1, 2, seed=7)
    follows = llama(more, cache, 12)
    assert distance(follows, llama(torch.cat([texts[0], more], 1))[:, 12:]) < 1e-5


def test_debug_mode_shows_a_hole_that_is_read(llama, monkeypatch):
    monkeypatch.setattr(module, "DEBUG", True)
    cache, tokens = KVCache(llama, 1, 8), random_tokens(1, 8)
    skip = torch.zeros(3, 2, dtype=torch.bool)
    skip[1, 0] = True
    llama(tokens[:, :5], cache)
    assert llama(tokens[:, 5:6], cache, 5, skip).isfinite().all()
    assert llama(tokens[:, 6:7], cache, 6, skip).isfinite().all(), "the same set reads no hole"
    assert llama(tokens[:, 7:8], cache, 7).isnan().all(), "layer 1 has no keys of tokens 5, 6"


# ---------------------------------------------------------------- the skip set

SUBLAYERS = [(layer, sub) for layer in range(3) for sub in (0, 1)]


def mask_of(*sublayers, value=1.0) -> torch.Tensor:
    mask = torch.zeros(3, 2)
    for layer, sub in sublayers:
        mask[layer, sub] = value
    return mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_an_empty_mask_equals_no_mask(llama, dtype):
    tokens = random_tokens(2, 9)
    assert torch.equal(llama(tokens, skip=torch.zeros(3, 2, dtype=dtype)), llama(tokens))


@pytest.mark.parametrize("changes", [{}, KINDS["biases"]], ids=["plain", "biases"])
@pytest.mark.parametrize("layer, sub", SUBLAYERS)
def test_skipping_equals_zeroing_the_output_projection(make_checkpoint, changes, layer, sub):
    output = f"layers.{layer}.{('self_attn.o_proj', 'mlp.down_proj')[sub]}."

    def zero(tensors):
        found = [tensor.zero_() for name, tensor in tensors.items() if output in name]
        assert len(found) == (2 if changes else 1)

    tokens = random_tokens(1, 12)
    whole, zeroed = (
        Llama.from_pretrained(make_checkpoint(edit=edit, **changes)) for edit in (None, zero)
    )
    skipped = whole(tokens, skip=mask_of((layer, sub)).bool())
    assert distance(skipped, zeroed(tokens)) < 1e-5
    assert distance(skipped, whole(tokens)) > 0.1


@pytest.mark.parametrize("value", [1.0, 0.8, 1.3])
@pytest.mark.parametrize("chosen", [[(1, 0)], [(1, 1)], [(0, 1), (2, 0), (2, 1)], SUBLAYERS])
def test_a_number_in_the_mask_multiplies_the_stream(folder, llama, chosen, value):
    tokens, mask = random_tokens(1, 12), mask_of(*chosen, value=value)
    expected, _ = plain.forward(*stored(folder), tokens, mask)
    assert distance(llama(tokens, skip=mask), expected) < 1e-4


def test_each_sublayer_has_its_own_number(folder, llama):
    tokens = random_tokens(1, 12)
    mask = torch.tensor([[0, 0.7], [1.2, 1], [1.1, 0]])
    expected, _ = plain.forward(*stored(folder), tokens, mask)
    assert distance(llama(tokens, skip=mask), expected) < 1e-4


@pytest.mark.parametrize("value", [True, 0.5])
def test_skipped_sublayers_do_not_run(llama, monkeypatch, value):
    mask, ran = mask_of((0, 1), (1, 0), (1, 1), value=value), []
    for sub, kind in enumerate((module.Attention, module.FeedForward)):

        def counted(self, *args, call=kind.__call__, sub=sub):
            parts = [(layer.attention, layer.ffn)[sub] for layer in llama.layers]
            ran.append((next(i for i, part in enumerate(parts) if part is self), sub))
            return call(self, *args)

        monkeypatch.setattr(kind, "__call__", counted)
    llama(random_tokens(1, 4), skip=mask)
    assert ran == [(0, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize("value", [True, 0.5])
def test_a_skipped_attention_writes_nothing_into_the_cache(llama, value):
    cache, tokens = KVCache(llama, 1, 8), random_tokens(1, 8)
    llama(tokens, cache)
    before = [kv.clone() for kv in cache.layers]
    llama(random_tokens(1, 3, seed=1), cache, 5, mask_of((0, 0), (2, 0), (1, 1), value=value))
    assert torch.equal(cache.layers[0], before[0]) and torch.equal(cache.layers[2], before[2])
    changed = (cache.layers[1] != before[1]).flatten(0, 1).any(0).any(-1)
    assert changed.tolist() == [False] * 5 + [True] * 3


def test_a_skipped_feed_forward_needs_no_cache_entry(llama):
    cache, tokens = KVCache(llama, 1, 4), random_tokens(1, 4)
    llama(tokens, cache, skip=mask_of((0, 1), (1, 1), (2, 1)))
    assert all(kv.abs().sum((0, 1, 3)).all() for kv in cache.layers)


def test_the_probe_sees_every_sublayer_that_runs(folder, llama):
    tokens, seen = random_tokens(1, 9), []
    llama(tokens, probe=lambda *args: seen.append(args))
    _, streams = plain.forward(*stored(folder), tokens)
    assert [(layer, sub) for layer, sub, *_ in seen] == SUBLAYERS
    for (*_, before, after), (expected_before, expected_after) in zip(seen, streams):
        assert distance(before, expected_before) < 1e-4
        assert distance(after, expected_after) < 1e-4
    seen.clear()
    llama(tokens, skip=mask_of((0, 0), (2, 1)), probe=lambda *args: seen.append(args))
    assert [(layer, sub) for layer, sub, *_ in seen] == SUBLAYERS[1:5]


# ---------------------------------------------------------------- packed weights, memory, stories


def processor(monkeypatch, avx512: bool) -> None:
    """Packs as on a processor with or without AVX-512 and its bfloat16."""
    if avx512 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX-512 with bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(module, "PACK_FROM", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, KINDS["biases"]], ids=["plain", "biases"])
@pytest.mark.parametrize("avx512", [True, False])
def test_packed_weights_compute_the_same(make_checkpoint, monkeypatch, changes, dtype, avx512):
    processor(monkeypatch, avx512)
    folder = make_checkpoint(dtype=dtype, **changes)
    packed, loose = (Llama.from_pretrained(folder, pack=pack) for pack in (True, False))
    if module.packed_product(torch.zeros(8, 8, dtype=dtype), None) is None:
        pytest.skip("this build of PyTorch cannot pack")
    linears = [m for m in packed.modules() if isinstance(m, module.Linear)]
    assert len(linears) == 4 * 3 + 1 and all(m.packed and m.weight is None for m in linears)
    for tokens in (random_tokens(2, 24), random_tokens(1, 1)):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert relative(packed(tokens), loose(tokens).double()) < tolerance


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_tied_head_is_packed_and_its_embedding_stays_in_the_file(
    make_checkpoint, monkeypatch, dtype
):
    monkeypatch.setattr(module, "PACK_FROM", 0)
    folder = make_checkpoint(dtype=torch.bfloat16, tie_word_embeddings=True)
    packed, loose = (Llama.from_pretrained(folder, dtype=dtype, pack=p) for p in (True, False))
    if module.packed_product(torch.zeros(8, 8, dtype=packed.dtype), None) is None:
        pytest.skip("this build of PyTorch cannot pack")
    assert packed.dtype == loose.dtype == (dtype or torch.bfloat16)
    assert packed.head is not None and loose.head is None
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        start = packed.embed.weight.data_ptr()
        lines = [line for line in mapped.read_text().splitlines() if str(folder) in line]
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        assert any(low <= start < high for low, high in spans), "not a copy"
    for tokens in (random_tokens(2, 24), random_tokens(1, 1)):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert relative(packed(tokens), loose(tokens).double()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("avx512", [True, False])
def test_a_packed_product_gives_a_row_the_same_whatever_rows_stand_beside_it(
    monkeypatch, dtype, avx512
):
    processor(monkeypatch, avx512)
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=draw).to(dtype) for n in (96, 24))
    product = module.packed_product(weight, None)
    if product is None:
        pytest.skip("this build of PyTorch cannot pack")
    if dtype == torch.float32 and not avx512:
        pytest.skip("one row has a product of its own, which rounds otherwise")
    rows = torch.cat([product(x[i : i + 1]) for i in range(24)])
    for n in (1, 2, 3, 4, 5, 6, 7, 24):
        assert torch.equal(product(x[:n]), rows[:n]), n


def test_weights_that_float16_cannot_hold_are_not_packed_as_such(monkeypatch):
    processor(monkeypatch, avx512=False)
    weight = torch.full((8, 8), 1e5, dtype=torch.bfloat16)
    assert module.packed_product(weight, None) is None


@pytest.fixture
def big(make_checkpoint):
    """190 MB of weights, removed after use."""
    heads = {"num_attention_heads": 10, "num_key_value_heads": 10}
    folder = make_checkpoint(hidden_size=640, intermediate_size=1728, num_hidden_layers=9, **heads)
    yield folder
    (folder / "model.safetensors").unlink()


@pytest.fixture
def big_tied(make_checkpoint):
    """As large, a quarter of it the tied embedding; removed after use."""
    heads = {"num_attention_heads": 10, "num_key_value_heads": 10, "tie_word_embeddings": True}
    sizes = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 7}
    folder = make_checkpoint(**sizes, vocab_size=20000, **heads)
    yield folder
    (folder / "model.safetensors").unlink()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["big", "big_tied"])
def test_loading_holds_the_weights_once(request, name, folder):
    """The peak of a process that loads them, less what it held before, is little more."""
    big = request.getfixturevalue(name)
    script = """
        import re, sys
        from model import Llama

        def status(key):
            return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

        Llama.from_pretrained(sys.argv[2])  # what the libraries set up once
        before = status("VmRSS")
        model = Llama.from_pretrained(sys.argv[1])
        print((status("VmHWM") - before) * 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), big, folder]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    size = (big / "model.safetensors").stat().st_size
    assert 0.9 * size < int(out) < 1.2 * size


def test_stories260k_writes_its_story_to_the_letter(shared):
    from generate import Tokenizer

    folder = shared / "checkpoints" / "stories260K"
    tokenizer, llama = Tokenizer.from_pretrained(folder), Llama.from_pretrained(folder)
    story = (folder / "greedy.txt").read_text()
    ids = greedy(llama, tokenizer.encode(""), len(tokenizer.encode(story)) + 8)
    assert tokenizer.decode(ids).startswith(story)
