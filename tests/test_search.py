"""The search's logic, on an evaluator that answers from a table, and the search itself."""

import json

import pytest
from damage import question, write_questions

import search
from data.cli import Journal
from data.questions import parse_question as read_question
from data.report import print_full
from generate import Pipeline, Tokenizer
from model import Llama
from search import best, greedy, refine
from skip import mask_of


def trial(budgets, threshold, accuracy, latency, abandoned=False):
    return {
        "budgets": list(budgets),
        "threshold": threshold,
        "accuracy": accuracy,
        "latency_s": latency,
        "abandoned": abandoned,
    }


class Table:
    """Accuracy is 1 less the stages' losses, latency the sum of the stages' times."""

    def __init__(self, loss, time, threshold_loss=None):
        self.loss, self.time, self.threshold_loss = loss, time, threshold_loss or {}
        self.asked = []

    def __call__(self, point, target):
        budgets, threshold = point
        self.asked.append(point)
        accuracy = 1 - sum(self.loss[stage].get(b, 1) for stage, b in enumerate(budgets))
        accuracy -= self.threshold_loss.get(threshold, 0)
        latency = sum(self.time[stage][b] for stage, b in enumerate(budgets)) - threshold / 100
        return trial(budgets, threshold, accuracy, latency)


NONE = {b: 0.0 for b in range(6)}
FLAT = {b: 1.0 for b in range(6)}


def test_a_scan_goes_on_behind_budgets_that_fail():
    # the paper's figure: 1 and 2 miss the target, 0, 3 and 4 meet it, 4 is the fastest of them
    loss = {0: 0, 1: 0.2, 2: 0.2, 3: 0, 4: 0, 5: 0.3}
    times = {0: 10, 1: 9, 2: 8, 3: 7, 4: 6, 5: 5}
    table = Table([loss, NONE, NONE], [times, FLAT, FLAT])
    assert greedy(table, [0, 1, 2], list(range(6)), 0.99, [0.0]) == ((4, 0, 0), 0.0)


def test_more_skips_that_are_slower_are_not_chosen():
    # skipping lengthens outputs: 5 skips take longer than none
    times = {0: 10, 1: 9, 2: 8, 3: 8.5, 4: 9.5, 5: 11}
    table = Table([NONE, NONE, NONE], [times, FLAT, FLAT])
    assert greedy(table, [0, 1, 2], list(range(6)), 0.99, [0.0]) == ((2, 0, 0), 0.0)


def test_stages_are_scanned_in_order_with_earlier_choices_fixed_and_later_ones_at_zero():
    times = {b: 10.0 - b for b in range(3)}
    loss = {0: 0, 1: 0, 2: 0.5}
    table = Table([loss, loss, loss], [times, times, times])
    point = greedy(table, [1, 2, 0], [0, 1, 2], 0.99, [0.0])
    assert point == ((1, 1, 1), 0.0)
    asked = [budgets for budgets, _ in table.asked]
    assert asked[:9] == [
        *[(0, 0, 0), (0, 1, 0), (0, 2, 0)],
        *[(0, 1, 0), (0, 1, 1), (0, 1, 2)],
        *[(0, 1, 1), (1, 1, 1), (2, 1, 1)],
    ]


def test_a_stage_of_which_no_budget_meets_the_target_keeps_zero():
    lost = {b: 0.5 for b in range(6)}
    table = Table([lost, NONE, NONE], [FLAT, {b: 10 - b for b in range(6)}, FLAT])
    heard = []
    point = greedy(
        table,
        [1, 0, 2],
        list(range(6)),
        0.9,
        [0.0],
        lambda stage, *rest: heard.append((stage, rest[1])),
    )
    assert point == ((0, 0, 0), 0.0)
    assert [chosen for _, chosen in heard] == [None] * 4
    assert [stage for stage, _ in heard] == [1, 0, 2, None]


def test_budget_zero_is_chosen_when_it_is_the_fastest():
    table = Table([NONE] * 3, [{b: 1.0 + b for b in range(6)}] * 3)
    assert greedy(table, [0, 1, 2], list(range(6)), 0.5, [0.0])[0] == (0, 0, 0)


def test_of_equally_fast_budgets_the_one_that_skips_less_is_chosen():
    trials = [trial((b, 0, 0), 0.0, 1.0, 5.0) for b in (3, 1, 2)]
    assert best(trials, 0.9)["budgets"] == [1, 0, 0]


def test_an_abandoned_trial_never_meets_the_target_whatever_its_bound():
    assert best([trial((5, 0, 0), 0.0, 1.0, 1.0, abandoned=True)], 0.5) is None


def test_a_target_that_is_exactly_met_is_met():
    assert best([trial((1, 0, 0), 0.0, 0.9, 1.0)], 1 - 0.1) is not None


def test_the_threshold_is_chosen_last_at_the_budgets_found():
    table = Table([NONE] * 3, [{b: 9.0 - b for b in range(6)}] * 3, {0.8: 0.5})
    point = greedy(table, [0, 1, 2], list(range(6)), 0.9, [0.5, 0.0, 0.7, 0.8])
    assert point == ((5, 5, 5), 0.7)
    assert all(threshold == 0.5 for _, threshold in table.asked[:18])


def test_refine_leaves_a_greedy_choice_for_a_faster_pair():
    def table(point, target):
        # the two stages share what may be lost; the second one gains more by it
        a, b, _ = point[0]
        return trial(point[0], 0.0, 1.0 if a + b <= 2 else 0.0, 30 - a - 5 * b)

    start = ((2, 0, 0), 0.0)
    found = refine(table, start, [0, 1, 2], 0.9, lambda: True)
    assert found[0] != start[0] and table(found, 0)["latency_s"] < 28


def test_refine_tries_nothing_more_when_time_is_up():
    start, left, tried = ((1, 0, 0), 0.0), iter([True, True, True, True, False, False]), []

    def table(point, target):
        tried.append(point)
        return trial(point[0], 0.0, 1.0, 30 - point[0][2])

    assert refine(table, start, [0, 1], 0.9, lambda: next(left, False)) != start
    assert len(tried) == 4, "the start and three neighbours"
    assert refine(table, start, [0, 1], 0.9, lambda: False) == start


def test_a_torn_last_line_of_the_journal_is_dropped(tmp_path):
    path = tmp_path / "journal"
    first = Journal(path)
    first.append("trial", {"budgets": [1, 2, 3]})
    first.file.write(b'{"trial": {"budg')
    first.file.close()
    again = Journal(path)
    assert again.find("trial") == [{"budgets": [1, 2, 3]}]
    again.append("trial", {"budgets": [4, 5, 6]})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["trial"]["budgets"] for line in lines] == [[1, 2, 3], [4, 5, 6]]


@pytest.fixture
def questions_file(tmp_path):
    write_questions(tmp_path / "valid.jsonl", [question(i) for i in range(8)])
    return tmp_path / "valid.jsonl"


@pytest.fixture
def searched(tmp_path, folder, questions_file, monkeypatch, capsys):
    """Runs the command on a tiny checkpoint; returns a function of extra flags."""

    def run(*flags):
        out = tmp_path / "plan.json"
        base = ["--model", str(folder), "--data", str(questions_file), "--out", str(out)]
        limits = ["--max-new-tokens", "4", "--step", "2", "--limit", "6"]
        monkeypatch.setattr("sys.argv", ["search.py", *base, *limits, *flags])
        search.main()
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_a_plan_has_what_the_format_says(searched):
    plan, printed = searched("--epsilon", "0,1")
    assert plan["format"] == 1 and plan["split"] == "valid" and plan["n"] == 6
    assert {"config", "weights", "tokenizer"} <= set(plan["model"])
    assert len(plan["budgets"]) == 3
    assert sorted(map(tuple, plan["ranking"])) == [(i, s) for i in range(3) for s in range(2)]
    for one in plan["trials"]:
        assert {"stage", "budget", "budgets", "accuracy", "latency_s", "tokens"} <= set(one)
    assert [point["epsilon"] for point in plan["frontier"]] == [0, 1]
    assert "slowest stage first" in printed


def test_a_second_run_takes_every_trial_from_the_journal(searched, monkeypatch):
    plan, _ = searched("--epsilon", "0")
    monkeypatch.setattr(search.Evaluator, "stages", None)  # generating would now fail
    again, printed = searched("--epsilon", "0")
    assert again["budgets"] == plan["budgets"] and again["trials"] == plan["trials"]
    assert "0 question-stages generated" in printed


def test_trials_are_abandoned_only_when_the_target_is_out_of_reach(
    folder, questions_file, searched
):
    plan, _ = searched("--epsilon", "0")
    for one in plan["trials"]:
        if one["abandoned"]:
            assert one["accuracy"] < plan["full"]["accuracy"] - plan["epsilon"]


@pytest.mark.parametrize("static", [None, {}], ids=["plain", "recorded"])
def test_step_times_are_measured_in_every_stage_under_every_mask(folder, static):
    """With and without recorded steps; how long they take is the machine's affair."""
    pipeline = Pipeline(Llama.from_pretrained(folder), Tokenizer.from_pretrained(folder), 8)
    pipeline.static = static
    asked = read_question(question(0))
    ((_, stages),) = pipeline.answer([asked])
    masks = [mask_of([], 3), mask_of([(i, sub) for i in range(3) for sub in (0, 1)], 3)]
    times = search.time_steps(pipeline, asked, stages, masks)
    assert [len(row) for row in times] == [2, 2, 2] and min(map(min, times)) > 0


def test_step_times_between_the_measured_budgets_are_interpolated(folder, monkeypatch):
    """And a slow round does not count; here a step takes 10 - its budget, and one round tenfold."""
    slow = iter([1, 1, 10, 1, 1])
    monkeypatch.setattr(search, "ROUNDS", 5)
    monkeypatch.setattr(search, "KNOTS", 3)

    def times(pipeline, question, stages, masks):
        assert [int(mask.sum()) for mask in masks] == [0, 3, 6]
        factor = next(slow)
        return [[factor * (10.0 - int(mask.sum())) for mask in masks]] * 2 + [[float("nan")] * 3]

    monkeypatch.setattr(search, "time_steps", times)
    pipeline = Pipeline(Llama.from_pretrained(folder), Tokenizer.from_pretrained(folder), 8)
    measured = search.measure(pipeline, [read_question(question(i)) for i in range(3)], "sublayer")
    assert measured["step_s"][0] == pytest.approx([10, 9, 8, 7, 6, 5, 4])
    assert measured["step_s"][2] == [0] * 7, "no prompt of that stage fits the context"
    assert len(measured["token_s"]) == 3 and measured["noise"] >= 0


def test_stages_that_are_equally_slow_within_the_noise_are_named(capsys):
    full = {"accuracy": 1, "latency_s": 6, "stage_s": [1.01, 4, 1]}
    print_full(full, [1, 0, 2], noise=0.02)
    said = capsys.readouterr().out
    assert "recall and summarize are equally slow" in said and "analyze and" not in said
    print_full(full, [1, 0, 2], noise=0.005)
    assert "equally slow" not in capsys.readouterr().out


def test_an_exit_that_gains_no_more_than_the_noise_is_not_chosen():
    """Here a threshold of 0.7 saves 0.007 of 12 seconds, and 0.5 nearly as much."""
    table = Table([NONE] * 3, [{b: 9.0 - b for b in range(6)}] * 3)
    asked = table, [0, 1, 2], list(range(6)), 0.9, [0.5, 0.0, 0.7]
    assert greedy(*asked, noise=0.01) == ((5, 5, 5), 0.0)
    assert greedy(*asked, noise=0.0) == ((5, 5, 5), 0.7)


def test_of_trials_equally_fast_within_the_noise_the_most_accurate_is_chosen():
    trials = [
        trial((b, 0, 0), 0.0, accuracy, 10 - b / 10) for b, accuracy in enumerate((1, 1, 0.9))
    ]
    assert best(trials, 0.8)["budgets"] == [2, 0, 0]
    assert best(trials, 0.8, noise=0.05)["budgets"] == [0, 0, 0]
