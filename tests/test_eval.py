"""Evaluation: intervals against known values, the report's fields, runs that take turns."""

import json

import pytest
import torch
from conftest import ROOT
from damage import edit_json, question, write_questions

import eval as evaluation
from eval import paired, wilson
from generate import Pipeline
from model import InputError
from skip import Importance, Setting, rank
from tools import setup, sweep
from tools.files import digest_of
from tools.plan import checkpoint_digests, conditions, store_setting, write_plans
from tools.report import mean_ci95
from tools.tables import print_runs


@pytest.fixture
def reported(tmp_path, folder, monkeypatch, capsys):
    """Runs the command on a tiny checkpoint; returns a function of extra flags."""
    write_questions(tmp_path / "test.jsonl", [question(i) for i in range(8)])

    def run(*flags):
        base = ["--model", str(folder), "--data", str(tmp_path / "test.jsonl")]
        out = tmp_path / "report.json"
        limits = ["--limit", "5", "--max-new-tokens", "4", "--json", str(out)]
        monkeypatch.setattr("sys.argv", ["eval.py", *base, *limits, *flags])
        evaluation.main()
        captured = capsys.readouterr()
        return json.loads(out.read_text()), captured.out + captured.err

    return run


def test_wilson_is_the_published_interval():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, n) == pytest.approx([low, high], abs=6e-5)


def test_wilsons_interval_ends_exactly_where_all_or_none_are_right():
    for n in range(1, 600):
        low, high = wilson(0, n), wilson(n, n)
        assert low[0] == 0.0 < low[1] < 1 and 0 < high[0] < high[1] == 1.0


def test_columns_do_not_run_together(reported, capsys):
    report, _ = reported("--stage-budgets", "3,1,2")
    run = report["runs"][1] | {"speedup": 13.204, "latency_s": 12.3456}
    print_runs([run, run | {"method": "litestage-uniform", "budgets": [100, 100, 100]}])
    _, row, name, below = capsys.readouterr().out.splitlines()
    assert row.split()[-3:-1] == ["12346", "13.2x"] and row.endswith("3,1,2")
    assert name == "litestage-uniform 100,100,100" and below == " " * 26 + row[26:]


def test_the_paired_interval_is_agresti_and_mins():
    # 100 pairs, 8 gained, 3 lost: (8.5 - 3.5) / 102 and its standard error, by hand
    base = [False] * 8 + [True] * 3 + [True] * 89
    other = [True] * 8 + [False] * 3 + [True] * 89
    low, high = paired(base, other)
    assert (low + high) / 2 == pytest.approx(5 / 102)
    assert (high - low) / 2 == pytest.approx(1.959964 * (12 - 25 / 102) ** 0.5 / 102)


def test_the_paired_interval_does_not_vanish_when_nothing_differs():
    low, high = paired([True] * 50, [True] * 50)
    assert low < 0 < high


def test_the_report_has_what_the_format_says(reported):
    report, printed = reported("--stage-budgets", "2,4,1")
    named = {"model", "data", "n", "device", "dtype", "threads", "seed", "command", "runs"}
    named |= {"shots", "max_new_tokens", "ids"}
    assert named <= set(report)
    full, lite = report["runs"]
    fields = {"method", "budgets", "exit", "accuracy", "accuracy_ci95", "no_answer", "latency_s"}
    fields |= {"speedup", "accuracy_delta", "accuracy_delta_ci95", "stages", "draft", "answers"}
    per_stage = {"name", "tokens", "prefill_s", "decode_s", "ms_per_token", "skipped_sublayers"}
    for r in report["runs"]:
        assert fields <= set(r)
        assert [stage["name"] for stage in r["stages"]] == ["recall", "analyze", "summarize"]
        assert all(per_stage | {"exit_rate", "accepted"} <= set(stage) for stage in r["stages"])
        for stage in r["stages"]:
            low, high = stage["tokens_ci95"]
            assert low <= stage["tokens"] <= high
        seconds = sum(stage["prefill_s"] + stage["decode_s"] for stage in r["stages"])
        assert seconds == pytest.approx(r["latency_s"])
    assert full["method"] == "full" and full["speedup"] == 1 and full["exit"] is None
    assert [stage["skipped_sublayers"] for stage in full["stages"]] == [0, 0, 0]
    assert lite["budgets"] == [2, 4, 1]
    assert lite["speedup"] == pytest.approx(full["latency_s"] / lite["latency_s"])
    assert lite["accuracy_delta"] == pytest.approx(lite["accuracy"] - full["accuracy"])
    assert not [line for line in printed.splitlines() if len(line) > 80]


def test_no_skips_and_no_exit_is_the_full_model(reported):
    report, _ = reported("--stage-budgets", "0,0,0", "--exit-threshold", "0")
    full, lite = report["runs"]
    for name in ("accuracy", "no_answer", "exit"):
        assert full[name] == lite[name]
    tokens = [[stage["tokens"] for stage in r["stages"]] for r in (full, lite)]
    assert tokens[0] == tokens[1]


def test_questions_side_by_side_get_the_answers_they_get_alone(reported):
    alone, _ = reported("--stage-budgets", "1,2,1", "--exit-threshold", "0")
    together, printed = reported(
        "--stage-budgets", "1,2,1", "--exit-threshold", "0", "--batch", "3"
    )
    for a, b in zip(alone["runs"], together["runs"]):
        assert a["accuracy"] == b["accuracy"] and a["no_answer"] == b["no_answer"]
        assert [s["tokens"] for s in a["stages"]] == [s["tokens"] for s in b["stages"]]
    assert "batches of 3" in printed  # whose latencies are shares


def test_compare_runs_every_method(reported):
    report, printed = reported("--compare", "--limit", "2")
    methods = {r["method"] for r in report["runs"]}
    assert {"full", "unified", "skipdecode", "early-exit", "adaskip", "random"} <= methods
    assert report["runs"][0]["method"] == "full"
    assert not [line for line in printed.splitlines() if len(line) > 80]


def test_compare_of_one_method_runs_that_alone(reported):
    report, _ = reported("--compare", "--method", "unified", "--limit", "2")
    assert {r["method"] for r in report["runs"]} == {"full", "unified"}


def test_compare_may_name_its_budgets(reported):
    """Each for all stages, instead of the six eighths; with --method of that method alone."""

    def runs(*flags):
        return [(r["method"], r["budgets"]) for r in reported("--limit", "2", *flags)[0]["runs"]]

    every = runs("--compare", "2,5")
    for method in ("unified", "skipdecode", "early-exit", "adaskip", "random"):
        assert [budgets for name, budgets in every if name == method] == [[2] * 3, [5] * 3]
    lite = [budgets for name, budgets in every if name == "litestage"]
    assert lite[:2] == [[2] * 3, [5] * 3] and [1] * 3 not in lite
    assert runs("--compare", "4", "--method", "unified")[1:] == [("unified", [4] * 3)]


@pytest.mark.parametrize("budgets", ["7", "2,99"])
def test_a_compared_budget_beyond_the_model_is_one_line(reported, budgets):
    with pytest.raises(InputError, match="--compare (7|99): the model has 6 sub-layers"):
        reported("--compare", budgets)


@pytest.mark.parametrize("budgets", ["x", "2,", "-1", "1.5", ""])
def test_compared_budgets_that_are_no_counts_are_one_line(reported, budgets, capsys):
    with pytest.raises(SystemExit):
        reported(f"--compare={budgets}")
    assert "--compare: expected counts, such as 8,13,20, found" in capsys.readouterr().err


def test_compare_of_given_budgets_runs_them_too(reported):
    report, _ = reported("--compare", "--method", "litestage", "--stage-budgets", "3,1,2")
    assert ("litestage", [3, 1, 2]) in [(r["method"], r["budgets"]) for r in report["runs"]]
    report, _ = reported("--compare", "--method", "random", "--stage-budgets", "3,1,2")
    assert report["runs"][-1]["budgets"] == [3, 1, 2]


def test_there_is_no_exit_unless_a_flag_or_a_plan_asks(reported):
    def exits(*flags):
        return [r["exit"] for r in reported("--stage-budgets", "1,2,1", *flags)[0]["runs"]]

    assert exits() == [None, None]
    assert exits("--exit-threshold", "0.5") == [None, {"window": 5, "threshold": 0.5}]
    assert exits("--exit-threshold", "auto") == [None, None]
    assert exits("--method", "random") == [None, None]
    asked = exits("--method", "random", "--exit-threshold", "0.4", "--exit-window", "3")
    assert asked == [None, {"window": 3, "threshold": 0.4}]
    assert "there is no exit" in reported("--stage-budgets", "1,2,1", "--exit-window", "3")[1]


@pytest.mark.parametrize("plan", ["plan.json", "plan-0.03.json"])  # with and without a frontier
def test_an_exit_that_is_asked_for_is_that_of_every_plan(tmp_path, monkeypatch, plan):
    def exits(*flags):
        out = tmp_path / "report.json"
        file = ["--plan", str(ROOT / "data" / "demo" / plan), "--json", str(out)]
        compare = ["--compare", "--method", "litestage", "--limit", "1", "--max-new-tokens", "4"]
        monkeypatch.setattr("sys.argv", ["eval.py", *file, *compare, *flags])
        evaluation.main()
        runs = json.loads(out.read_text())["runs"]
        ours = [r for r in runs if r["method"] == "litestage" and r["variant"] != "no-exit"]
        return [r["exit"] for r in ours]

    assert all(exit == {"window": 5, "threshold": 0.4} for exit in exits("--exit-threshold", "0.4"))
    assert not any(exits("--exit-threshold", "0"))
    assert exits("--exit-window", "3")[-1] == {"window": 3, "threshold": 0.7}


def test_the_interval_of_a_mean():
    low, high = mean_ci95([1, 2, 3, 4, 5])  # the standard deviation is the root of 2.5
    assert (low + high) / 2 == pytest.approx(3)
    assert high - low == pytest.approx(2 * 1.96 * (2.5 / 5) ** 0.5)
    assert mean_ci95([7]) == [7, 7]


def test_a_sweep_of_another_checkpoint_measures_its_importance(tmp_path, folder, monkeypatch):
    write_questions(tmp_path / "test.jsonl", [question(i) for i in range(4)])
    out = tmp_path / "sweep.json"
    flags = ["--model", str(folder), "--data", str(tmp_path / "test.jsonl"), "--json", str(out)]
    few = ["--step", "2", "--max-budget", "4", "--max-new-tokens", "4"]
    monkeypatch.setattr("sys.argv", ["sweep.py", *flags, *few])
    sweep.main()
    report = json.loads(out.read_text())
    assert min(min(row) for row in report["similarity"]) > 0
    assert {budget for run in report["runs"] for budget in run["budgets"]} == {0, 2, 4}


def test_compile_without_a_compiler_says_so_and_changes_nothing(reported, monkeypatch):
    monkeypatch.setattr("tools.setup.why_not_compiled", lambda: "no g++")
    plain, _ = reported("--stage-budgets", "1,2,1")
    compiled, printed = reported("--stage-budgets", "1,2,1", "--compile")
    assert "--compile: no working C++ compiler (no g++); decoding as usual" in printed
    for a, b in zip(plain["runs"], compiled["runs"]):
        assert [s["tokens"] for s in a["stages"]] == [s["tokens"] for s in b["stages"]]


# ---------------------------------------------------------------- per question


def test_the_report_has_every_answer_and_texts_has_every_text(reported, tmp_path):
    texts = tmp_path / "texts.jsonl"
    report, _ = reported("--stage-budgets", "2,4,1", "--texts", str(texts))
    assert report["ids"] == [f"q{i}" for i in range(5)]
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    assert len(rows) == 5 * 2
    for i, row in enumerate(rows):
        entry = report["runs"][i % 2]
        assert row["id"] == report["ids"][i // 2]
        assert (row["method"], row["budgets"]) == (entry["method"], entry["budgets"])
        assert row["answer"] == entry["answers"][i // 2]
        assert [stage["name"] for stage in row["stages"]] == ["recall", "analyze", "summarize"]
        for stage, texts_of_it in zip(row["stages"], (1, 3, 1)):
            for key in ("prompts", "texts", "tokens", "confidences", "stops"):
                assert len(stage[key]) == texts_of_it, key
            for ids, confidences in zip(stage["tokens"], stage["confidences"]):
                assert len(ids) == len(confidences)
        assert row["stages"][0]["prompts"][0].endswith("\nRecall:")
    tokens = sum(len(ids) for row in rows[1::2] for ids in row["stages"][1]["tokens"])
    assert tokens / 5 == report["runs"][1]["stages"][1]["tokens"]


def test_full_with_budgets_is_refused(reported):
    """It skips nothing, whatever they are."""
    with pytest.raises(InputError, match="--method full skips nothing"):
        reported("--method", "full", "--stage-budgets", "2,4,1")
    report, _ = reported("--method", "full")
    assert [r["budgets"] for r in report["runs"]] == [[0, 0, 0]] * 2


def texts_of(path):
    """A file of --texts without its confidences, whose last bits depend on what is in a cache."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for stage in row["stages"]:
            del stage["confidences"]
    return rows


def test_a_killed_evaluation_goes_on_where_it_was(reported, tmp_path, monkeypatch):
    """And its journal is gone when the report is there."""
    flags = ("--stage-budgets", "1,3,2", "--exit-threshold", "0.2", "--exit-window", "2")
    texts = ("--texts", str(tmp_path / "texts.jsonl"))
    whole, _ = reported(*flags, *texts)
    written = texts_of(tmp_path / "texts.jsonl")
    assert not list(tmp_path.glob("*.journal"))
    asked = []
    answer = Pipeline.answer

    def stop_at_the_third(self, questions, *rest, **named):
        if len(rest) == 3:  # neither the warm-up nor the importance
            asked.append(questions[0].id)
            if len(asked) == 6:
                raise KeyboardInterrupt
        return answer(self, questions, *rest, **named)

    monkeypatch.setattr(Pipeline, "answer", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        reported(*flags, *texts)
    assert len(list(tmp_path.glob("report.json.*.journal"))) == 1
    asked.clear()
    asked += [None] * 10
    again, printed = reported(*flags, *texts)
    assert asked[10:] == ["q2", "q2", "q3", "q3", "q4", "q4"]
    assert not list(tmp_path.glob("*.journal")) and "new journal" not in printed
    for one, other in zip(whole["runs"], again["runs"]):
        assert one["answers"] == other["answers"]
        assert [s["tokens"] for s in one["stages"]] == [s["tokens"] for s in other["stages"]]
    assert texts_of(tmp_path / "texts.jsonl") == written


def test_an_evaluation_of_other_questions_takes_nothing_from_a_journal(
    reported, tmp_path, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "describe", stop)
        reported("--stage-budgets", "1,3,2")
    write_questions(tmp_path / "test.jsonl", [question(i) for i in range(10, 15)])
    report, printed = reported("--stage-budgets", "1,3,2")
    assert report["ids"] == [f"q{i}" for i in range(10, 15)]
    assert "note: a new journal, for other data, questions, rankings" in printed


# ---------------------------------------------------------------- plans


@pytest.fixture
def plans(tmp_path, folder):
    """Two plans of the same model: by similarity, and by a loss that reverses its ranking."""
    importance = Importance(torch.rand(3, 2, dtype=torch.float64), torch.ones(3, 2).double())
    ranking = rank(importance.similarity)
    own = {"epsilon": 0.01, "budgets": [2, 1, 3], "exit": None, "draft": None}
    chosen = {"accuracy": 1.0, "latency_s": 1.0}
    shared = {
        "model": {"name": "m", **checkpoint_digests(folder)},
        **conditions("somewhere", None, 0, "", 4),
        "data_digest": "0",
        "granularity": "sublayer",
        "full": chosen,
    }
    files = []
    for by, ranked in (("similarity", ranking), ("loss", ranking[::-1])):
        setting = Setting(importance, [ranked] * 3, "sublayer")
        files.append(tmp_path / f"{by}.json")
        write_plans(files[-1], shared | store_setting(setting, by), [own | {"chosen": chosen}])
    return files


def test_each_plan_runs_by_the_name_of_its_ranking(reported, plans, monkeypatch):
    seen = []
    make_run = evaluation.make_run

    def watch(policy, setting, *rest, **named):
        made = make_run(policy, setting, *rest, **named)
        seen.append((made.method, [mask.tolist() for mask in made.skips]))
        return made

    monkeypatch.setattr(evaluation, "make_run", watch)
    report, _ = reported("--plan", *map(str, plans))
    assert [r["method"] for r in report["runs"]] == ["full", "litestage", "litestage-loss"]
    similarity, loss = dict(seen)["litestage"], dict(seen)["litestage-loss"]
    assert similarity != loss
    for masks in (similarity, loss):
        assert [sum(map(sum, mask)) for mask in masks] == [2, 1, 3]


def test_compare_runs_both_rankings_and_always_similarity(reported, plans):
    names = {"full", "unified", "skipdecode", "early-exit", "adaskip", "random", "litestage"}

    def methods(*files):
        report, _ = reported("--compare", "--limit", "1", "--plan", *map(str, files))
        return [r["method"] for r in report["runs"]]

    both = methods(*plans)
    assert set(both) == names | {"litestage-loss"}
    assert both.count("litestage") == both.count("litestage-loss") == 7
    by_loss = methods(plans[1])
    assert set(by_loss) == names | {"litestage-loss"} and by_loss.count("litestage") >= 6
    assert set(methods(plans[0])) == names, "no loss ranking is measured on questions under test"


def test_what_several_epsilons_chose_alike_runs_once(reported, plans):
    stored = json.loads(plans[0].read_text())
    point = {key: stored[key] for key in ("budgets", "exit")}
    edit_json(plans[0], frontier=[point, point])
    report, _ = reported(*"--compare 1 --method litestage --limit 1 --plan".split(), str(plans[0]))
    assert [r["budgets"] for r in report["runs"]] == [[0, 0, 0], [1, 1, 1], [2, 1, 3]]


def test_what_a_plan_was_not_found_with_is_one_note_each(reported, plans, tmp_path):
    _, printed = reported("--plan", str(plans[0]))
    assert printed.count("note: similarity.json was") == 1
    assert "found for other questions (somewhere)" in printed
    _, printed = reported("--plan", str(plans[0]), "--max-new-tokens", "3")
    assert "note: similarity.json was found with --max-new-tokens 4, used with 3\n" in printed
    shots = [question(i) | {"recall": "R.", "analyze": ["A.", "B.", "C."]} for i in (90, 91)]
    write_questions(tmp_path / "shots.jsonl", shots)
    _, printed = reported("--plan", str(plans[0]), "--shots", "2")
    assert "note: similarity.json was found with --shots 0, used with 2\n" in printed
    edit_json(plans[0], prompts_digest="0", data_digest=digest_of([tmp_path / "test.jsonl"]))
    _, printed = reported("--plan", str(plans[0]))
    assert "note: similarity.json was found with other prompts\n" in printed
    assert "note: similarity.json was found on the very questions under test\n" in printed


# ---------------------------------------------------------------- importance


def test_where_importance_is_measured_is_said(reported, tmp_path):
    _, printed = reported("--stage-budgets", "1,2,1")
    assert "note: importance is measured on the questions under test themselves\n" in printed
    _, printed = reported("--stage-budgets", "0,0,0")
    assert "importance" not in printed
    for split in ("valid", "test"):
        write_questions(tmp_path / f"{split}.jsonl", [question(i) for i in range(6)])
    _, printed = reported("--stage-budgets", "1,2,1", "--data", str(tmp_path))
    assert "importance is measured" not in printed


def test_a_foreign_model_without_data_is_told_of_the_demos_questions(reported, tmp_path):
    _, printed = reported("--stage-budgets", "1,2,1", "--data", "demo", "--limit", "1")
    assert "note: importance is measured on the demo's questions; --data names" in printed


# ---------------------------------------------------------------- worked examples


def example(number):
    return question(number) | {"recall": f"Fact {number}.", "analyze": ["One.", "Two.", "Three."]}


def test_worked_examples_of_a_file_stand_beside_it(reported, tmp_path):
    with pytest.raises(InputError, match=r"--shots: expected examples in .*shots.jsonl, or"):
        reported("--shots", "2")  # not those of the file itself, which are under test
    write_questions(tmp_path / "shots.jsonl", [example(i) for i in (90, 91)])
    texts = tmp_path / "texts.jsonl"
    report, _ = reported("--shots", "2", "--texts", str(texts))
    assert report["shots"] == 2
    prompt = json.loads(texts.read_text().splitlines()[0])["stages"][0]["prompts"][0]
    assert prompt.startswith("Which, of 90?") and "Fact 91." in prompt
    with pytest.raises(InputError, match="--shots 3: .*shots.jsonl has 2"):
        reported("--shots", "3")


def test_worked_examples_may_come_from_a_file(reported, tmp_path):
    write_questions(tmp_path / "mine.jsonl", [example(i) for i in (90, 91)])
    report, _ = reported("--shots", "1", "--shots-file", str(tmp_path / "mine.jsonl"))
    assert report["shots"] == 1
    with pytest.raises(InputError, match="--shots-file .*: expected --shots"):
        reported("--shots-file", str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize("same", ["id", "text"])
def test_an_example_that_is_under_test_is_refused(reported, tmp_path, same):
    twin = example(90)
    if same == "id":
        twin["id"] = "q3"
    else:  # with other spaces and capitals, and its options in another order
        twin["question"] = json.loads(json.dumps(question(3)["question"]))
        twin["question"]["stem"] = " which,  OF 3? "
        twin["question"]["choices"][0]["text"] = "b3"
        twin["question"]["choices"][1]["text"] = "A3"
    write_questions(tmp_path / "shots.jsonl", [twin])
    with pytest.raises(InputError, match="shots.jsonl: example .* is a question under test"):
        reported("--shots", "1")
    write_questions(tmp_path / "mine.jsonl", [example(91), twin])
    with pytest.raises(InputError, match="mine.jsonl: example .* is a question under test"):
        reported("--shots", "2", "--shots-file", str(tmp_path / "mine.jsonl"))


def test_worked_examples_are_prefilled_before_anything_is_timed(reported, tmp_path, monkeypatch):
    """So that no question is billed for them, and the figures do not drift with --limit."""
    write_questions(tmp_path / "shots.jsonl", [example(i) for i in range(90, 94)])
    asked = []
    new_caches = Pipeline.new_caches

    def watch(self, n):
        made = new_caches(self, n)
        asked.extend(len(cache.tokens) for cache in made)
        return made

    monkeypatch.setattr(Pipeline, "new_caches", watch)
    reported("--shots", "4", "--limit", "1")
    assert len(set(asked)) == 1 and asked[0] > 300, "each cache holds all four examples"


# ---------------------------------------------------------------- threads


def test_the_number_of_threads_is_asked_for_or_measured(reported, monkeypatch):
    counts = []
    monkeypatch.setattr("torch.set_num_threads", counts.append)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    reported("--threads", "3")
    assert counts[0] == 3
    counts.clear()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(setup, "faster_threads", lambda model, most: most - 7)
    reported()
    assert counts[0] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    counts.clear()
    reported()
    assert counts[0] == 8


def test_a_busy_machine_gets_one_thread(folder, monkeypatch):
    """Where eight threads wait for one another a step takes ten times as long as with one."""
    now = {"threads": 1, "clock": 0.0}
    monkeypatch.setattr("torch.set_num_threads", lambda n: now.update(threads=n))
    monkeypatch.setattr(setup.time, "perf_counter", lambda: now["clock"])

    class Busy:
        device = torch.device("cpu")

        def __init__(self, slower):
            self.slower = slower

        def __call__(self, *_):
            now["clock"] += self.slower if now["threads"] > 1 else 1.0

    monkeypatch.setattr(setup, "KVCache", lambda *_: None)
    assert setup.faster_threads(Busy(10.0), 8) == 1
    assert setup.faster_threads(Busy(0.95), 8) == 1
    assert setup.faster_threads(Busy(0.5), 8) == 8


def test_an_unknown_device_is_one_short_line():
    for name in ("mps", "gpu", "cuda:77"):
        with pytest.raises(InputError) as e:
            setup.find_device(name)
        assert str(e.value).startswith(f"--device {name}: expected cpu or a cuda (")
        assert len(str(e.value)) < 250 and "\n" not in str(e.value)


def test_a_run_that_skips_nothing_says_so(reported):
    _, printed = reported()
    assert "note: nothing is skipped: expected --plan or --stage-budgets" in printed
    _, printed = reported("--stage-budgets", "1,0,0")
    assert "nothing is skipped" not in printed
