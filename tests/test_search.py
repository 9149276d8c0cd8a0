"""The search's logic, on an evaluator that answers from a table, and the search itself."""

import json
from types import SimpleNamespace

import pytest
import torch
from damage import question, write_questions

import search
from data.questions import parse_question as read_question
from generate import Pipeline, Stepper, Tokenizer
from model import InputError, Llama
from search import Point, Search, best
from skip import mask_of
from tools import clock, trials
from tools.fast import RecordedStepper
from tools.journal import Journal
from tools.refine import refine
from tools.tables import print_full
from tools.trials import Answers


def trial(budgets, threshold, accuracy, latency, abandoned=False):
    return {
        "budgets": list(budgets),
        "threshold": threshold,
        "accuracy": accuracy,
        "latency_s": latency,
        "abandoned": abandoned,
        "tokens": 1,
        "exit_rate": 0.0,
    }


class Table:
    """Accuracy is 1 less the stages' losses, latency the sum of the stages' times."""

    def __init__(self, loss, time, threshold_loss=None):
        self.loss, self.time, self.threshold_loss = loss, time, threshold_loss or {}
        self.asked = []

    def __call__(self, point, target):
        budgets, threshold, _ = point
        self.asked.append(point[:2])
        accuracy = 1 - sum(self.loss[stage].get(b, 1) for stage, b in enumerate(budgets))
        accuracy -= self.threshold_loss.get(threshold, 0)
        latency = sum(self.time[stage][b] for stage, b in enumerate(budgets)) - threshold / 100
        return trial(budgets, threshold, accuracy, latency)


def greedy(table, order, budgets, target, thresholds, noise=0.0):
    """The chosen budgets and threshold; thresholds: 0 first, if there are several."""
    return Search(table, target, noise).greedy(order, budgets, thresholds)[:2]


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


def test_a_stage_of_which_no_budget_meets_the_target_keeps_zero(capsys):
    lost = {b: 0.5 for b in range(6)}
    table = Table([lost, NONE, NONE], [FLAT, {b: 10 - b for b in range(6)}, FLAT])
    made = Search(table, 0.9)
    assert made.greedy([1, 0, 2], list(range(6)), [0.0, 0.0001])[:2] == ((0, 0, 0), 0.0)
    assert not any(search.meets(one, 0.9) for one in made.trials.values())
    stages = [stage for stage, _ in made.trials]
    assert list(dict.fromkeys(stages)) == ["analyze", "recall", "summarize", "exit"]
    assert capsys.readouterr().out.count("none meets the target") == 4


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
    point = greedy(table, [0, 1, 2], list(range(6)), 0.9, [0.0, 0.5, 0.7, 0.8])
    assert point == ((5, 5, 5), 0.7)
    assert all(threshold == 0.5 for _, threshold in table.asked[:18])


def test_refine_leaves_a_greedy_choice_for_a_faster_pair():
    def table(point, target):
        # the two stages share what may be lost; the second one gains more by it
        a, b, _ = point[0]
        return trial(point[0], 0.0, 1.0 if a + b <= 2 else 0.0, 30 - a - 5 * b)

    start = Point((2, 0, 0))
    found = refine(Search(table, 0.9), best, start, [0, 1, 2], lambda: True)
    assert found[0] != start[0] and table(found, 0)["latency_s"] < 28


def test_refine_tries_nothing_more_when_time_is_up():
    start, left, tried = Point((1, 0, 0)), iter([True, True, True, True, False, False]), []

    def table(point, target):
        tried.append(point)
        return trial(point[0], 0.0, 1.0, 30 - point[0][2])

    search = Search(table, 0.9)
    assert refine(search, best, start, [0, 1], lambda: next(left, False)) != start
    assert len(tried) == 4, "the start and three neighbours"
    assert refine(search, best, start, [0, 1], lambda: False) == start


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
    """Runs the command on a tiny checkpoint; returns a function of extra flags: plan, printed."""

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
    assert plan["format"] == 2 and plan["split"] == "valid" and plan["n"] == 6
    assert {"config", "weights", "tokenizer"} <= set(plan["model"])
    assert len(plan["budgets"]) == 3
    assert plan["ranking_by"] == "similarity" and len(plan["rankings"]) == 3
    for ranking in plan["rankings"]:
        assert sorted(map(tuple, ranking)) == [(i, s) for i in range(3) for s in range(2)]
    assert plan["draft"] is None and plan["max_new_tokens"] == 4 and plan["shots"] == 0
    for one in plan["trials"]:
        assert {"stage", "budgets", "threshold", "accuracy", "latency_s", "tokens"} <= set(one)
    named = [(one["stage"], str(one["budgets"]), one["threshold"]) for one in plan["trials"]]
    assert len(named) == len(set(named)) and {"recall", "exit"} <= {stage for stage, *_ in named}
    assert [point["epsilon"] for point in plan["frontier"]] == [0, 1]
    assert "slowest stage first" in printed


def test_a_second_run_takes_every_trial_from_the_journal(searched, monkeypatch):
    plan, _ = searched("--epsilon", "0")
    monkeypatch.setattr(Answers, "at", None)  # generating would now fail
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


@pytest.mark.parametrize("stepper", [Stepper, RecordedStepper])
def test_step_times_are_measured_in_every_stage_under_every_mask(folder, stepper):
    """With and without recorded steps; how long they take is the machine's affair."""
    pipeline = Pipeline(Llama.from_pretrained(folder), Tokenizer.from_pretrained(folder), 8)
    pipeline.stepper = stepper(pipeline.model)
    asked = read_question(question(0))
    ((_, stages),) = pipeline.answer([asked])
    said = [stage.texts for stage in stages]
    masks = [mask_of([], 3), mask_of([(i, sub) for i in range(3) for sub in (0, 1)], 3)]
    times = clock.time_steps(pipeline, asked, said, [masks] * 3)
    assert [len(row) for row in times] == [2, 2, 2] and min(map(min, times)) > 0


def test_step_times_between_the_measured_budgets_are_interpolated(folder, monkeypatch, tmp_path):
    """And a slow round does not count; here a step takes 10 - its budget, and one round tenfold."""
    slow = iter([1, 1, 10, 1, 1])
    monkeypatch.setattr(clock, "KNOTS", 3)

    def times(pipeline, question, said, masks):
        assert [[int(mask.sum()) for mask in own] for own in masks] == [[0, 3, 6]] * 3
        factor = next(slow)
        return [[factor * (10.0 - int(mask.sum())) for mask in masks[0]]] * 2 + [[float("nan")] * 3]

    monkeypatch.setattr(clock, "time_steps", times)
    pipeline = Pipeline(Llama.from_pretrained(folder), Tokenizer.from_pretrained(folder), 8)
    questions = [read_question(question(i)) for i in range(3)]
    flags = SimpleNamespace(granularity="sublayer", ranking="similarity")
    measured = search.measure(pipeline, questions, flags, 5, Journal(tmp_path / "journal"))
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
    asked = table, [0, 1, 2], list(range(6)), 0.9, [0.0, 0.5, 0.7]
    assert greedy(*asked, noise=0.01) == ((5, 5, 5), 0.0)
    assert greedy(*asked, noise=0.0) == ((5, 5, 5), 0.7)


def test_of_trials_equally_fast_within_the_noise_the_most_accurate_is_chosen():
    trials = [
        trial((b, 0, 0), 0.0, accuracy, 10 - b / 10) for b, accuracy in enumerate((1, 1, 0.9))
    ]
    assert best(trials, 0.8)["budgets"] == [2, 0, 0]
    assert best(trials, 0.8, noise=0.05)["budgets"] == [0, 0, 0]


@pytest.mark.parametrize("device, batch", [("cpu", 3), ("meta", 7)])
def test_more_questions_go_side_by_side_on_a_gpu(device, batch):
    """Seen on a device that is no CPU and holds nothing."""
    made = []
    model = SimpleNamespace(device=torch.device(device))
    pipeline = SimpleNamespace(model=model, new_caches=lambda n: made.append(n) or [])
    session = object.__new__(trials.Session)
    session.pipeline = pipeline
    session.questions = []
    session.args = SimpleNamespace(granularity="sublayer", exit_window=5)
    session.journal = SimpleNamespace(find=lambda kind: [])
    importance = {"similarity": [[1.0, 1.0]], "ratio": [[1.0, 1.0]]}
    session.trials(search.run_trial, {"importance": importance, "rankings": []}, 3, 7)
    assert made == [batch] and (search.BATCH, search.GPU_BATCH) == (20, 100)


def test_a_ranking_by_loss_is_of_sublayers(searched):
    with pytest.raises(InputError, match="--granularity layer: expected sublayer, .* --ranking"):
        searched("--ranking", "loss", "--granularity", "layer")


# ---------------------------------------------------------------- exits


def at_one_point(latencies, accuracy=1.0):
    """Trials at the same budgets: {threshold: latency}."""
    return [trial((4, 4, 4), t, accuracy, latency) for t, latency in latencies.items()]


def test_an_exit_must_be_faster_than_none_by_more_than_the_noise():
    """With 6.2% of noise 0.7 is no faster than none; 0.8 is, and as fast as 0.7 within it."""
    trials = at_one_point({0.0: 77.8, 0.7: 74.5, 0.8: 71.0})
    assert search.best_exit(trials, 0.9, noise=0.062)["threshold"] == 0.8
    assert search.best_exit(trials[:2], 0.9, noise=0.062)["threshold"] == 0.0


def test_an_exit_that_repairs_what_skipping_broke_need_not_be_faster():
    none, exit = at_one_point({0.0: 70.0, 0.6: 71.0})
    assert search.best_exit([none | {"accuracy": 0.5}, exit], 0.9, 0.05) is exit
    assert search.best_exit([none, exit], 0.9, 0.05) is none


# ---------------------------------------------------------------- worked examples


SHOTS = [question(i) | {"recall": f"Fact {i}.", "analyze": ["One.", "Two.", "Three."]} for i in
         range(100, 104)]  # fmt: skip


@pytest.mark.parametrize("count", ["1", "4"])
def test_worked_examples_are_prefilled_once_and_billed_to_no_question(
    searched, tmp_path, monkeypatch, count
):
    """Whatever their number, a stage is billed for the tokens of its own question alone."""
    write_questions(tmp_path / "shots.jsonl", SHOTS)
    seen = []
    counted = search.prefilled_tokens

    def watch(stages, shared):
        seen.append((stages[0].prompt_tokens, shared, counted(stages, shared)[0]))
        return counted(stages, shared)

    monkeypatch.setattr(search, "prefilled_tokens", watch)
    searched("--shots", count)
    question_alone = 40  # tokens; an example has about a hundred
    for total, shared, billed in seen:
        assert billed == total - shared and shared > 0
        assert billed < question_alone


# ---------------------------------------------------------------- journals


def journals(tmp_path):
    return sorted(tmp_path.glob("*.journal"))


def test_a_new_journal_says_what_changed_since_the_one_before(
    searched, tmp_path, questions_file, monkeypatch
):
    monkeypatch.setattr("tools.plan.CODE", [])  # which may be edited while this runs
    _, printed = searched()
    assert "new journal" not in printed
    _, printed = searched("--max-new-tokens", "5")
    assert "note: a new journal, for other max new tokens\n" in printed
    rows = [question(i) for i in range(9)]
    write_questions(questions_file, rows)
    _, printed = searched("--max-new-tokens", "5")
    assert "note: a new journal, for other data\n" in printed
    _, printed = searched("--max-new-tokens", "5")
    assert "new journal" not in printed and len(journals(tmp_path)) == 3


def test_step_times_go_on_with_the_round_that_was_interrupted(searched, tmp_path, monkeypatch):
    timed = []
    time_steps = clock.time_steps

    def stop_in_the_third(*given):
        timed.append(given)
        if len(timed) == 3:
            raise KeyboardInterrupt
        return time_steps(*given)

    monkeypatch.setattr(clock, "time_steps", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        searched()
    first = Journal(journals(tmp_path)[0])
    first.file.close()
    assert len(first.find("round")) == 2 and not first.find("measured")
    searched()
    assert len(timed) == 4, "two before, and the third again"
    again = Journal(journals(tmp_path)[0])
    assert again.find("round")[:2] == first.find("round") and len(again.find("round")) == 3


def test_a_small_search_times_fewer_rounds_than_a_large_one(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "PER_ROUND", 1)
    searched("--limit", "2", "--step", "3")  # budgets 0 and 3
    searched("--limit", "6", "--step", "1")  # 0, 1, 2, 3, 4
    rounds = [len(Journal(path).find("round")) for path in journals(tmp_path)]
    assert sorted(rounds) == [4, 15]


def test_a_resumed_search_keeps_its_number_of_threads(searched, tmp_path, monkeypatch):
    plan, _ = searched("--epsilon", "0")
    counts = []
    monkeypatch.setattr("torch.set_num_threads", counts.append)
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)  # what was measured now
    again, printed = searched("--epsilon", "0")
    assert counts[-1] == 1 and "threads: 1, as the journal began" in printed
    assert "0 question-stages generated" in printed and len(journals(tmp_path)) == 1
    searched("--epsilon", "0", "--threads", "7")
    assert len(journals(tmp_path)) == 2, "a number that is asked for is another search"


# ---------------------------------------------------------------- results that mean nothing


def test_an_epsilon_below_one_question_is_noted(searched):
    assert "epsilon 0.1 is less than one question of 6" in searched("--epsilon", "0.1,0.2")[1]
    assert "less than one question" not in searched("--epsilon", "0,0.2")[1]


def test_a_full_model_at_chance_is_noted(searched):
    _, printed = searched()  # random weights
    assert "note: chance, 33.3%, is in the full model's interval" in printed


def test_every_trial_that_ran_to_its_end_has_its_interval(searched):
    plan, printed = searched("--epsilon", "0")
    for one in [plan["full"], *plan["trials"]]:
        if one["abandoned"]:
            assert one["accuracy_ci95"] is None
        else:
            low, high = one["accuracy_ci95"]
            assert low <= one["accuracy"] <= high
    assert "accuracy [95%]" in printed
