"""The decoder computes what the textbook and `transformers` compute, whatever path it takes.

`load` and `llama` are fixtures of two kinds: the plain model and the packed one of tools/fast.py.

python -m pytest -q tests/test_model.py
"""

import json
import os
import subprocess
import sys
import textwrap

import plain
import pytest
import torch
from conftest import BASE, ROOT, random_tensors
from safetensors.torch import load_file, save_file

import model as module
from model import InputError, KVCache, Llama, ModelArgs, Skip
from skip import ImportanceProbe

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
def test_logits_are_the_textbooks(make_checkpoint, load, changes):
    folder, tokens = make_checkpoint(**changes), random_tokens(2, 40)
    expected, _ = plain.forward(*stored(folder), tokens)
    assert distance(load(folder)(tokens), expected) < 1e-4


@every_kind
def test_32_greedy_tokens_are_the_textbooks(make_checkpoint, load, changes):
    folder, prompt = make_checkpoint(**changes), random_tokens(5).tolist()
    ids = greedy(load(folder), prompt, 32)
    assert len(ids) == 32 and plain.follows(*stored(folder), prompt, ids)
    assert len(set(ids)) > 4, "a text that repeats itself shows little"


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_hold_the_same_model(make_checkpoint, load, llama, shards):
    tokens = random_tokens(1, 20)
    assert torch.equal(load(make_checkpoint(shards=shards))(tokens), llama(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_computed(make_checkpoint, load, dtype):
    folder, tokens = make_checkpoint(dtype=dtype), random_tokens(2, 40)
    expected, _ = plain.forward(*stored(folder), tokens)
    llama = load(folder)
    logits = llama(tokens)
    assert llama.dtype == logits.dtype == dtype, "computes in what is stored"
    assert relative(logits, expected) < 2e-2
    exact = load(folder, dtype=torch.float32)(tokens)
    assert distance(exact, expected) < 1e-4


def test_dtype_changes_what_is_computed_in(folder, load):
    tokens = random_tokens(2, 40)
    expected, _ = plain.forward(*stored(folder), tokens)
    logits = load(folder, dtype=torch.bfloat16)(tokens)
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
def test_logits_and_greedy_tokens_are_those_of_transformers(saved, load, changes):
    theirs, folder = saved(changes)
    ours, tokens = load(folder), random_tokens(2, 40)
    assert distance(ours(tokens), theirs(tokens).logits) < 1e-4
    prompt = random_tokens(1, 5)
    options = dict(max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert greedy(ours, prompt[0].tolist(), 32) == expected[0, 5:].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_transformers(saved, load, dtype):
    theirs, folder = saved({}, dtype)
    ours, tokens = load(folder), random_tokens(2, 40)
    logits, expected = ours(tokens), theirs(tokens).logits.double()
    exact, _ = plain.forward(*stored(folder)[:1], BASE, tokens)
    assert ours.dtype == dtype
    assert relative(logits, expected) < 2e-2
    assert relative(logits, exact) < 1.3 * relative(expected, exact), "no coarser than theirs"


def test_shards_that_transformers_wrote_are_read(saved, load):
    theirs, folder = saved({}, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    tokens = random_tokens(1, 40)
    assert distance(load(folder)(tokens), theirs(tokens).logits) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_transformers(transformers, folder, load, dtype):
    """On streams of all sizes; one that is all zero stays so."""
    ours = load(folder, dtype=dtype).norm
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(32, BASE["rms_norm_eps"])
    theirs.weight.data = ours.weight.data
    sizes = torch.tensor([0, 1e-3, 1, 300])[:, None, None]
    x = (sizes * torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype == dtype and not found[0].any()
    assert torch.allclose(found, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2)


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
    loaded = dict(Llama.from_pretrained(folder).tensors())
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_tied_head_stored_twice_must_be_the_embedding(make_checkpoint, load):
    def store_head(tensors, change=0.0):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][7, 3] += change

    tokens = random_tokens(1, 9)
    once, twice = (
        load(make_checkpoint(tie_word_embeddings=True, edit=edit))(tokens)
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


@pytest.mark.parametrize("tied", [False, True])
def test_a_single_file_wins_over_an_index_beside_it(make_checkpoint, load, tied):
    """As in transformers: what was trained into the folder of a sharded model is what is read."""
    old = make_checkpoint(seed=1, shards=3, tie_word_embeddings=tied)
    new = make_checkpoint(seed=2, tie_word_embeddings=tied)
    (old / "model.safetensors").write_bytes((new / "model.safetensors").read_bytes())
    tokens = random_tokens(1, 9)
    assert torch.equal(load(old)(tokens), load(new)(tokens))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("stale", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_of_a_tensor_in_two_shards_the_index_decides(make_checkpoint, load, name, stale, tied):
    """A stale copy in another shard, whichever file is read first, even one of another shape."""
    folder = make_checkpoint(shards=3, tie_word_embeddings=tied)
    tokens = random_tokens(1, 9)
    expected = load(folder)(tokens)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / f"model-0000{stale}-of-00003.safetensors"
    if index["weight_map"].get(name, file.name) == file.name:
        pytest.skip("that is the shard the index names, or there is no such tensor")
    shard = load_file(file)
    for copy in (torch.ones(320, 32), torch.ones(5, 5)):
        save_file(shard | {name: copy}, file, {"format": "pt"})
        assert torch.equal(load(folder)(tokens), expected)


def test_a_foreign_family_is_refused_for_its_family():
    """A Qwen2 configuration has other faults, too: its family is what the user must know."""
    config = BASE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    config |= {"eos_token_id": 151645, "use_sliding_window": False, "rope_scaling": {"type": "?"}}
    with pytest.raises(InputError, match="'model_type' must be 'llama', found 'qwen2'"):
        ModelArgs.from_config(config)


# ---------------------------------------------------------------- the cache


@every_kind
def test_cached_equals_uncached(make_checkpoint, load, changes):
    llama, tokens = load(make_checkpoint(**changes)), random_tokens(2, 24)
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


@pytest.mark.parametrize("skip", [None, [(0, 0), (1, 1)]])
@pytest.mark.parametrize("seqlen", [1, 4])
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (2, 0, 5, 1)])
def test_rows_at_different_slots_give_what_each_gives_alone(llama, pads, seqlen, skip):
    """pos is a tensor. The cache holds another text behind each row's slot, as after drafting."""
    lengths = (9, 3, 12, 1)
    rows = [random_tokens(1, n + seqlen, seed=n) for n in lengths]
    mask = None if skip is None else mask_of(*skip)
    cache = KVCache(llama, 4, 30, list(pads))
    llama(random_tokens(4, 30, seed=9), cache)
    begun = random_tokens(4, 20, seed=8)
    for i, (pad, n) in enumerate(zip(pads, lengths)):
        begun[i, pad : pad + n] = rows[i][0, :n]
    llama(begun, cache)
    pos = torch.tensor(pads) + torch.tensor(lengths)
    new = torch.cat([row[:, -seqlen:] for row in rows])
    logits = llama(new, cache, pos, mask)
    for i, (row, n) in enumerate(zip(rows, lengths)):
        alone = KVCache(llama, 1, n + seqlen)
        llama(row[:, :n], alone)
        expected = llama(row[:, n:], alone, n, mask)[0]
        assert distance(logits[i], expected) < 1e-5
        if mask is None:
            written = slice(int(pos[i]), int(pos[i]) + seqlen)
            for mine, its in zip(cache.layers, alone.layers):
                assert distance(mine[i, :, written], its[0, :, n:]) < 1e-5


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
    skip = mask_of((1, 0))
    llama(tokens[:, :5], cache)
    assert llama(tokens[:, 5:6], cache, 5, skip).isfinite().all()
    assert llama(tokens[:, 6:7], cache, 6, skip).isfinite().all(), "the same set reads no hole"
    assert llama(tokens[:, 7:8], cache, 7).isnan().all(), "layer 1 has no keys of tokens 5, 6"


# ---------------------------------------------------------------- the skip set

SUBLAYERS = [(layer, sub) for layer in range(3) for sub in (0, 1)]


def mask_of(*sublayers) -> torch.Tensor:
    mask = torch.zeros(3, 2, dtype=torch.bool)
    for layer, sub in sublayers:
        mask[layer, sub] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_an_empty_mask_equals_no_mask(llama, dtype):
    tokens = random_tokens(2, 9)
    assert torch.equal(llama(tokens, skip=mask_of().to(dtype)), llama(tokens))


@pytest.mark.parametrize("changes", [{}, KINDS["biases"]], ids=["plain", "biases"])
@pytest.mark.parametrize("layer, sub", SUBLAYERS)
def test_skipping_equals_zeroing_the_output_projection(make_checkpoint, load, changes, layer, sub):
    output = f"layers.{layer}.{('self_attn.o_proj', 'mlp.down_proj')[sub]}."

    def zero(tensors):
        found = [tensor.zero_() for name, tensor in tensors.items() if output in name]
        assert len(found) == (2 if changes else 1)

    tokens = random_tokens(1, 12)
    whole, zeroed = (load(make_checkpoint(edit=edit, **changes)) for edit in (None, zero))
    skipped = whole(tokens, skip=mask_of((layer, sub)))
    assert distance(skipped, zeroed(tokens)) < 1e-5
    assert distance(skipped, whole(tokens)) > 0.1


@pytest.mark.parametrize("chosen", [[(1, 0)], [(1, 1)], [(0, 1), (2, 0), (2, 1)], SUBLAYERS])
def test_skipping_is_the_textbooks(folder, llama, chosen):
    tokens, mask = random_tokens(1, 12), mask_of(*chosen)
    expected, _ = plain.forward(*stored(folder), tokens, mask)
    assert distance(llama(tokens, skip=mask), expected) < 1e-4


@pytest.mark.parametrize("shape", [(2, 2), (3,), (1, 3, 2)])
@pytest.mark.parametrize("hook", [None, print])
def test_a_mask_of_another_shape_is_refused(llama, shape, hook):
    mask = torch.zeros(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"skip: expected \(3, 2\), True or False, found"):
        llama(random_tokens(1, 4), skip=Skip(mask, hook))


@pytest.mark.parametrize("number", [0.8, 2, -1])
def test_a_mask_of_other_numbers_is_refused(llama, number):
    mask = torch.full((3, 2), number)
    with pytest.raises(ValueError, match=f"True or False, found .*{mask.dtype}"):
        llama(random_tokens(1, 4), skip=mask)


def test_skipped_sublayers_do_not_run(folder, load, monkeypatch):
    llama, mask, ran = load(folder), mask_of((0, 1), (1, 0), (1, 1)), []

    def watch(part, name, sublayer):
        whole = getattr(part, name)

        def watched(*args):
            ran.append(sublayer)
            return whole(*args)

        monkeypatch.setattr(part, name, watched)

    for i, layer in enumerate(llama.layers):
        if isinstance(layer, module.DecoderLayer):
            watch(layer.self_attn, "forward", (i, 0))
            watch(layer.mlp, "forward", (i, 1))
        else:
            watch(layer, "qkv_proj", (i, 0))
            watch(layer, "gate_up_proj", (i, 1))
    llama(random_tokens(1, 4), skip=mask)
    assert ran == [(0, 0), (2, 0), (2, 1)]


def test_a_skipped_attention_writes_nothing_into_the_cache(llama):
    cache, tokens = KVCache(llama, 1, 8), random_tokens(1, 8)
    llama(tokens, cache)
    before = [kv.clone() for kv in cache.layers]
    llama(random_tokens(1, 3, seed=1), cache, 5, mask_of((0, 0), (2, 0), (1, 1)))
    assert torch.equal(cache.layers[0], before[0]) and torch.equal(cache.layers[2], before[2])
    changed = (cache.layers[1] != before[1]).flatten(0, 1).any(0).any(-1)
    assert changed.tolist() == [False] * 5 + [True] * 3


def test_a_skipped_feed_forward_needs_no_cache_entry(llama):
    cache, tokens = KVCache(llama, 1, 4), random_tokens(1, 4)
    llama(tokens, cache, skip=mask_of((0, 1), (1, 1), (2, 1)))
    assert all(kv.abs().sum((0, 1, 3)).all() for kv in cache.layers)


# ---------------------------------------------------------------- hooks


def call_it(i, layer, x, *rest):
    return layer(x, *rest)


@pytest.mark.parametrize("chosen", [[], [(0, 1), (1, 0)], SUBLAYERS])
def test_a_hook_that_calls_the_layer_changes_nothing(llama, chosen):
    tokens, mask = random_tokens(1, 9), mask_of(*chosen)
    caches = [KVCache(llama, 1, 10) for _ in range(2)]
    for at, to in ((0, 6), (6, 7), (7, 9)):
        expected = llama(tokens[:, at:to], caches[0], at, mask)
        assert torch.equal(llama(tokens[:, at:to], caches[1], at, Skip(mask, call_it)), expected)
    for kv, its in zip(caches[0].layers, caches[1].layers):
        assert torch.equal(kv.nan_to_num(), its.nan_to_num())


def test_a_hook_is_given_each_layer_what_it_skips_and_its_stream(folder, llama):
    tokens, mask, seen = random_tokens(1, 9), mask_of((0, 1), (1, 0), (2, 0), (2, 1)), []

    def hook(i, layer, x, places, kv, skip_attention, skip_ffn):
        assert layer is llama.layers[i] and kv is None and places.end == 9
        seen.append((i, skip_attention, skip_ffn, x))
        return layer(x, places, kv, skip_attention, skip_ffn)

    llama(tokens, skip=Skip(mask, hook))
    _, streams = plain.forward(*stored(folder), tokens, mask)
    assert [row[:3] for row in seen] == [(0, False, True), (1, True, False), (2, True, True)]
    for i, (*_, x) in enumerate(seen):
        assert distance(x, streams[2 * i][0]) < 1e-4


def test_what_a_hook_returns_is_the_stream(folder, llama):
    """Here layer 1 turns the stream around, without running."""

    def hook(i, layer, x, *rest):
        return -x if i == 1 else layer(x, *rest)

    tokens = random_tokens(1, 9)
    numbers = torch.tensor([[0, 0], [-1, 1], [0, 0]])
    expected, _ = plain.forward(*stored(folder), tokens, numbers)
    assert distance(llama(tokens, skip=Skip(mask_of(), hook)), expected) < 1e-4


def test_the_probe_sees_every_sublayer_that_runs(folder, llama):
    class Probe(ImportanceProbe):
        def compare(self, *args):
            seen.append(args)

    tokens, seen = random_tokens(1, 9), []
    llama(tokens, skip=Skip(mask_of(), Probe(3)))
    _, streams = plain.forward(*stored(folder), tokens)
    assert [(layer, sub) for layer, sub, *_ in seen] == SUBLAYERS
    for (*_, before, after), (expected_before, expected_after) in zip(seen, streams):
        assert distance(before, expected_before) < 1e-4
        assert distance(after, expected_after) < 1e-4
    seen.clear()
    llama(tokens, skip=Skip(mask_of((0, 0), (2, 1)), Probe(3)))
    assert [(layer, sub) for layer, sub, *_ in seen] == SUBLAYERS[1:5]


def test_the_probe_changes_nothing(llama):
    tokens, mask = random_tokens(2, 9), mask_of((0, 0), (2, 1))
    assert torch.equal(llama(tokens, skip=Skip(mask, ImportanceProbe(3))), llama(tokens, skip=mask))


# ---------------------------------------------------------------- memory, stories


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
@pytest.mark.parametrize(
    "name, packed, most",
    [("big", False, 1.1), ("big_tied", False, 1.1)]
    + [("big", True, 1.2), ("big_tied", True, 1.35)],
)
def test_loading_and_packing_hold_the_weights_once(request, name, folder, packed, most):
    """The peak of a process that loads them, less what it held before, is little more: packing adds
    a layer, or the head, which is a quarter of the tied ones. Afterwards the plain ones are gone.
    """
    big = request.getfixturevalue(name)
    script = """
        import re, sys
        from model import Llama
        from tools.fast import pack

        def status(key):
            return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

        def load(folder):
            model = Llama.from_pretrained(folder)
            return pack(model) if PACKED else model

        load(sys.argv[2])  # what the libraries set up once
        before = status("VmRSS")
        model = load(sys.argv[1])
        print((status("VmHWM") - before) * 1024, (status("VmRSS") - before) * 1024)
    """
    script = textwrap.dedent(script).replace("PACKED", str(packed))
    # so that the C library gives back what is freed at once, as it does for large models
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    command = [sys.executable, "-c", script, big, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    size = (big / "model.safetensors").stat().st_size
    peak, left = (int(n) / size for n in done.stdout.split())
    assert 0.9 < left < 1.1
    assert 0.9 < peak < most


def test_stories260k_writes_its_story_to_the_letter(shared, load):
    from generate import Tokenizer

    folder = shared / "checkpoints" / "stories260K"
    tokenizer, llama = Tokenizer.from_pretrained(folder), load(folder)
    story = (folder / "greedy.txt").read_text()
    ids = greedy(llama, tokenizer.encode(""), len(tokenizer.encode(story)) + 8)
    assert tokenizer.decode(ids).startswith(story)
