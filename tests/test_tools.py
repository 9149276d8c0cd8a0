"""What surrounds a command: flags, one-line errors, whole files, the journal, progress, tables."""

import argparse
import errno
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT  # noqa: F401  (must come first: threads, path)

from data.prompts import STAGES, Stage
from model import InputError
from tools import flags, journal, progress
from tools.command import run
from tools.files import digest_of, write_json, write_lines
from tools.flags import FLAGS, make_parser
from tools.journal import Journal
from tools.tables import count, print_full, print_runs, print_scan, print_stage, print_stages


@pytest.fixture
def two_stages():
    """The list of stages, as a fork has it."""
    first, last = (Stage(name, f"\n{name}:", lambda q: [""]) for name in ("reason", "answer"))
    before = list(STAGES)
    STAGES[:] = [first, last]
    yield
    STAGES[:] = before


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_explained_in_a_help_of_80_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = make_parser("What it does.\n\n    python eval.py", name).format_help()
    assert name in said and max(map(len, said.splitlines())) <= 80
    assert "default" in said or isinstance(FLAGS[name].default, bool | None)
    assert "{stages}" not in said and "{example}" not in said


def test_the_flags_of_the_design_are_all_there():
    design = "model data split limit seed device dtype threads stage-budgets plan compare method "
    design += "granularity ranking exit-threshold exit-window draft max-new-tokens shots batch "
    design += "compile plain json texts shots-file show-prompts out epsilon max-budget step refine"
    assert {f"--{name}" for name in design.split()} <= set(FLAGS)


def parsed(name: str, *argv: str, **options):
    args = make_parser("Doc.\n\n    python eval.py", name, **options).parse_args([name, *argv])
    return getattr(args, name[2:].replace("-", "_"))


def test_there_are_as_many_budgets_as_stages(two_stages):
    assert parsed("--stage-budgets", "3,4") == [3, 4]
    wanted = "expected two counts, for reason and answer, such as 2,4, found 2,4,1"
    with pytest.raises(argparse.ArgumentTypeError, match=wanted):
        flags.budgets("2,4,1")
    said = make_parser("Doc.\n\n    python eval.py", "--stage-budgets").format_help()
    assert "each stage (reason, answer) skips, e.g. 2,4" in " ".join(said.split())


def test_the_error_of_budgets_names_the_stages():
    wanted = "expected three counts, for recall, analyze and summarize, such as 2,4,1, found 2,4"
    with pytest.raises(argparse.ArgumentTypeError, match=wanted):
        flags.budgets("2,4")


def test_plan_takes_one_file_or_several():
    assert parsed("--plan", "a.json") == [Path("a.json")]
    assert parsed("--plan", "a.json", "b.json") == [Path("a.json"), Path("b.json")]


def test_plan_leaves_the_words_that_follow_to_a_command_that_has_some():
    parser = make_parser("Doc.\n\n    python generate.py", "--plan", one_plan=True)
    parser.add_argument("text")
    parser.add_argument("choices", nargs="*")
    args = parser.parse_args(["--plan", "a.json", "Which?", "tin", "oak"])
    assert (args.plan, args.text, args.choices) == ([Path("a.json")], "Which?", ["tin", "oak"])


@pytest.mark.parametrize(
    "text, found", [("auto", None), ("0", [0, 0, 0]), ("4", [4, 4, 4]), ("4,2,0", [4, 2, 0])]
)
def test_a_draft_is_one_count_or_one_a_stage(text, found):
    assert flags.drafts(text) == found


@pytest.mark.parametrize("text", ["4,2", "-1", "1.5", "", "many"])
def test_other_drafts_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected auto, one count, or three"):
        flags.drafts(text)


def test_nothing_is_asked_of_exit_threads_and_ranking_by_default():
    args = make_parser("Doc.\n\n    x", "--exit-threshold", "--threads", "--ranking").parse_args([])
    assert (args.exit_threshold, args.threads, args.ranking) == (None, None, None)
    assert parsed("--exit-threshold", "auto") is None and parsed("--exit-threshold", "0") == 0


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "error, line",
    [
        (InputError("a.json: two\nlines"), "error: a.json: two lines"),
        (InputError("a\x1b[2J"), "error: a?[2J"),
        (MemoryError(), "error: out of memory"),
        (RuntimeError("not enough memory: 4 GB"), "error: out of memory (not enough memory: 4 GB)"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_an_error_is_one_line(error, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(main)
    assert ended.value.code == (130 if line == "interrupted" else 2)
    assert capsys.readouterr().err == line + "\n"


def test_an_error_of_the_program_is_not_hidden():
    def main():
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        run(main)


# ---------------------------------------------------------------- files


def test_lines_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "texts.jsonl"
    write_lines(path, [{"a": 1}, {"b": "\u00e4"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"b": "ä"}]
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_lines(path, [{"a": 2}, {"b": object()}])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "a.json")
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads((tmp_path / "real" / "a.json").read_text()) == {"a": 1}


def test_a_digest_depends_on_content_and_order_alone(tmp_path):
    for name, text in (("a", "x"), ("b", "y"), ("c", "x")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert digest_of([a, b]) == digest_of([c, b]) != digest_of([b, a])
    with pytest.raises(InputError, match="gone: cannot be read"):
        digest_of([tmp_path / "gone"])


# ---------------------------------------------------------------- journal


def test_a_journal_keeps_what_was_appended_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "a.journal"
    first = Journal(path)
    first.append("trial", {"budgets": (1, 2), "accuracy": 0.5})
    first.append("time", 1.5)
    assert first.find("trial") == [{"budgets": [1, 2], "accuracy": 0.5}]
    first.file.close()
    path.write_bytes(path.read_bytes() + b'{"trial": {"budg')
    second = Journal(path)
    assert second.lines == first.lines
    assert path.read_bytes().endswith(b"\n")


def test_a_damaged_journal_is_refused(tmp_path):
    path = tmp_path / "a.journal"
    first = Journal(path)
    first.append("n", 1)
    first.file.close()
    path.write_text(path.read_text().replace('"n": 1', '"n": 2'))
    with pytest.raises(InputError, match="not a journal of ours .*damaged.*delete it"):
        Journal(path)


def lock_fails_with(number: int, monkeypatch) -> None:
    def lockf(*_):
        raise OSError(number, "no")

    system = SimpleNamespace(lockf=lockf, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setattr(journal, "fcntl", system)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_has_a_journal(number, tmp_path, monkeypatch):
    lock_fails_with(number, monkeypatch)
    written = Journal(tmp_path / "a.journal")
    written.append("n", 1)
    assert Journal(tmp_path / "a.journal").find("n") == [1]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_journal_that_another_process_holds_is_refused(number, tmp_path, monkeypatch):
    lock_fails_with(number, monkeypatch)
    with pytest.raises(InputError, match="another process is writing to it"):
        Journal(tmp_path / "a.journal")


# ---------------------------------------------------------------- progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.s)
    return now


def test_a_log_file_gets_a_line_now_and_then(clock, capsys):
    with progress.progress(total=100, desc="questions") as bar:
        for second in range(100):
            clock.s = float(second)
            bar.set_postfix(loss="0.5")
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "questions: 11 of 100, 10 s, about 81 s left, loss 0.5"
    assert [line.split()[1] for line in lines] == ["11", "41", "71", "100"]
    assert lines[-1] == "questions: 100 of 100, 99 s, loss 0.5"


def test_a_short_job_prints_no_line(clock, capsys):
    assert list(progress.progress(range(5), "short")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_a_resumed_job_counts_from_where_it_was(clock, capsys):
    for i in progress.progress(range(80, 100), "steps", total=100, initial=80):
        clock.s = float(i - 70)
    assert capsys.readouterr().err.splitlines()[0] == "steps: 81 of 100, 10 s, about 190 s left"


def test_an_abandoned_job_ends_its_lines(clock, capsys):
    with progress.progress(desc="rounds") as bar:
        bar.write("by hand")
        clock.s = 10.0
        bar.update(3)
        bar.clear()
        bar.update(2)
    assert capsys.readouterr().err.splitlines() == ["by hand", "rounds: 3, 10 s", "rounds: 5, 10 s"]


def test_other_ranks_print_no_progress(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "rank", lambda: (1, 2))
    with progress.progress(total=2, desc="questions") as bar:
        clock.s = 60.0
        bar.update()
        bar.write("a line")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.progress(total=2, desc="questions") as bar:
        bar.update()
        bar.write("a line")
        bar.set_postfix(loss="0.5")
    said = terminal.getvalue()
    assert "questions:" in said and "a line\n" in said and "1/2" in said and "loss=0.5" in said


# ---------------------------------------------------------------- tables


def entry(method: str, budgets: list[int], skipped: float = 6.76923) -> dict:
    stage = {"tokens": 12345.678, "prefill_s": 12.3456, "decode_s": 123.456}
    stage |= {"ms_per_token": 1234.567, "skipped_sublayers": skipped, "exit_rate": 1.0}
    stages = [{"name": f"stage-{i}"} | stage for i in range(len(budgets))]
    run = {"accuracy": 1.0, "accuracy_ci95": [0.9, 1.0], "latency_s": 123.4, "speedup": 12.345}
    return {"method": method, "budgets": budgets, "stages": stages} | run


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4, 6])
def test_tables_fit_80_columns_for_any_number_of_stages(n_stages, capsys):
    runs = [entry("full", [0] * n_stages), entry("litestage-uniform", [128] * n_stages)]
    print_runs(runs)
    print_stages(runs)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.endswith(",".join(["6.8"] * n_stages)) for line in lines) == 2
    assert sum(line.startswith("stage-") for line in lines) == 2 * n_stages


@pytest.mark.parametrize("value, text", [(6.76923, "6.8"), (6.0, "6"), (0, "0"), (99.96, "100")])
def test_a_count_has_one_decimal(value, text):
    assert count(value) == text


def trial(tried, accuracy: float, meets: bool, **more) -> dict:
    found = {"tried": tried, "accuracy": accuracy, "accuracy_ci95": [0.4, 0.6], "meets": meets}
    return found | {"tokens": 61.5, "latency_s": 0.3, "exit_rate": 0.25, "abandoned": False} | more


def test_a_scan_shows_intervals_what_meets_and_what_was_chosen(capsys):
    trials = [
        trial(0, 0.5, True),
        trial(1, 0.48, False),
        trial(2, 0.49, False, abandoned=True),
        trial(3, 0.5, True, latency_s=0.29),
    ]
    print_scan("recall", 0.5, trials, 3, 0.05)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "recall: target accuracy 50.0%"
    assert lines[3].split() == ["0", "50.0", "[40.0,60.0]", "61.5", "300.00", "25%", "yes"]
    assert lines[4].split()[-1] == "no"
    assert lines[5].split()[:4] == ["2", "<=49.0", "61.5", "-"]
    assert lines[6].split()[-2:] == ["yes", "<--"]
    assert lines[7] == "as fast or faster, within the measuring noise: 0"
    assert max(map(len, lines)) <= 80
    print_scan("exit", 0.9, trials, None, 0.05)
    assert capsys.readouterr().out.splitlines()[-1] == "none meets the target: nothing changes"


def test_the_full_model_is_shown_for_the_stages_there_are(two_stages, capsys):
    full = {"accuracy": 0.0, "latency_s": 0.3, "stage_s": [0.1, 0.2], "accuracy_ci95": [0.0, 0.02]}
    print_full(full, [1, 0], 0.01)
    said = capsys.readouterr().out
    assert "accuracy 0.0 [0.0,2.0]%" in said
    assert "slowest stage first: answer 200.00 ms, reason 100.00 ms" in said
    assert "it answers none of the questions right" in said


def test_a_stage_is_shown_with_its_prompts_if_asked(capsys):
    result = SimpleNamespace(
        name="analyze",
        prompts=["Q?\nAnalyze: A,", "Q?\nAnalyze: B,"],
        texts=[" one.", " two."],
        stops=["eos", "length"],
        tokens=10,
        timings=SimpleNamespace(decode_s=0.1, skipped=6.76923),
    )
    print_stage(result, ("A", "B"), 32)
    said = capsys.readouterr().out
    assert "    (A) one. [eos]\n    (B) two. [length]\n" in said and "Q?" not in said
    assert "10 tokens, 10.00 ms/token, 6.8 of 32 sub-layers skipped" in said
    print_stage(result, ("A", "B"), 32, show_prompts=True)
    said = capsys.readouterr().out
    assert "  | Q?\n  | Analyze: B,\n    (B) two. [length]\n" in said
