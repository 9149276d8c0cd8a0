"""Plan files: both formats, what is refused, and what the demo ships."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from damage import edit_json

from generate import Exit
from model import InputError
from skip import Importance, Setting, litestage, rank
from tools import plan as plans
from tools.plan import (
    check_budgets,
    checkpoint_digests,
    conditions,
    differences,
    read_plan,
    store_setting,
    write_plans,
)

DEMO = ROOT / "data" / "demo"


def make_plan(path, folder, ranking_by="similarity", **changes):
    importance = Importance(torch.rand(3, 2).double(), torch.ones(3, 2).double())
    rankings = [rank(importance.similarity)[::-1] for _ in range(3)]
    shared = {
        "model": {"name": "m", **plans.checkpoint_digests(folder)},
        **conditions("demo", DEMO / "valid.jsonl", 0, "", 64),
        "granularity": "sublayer",
        "full": {"accuracy": 1.0, "latency_s": 2.0},
        **store_setting(Setting(importance, rankings, "sublayer"), ranking_by),
    }
    own = {"epsilon": 0.01, "budgets": [3, 1, 2], "exit": {"window": 4, "threshold": 0.6}}
    own |= {"draft": None, "chosen": {"accuracy": 1.0, "latency_s": 1.0}, "trials": []}
    other = own | {"epsilon": 0.1, "budgets": [4, 2, 2], "exit": None}
    write_plans(path, shared, [own | changes, other])
    return importance, rankings


def test_a_plan_is_read_as_it_was_written(tmp_path, folder):
    path = tmp_path / "plan.json"
    importance, rankings = make_plan(path, folder, "loss")
    stored = json.loads(path.read_text())
    assert stored["format"] == 2 and stored["ranking_by"] == "loss" and stored["draft"] is None
    plan = read_plan(path, folder, 3)
    assert torch.equal(plan.importance.similarity, importance.similarity)
    assert plan.rankings == rankings and plan.method == "litestage-loss"
    assert plan.budgets == [3, 1, 2] and plan.exit == Exit(4, 0.6)
    assert [choice.budgets for choice in plan.frontier] == [[3, 1, 2], [4, 2, 2]]
    other = read_plan(tmp_path / "plan-0.1.json", folder, 3)
    assert other.budgets == [4, 2, 2] and other.exit is None and len(other.frontier) == 1


def test_each_stage_skips_by_its_own_ranking(tmp_path, folder):
    path = tmp_path / "plan.json"
    make_plan(path, folder)
    everywhere = [[layer, sub] for layer in range(3) for sub in (0, 1)]
    edit_json(path, rankings=[everywhere, everywhere[::-1], everywhere])
    setting = read_plan(path, folder, 3).setting(0)
    assert litestage(setting.at(0), 1).nonzero().tolist() == [[0, 0]]
    assert litestage(setting.at(1), 1).nonzero().tolist() == [[2, 1]]


def test_the_first_format_has_one_ranking_for_all_stages(tmp_path, folder):
    path = tmp_path / "plan.json"
    importance, _ = make_plan(path, folder)
    stored = json.loads(path.read_text()) | {"format": 1}
    for key in ("rankings", "ranking_by", "draft", "shots", "max_new_tokens", "data_digest"):
        del stored[key]
    path.write_text(json.dumps(stored))
    plan = read_plan(path, folder, 3)
    assert plan.rankings == [rank(importance.similarity)] * 3 and plan.method == "litestage"


@pytest.mark.parametrize("name", ["plan", "plan-0.01", "plan-0.03"])
def test_the_demos_plans_are_of_its_model(name):
    stored = json.loads((DEMO / f"{name}.json").read_text())
    plan = read_plan(DEMO / f"{name}.json", DEMO / "model", 16)
    assert plan.budgets == stored["budgets"] and len(plan.rankings) == 3
    ranking = stored["ranking"] if stored["format"] == 1 else stored["rankings"][0]
    assert [list(sub) for sub in plan.rankings[0]] == ranking


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": 3}, "'format' must be 1 or 2, found 3"),
        ({"rankings": [[[0, 0]]] * 3}, "'rankings' must name each of 6 sub-layers once a stage"),
        ({"ranking_by": "taste"}, "'ranking_by' must be similarity or loss"),
        ({"budgets": [1, 2]}, r"'budgets' \[1, 2\]: expected 3 numbers from 0 to 6, a stage each"),
        ({"max_new_tokens": "64"}, "'max_new_tokens' must be of type int"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path, folder, changes, words):
    path = tmp_path / "plan.json"
    make_plan(path, folder)
    edit_json(path, **changes)
    with pytest.raises(InputError, match=f"plan.json: {words}"):
        read_plan(path, folder, 3)


def test_too_few_rankings_are_refused(tmp_path, folder):
    path = tmp_path / "plan.json"
    make_plan(path, folder)
    edit_json(path, rankings=json.loads(path.read_text())["rankings"][:2])
    with pytest.raises(InputError, match="'rankings': expected 3, one a stage, found 2"):
        read_plan(path, folder, 3)


def test_what_differs_is_a_line_each(tmp_path, folder):
    path = tmp_path / "plan.json"
    make_plan(path, folder)
    plan = read_plan(path, folder, 3)
    same = conditions("demo", DEMO / "valid.jsonl", 0, "", 64)
    assert differences(plan, same, DEMO / "test.jsonl") == []
    now = conditions("fresh.jsonl", DEMO / "test.jsonl", 4, "Example.", 32)
    assert differences(plan, now, DEMO / "test.jsonl") == [
        "plan.json was found for other questions (demo)",
        "plan.json was found with --shots 0, used with 4",
        "plan.json was found with --max-new-tokens 64, used with 32",
    ]
    tested = differences(plan, same, DEMO / "valid.jsonl")
    assert tested == ["plan.json was found on the very questions under test"]


def test_budgets_are_one_a_stage():
    check_budgets("--stage-budgets", [0, 6, 1], 3)
    for wrong in ([1, 2], [1, 2, 7], [1, -1, 2], [1, 2, 3, 4], "111", [True, 1, 1]):
        with pytest.raises(InputError):
            check_budgets("--stage-budgets", wrong, 3)


def test_another_setting_of_the_tokenizer_is_another_model(folder, tmp_path):
    """add_bos_token changes every prompt, whatever tokenizer.json says."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = checkpoint_digests(copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    after = checkpoint_digests(copy)
    assert {key for key in before if before[key] != after[key]} == {"tokenizer_settings"}
