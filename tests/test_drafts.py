"""Lossless decoding: a skip set drafts, all layers verify, and the text is the full model's.

Cases by hand run on a chain, whose tokens count up; a hook makes some of its drafts wrong.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from damage import question, write_questions

import eval as evaluation
import model as module
import search
from data.questions import Question
from generate import (
    Draft,
    Exit,
    Pipeline,
    Stepper,
    Tokenizer,
    Until,
    generate,
    generate_batch,
    prefill_group,
)
from model import InputError, KVCache, Llama, Skip
from skip import mask_of
from tools.clock import step_seconds
from tools.fast import RecordedStepper

COUNT = {i: (i + 1, 0.9) for i in range(30)}  # 0, 1, 2, ... 30
UNSURE = COUNT | {1: (2, 0.8), 2: (3, 0.3), 3: (4, 0.6)}
NONE = mask_of([], 3)
SKIPS = (mask_of([(0, 0), (1, 1)], 3), mask_of([(1, 0), (2, 1), (0, 1)], 3), NONE, ~NONE)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Debug mode, and every forward by its (bsz, seqlen, whether it skips)."""
    monkeypatch.setattr(module, "DEBUG", True)
    forward, seen = Llama.forward, []

    def checked(self, tokens, cache=None, pos=0, skip=None, *args, **kwargs):
        logits = forward(self, tokens, cache, pos, skip, *args, **kwargs)
        assert logits.isfinite().all(), "a cache slot was read that nothing had written"
        seen.append((*tokens.shape, skip is not None))
        return logits

    monkeypatch.setattr(Llama, "forward", checked)
    return seen


def drafter(*wrong: int) -> Skip:
    """Drafts as the chain goes on, but wrongly after the given tokens: one further."""

    def hook(i, layer, x, *rest):
        if i < 2:
            return x
        token = x.argmax(-1)  # the stream is the embedding, one component a token
        mistaken = torch.isin(token, torch.tensor(wrong, dtype=torch.long))
        return torch.where(mistaken[..., None], x.roll(1, -1), x)

    return Skip(NONE, hook)


def continued(llama, prompts, n, skip, eos=(), exit=None, stepper=None):
    groups = [(KVCache(llama, 1, 0), [list(prompt)]) for prompt in prompts]
    until = Until(n, frozenset(eos), exit=exit)
    return generate_batch(stepper or Stepper(llama), groups, until, skip)


def said(row):
    assert len(row.ids) == len(row.confidences)
    return row.ids, row.stop


# ---------------------------------------------------------------- by hand


def test_all_drafts_are_accepted(make_chain, calls):
    (row,) = continued(make_chain(COUNT), [[3]], 9, Draft(drafter(), 3))
    assert said(row) == (list(range(4, 13)), "length")
    assert (row.steps, row.accepted) == (2, 6), "4; 5 6 7 and 8; 9 10 11 and 12"
    draft, verify = (1, 1, True), (1, 4, False)
    assert calls == [(1, 1, False)] + 2 * [draft, draft, draft, verify]


def test_no_draft_is_accepted(make_chain):
    (row,) = continued(make_chain(COUNT), [[3]], 4, Draft(drafter(*range(30)), 3))
    assert said(row) == ([4, 5, 6, 7], "length")
    assert (row.steps, row.accepted) == (3, 0), "each round gives the full model's own token"


def test_drafts_are_accepted_up_to_the_first_that_is_wrong(make_chain):
    (row,) = continued(make_chain(COUNT), [[3]], 8, Draft(drafter(6), 4))
    assert said(row) == (list(range(4, 12)), "length")
    # 4; 5 6 and, for 8, 7; 8 9 10 11
    assert (row.steps, row.accepted) == (2, 2 + 4)


@pytest.mark.parametrize("end", [5, 6, 7, 8, 9])
def test_a_text_ends_at_an_end_token_inside_a_draft(make_chain, end):
    (row,) = continued(make_chain(COUNT), [[3]], 20, Draft(drafter(), 3), eos=[end])
    assert said(row) == (list(range(4, end)), "eos")


@pytest.mark.parametrize("n", range(1, 9))
def test_the_limit_may_be_inside_a_draft(make_chain, n):
    (row,) = continued(make_chain(COUNT), [[3]], n, Draft(drafter(), 3))
    assert said(row) == (list(range(4, 4 + n)), "length")


@pytest.mark.parametrize("prompt", range(1, 17))
def test_the_context_may_be_full_inside_a_draft(make_chain, prompt):
    llama = make_chain(COUNT, max_position_embeddings=16)
    ids = [29] * (prompt - 1) + [0]
    (row,) = continued(llama, [ids], 100, Draft(drafter(), 3))
    assert said(row) == (list(range(1, 18 - prompt)), "context")


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7, 0.85])
def test_the_exit_looks_at_verified_tokens_alone(make_chain, threshold):
    llama = make_chain(UNSURE)
    exit = Exit(2, threshold)
    (plain,) = continued(llama, [[0]], 12, None, exit=exit)
    for skip in (drafter(), drafter(2), drafter(1, 4)):
        (row,) = continued(llama, [[0]], 12, Draft(skip, 3), exit=exit)
        assert said(row) == said(plain)
        assert row.confidences == pytest.approx(plain.confidences, abs=1e-5)


def test_rows_accept_different_numbers_and_end_at_different_times(make_chain, calls):
    llama = make_chain(COUNT)
    prompts = [[3], [11, 12], [20]]
    rows = continued(llama, prompts, 20, Draft(drafter(5, 15, 16), 3), eos=[9, 25])
    assert [said(row) for row in rows] == [
        (list(range(4, 9)), "eos"),
        (list(range(13, 25)), "eos"),
        ([21, 22, 23, 24], "eos"),
    ]
    assert [bsz for bsz, _, _ in calls[3:]] == [3] * 4 + [2] * 4 + [1] * 8


# ---------------------------------------------------------------- on a model of random weights

PROMPTS = [[5, 9, 2], [7], [100, 3, 3, 250, 17, 90], [44, 39, 233, 60]]


@pytest.mark.parametrize("count", [0, 1, 3, 6])
@pytest.mark.parametrize("number", range(len(SKIPS)))
def test_whatever_is_skipped_the_text_is_the_full_models(llama, number, count):
    plain = continued(llama, PROMPTS, 20, None, eos=[12])
    drafted = continued(llama, PROMPTS, 20, Draft(SKIPS[number], count), eos=[12])
    assert [said(row) for row in drafted] == [said(row) for row in plain]
    for row, other in zip(drafted, plain):
        assert row.confidences == pytest.approx(other.confidences, abs=1e-4)
    for prompt, other in zip(PROMPTS, plain):
        alone = generate(llama, prompt, 20, 12, SKIPS[number], draft=count) if count else other
        assert said(alone) == said(other)


def test_a_draft_that_skips_nothing_is_always_accepted(llama):
    for row in continued(llama, PROMPTS, 20, Draft(None, 4)):
        assert row.accepted == 4 * row.steps and row.steps == 4


def test_verified_slots_hold_what_a_prefill_writes(llama, calls):
    """And so a later prompt that goes on with the text runs only what is new."""
    prompt = PROMPTS[2]
    cache = KVCache(llama, 1, 0)
    until = Until(11)
    (row,) = generate_batch(Stepper(llama), [(cache, [prompt])], until, Draft(SKIPS[1], 3))
    text = prompt + row.ids
    kept = cache.tokens
    assert kept[: len(text) - 1] == text[:-1] and len(kept) >= len(text) - 1
    fresh = KVCache(llama, 1, 0)
    prefill_group(llama, (fresh, [kept]))
    for mine, other in zip(cache.layers, fresh.layers):
        assert torch.allclose(mine[:, :, : len(kept)], other, atol=1e-5)
    calls.clear()
    with torch.inference_mode():
        logits, _ = prefill_group(llama, (cache, [[*text, 8, 9]]))
        alone, _ = prefill_group(llama, (KVCache(llama, 1, 0), [[*text, 8, 9]]))
    assert calls[0][1] <= 3, "the text's last token, and what is new"
    assert torch.allclose(logits, alone, atol=1e-4)


def test_drafts_are_not_recorded(llama):
    stepper = RecordedStepper(llama)
    plain = continued(llama, PROMPTS, 9, None)
    for skip in (SKIPS[0], Draft(SKIPS[0], 2), None):
        rows = continued(llama, PROMPTS, 9, skip, stepper=stepper)
        if not torch.is_tensor(skip):
            assert [said(row) for row in rows] == [said(row) for row in plain]
    assert len(stepper.recorded) == 1


def test_drafts_are_greedy(llama):
    with pytest.raises(ValueError, match="temperature"):
        generate(llama, [5], 3, skip=SKIPS[0], temperature=0.5, draft=2)


# ---------------------------------------------------------------- time


def test_the_time_of_drafts_and_verifications_is_that_on_the_clock(make_chain, monkeypatch):
    """On a clock of our own: count x median of each kind, summed, is what the whole took; a median
    over all steps would be a draft's."""
    llama = make_chain(COUNT)
    clock = [0.0]
    forward = Llama.forward

    def slow(self, tokens, cache=None, pos=0, skip=None, *args, **kwargs):
        clock[0] += 1 if skip is not None else 6
        return forward(self, tokens, cache, pos, skip, *args, **kwargs)

    monkeypatch.setattr(Llama, "forward", slow)
    monkeypatch.setattr("generate.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    (row,) = continued(llama, [[3]], 9, Draft(drafter(), 3))
    timings = row.timings
    assert timings.step_s == [1, 1, 1, 6] * 2
    assert timings.prefill_s + timings.decode_s == clock[0] == 6 + 2 * 9
    measured = {"step_s": [[6, 5, 1]], "verify_s": [{"3": 6}]}
    point = search.Point((2,), 0.0, (3,))
    assert row.steps * step_seconds(measured, point, 0) == timings.decode_s
    assert step_seconds(measured, search.Point((1,)), 0) == 5
    assert step_seconds(measured, search.Point((2,), 0.0, (0,)), 0) == 1


# ---------------------------------------------------------------- the commands


@pytest.fixture
def asked(tmp_path, folder, monkeypatch, capsys):
    """asked("eval", *flags) runs a command on a tiny checkpoint: what it wrote and printed."""
    write_questions(tmp_path / "test.jsonl", [question(i) for i in range(6)])
    monkeypatch.setattr("search.ROUNDS", 2)

    def run(command, *flags):
        base = ["--model", str(folder), "--data", str(tmp_path / "test.jsonl")]
        base += ["--max-new-tokens", "6", "--limit", "4"]
        out = tmp_path / f"{command}.json"
        base += ["--out" if command == "search" else "--json", str(out)]
        monkeypatch.setattr("sys.argv", [command, *base, *flags])
        {"eval": evaluation, "search": search}[command].main()
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_the_drafted_run_comes_last_and_changes_no_text(asked):
    report, printed = asked("eval", "--stage-budgets", "2,3,1", "--draft", "3,0,2")
    full, lite, drafted = report["runs"]
    assert [run["method"] for run in report["runs"]] == ["full", "litestage", "litestage-draft"]
    assert (full["draft"], lite["draft"], drafted["draft"]) == (None, None, [3, 0, 2])
    assert drafted["budgets"] == [2, 0, 1], "a stage that does not draft skips nothing"
    assert drafted["answers"] == full["answers"] and drafted["texts_changed"] == 0
    assert [stage["tokens"] for stage in drafted["stages"]] == [
        stage["tokens"] for stage in full["stages"]
    ]
    shares = [stage["accepted"] for stage in drafted["stages"]]
    assert shares[1] is None and all(0 <= share <= 1 for share in shares[::2])
    assert "drafts 3,0,2, accepted" in printed and "texts changed in 0 of 4" in printed
    by_all = full["macs"]
    a_round = 3 * lite["stages"][0]["macs"] + 4 * by_all  # three drafts, then four tokens verified
    assert drafted["stages"][0]["macs"] == pytest.approx(a_round / (1 + 3 * shares[0]))
    assert drafted["stages"][1]["macs"] == by_all < drafted["macs"]


def test_a_search_for_drafts_writes_a_plan_that_drafts(asked, tmp_path):
    plan, printed = asked("search", "--draft", "2,3,2", "--step", "2")
    assert len(plan["draft"]) == 3 and set(plan["draft"]) <= {0, 2, 3}
    assert "the texts are the full model's" in printed
    for trial in plan["trials"]:
        assert trial["accuracy"] == plan["full"]["accuracy"] and not trial["abandoned"]
        for budget, count in zip(trial["budgets"], trial["draft"]):
            assert bool(budget) == bool(count)
    tried = [str([t["stage"], t["budgets"], t["draft"]]) for t in plan["trials"]]
    assert len(tried) == len(set(tried))
    again, printed = asked("search", "--draft", "2,3,2", "--step", "2")
    assert again == plan and "\n0 question-stages generated" in printed
    plan |= {"draft": [2, 0, 3], "budgets": [2, 0, 4]}
    (tmp_path / "drafts.json").write_text(json.dumps(plan))
    report, _ = asked("eval", "--plan", str(tmp_path / "drafts.json"))
    assert [run["method"] for run in report["runs"]] == ["full", "litestage-draft"]
    assert report["runs"][1]["texts_changed"] == 0
    report, _ = asked("eval", "--plan", str(tmp_path / "drafts.json"), "--compare", "2")
    assert report["runs"][-1]["method"] == "litestage-draft"
    with pytest.raises(InputError, match="--draft 0: drafts.json drafts"):
        asked("eval", "--plan", str(tmp_path / "drafts.json"), "--draft", "0")


@pytest.mark.parametrize("draft", ["[2, 2]", '"2"', "[2, -1, 2]", "[2, true, 2]", "5"])
def test_a_plan_whose_drafts_are_no_counts_is_refused(asked, tmp_path, draft):
    plan, _ = asked("search", "--step", "3")
    plan["draft"] = json.loads(draft)
    (tmp_path / "drafts.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="'draft' must be null or 3 counts"):
        asked("eval", "--plan", str(tmp_path / "drafts.json"))


@pytest.mark.parametrize(
    "command, flags, line",
    [
        ("eval", ("--draft", "2"), "--draft: expected budgets"),
        ("eval", ("--draft", "2", "--method", "random"), "found --method random"),
        ("search", ("--draft", "auto", "--epsilon", "0.1,0.2"), "one --epsilon"),
        ("search", ("--draft", "auto", "--refine", "1"), "no --refine"),
    ],
)
def test_what_does_not_go_with_drafts_is_refused(asked, command, flags, line):
    with pytest.raises(InputError, match=line):
        asked(command, *flags)


def test_questions_side_by_side_keep_their_texts(llama, folder):
    pipeline = Pipeline(llama, Tokenizer.from_pretrained(folder), 8)
    questions = []
    for i in range(3):
        questions.append(Question(str(i), f"Which, {i}?", ("A", "B"), ("a", "b"), "A"))
    skips = [Draft(SKIPS[0], 2), Draft(SKIPS[1], 3), Draft(SKIPS[3], 1)]
    together = pipeline.answer(questions, skips)
    for asked, (label, stages) in zip(questions, together):
        ((alone, theirs),) = pipeline.answer([asked])
        assert label == alone
        for stage, other in zip(stages, theirs):
            assert (stage.texts, stage.stops) == (other.texts, other.stops)
