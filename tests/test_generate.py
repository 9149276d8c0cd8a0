"""Decoding under a skip set, why a text stops, and the three stages.

Everything here runs in debug mode, where a cache slot that nobody wrote holds NaN, and every
forward is checked to be finite: no test passes that has read a hole. `llama` and `make_chain` are
fixtures of two kinds: the plain model and the packed one of tools/fast.py.

python -m pytest -q tests/test_generate.py
"""

import os
from functools import partial
from types import SimpleNamespace

import plain
import pytest
import torch
from conftest import BASE
from safetensors.torch import load_file

import model as module
from data.prompts import find_answer, finish, stage_prompts
from data.questions import Question
from generate import (
    Exit,
    Pipeline,
    Stepper,
    Timings,
    Tokenizer,
    Until,
    common_prefix,
    generate,
    generate_batch,
    importance_of,
    prefill_group,
)
from model import KVCache, Llama, Skip
from skip import POLICIES, Importance, Setting, mask_of, measure_importance, rank
from tools.fast import RecordedStepper, StaticStep

ROBIN = Question("1", "Which can fly?", ("A", "B"), ("a robin", "an oak"), "A")
SOUP = Question(
    "2",
    "Which is best eaten hot, with a spoon?",
    ("A", "B", "C", "D", "E"),
    ("ice, crushed", "soup", "salt, pepper, and oil", "grass", "a car"),
    "B",
)
BEES = Question("3", "What do bees make?", ("A", "B", "C"), ("honey", "milk", "wool"), "A")
SKIPS = (mask_of([(0, 0), (1, 1)], 3), mask_of([(1, 0), (2, 1), (0, 1)], 3), mask_of([(2, 0)], 3))


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Debug mode, and every forward by its (bsz, seqlen, whether it skips)."""
    monkeypatch.setattr(module, "DEBUG", True)
    forward, seen = Llama.forward, []

    def checked(self, tokens, cache=None, pos=0, skip=None, *args, **kwargs):
        logits = forward(self, tokens, cache, pos, skip, *args, **kwargs)
        assert logits.isfinite().all(), "a cache slot was read that nothing had written"
        mask = skip.mask if isinstance(skip, Skip) else skip
        seen.append((*tokens.shape, mask is not None and bool(mask.count_nonzero())))
        return logits

    monkeypatch.setattr(Llama, "forward", checked)
    return seen


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


def ids_of(n: int, seed=0) -> list[int]:
    return torch.randint(300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def side_by_side(llama, groups, n, eos=(), skip=None, exit=None, last=(), stepper=None):
    """Continues groups by n tokens at most, or up to one of eos or with one of last."""
    until = Until(n, frozenset(eos), frozenset(last), exit)
    return generate_batch(stepper or Stepper(llama), groups, until, skip)


def batch(llama, rows, *args, **options):
    """Continues rows in one batch, each with a cache of its own."""
    groups = [(KVCache(llama, 1, 0), [row]) for row in rows]
    return side_by_side(llama, groups, *args, **options)


def said(row) -> tuple[list[int], str]:
    """What a row generated, and why it stopped."""
    assert len(row.confidences) == len(row.ids)
    return row.ids, row.stop


def setting_of(importance: Importance, **options) -> Setting:
    return Setting(importance, [rank(importance.similarity)] * 3, **options)


# ---------------------------------------------------------------- why a text stops

COUNT = {i: (i + 1, 0.9) for i in range(30)}  # 0, 1, 2, ... 30


def test_end_token_ends_a_text_and_is_no_part_of_it(make_chain):
    llama = make_chain(COUNT)
    assert said(generate(llama, [3], 20, eos_id=8)) == ([4, 5, 6, 7], "eos")
    assert said(generate(llama, [3], 20, eos_id=[20, 7])) == ([4, 5, 6], "eos")
    assert said(generate(llama, [3], 20, eos_id=4)) == ([], "eos"), "the very first"
    assert generate(llama, [4, 3], 3, eos_id=4).stop == "eos", "one in the prompt is only text"


@pytest.mark.parametrize("n", [1, 2, 9])
def test_length_stops_after_max_new_tokens(make_chain, n):
    llama = make_chain(COUNT)
    assert said(generate(llama, [3], n, eos_id=30)) == (list(range(4, 4 + n)), "length")


@pytest.mark.parametrize("prompt, n", [(1, 16), (2, 15), (15, 2), (16, 1), (17, 0), (40, 0)])
def test_context_stops_when_the_last_position_has_spoken(make_chain, prompt, n):
    """16 positions: the token that the last one gives is the last; it has no place itself."""
    llama = make_chain(COUNT, max_position_embeddings=16)
    found = generate(llama, [29] * (prompt - 1) + [0], 100, eos_id=31)
    assert said(found) == (list(range(1, 1 + n)), "context")


@pytest.mark.parametrize("n", [17, 10**9])
def test_asking_for_more_than_the_context_holds_costs_no_memory(make_chain, n):
    llama = make_chain(COUNT, max_position_embeddings=16)
    assert said(generate(llama, [3], n)) == (list(range(4, 20)), "context")


def test_length_before_context_and_end_token_before_both(make_chain):
    llama = make_chain(COUNT, max_position_embeddings=4)
    assert generate(llama, [0, 1], 3).stop == "length", "three tokens fit exactly"
    assert said(generate(llama, [0, 1], 4)) == ([2, 3, 4], "context")
    assert said(generate(llama, [0, 1], 3, eos_id=4)) == ([2, 3], "eos")


def test_the_last_position_is_computed_right(llama, load, make_checkpoint):
    """A model of 12 positions writes what one of 512 with the same weights writes."""
    short = load(make_checkpoint(max_position_embeddings=12))
    prompt = ids_of(5)
    found, expected = generate(short, prompt, 50), generate(llama, prompt, 8)
    assert said(found) == (expected.ids, "context") and expected.stop == "length"


# confidences 0.9, 0.8, 0.3, 0.6, 0.9, 0.9, ...
UNSURE = COUNT | {1: (2, 0.8), 2: (3, 0.3), 3: (4, 0.6)}


@pytest.mark.parametrize(
    "window, threshold, n",  # n: which token's confidence brings the mean down
    [
        (1, 0.31, 3),  # 0.3
        (1, 0.29, None),
        (2, 0.56, 3),  # (0.8 + 0.3) / 2 = 0.55
        (2, 0.54, 4),  # (0.3 + 0.6) / 2 = 0.45
        (2, 0.44, None),
        (3, 0.58, 4),  # (0.8 + 0.3 + 0.6) / 3 = 0.567; the three before: 0.667
        (3, 0.67, 3),
        (3, 0.56, None),
        (4, 0.6505, 4),  # 0.65, the first mean there is
        (4, 0.649, None),  # and again 0.65, then 0.675, ...
        (5, 0.5, None),
        (1, 0.95, 1),
        (5, 1.0, 5),  # never before the window is full
    ],
)
def test_confidence_exit_takes_the_mean_of_the_last_window(make_chain, window, threshold, n):
    """The end stands in the place of that token, whose step was made all the same."""
    llama = make_chain(UNSURE)
    found = generate(llama, [0], 12, exit=(window, threshold))
    if n is None:
        assert said(found) == (list(range(1, 13)), "length") and found.steps == 11
    else:
        assert said(found) == (list(range(1, n)), "confidence") and found.steps == n - 1
    confidences = [0.9, 0.8, 0.3, 0.6, *[0.9] * 8]
    assert found.confidences == pytest.approx(confidences[: len(found.ids)], abs=1e-4)
    assert len(found.timings.step_s) == found.steps


def test_confidence_exit_at_the_threshold_itself(make_chain):
    """32 equal probabilities of exactly 1/32: the mean is at the threshold, so it stops."""
    llama = make_chain({})
    assert said(generate(llama, [3], 9, exit=Exit(4, 1 / 32))) == ([0] * 3, "confidence")
    assert generate(llama, [3], 9, exit=Exit(4, 1 / 33)).stop == "length"


def test_the_end_stands_in_place_of_the_token_that_brought_the_mean_down(make_chain):
    """Confidences 0.9, 0.8, 0.3 after token 0: (0.8 + 0.3) / 2 is below 0.56, so that 3 is not
    said. A text that may have two tokens is not at fault: it has ended before."""
    llama = make_chain(UNSURE)
    found = generate(llama, [0], 12, exit=Exit(2, 0.56))
    assert said(found) == ([1, 2], "confidence")
    assert found.confidences == pytest.approx([0.9, 0.8], abs=1e-4)
    assert said(generate(llama, [0], 3, exit=Exit(2, 0.56))) == ([1, 2], "confidence")
    assert said(generate(llama, [0], 2, exit=Exit(2, 0.56))) == ([1, 2], "length")
    last = batch(llama, [[0]], 12, exit=Exit(2, 0.56), last={3})
    assert said(last[0])[0] == [1, 2], "nor is it as the last token of a line"


def test_confidences_are_those_of_the_tokens_said(make_chain):
    found = batch(make_chain(UNSURE), [[0], [2]], 3, eos={5})
    assert [said(row) for row in found] == [([1, 2, 3], "length"), ([3, 4], "eos")]
    for row, expected in zip(found, ([0.9, 0.8, 0.3], [0.3, 0.6])):
        assert row.confidences == pytest.approx(expected, abs=1e-4)


def test_a_last_token_ends_a_text_and_belongs_to_it(make_chain):
    found = batch(make_chain(COUNT), [[3], [6]], 20, eos={5}, last={8})
    assert [said(row) for row in found] == [([4], "eos"), ([7, 8], "eos")]
    assert [row.steps for row in found] == [1, 1]


def test_no_exit_never_exits(make_chain):
    assert generate(make_chain({}), [3], 9, exit=None).stop == "length"
    assert Exit() == (5, 0.5), "the defaults that are documented"


def test_an_end_token_ends_before_confidence_is_asked(make_chain):
    llama = make_chain(UNSURE)
    assert said(generate(llama, [0], 9, eos_id=3, exit=(1, 0.5))) == ([1, 2], "eos")


def test_temperature_is_drawn_by_the_seed(llama):
    def draw(seed, temperature=1.0):
        torch.manual_seed(seed)
        return generate(llama, ids_of(5), 12, temperature=temperature).ids

    greedy = generate(llama, ids_of(5), 12).ids
    assert draw(1) == draw(1) != draw(2)
    assert draw(1) != greedy
    assert draw(1, 1e-4) == draw(2, 0.0) == greedy


def test_temperature_draws_by_probability(make_chain):
    """One token of 90%, the others of 10% together; at temperature 2 of 3 to 5.6."""
    torch.manual_seed(0)
    llama = make_chain({i: (7, 0.9) for i in range(32)}, max_position_embeddings=1000)
    for temperature, expected in ((1.0, 0.9), (2.0, 0.35)):
        ids = generate(llama, [7], 300, temperature=temperature).ids
        assert ids.count(7) / 300 == pytest.approx(expected, abs=0.08)


# ---------------------------------------------------------------- decoding under a skip set


@pytest.fixture(scope="module")
def follows(folder):
    """plain.follows with the tiny model's weights."""
    return partial(plain.follows, load_file(folder / "model.safetensors"), BASE)


def test_generate_is_greedy(llama, follows):
    prompt = ids_of(9)
    found = generate(llama, prompt, 24)
    assert len(found.ids) == 24 and follows(prompt, found.ids)


@pytest.mark.parametrize("skip", SKIPS)
def test_prefill_runs_all_layers_and_decoding_skips(llama, follows, skip):
    """The first token is the full model's, the others are those of a prompt that was computed in
    full and of tokens that left the sub-layers out."""
    prompt = ids_of(9)
    found = generate(llama, prompt, 24, skip=skip)
    assert follows(prompt, found.ids, skip)
    assert found.ids[0] == generate(llama, prompt, 1).ids[0]
    assert found.ids != generate(llama, prompt, 24).ids
    assert found.timings.skipped == skip.count_nonzero()


def test_a_skip_set_may_be_a_function_of_the_step(llama, follows):
    prompt, steps = ids_of(9), []

    def skip(step):
        steps.append(step)
        return mask_of([(i, sub) for i in range(min(step // 4, 2)) for sub in (0, 1)], 3)

    found = generate(llama, prompt, 13, skip=skip)
    assert steps == list(range(12)), "one for every token after the first"
    assert follows(prompt, found.ids, skip)
    assert found.timings.skipped == pytest.approx((4 * 0 + 4 * 2 + 4 * 4) / 12)


def test_a_skip_set_with_a_hook_that_scales(llama, follows):
    prompt, numbers = ids_of(9), torch.tensor([[0, 1.3], [0.6, 0], [0, 0]])
    skip = POLICIES["adaskip"](setting_of(Importance(torch.zeros(3, 2), torch.ones(3, 2))), 0)
    skip(0)
    skip.rho = numbers.tolist()
    found = generate(llama, prompt, 20, skip=Skip(numbers != 0, skip.scale))
    assert follows(prompt, found.ids, numbers) and not follows(prompt, found.ids, numbers != 0)
    assert found.timings.skipped == 2


def test_a_hook_that_calls_the_layer_changes_no_token(llama):
    for mask in (mask_of([], 3), *SKIPS):
        hooked = Skip(mask, lambda i, layer, x, *rest: layer(x, *rest))
        found = batch(llama, PROMPTS, 12, skip=hooked)
        assert found[0].timings.skipped == mask.count_nonzero()
        expected = batch(llama, PROMPTS, 12, skip=mask)
        assert [row.ids for row in found] == [row.ids for row in expected]


def test_adaskip_watches_the_decoding(llama, follows):
    """Where every similarity reaches the threshold, all FFNs are left out after the window."""
    importance = measure_importance(llama, [ids_of(9)])
    low = Importance(importance.similarity - 9, importance.ratio)
    adaskip, tables = POLICIES["adaskip"](setting_of(low), 1), []

    def skip(step):
        now = adaskip(step)
        tables.append(torch.where(now.mask, torch.tensor(adaskip.rho), 0))
        return now

    found = generate(llama, ids_of(9), 12, skip=skip)
    assert adaskip.mask[:, 1].all() and adaskip.mask[:, 0].count_nonzero() <= 1
    assert [table.count_nonzero().item() for table in tables] == [1] * 5 + [
        adaskip.mask.count_nonzero()
    ] * 6
    assert follows(ids_of(9), found.ids, lambda step: tables[min(step, 10)])
    generate(llama, ids_of(9), 2, skip=adaskip)
    assert adaskip.mask.count_nonzero() == 1, "a new request starts anew"


def test_one_preempted_step_does_not_count():
    timings = Timings(0.5, [0.25, 0.25, 9.0, 0.25], [[0, 0]] * 4, [""] * 4)
    assert timings.decode_s == 1.0
    assert Timings(0.5, [], [], []).decode_s == 0.0


# ---------------------------------------------------------------- batches

PROMPTS = [ids_of(n, seed=n) for n in (7, 1, 23, 12, 3)]
COMMON = [ids_of(6) + ids_of(n, seed=n) for n in (4, 1, 9)]


@pytest.mark.parametrize("skip", [None, *SKIPS])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0), (1, 1, 2), (3,), (2, 3)])
def test_a_rows_tokens_do_not_depend_on_the_other_rows(llama, skip, order):
    """End tokens are drawn from what some rows say, so that rows leave at different times."""
    alone = [generate(llama, prompt, 12, skip=skip).ids for prompt in PROMPTS]
    eos = {alone[0][4], alone[2][7], alone[3][1]}
    expected = [said(generate(llama, PROMPTS[i], 12, eos, skip)) for i in order]
    found = batch(llama, [PROMPTS[i] for i in order], 12, eos, skip)
    assert [said(row) for row in found] == expected
    assert len({len(ids) for ids, _ in expected}) > 1 or len(order) < 3


@pytest.mark.parametrize("skip", [None, *SKIPS])
def test_prompts_of_a_group_share_their_beginning(llama, calls, skip):
    """What a group has in common is computed once, in one forward with what follows it in each
    prompt; the tokens are those of single rows."""
    expected = [said(generate(llama, prompt, 12, skip=skip)) for prompt in COMMON]
    calls.clear()
    found = side_by_side(llama, [(KVCache(llama, 1, 0), COMMON)], 12, (), skip)
    assert [said(row) for row in found] == expected
    tails = sum(len(prompt) - 6 for prompt in COMMON)
    assert [call[:2] for call in calls[:2]] == [(1, 6 + tails), (3, 1)]


@pytest.mark.parametrize(
    "groups",
    [
        [[PROMPTS[0]], COMMON],
        [COMMON, [PROMPTS[2]], [PROMPTS[1], PROMPTS[3]]],
        [[PROMPTS[2], PROMPTS[2]], [PROMPTS[2][:5], PROMPTS[2]]],  # the same, one in the other
        [[PROMPTS[1]], [PROMPTS[1]]],
    ],
)
def test_groups_of_any_kind_go_side_by_side(llama, groups):
    rows = [prompt for group in groups for prompt in group]
    expected = [said(generate(llama, prompt, 10, skip=SKIPS[1])) for prompt in rows]
    caches = [KVCache(llama, 1, 0) for _ in groups]
    for _ in range(2):  # the second time everything lies in the caches already
        found = side_by_side(llama, list(zip(caches, groups)), 10, (), SKIPS[1])
        assert [said(row) for row in found] == expected


def test_a_common_prefix_is_as_long_as_all_agree():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert common_prefix([[1, 2], [1, 2, 5]]) == 2 == common_prefix([[1, 2]])
    assert common_prefix([[], [1]]) == 0 == common_prefix([[3], [1]])


def test_the_worked_example_of_a_prefill(llama, calls):
    """Prompts ABCD and ABE in a cache that holds A: B, CD and E are run, in one forward."""
    a, b, c, d, e = ids_of(5)
    cache = KVCache(llama, 1, 0)
    prefill_group(llama, (cache, [[a]]))
    calls.clear()
    logits, slots = prefill_group(llama, (cache, [[a, b, c, d], [a, b, e]]), room=3)
    assert calls == [(1, 4, False)], "B, C, D, E"
    assert slots == [[0, 1, 2, 3], [0, 1, 4]]
    assert cache.tokens == [a, b, c, d] and cache.max_len == 8
    for text, found, its in zip([[a, b, c, d], [a, b, e]], logits, slots):
        alone = KVCache(llama, 1, len(text))
        expected = llama(torch.tensor([text]), alone)[0, -1]
        assert torch.allclose(found, expected, atol=1e-5)
        for kv, other in zip(cache.layers, alone.layers):
            assert torch.allclose(kv[:, :, its], other, atol=1e-5)
    more = llama(torch.tensor([[e]]), cache, 4)
    assert torch.allclose(more, llama(torch.tensor([[a, b, c, d, e]]))[:, -1:], atol=1e-5)


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (1, 1, 2), (3,)])
def test_static_steps_decode_the_same_tokens(folder, load, order, device):
    """What --compile records: the same tokens as steps of growing caches and shrinking batches, for
    one skip set after the other on the same tensors; a cached step is found again."""
    llama = load(folder, device)
    rows, stepper = [PROMPTS[i] for i in order], RecordedStepper(llama)
    alone = [generate(llama, prompt, 12).ids for prompt in PROMPTS]
    ends = {alone[0][4], alone[2][7], alone[3][1]}
    for skip in (*SKIPS, None, *SKIPS):
        expected = batch(llama, rows, 12, ends, skip, Exit(3, 0.005))
        found = batch(llama, rows, 12, ends, skip, Exit(3, 0.005), stepper=stepper)
        assert [said(row) for row in found] == [said(row) for row in expected]
        assert [row.steps for row in found] == [row.steps for row in expected]
        assert len(found[0].timings.step_s) == len(expected[0].timings.step_s)
        assert found[0].timings.skipped == expected[0].timings.skipped
    assert list(stepper.recorded) == [(len(order), 256)]
    assert len(stepper.recorded[len(order), 256].recorded) == 1 + len(SKIPS)


def test_copying_the_cache_for_recorded_steps_is_timed(llama, monkeypatch):
    """It is part of the prefill; recording, once for a skip set, is not. On a clock of our own."""
    clock = [0.0]

    def takes(seconds, method):
        def slow(*args):
            clock[0] += seconds
            return method(*args)

        return slow

    for timed in ("generate", "tools.fast"):
        monkeypatch.setattr(f"{timed}.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(StaticStep, "load", takes(2, StaticStep.load))
    monkeypatch.setattr(StaticStep, "record", takes(50, StaticStep.record))
    timings = batch(llama, PROMPTS, 3, stepper=RecordedStepper(llama))[0].timings
    assert (timings.prefill_s, set(timings.step_s)) == (2, {0}) and clock[0] == 52


def test_a_skip_set_that_changes_from_step_to_step_is_not_recorded(llama):
    def skip(step):
        return mask_of([(0, 0), (1, 1), (2, 0)][: step // 3], 3)

    stepper = RecordedStepper(llama)
    expected = batch(llama, PROMPTS, 12, skip=skip)
    found = batch(llama, PROMPTS, 12, skip=skip, stepper=stepper)
    assert [row.ids for row in found] == [row.ids for row in expected] and not stepper.recorded


def test_a_skip_set_with_a_hook_is_not_recorded(llama):
    """A hook may look at what it is given: it runs at every step."""
    seen = []

    def hook(i, layer, x, *rest):
        seen.append(i)
        return layer(x, *rest)

    stepper = RecordedStepper(llama)
    found = batch(llama, PROMPTS, 4, skip=Skip(SKIPS[0], hook), stepper=stepper)
    assert seen == [0, 1, 2] * 3 and not stepper.recorded
    expected = batch(llama, PROMPTS, 4, skip=SKIPS[0], stepper=stepper)
    assert [row.ids for row in found] == [row.ids for row in expected] and stepper.recorded


def test_finished_rows_leave_the_batch(make_chain, calls):
    llama = make_chain(COUNT)
    found = batch(llama, [[9], [5], [7]], 20, {11})
    assert [row.ids for row in found] == [[10], [6, 7, 8, 9, 10], [8, 9, 10]]
    assert [bsz for bsz, seqlen, _ in calls] == [1, 1, 1, 3, 2, 2, 1, 1], "prefills, five steps"


def test_each_row_has_its_own_exit_and_its_own_context(make_chain):
    llama = make_chain(UNSURE, max_position_embeddings=10)
    found = batch(llama, [[0], [5], [6] * 8, [6] * 11], 9, {8}, exit=Exit(2, 0.56))
    assert [said(row) for row in found] == [
        ([1, 2], "confidence"),
        ([6, 7], "eos"),
        ([7], "eos"),
        ([], "context"),
    ]
    found = batch(llama, [[0], [5], [6] * 8, [6] * 10, [6] * 11], 7)
    assert [(len(row.ids), row.stop) for row in found] == [
        (7, "length"),
        (7, "length"),
        (3, "context"),
        (1, "context"),
        (0, "context"),
    ]


# ---------------------------------------------------------------- the three stages


def answer(llama, tokenizer, questions, skips=None, exit=None, n=10, caches=None):
    return Pipeline(llama, tokenizer, n).answer(questions, skips, exit, caches)


def afresh(llama, tokenizer, question, skips, exit=None, n=10):
    """The stages one prompt at a time, nothing shared: [(texts, stops, tokens)] of each."""
    before, stages = [], []
    for index, skip in enumerate(skips):
        prompts = [tokenizer.encode(text) for text in stage_prompts(index, question, before)]
        rows = [generate(llama, ids, n, tokenizer.eos_ids, skip, exit) for ids in prompts]
        texts = [tokenizer.decode(row.ids) for row in rows]
        texts = texts if index == 2 else [finish(text) for text in texts]
        stages.append((texts, [row.stop for row in rows], sum(len(row.ids) for row in rows)))
        before.append(texts)
    return stages


def told(stages):
    return [(stage.texts, stage.stops, stage.tokens) for stage in stages]


@pytest.mark.parametrize("skips", [(None,) * 3, SKIPS, SKIPS[::-1], (None, SKIPS[0], SKIPS[1])])
@pytest.mark.parametrize("question", [ROBIN, BEES, SOUP], ids=["2", "3", "5 options"])
def test_one_cache_through_three_stages_changes_nothing(llama, tokenizer, question, skips):
    """Stages with different skip sets, whose holes lie in different layers."""
    ((label, stages),) = answer(llama, tokenizer, [question], skips, None, 10)
    assert told(stages) == afresh(llama, tokenizer, question, skips)
    assert [stage.name for stage in stages] == ["recall", "analyze", "summarize"]
    assert [len(stage.texts) for stage in stages] == [1, len(question.options), 1]
    assert label == find_answer(stages[2].texts[0])
    assert all("context" not in stage.stops for stage in stages)


def test_the_stages_differ_by_their_skip_sets(llama, tokenizer):
    """Or the test above would show nothing."""
    full, skipped = (answer(llama, tokenizer, [BEES], s, None, 10) for s in ((None,) * 3, SKIPS))
    assert told(full[0][1])[0] != told(skipped[0][1])[0]
    counts = [stage.timings.skipped for stage in skipped[0][1]]
    assert counts == [2, 3, 1] and [stage.timings.skipped for stage in full[0][1]] == [0] * 3


def test_exit_applies_in_every_stage(llama, tokenizer):
    exit = Exit(3, 0.2)
    ((_, stages),) = answer(llama, tokenizer, [SOUP], SKIPS, exit, 12)
    assert told(stages) == afresh(llama, tokenizer, SOUP, SKIPS, exit, 12)
    stops = [stop for stage in stages for stop in stage.stops]
    assert "confidence" in stops and "length" in stops


def test_what_was_in_the_cache_before_does_not_matter(llama, tokenizer):
    cache = KVCache(llama, 1, 0)
    for question in (SOUP, ROBIN, BEES, BEES, SOUP):
        ((_, stages),) = answer(llama, tokenizer, [question], SKIPS, None, 10, [cache])
        assert told(stages) == afresh(llama, tokenizer, question, SKIPS)


def test_questions_side_by_side_answer_as_alone(llama, tokenizer):
    questions = [SOUP, ROBIN, BEES]
    for (label, stages), question in zip(
        answer(llama, tokenizer, questions, SKIPS, None, 10), questions
    ):
        assert told(stages) == afresh(llama, tokenizer, question, SKIPS)
        assert label == find_answer(stages[2].texts[0])


def test_debug_mode_changes_no_text(llama, tokenizer, monkeypatch):
    poisoned = answer(llama, tokenizer, [SOUP], SKIPS, None, 10)
    monkeypatch.setattr(module, "DEBUG", False)
    plainly = answer(llama, tokenizer, [SOUP], SKIPS, None, 10)
    assert told(poisoned[0][1]) == told(plainly[0][1])


def test_a_prompt_makes_holes_of_what_it_does_not_reuse(llama):
    """In a cache that a longer text has filled, what decoding then leaves out is NaN again."""
    cache, prompt = KVCache(llama, 1, 0), ids_of(12, seed=1)
    side_by_side(llama, [(cache, [ids_of(30)])], 4)
    side_by_side(llama, [(cache, [prompt])], 6, (), mask_of([(1, 0)], 3))
    written = [kv[0].isfinite().all(0).all(-1).sum().item() for kv in cache.layers]
    assert written == [12 + 5, 12, 12 + 5], "the sixth token was not fed"
    assert cache.tokens == prompt


def test_what_all_layers_have_prefilled_is_not_prefilled_again(llama, tokenizer, calls):
    """And what was decoded under a skip set is: only common prefixes of prompts are reused."""
    ((_, stages),) = answer(llama, tokenizer, [SOUP], SKIPS, None, 10)
    prefilled = [bsz * seqlen for bsz, seqlen, skips in calls if not skips]
    decoded = [bsz * seqlen for bsz, seqlen, skips in calls if skips]
    texts = [stage.texts for stage in stages]
    first, options, last = (
        [tokenizer.encode(text) for text in stage_prompts(i, SOUP, texts)] for i in range(3)
    )
    both = len(os.path.commonprefix(options))
    tails = sum(len(option) - both for option in options)
    assert prefilled == [
        len(first[0]),
        both - len(os.path.commonprefix([first[0], options[0][:both]])) + tails,
        len(last[0]) - len(os.path.commonprefix([last[0], options[0]])),
    ]
    assert sum(prefilled) < len(first[0]) + sum(map(len, options)) + len(last[0])
    assert sum(decoded) == sum(stage.tokens for stage in stages) - 7, "all but each text's first"


def test_stages_count_tokens_steps_and_prompts(tokenizer, llama):
    caches = [KVCache(llama, 1, 0)]
    pipeline = Pipeline(llama, tokenizer, 6)
    (stage,) = pipeline.run_stage(1, [SOUP], [[["Soup."]]], caches, SKIPS[0])
    prompts = [tokenizer.encode(text) for text in stage_prompts(1, SOUP, [["Soup."]])]
    assert stage.stops == ["length"] * 5 and stage.tokens == 30 and stage.steps == 5
    assert stage.prompts == stage_prompts(1, SOUP, [["Soup."]])
    assert stage.prompt_tokens == max(map(len, prompts))
    assert [len(row.ids) for row in stage.rows] == [len(row.confidences) for row in stage.rows]
    assert [tokenizer.decode(row.ids) for row in stage.rows] != stage.texts, "which are quoted"
    assert [finish(tokenizer.decode(row.ids)) for row in stage.rows] == stage.texts
    assert [row.stop for row in stage.rows] == stage.stops
    assert all(text.endswith((".", '"', "'")) for text in stage.texts)


def test_worked_examples_go_before_every_prompt(llama, tokenizer):
    """A newline ends what is generated after them, and is not part of the text."""
    shots = "What do cows make?\n(A) milk (B) wool\nRecall: Cows make milk.\n\n"
    pipeline = Pipeline(llama, tokenizer, 40, shots)
    for index, texts in enumerate(([], [["Soup."]], [["Soup."], list("vwxyz")])):
        expected = [shots + prompt for prompt in stage_prompts(index, SOUP, texts)]
        assert pipeline.prompts(index, SOUP, texts) == expected
        found = pipeline.prompt_ids(index, SOUP, texts)
        assert [tokenizer.decode(ids) for ids in found] == expected
    assert tokenizer.newline_ids == {i for i in range(300) if "\n" in tokenizer.decode([i])}
    ((_, stages),) = pipeline.answer([SOUP])
    assert not any("\n" in text for stage in stages for text in stage.texts)


SHOTS = "What do cows make?\n(A) milk (B) wool\nRecall: Cows make milk.\nSummarize: So A.\n\n"


def test_worked_examples_are_prefilled_once(llama, tokenizer, calls):
    """Before any question, and then never again: what a stage runs is what its prompt adds."""
    n = len(tokenizer.encode(SHOTS))
    pipeline = Pipeline(llama, tokenizer, 8, SHOTS)
    assert calls == [(1, n, False)] and pipeline.shared_tokens == n
    questions = [SOUP, ROBIN, BEES]
    caches = pipeline.new_caches(3)
    assert len(calls) == 1
    assert [cache.tokens for cache in caches] == [tokenizer.encode(SHOTS)] * 3
    calls.clear()
    shared = pipeline.answer(questions, SKIPS, None, caches)
    prefilled = [seqlen for bsz, seqlen, skips in calls if not skips]
    for question, ran in zip(questions, prefilled):
        assert ran == len(pipeline.prompt_ids(0, question, [])[0]) - n
    calls.clear()
    afresh = pipeline.answer(questions, SKIPS, None, [KVCache(llama, 1, 0) for _ in range(3)])
    again = [seqlen for bsz, seqlen, skips in calls if not skips]
    assert again == [ran + n for ran in prefilled[:3]] + prefilled[3:]
    calls.clear()
    assert told(pipeline.answer(questions, SKIPS)[2][1]) == told(shared[2][1])
    assert [seqlen for bsz, seqlen, skips in calls if not skips] == prefilled, "without caches, too"
    for ours, its in zip(shared, afresh):
        assert ours[0] == its[0] and told(ours[1]) == told(its[1])
        for stage, other in zip(ours[1], its[1]):
            assert [row.ids for row in stage.rows] == [row.ids for row in other.rows]


def test_caches_with_worked_examples_are_independent(llama, tokenizer):
    """What one question leaves in its cache is in no other, nor in those to come."""
    pipeline = Pipeline(llama, tokenizer, 8, SHOTS)
    first, second = pipeline.new_caches(2)
    expected = told(pipeline.answer([BEES], SKIPS)[0][1])
    pipeline.answer([SOUP], SKIPS, None, [first])
    assert pipeline.shared.tokens == second.tokens == tokenizer.encode(SHOTS)
    assert told(pipeline.answer([BEES], SKIPS, None, [second])[0][1]) == expected
    assert told(pipeline.answer([BEES], SKIPS, None, [first])[0][1]) == expected
    assert told(pipeline.answer([BEES], SKIPS)[0][1]) == expected


def test_without_worked_examples_nothing_is_shared(llama, tokenizer, calls):
    pipeline = Pipeline(llama, tokenizer)
    assert pipeline.shared_tokens == 0 and not calls
    assert [cache.tokens for cache in pipeline.new_caches(2)] == [[], []]


def test_worked_examples_longer_than_the_context(make_checkpoint, load, tokenizer, calls):
    """There is nothing to share, and every prompt says that it does not fit."""
    context = len(tokenizer.encode(SHOTS)) - 1
    pipeline = Pipeline(load(make_checkpoint(max_position_embeddings=context)), tokenizer, 8, SHOTS)
    assert pipeline.shared_tokens == 0 and not calls
    ((label, stages),) = pipeline.answer([ROBIN])
    assert label is None and all(set(stage.stops) == {"context"} for stage in stages)


def test_importance_of_the_stages_prompts(llama, tokenizer):
    """Over one prompt of every stage of every question, worked examples and all."""
    pipeline = Pipeline(llama, tokenizer, 6, SHOTS)
    answered = [stages for _, stages in pipeline.answer([ROBIN, BEES])]
    prompts = []
    for question, stages in zip([ROBIN, BEES], answered):
        texts = [stage.texts for stage in stages]
        for index in range(3):
            text = SHOTS + stage_prompts(index, question, texts[:index])[0]
            prompts.append(tokenizer.encode(text))
    expected = measure_importance(llama, prompts)
    found = importance_of(pipeline, [ROBIN, BEES], answered)
    assert torch.equal(found.similarity, expected.similarity)
    assert torch.equal(found.ratio, expected.ratio)


def test_there_is_one_skip_set_for_each_stage(llama, tokenizer):
    with pytest.raises(ValueError, match="skips: expected 3"):
        answer(llama, tokenizer, [ROBIN], SKIPS[:2])


@pytest.mark.parametrize("n", [0, -1])
def test_nothing_cannot_be_generated(llama, n):
    with pytest.raises(ValueError, match="max_new_tokens: expected 1 or more"):
        generate(llama, [3], n)


@pytest.mark.parametrize("index, texts", [(0, []), (1, [["A."]]), (2, [["A."], list("vwxyz")])])
def test_after_worked_examples_a_stage_ends_with_its_line(
    llama, tokenizer, monkeypatch, index, texts
):
    """At the newline, not at the most tokens; without examples it goes on behind it."""
    ids = tokenizer.encode(" Hen.\nQuiz", bos=False)
    line = tokenizer.encode(" Hen.\n", bos=False)
    assert ids[: len(line)] == line and len(set(ids)) == len(ids)
    following = dict(zip(ids, ids[1:] + [1]))  # then the end token

    def forward(self, tokens, *args, tails=(1,)):
        ends = torch.tensor(tails).cumsum(0) - sum(tails) - 1
        nexts = [[following.get(last, ids[0]) for last in row] for row in tokens[:, ends].tolist()]
        return 9.0 * torch.nn.functional.one_hot(torch.tensor(nexts), 320).float()

    monkeypatch.setattr(Llama, "forward", forward)
    rows = len(SOUP.options) if index == 1 else 1
    for shots, text, n in (("Hens lay.\n\n", "Hen.", len(line)), ("", "Hen.\nQuiz", len(ids))):
        pipeline = Pipeline(llama, tokenizer, 30, shots)
        (stage,) = pipeline.run_stage(index, [SOUP], [texts], [KVCache(llama, 1, 0)])
        assert [found.strip().removesuffix(".") for found in stage.texts] == [
            text.removesuffix(".")
        ] * rows
        assert stage.stops == ["eos"] * rows and stage.tokens == n * rows


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("budget", [0, 2, 3, 6])
def test_no_policy_ever_reads_a_hole(llama, tokenizer, name, budget):
    """Every policy in every stage, one cache, two questions; see `calls` for what is checked."""
    importance = measure_importance(llama, [ids_of(9)])
    setting = setting_of(importance, horizon=4)
    budgets = (budget, max(budget - 1, 0), budget)
    skips = [POLICIES[name](setting.at(i), stage) for i, stage in enumerate(budgets)]
    cache = KVCache(llama, 1, 0)
    for question in (SOUP, ROBIN):
        ((_, stages),) = answer(llama, tokenizer, [question], skips, Exit(3, 0.2), 8, [cache])
        if name != "adaskip":  # which watches the whole batch
            assert told(stages) == afresh(llama, tokenizer, question, skips, Exit(3, 0.2), 8)


# ---------------------------------------------------------------- prompts that do not fit


def test_a_prompt_that_does_not_fit_is_reported_not_a_crash(make_checkpoint, load, tokenizer):
    """At every length of the context each stage either writes or says `context`."""
    longest = len(tokenizer.encode(stage_prompts(0, SOUP, [])[0]))
    seen = set()
    for context in (8, longest - 1, longest, longest + 6, longest + 20, longest + 40):
        llama = load(make_checkpoint(max_position_embeddings=context))
        ((_, stages),) = answer(llama, tokenizer, [SOUP], SKIPS, None, 10)
        assert told(stages) == afresh(llama, tokenizer, SOUP, SKIPS)
        for stage in stages:
            if stage.prompt_tokens > context:
                seen.add(stage.name)
                assert "context" in stage.stops
            if stage.prompt_tokens > context and len(stage.texts) == 1:
                assert stage.tokens == stage.steps == 0 and stage.texts[0] in ("", ".")
    assert seen == {"recall", "analyze", "summarize"}


def test_one_that_does_not_fit_leaves_its_neighbours_alone(make_checkpoint, load, tokenizer):
    context = len(tokenizer.encode(stage_prompts(0, SOUP, [])[0])) - 1
    llama = load(make_checkpoint(max_position_embeddings=context))
    questions = [ROBIN, SOUP, BEES]
    found = answer(llama, tokenizer, questions, SKIPS, None, 4)
    for (_, stages), question in zip(found, questions):
        assert told(stages) == afresh(llama, tokenizer, question, SKIPS, None, 4)
    assert found[1][1][0].stops == ["context"] and found[0][1][0].stops == ["length"]


def test_an_answer_is_none_where_nothing_was_said(make_checkpoint, load, tokenizer):
    llama = load(make_checkpoint(max_position_embeddings=8))
    ((label, stages),) = answer(llama, tokenizer, [ROBIN])
    assert label is None and all(set(stage.stops) == {"context"} for stage in stages)
