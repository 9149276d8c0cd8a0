"""Pictures: what is drawn from which file, and under which name."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT  # noqa: F401  (must come first: threads, path)

from model import InputError
from tools import figures
from tools.figures import draw, error_bars, free_path, main, skipped_sublayers, title_of

NAMES = ("reason", "answer")  # of a fork with two stages


@pytest.fixture
def plt():
    pytest.importorskip("matplotlib")
    return figures.find_matplotlib()


def entry(method: str, budgets: list[int], accuracy: float = 0.9, speedup: float = 1.5) -> dict:
    stages = []
    for name, budget in zip(NAMES, budgets):
        tokens = 20.0 + budget
        interval = [tokens - budget, tokens + budget]
        stages.append({"name": name, "tokens": tokens, "tokens_ci95": interval})
    interval = [accuracy - 0.05, min(accuracy + 0.05, 1.0)]
    found = {"method": method, "budgets": budgets, "accuracy": accuracy, "stages": stages}
    return found | {"accuracy_ci95": interval, "speedup": speedup}


def report(*runs: dict, **more) -> dict:
    entries = [entry("full", [0, 0], 0.98, 1.0), *runs]
    return {"model": "x/small", "data": "demo", "split": "test", "n": 50, "runs": entries} | more


def swept(*methods: str) -> dict:
    runs = [entry(m, budgets) for m in methods for budgets in ([1, 0], [2, 0], [0, 1], [0, 2])]
    return report(*runs, kind="sweep", similarity=[[0.5, 0.9]] * 2)


PLAN = {
    "format": 2,
    "model": {"name": "demo"},
    "data": "demo",
    "split": "valid",
    "n": 50,
    "granularity": "sublayer",
    "importance": {"similarity": [[0.1, 0.2], [0.9, 0.8]], "ratio": [[1.0, 1.0], [1.0, 1.0]]},
    "rankings": [[[1, 0], [1, 1], [0, 1], [0, 0]], [[0, 1], [1, 1], [1, 0], [0, 0]]],
    "stages": list(NAMES),
    "budgets": [2, 1],
}


def test_a_report_of_one_stages_budgets_is_no_sweep(plt):
    one = report(entry("litestage", [4, 0]))
    assert list(draw(plt, one)) == [""]
    assert list(draw(plt, one | {"kind": "sweep"})) == ["-accuracy", "-tokens"]


def test_a_sweep_says_of_what_and_how_sure(plt):
    drawn = draw(plt, swept("litestage"))
    assert list(drawn) == ["-accuracy", "-tokens", "-importance"]
    for figure in drawn.values():
        assert figure.axes[0].get_title() == "small on demo test, n = 50"
    axes = drawn["-accuracy"].axes[0]
    assert len(axes.containers) == 2, "a line with its intervals for each stage"
    bars = axes.containers[0].lines[2][0].get_segments()
    assert [round(float(y), 6) for y in bars[1][:, 1]] == [85.0, 95.0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["reason", "answer"]
    bars = drawn["-tokens"].axes[0].containers[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[20, 20], [20, 22], [20, 24]]


def test_a_sweep_of_before_has_no_interval_of_its_tokens(plt):
    before = swept("litestage")
    for run in before["runs"]:
        for stage in run["stages"]:
            del stage["tokens_ci95"]
    bars = draw(plt, before)["-tokens"].axes[0].containers[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[20, 20], [21, 21], [22, 22]]


def test_sweeps_of_two_rankings_are_one_picture(plt):
    axes = draw(plt, swept("litestage", "litestage-loss"))["-accuracy"].axes[0]
    lines = [container.lines[0] for container in axes.containers]
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--", "--"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0] == "reason, by similarity" and labels[3] == "answer, by loss"
    assert list(lines[0].get_xdata()) == [0, 1, 2]


def test_a_comparison_has_a_second_panel_near_the_full_model(plt):
    runs = [entry("litestage", [2, 2], 0.96, 2.0), entry("random", [2, 2], 0.3, 1.9)]
    figure = draw(plt, report(*runs))[""]
    whole, near = figure.axes
    assert whole.get_ylim()[0] < 30 and near.get_ylim()[0] == pytest.approx(93)
    assert near.get_ylim()[1] == pytest.approx(100.3, abs=0.7)
    assert near.get_xlim()[0] < 1.0 and near.get_xlim()[1] > 2.0
    assert "n = 50" in figure.get_suptitle()


def test_a_variant_of_a_method_is_a_line_of_its_own(plt):
    runs = [
        entry("litestage", [2, 2], 0.96, 2.0),
        entry("litestage", [1, 1]) | {"variant": "uniform"},
    ]
    figure = draw(plt, report(*runs))[""]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["LiteStage", "LiteStage, one budget"]


def test_a_plan_is_drawn_by_stage_and_layer(plt):
    drawn = draw(plt, PLAN)
    assert list(drawn) == ["-plan", "-importance"]
    axes = drawn["-plan"].axes[0]
    assert len(axes.patches) == 2 * 2 * 2, "a cell for every stage and sub-layer"
    white = [patch.get_facecolor()[:3] == (1.0, 1.0, 1.0) for patch in axes.patches]
    assert white == [False, True, False, True, False, False, True, False]
    assert [text.get_text() for text in axes.texts] == ["reason\nskips 2", "answer\nskips 1"]


def test_plans_of_the_first_format_have_one_ranking_for_their_three_stages():
    old = {key: value for key, value in PLAN.items() if key not in ("stages", "rankings")}
    old |= {"format": 1, "ranking": PLAN["rankings"][0], "budgets": [0, 1, 4]}
    names, masks = skipped_sublayers(old)
    assert names == ["recall", "analyze", "summarize"]
    assert [int(mask.sum()) for mask in masks] == [0, 1, 4] and bool(masks[1][1, 0])


def test_whole_layers_stay_whole():
    _, masks = skipped_sublayers(PLAN | {"granularity": "layer", "budgets": [3, 1]})
    assert [int(mask.sum()) for mask in masks] == [2, 0]


def test_intervals_are_distances_in_points():
    below, above = error_bars([entry("full", [0, 0], 0.98)])
    assert below == [pytest.approx(5)] and above == [pytest.approx(2)]


def test_the_title_of_a_file_of_questions():
    value = report(data="somewhere/own.jsonl", split=None)
    assert title_of(value) == "small on own.jsonl, n = 50"


def test_no_two_pictures_have_the_same_name(tmp_path):
    taken: list[Path] = []
    for file in ("a/p.json", "b/p.json", "c/b/p.json", "q/b/p.json"):
        taken.append(free_path(tmp_path, tmp_path / file, "", taken))
    assert [path.name for path in taken] == ["p.png", "b-p.png", "b-p-2.png", "b-p-3.png"]


def test_two_files_of_one_name_are_both_drawn(plt, tmp_path, monkeypatch, capsys):
    for folder, n in (("a", 50), ("b", 60)):
        (tmp_path / folder).mkdir()
        text = json.dumps(report(entry("litestage", [1, 1]), n=n))
        (tmp_path / folder / "p.json").write_text(text)
    argv = ["figures.py", "a/p.json", "b/p.json", "--out", "drawn"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", argv)
    main()
    assert capsys.readouterr().out.split() == ["drawn/p.png", "drawn/b-p.png"]
    first, second = ((tmp_path / "drawn" / name).read_bytes() for name in ("p.png", "b-p.png"))
    assert first.startswith(b"\x89PNG") and first != second


@pytest.mark.parametrize(
    "value, words",
    [
        ({"n": 1}, "expected a report of eval.py or a plan"),
        (report() | {"runs": [{"method": "full"}]}, "not a report or a plan"),
        (PLAN | {"rankings": [[[9, 9]]]}, "not a report or a plan"),
        (PLAN | {"importance": 3}, "not a report or a plan"),
    ],
)
def test_other_files_are_refused(plt, value, words, tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps(value))
    argv = ["figures.py", str(tmp_path / "a.json"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(InputError, match=words):
        main()


def test_drawing_says_that_it_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="matplotlib is not installed; pip install matplotlib"):
        figures.find_matplotlib()
