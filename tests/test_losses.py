"""The ranking by loss: nats per token and time that a sub-layer costs, on top of others."""

import json
import math

import pytest
import torch
from conftest import ROOT

from data.prompts import STAGES
from data.questions import read_questions
from generate import generate
from model import Llama
from skip import Importance, Setting, mask_of, rank, rank_by_loss
from tools.journal import Journal
from tools.losses import SharedLoss, SkipLoss, rank_stages, skip_loss, sublayer_seconds
from tools.setup import answer_all, load

EVERY = [(layer, sub) for layer in range(3) for sub in (0, 1)]
EVEN = torch.ones(3, 2)


def total(costs: dict):
    """A loss that adds up what each skipped sub-layer costs."""

    def loss(mask):
        return sum(costs.get(tuple(where), 0.0) for where in mask.nonzero().tolist())

    return loss


def test_what_costs_least_goes_first():
    costs = {where: cost for where, cost in zip(EVERY, (5.0, 1.0, 4.0, 2.0, 6.0, 3.0))}
    assert rank_by_loss(total(costs), EVEN, most=6) == [
        (0, 1), (1, 1), (2, 1), (1, 0), (0, 0), (2, 0)
    ]  # fmt: skip


def test_it_is_loss_per_time():
    costs = dict.fromkeys(EVERY, 1.0)
    seconds = torch.tensor([[1.0, 4.0]] * 3)  # an FFN is four attentions
    ranking = rank_by_loss(total(costs), seconds, most=6)
    assert [sub for _, sub in ranking] == [1, 1, 1, 0, 0, 0]
    costs = {where: (1.0, 5.0)[where[1]] for where in EVERY}  # and costs five: not worth it
    assert [sub for _, sub in rank_by_loss(total(costs), seconds, most=6)] == [0, 0, 0, 1, 1, 1]


def test_of_two_that_stand_in_for_each_other_one_stays():
    twins = {(0, 0), (2, 0)}

    def loss(mask):
        gone = {tuple(where) for where in mask.nonzero().tolist()}
        return 0.1 * len(gone - twins) + 9.0 * (twins <= gone)

    ranking = rank_by_loss(loss, EVEN, most=6)
    assert ranking[0] in twins  # free as long as the other is there
    assert ranking[-1] in twins  # and then the dearest of all


def test_the_rest_follows_as_measured():
    costs = {where: cost for where, cost in zip(EVERY, (5.0, 1.0, 4.0, 2.0, 6.0, 3.0))}
    assert rank_by_loss(total(costs), EVEN, most=2, few=1) == rank_by_loss(total(costs), EVEN, 6)


@pytest.fixture(scope="module")
def silent(make_checkpoint):
    """A model whose middle attention adds nothing."""

    def edit(tensors):
        tensors["model.layers.1.self_attn.o_proj.weight"].zero_()

    return Llama.from_pretrained(make_checkpoint(edit=edit))


def loss_of(model: Llama, prompt: list[int], n: int) -> SkipLoss:
    from model import KVCache

    ids = generate(model, prompt, n).ids
    cache = KVCache(model, 1, len(prompt) + n)
    with torch.inference_mode():
        model(torch.tensor([prompt]), cache)
    tokens = torch.tensor([ids])
    return SkipLoss(model, cache, len(prompt), tokens, torch.ones_like(tokens, dtype=torch.bool))


def test_a_sublayer_that_adds_nothing_costs_nothing_and_goes_first(silent):
    loss = loss_of(silent, [5, 9, 33], 6)
    assert loss(mask_of([(1, 0)], 3)) == pytest.approx(0, abs=1e-6)
    assert loss(mask_of([(0, 1)], 3)) > 1e-3
    assert rank_by_loss(loss, EVEN, most=3)[0] == (1, 0)


def test_the_loss_is_that_of_decoding_step_by_step(silent):
    """Teacher forcing in one forward is what decoding under the skip set would have said."""
    prompt = [5, 9, 33]
    loss = loss_of(silent, prompt, 6)
    mask = mask_of([(0, 1), (2, 0)], 3)
    from model import KVCache

    total = 0.0
    caches = KVCache(silent, 1, 9), KVCache(silent, 1, 9)
    with torch.inference_mode():
        for cache in caches:
            silent(torch.tensor([prompt]), cache)
        for i, token in enumerate(loss.tokens[0].tolist()):
            full, skipped = (
                silent(torch.tensor([[token]]), cache, 3 + i, skip)[0, 0].log_softmax(-1)
                for cache, skip in zip(caches, (None, mask))
            )
            total += (full.exp() * (full - skipped)).sum().item()
    assert loss(mask) == pytest.approx(total / 6, rel=1e-4)


def test_padding_does_not_count(silent):
    loss = loss_of(silent, [5, 9, 33], 6)
    padded = torch.cat((loss.tokens, torch.zeros(1, 0, dtype=torch.long)), 1)
    counted = torch.ones_like(padded, dtype=torch.bool)
    counted[0, 4:] = False
    with torch.inference_mode():
        short = SkipLoss(silent, loss.cache, 3, loss.tokens[:, :4], counted[:, :4])
        masked = SkipLoss(silent, loss.cache, 3, padded, counted)
    mask = mask_of([(0, 1)], 3)
    assert masked(mask) == pytest.approx(short(mask), rel=1e-5)


@pytest.fixture(scope="module")
def demo():
    pipeline = load("demo", threads=1)
    questions = read_questions(ROOT / "data/demo/valid.jsonl")[:2]
    return pipeline, questions, answer_all(pipeline, questions)


def test_every_stage_has_its_own_ranking_and_its_own_texts(demo):
    pipeline, questions, answered = demo
    for index, rows in enumerate((2, 2 * len(questions[0].labels), 2)):
        loss = skip_loss(pipeline, index, questions, answered)
        assert len(loss.tokens) == rows
        longest = max(len(row.ids) for stages in answered for row in stages[index].rows)
        assert loss.tokens.shape[1] == longest
        assert loss(mask_of([], 16)) == pytest.approx(0, abs=1e-6)
        assert loss(mask_of([(0, 1)], 16)) > loss(mask_of([(13, 1)], 16))  # the demo's upper half


def test_ranks_share_the_questions_out_and_find_the_same_loss(demo, monkeypatch):
    import tools.losses

    pipeline, questions, answered = demo
    mask = mask_of([(0, 1), (2, 0)], 16)
    alone = SharedLoss(pipeline, 1, questions, answered)
    assert alone(mask) == pytest.approx(skip_loss(pipeline, 1, questions, answered)(mask))
    parts = []
    for number in range(3):  # the third has no question
        monkeypatch.setattr(tools.losses, "rank", lambda number=number: (number, 3))
        monkeypatch.setattr(tools.losses, "gather", lambda part: parts.append(part) or [(1.0, 1)])
        SharedLoss(pipeline, 1, questions, answered)(mask)
    assert parts[2] == (0.0, 0) and parts[0][1] > 0 and parts[1][1] > 0
    monkeypatch.setattr(tools.losses, "gather", lambda part: parts)
    assert alone(mask) == pytest.approx(sum(p[0] for p in parts) / sum(p[1] for p in parts))
    monkeypatch.undo()
    assert alone(mask) == pytest.approx(sum(p[0] for p in parts) / sum(p[1] for p in parts))


def test_losses_are_measured_once_and_survive(demo, tmp_path, monkeypatch):
    import tools.losses

    monkeypatch.setattr(tools.losses, "SHARE", 0.1)
    monkeypatch.setattr(tools.losses, "ROUNDS", 1)
    pipeline, questions, answered = demo
    first = rank_stages(pipeline, questions, answered, Journal(tmp_path / "j"))
    assert len(first) == len(STAGES)
    for ranking in first:
        assert sorted(ranking) == sorted(rank(torch.zeros(16, 2)))  # all of them, once

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(SkipLoss, "__call__", refuse)
    monkeypatch.setattr(tools.losses, "time_steps", refuse)
    assert rank_stages(pipeline, questions, answered, Journal(tmp_path / "j")) == first


def test_the_time_of_a_sublayer_is_above_zero(demo):
    pipeline, questions, answered = demo
    said = [[stage.texts for stage in stages] for stages in answered]
    step_s, seconds = sublayer_seconds(pipeline, questions, said)
    assert seconds.shape == (3, 16, 2) and bool((seconds > 0).all())
    assert math.isfinite(seconds.sum().item())
    assert step_s.shape == (3,) and bool((step_s > 0).all())


def test_rankings_are_compared_at_the_same_time_saved(tmp_path, monkeypatch, capsys):
    from tools import rankings

    plans = [str(ROOT / "data/demo" / name) for name in ("plan.json", "plan-loss.json")]
    file = tmp_path / "rankings.json"
    argv = ["rankings", "--limit", "1", "--plan", *plans, "--json", str(file), "--threads", "1"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(rankings, "SHARES", (0.1, 0.3))
    rankings.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["ranking"] for row in rows] == ["similarity", "loss"] * 2
    assert all(len(row["loss"]) == 3 and min(row["loss"]) >= -1e-6 for row in rows)
    for less, more in zip(rows[:2], rows[2:]):  # more time saved, more sub-layers skipped
        assert all(0 < few < many for few, many in zip(less["budgets"], more["budgets"]))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and max(map(len, printed)) <= 80


def test_a_budget_saves_at_least_its_share():
    from tools.rankings import budget_saving

    ranking = [[(0, 0), (1, 1), (1, 0), (0, 1)]]
    setting = Setting(Importance(torch.zeros(2, 2), torch.ones(2, 2)), ranking)
    seconds = torch.tensor([[0.1, 0.4], [0.1, 0.2]])  # skipped in turn: 0.1, 0.3, 0.4, 0.8
    found = [budget_saving(share, setting, 1.0, seconds) for share in (0.0, 0.1, 0.2, 0.35, 0.9)]
    assert found == [0, 1, 2, 3, 4]
