"""Evaluation: intervals against known values, the report's fields, runs that take turns."""

import json

import pytest
import torch
from conftest import ROOT
from damage import question, write_questions

import eval as evaluation
from data import sweep
from data.report import paired, print_runs, wilson


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
    assert named <= set(report)
    full, lite = report["runs"]
    fields = {"method", "budgets", "exit", "accuracy", "accuracy_ci95", "no_answer", "latency_s"}
    fields |= {"speedup", "accuracy_delta", "accuracy_delta_ci95", "stages"}
    per_stage = {"name", "tokens", "prefill_s", "decode_s", "ms_per_token", "skipped_sublayers"}
    for r in report["runs"]:
        assert fields <= set(r)
        assert [stage["name"] for stage in r["stages"]] == ["recall", "analyze", "summarize"]
        assert all(per_stage | {"exit_rate"} <= set(stage) for stage in r["stages"])
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


def test_compare_of_given_budgets_runs_them_too(reported):
    report, _ = reported("--compare", "--method", "litestage", "--stage-budgets", "3,1,2")
    assert ("litestage", [3, 1, 2]) in [(r["method"], r["budgets"]) for r in report["runs"]]
    report, _ = reported("--compare", "--method", "random", "--stage-budgets", "3,1,2")
    assert report["runs"][-1]["budgets"] == [3, 1, 2]


def test_the_exit_is_litestages_and_others_have_it_only_when_asked(reported):
    def exits(*flags):
        return [r["exit"] for r in reported("--stage-budgets", "1,2,1", *flags)[0]["runs"]]

    assert exits() == [None, {"window": 5, "threshold": 0.5}]
    assert exits("--method", "random") == [None, None]
    asked = exits("--method", "random", "--exit-threshold", "0.4")
    assert asked == [None, {"window": 5, "threshold": 0.4}]


@pytest.mark.parametrize("plan", ["plan.json", "plan-0.03.json"])  # with and without a frontier
def test_an_exit_that_is_asked_for_is_that_of_every_plan(tmp_path, monkeypatch, plan):
    def exits(*flags):
        out = tmp_path / "report.json"
        file = ["--plan", str(ROOT / "data" / "demo" / plan), "--json", str(out)]
        compare = ["--compare", "--method", "litestage", "--limit", "1"]
        monkeypatch.setattr("sys.argv", ["eval.py", *file, *compare, *flags])
        evaluation.main()
        runs = json.loads(out.read_text())["runs"]
        return [r["exit"] for r in runs if r["method"] == "litestage"]

    assert all(exit == {"window": 5, "threshold": 0.4} for exit in exits("--exit-threshold", "0.4"))
    assert not any(exits("--exit-threshold", "0"))
    assert exits("--exit-window", "3")[-1] == {"window": 3, "threshold": 0.7}


def test_a_sweep_of_another_checkpoint_measures_its_importance(tmp_path, folder, monkeypatch):
    write_questions(tmp_path / "test.jsonl", [question(i) for i in range(4)])
    out = tmp_path / "sweep.json"
    flags = ["--model", str(folder), "--data", str(tmp_path / "test.jsonl"), "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["sweep.py", *flags, "--step", "4", "--max-new-tokens", "4"])
    sweep.main()
    assert min(min(row) for row in json.loads(out.read_text())["similarity"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_compile_without_a_gpu_says_so_and_changes_nothing(reported):
    plain, _ = reported("--stage-budgets", "1,2,1")
    compiled, printed = reported("--stage-budgets", "1,2,1", "--compile")
    assert "--compile: no CUDA graphs" in printed
    for a, b in zip(plain["runs"], compiled["runs"]):
        assert [s["tokens"] for s in a["stages"]] == [s["tokens"] for s in b["stages"]]
