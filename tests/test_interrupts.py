"""Ctrl-C, kill -9, a full disk, little memory, a closed pipe: complete files only, nothing lost.

python -m pytest -q tests/test_interrupts.py
"""

import errno
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
from damage import (
    REPORT,
    ROOT,
    command,
    edit_json,
    edit_tensors,
    eval_flags,
    finish,
    forked,
    make_good,
    make_model,
    one_line,
    question,
    search_flags,
    snapshot,
    start,
    texts_of,
    untimed,
    write_questions,
)

import generate
from tools.journal import Journal

MANY = 24  # questions, so that a search has more than one batch of them
QUICK = ("--limit", "6", "--step", "4")  # one batch, few trials
MEASURED = 6  # lines of a search's journal before the first trial
FEW_ROUNDS = "import search; search.ROUNDS = 2"  # how fast a step is does not matter here
# a few tokens and an exit that sometimes happens, so that texts of a batch end at different steps
VARIED = ("--max-new-tokens", "6", "--exit-window", "2", "--exit-threshold", "0.25")

# Code for a process of its own: a signal to itself in the middle of its n-th forward after it has
# appended so many lines to the journal, or (n = 0) half-way through writing the next line.
SIGNALLED = """
import os, signal, model, search
from tools.journal import Journal
search.ROUNDS = 2  # how fast a step is does not matter here
forward, append, lines, calls = model.Llama.forward, Journal.append, 0, 0
def counted(*args, **more):
    global calls
    calls += lines >= {lines}
    if {n} and calls == {n}:
        os.kill(os.getpid(), signal.{signal})
    return forward(*args, **more)
def appended(self, *args):
    global lines
    if not {n} and lines == {lines}:
        file = self.file
        class Half:
            def write(_, raw):
                file.write(raw[: len(raw) // 2])
                file.flush()
                os.kill(os.getpid(), signal.{signal})
        self.file = Half()
    append(self, *args)
    lines += 1
model.Llama.forward, Journal.append = counted, appended
"""


def signalled(signal: str, n: int, lines: int = 0) -> str:
    return SIGNALLED.format(signal=signal, n=n, lines=lines)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = make_good(tmp_path_factory.mktemp("good") / "files")
    write_questions(folder / "questions.jsonl", [question(i) for i in range(MANY)])
    for journal in journals(folder):
        journal.unlink()
    return folder


@pytest.fixture
def files(good, tmp_path) -> Path:
    """Good files, a report and a plan from before, and no journal."""
    return Path(shutil.copytree(good, tmp_path / "files"))


@pytest.fixture
def eight(files) -> Path:
    """The same with fewer questions, for what is run several times."""
    write_questions(files / "questions.jsonl", [question(i) for i in range(8)])
    return files


@pytest.fixture(scope="module")
def place(good, tmp_path_factory) -> Path:
    """A folder with `kept`: the good files after a search in `known`."""
    place = tmp_path_factory.mktemp("searched")
    shutil.copytree(good, place / "known")
    assert search_here(place / "known", *QUICK).status == 0
    shutil.copytree(place / "known", place / "kept")
    return place


@pytest.fixture
def known(place) -> Path:
    """Good files, and the plan and the journal of a search where they lie."""
    shutil.rmtree(place / "known")
    return Path(shutil.copytree(place / "kept", place / "known"))


def search_here(folder: Path, *more: str):
    with mock.patch("search.ROUNDS", 2):
        return command("search", *search_flags(folder, *more))


def journals(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.journal"))


def searched(folder: Path, *more: str) -> list[Path]:
    """The journals of a search that found none."""
    assert search_here(folder, *more).status == 0
    return journals(folder)


def trials(journal: Path) -> list[dict]:
    """Every trial of a journal, all lines of which must be whole."""
    assert journal.read_bytes().endswith(b"\n")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    kinds = [next(iter(line)) for line in lines]
    assert kinds[:MEASURED] == ["key", "threads", "ranked", "round", "round", "measured"]
    return [line["trial"] for line in lines[MEASURED:]]


def assert_none_repeated(journal: Path) -> None:
    """A point may be tried again only where its first trial was abandoned half-way."""
    seen = {}
    for trial in trials(journal):
        point = (*trial["budgets"], trial["threshold"])
        assert point not in seen or seen[point]["abandoned"], f"{point} was tried twice"
        seen[point] = trial


def undisturbed_plan(folder: Path, journal: Path, *more: str) -> dict:
    """The plan of a search that is never interrupted, from the same measured times."""
    other = folder.parent / "undisturbed"
    other.mkdir()
    measured = journal.read_bytes().partition(b'{"trial"')[0]
    (other / journal.name).write_bytes(measured)
    with mock.patch("search.ROUNDS", 2):
        done = command("search", *search_flags(folder, *more, "--out", f"{other}/plan.json"))
    assert done.status == 0, done
    return plan_of(other)


def plan_of(folder: Path) -> dict:
    return json.loads((folder / "plan.json").read_text()) | {"command": None}


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    "name, n, lines", [("eval", 40, 0), ("search", 3, MEASURED + 3), ("generate", 9, 0)]
)
def test_ctrl_c_says_one_line_and_leaves_the_files_as_they_were(name, n, lines, files):
    flags = {
        "eval": eval_flags(files, "--stage-budgets", "1,1,1"),
        "search": search_flags(files, *QUICK),
        "generate": [*eval_flags(files)[:4], "Which?", "this", "that"],
    }
    before = snapshot(files)
    done = forked(name, *flags[name], before=signalled("SIGINT", n, lines))
    assert (done.status, done.err) == (130, "interrupted\n")
    after = snapshot(files)
    for journal in journals(files):
        assert name == "search" and len(trials(journal)) == 3
        del after[journal.name]
    assert after == before


LOADING = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, *args):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
sys.path[0] = os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["eval", "search", "generate", "skip", "tools/train"])
def test_ctrl_c_while_torch_is_loading_is_one_line(name):
    path = str(ROOT / f"{name}.py")
    run = [os.sys.executable, "-c", LOADING, path]
    restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, preexec_fn=restore)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_whoever_imports_our_code_keeps_their_own_ctrl_c():
    code = "import signal, data; print(signal.getsignal(signal.SIGINT) is data.stop)"
    run = [os.sys.executable, "-c", code]
    assert subprocess.run(run, cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


def test_ctrl_c_while_a_report_takes_its_name_leaves_the_old_one(files):
    slow = """
import os, signal
replace = os.replace
os.replace = lambda *args: (os.kill(os.getpid(), signal.SIGINT), replace(*args))
"""
    before = snapshot(files)
    flags = eval_flags(files, "--stage-budgets", "1,1,1", "--limit", "1")
    done = forked("eval", *flags, before=slow)
    assert (done.status, done.err) == (130, "interrupted\n")
    (journal,) = journals(files)
    after = snapshot(files)
    del after[journal.name]
    assert after == before


# ---------------------------------------------------------------- killed searches


def test_a_search_killed_ten_times_ends_with_the_undisturbed_plan(files):
    """At random moments: while it measures, in a trial, half-way through a line of the journal."""
    (files / "plan.json").unlink()
    rng, kept = random.Random(7), b""
    # while it ranks, writes down a round of step times, and in the first trial
    moments = [(2, 20), (1, 0), (3, 5)]
    moments += [(rng.randrange(2), rng.choice((0, rng.randrange(1, 40)))) for _ in range(7)]
    for lines, n in moments:
        done = forked("search", *search_flags(files), before=signalled("SIGKILL", n, lines))
        assert (done.status, done.err) == (-9, ""), done
        raw = journals(files)[0].read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        assert whole.startswith(kept), "what was finished before stays"
        assert (raw != whole) == (n == 0), "half a line is there if it was being written"
        assert whole.count(b"\n") >= kept.count(b"\n") + lines
        kept = whole
    assert kept.count(b'{"trial"') > 2, "the killed searches got somewhere"
    assert not (files / "plan.json").exists()
    assert search_here(files).status == 0
    (journal,) = journals(files)
    assert journal.read_bytes().startswith(kept)
    assert_none_repeated(journal)
    assert plan_of(files) == undisturbed_plan(files, journal)


def test_a_torn_last_line_of_the_journal_is_dropped_wherever_it_is_torn(known):
    (journal,) = journals(known)
    raw, plan = journal.read_bytes(), plan_of(known)
    first = raw.index(b'{"trial"')
    for cut in [first, len(raw) - 1, *random.Random(1).choices(range(first, len(raw)), k=4)]:
        journal.write_bytes(raw[:cut])
        (known / "plan.json").unlink()
        assert search_here(known, *QUICK).status == 0
        assert journal.read_bytes() == raw, "the same trials again, from the torn line on"
        assert plan_of(known) == plan


CHANGES = {
    "weights": lambda f: edit_tensors(
        f / "model" / "model.safetensors", lambda t: t["lm_head.weight"].mul_(2)
    ),
    "config": lambda f: edit_json(f / "model" / "config.json", rope_theta=500.0),
    "tokenizer": lambda f: (f / "model" / "tokenizer.json").write_bytes(
        (f / "model" / "tokenizer.json").read_bytes() + b"\n"
    ),
    "end token": lambda f: edit_json(f / "model" / "generation_config.json", eos_token_id=9),
    "questions": lambda f: write_questions(
        f / "questions.jsonl", [question(i + 1) for i in range(MANY)]
    ),
    "one question fewer": ("--limit", "5"),
    "longer texts": ("--max-new-tokens", "4"),
    "another window": ("--exit-window", "3"),
    "whole layers": ("--granularity", "layer"),
    "another dtype": ("--dtype", "bfloat16"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_search_of_something_else_takes_no_trial_from_the_journal(change, known):
    before = snapshot(known)
    flags = change if isinstance(change, tuple) else ()
    if not flags:
        change(known)
    assert search_here(known, *QUICK, *flags).status == 0
    new = [path for path in journals(known) if path.name not in before]
    assert len(new) == 1 and len(trials(new[0])) > 3
    (old,) = [path for path in journals(known) if path.name in before]
    assert old.read_bytes() == before[old.name]


def test_another_target_takes_the_trials_from_the_journal(files):
    (journal,) = searched(files, "--step", "3", "--epsilon", "0.5")
    raw = journal.read_bytes()
    assert search_here(files, "--step", "3", "--epsilon", "0.1,0.5").status == 0
    assert journals(files) == [journal] and journal.read_bytes().startswith(raw)
    assert_none_repeated(journal)


# ---------------------------------------------------------------- files that cannot be written


@contextmanager
def full_disk(n: int):
    """No file can be made longer than n bytes: the write that would do so fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only():
    """No file can be opened for writing, or take another's name."""
    real, refused = open, OSError(errno.EROFS, "Read-only file system")

    def opens(file, mode="r", *args, **more):
        if set(mode) & set("wax+"):
            raise refused
        return real(file, mode, *args, **more)

    with mock.patch("builtins.open", opens), mock.patch("io.open", opens):
        with mock.patch("os.replace", side_effect=refused):
            yield


def test_a_report_that_cannot_be_written_leaves_the_old_one(files):
    before = snapshot(files)
    answer = generate.Pipeline.answer
    flags = eval_flags(files, "--stage-budgets", "1,1,1", "--limit", "2")
    with mock.patch("os.replace", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        done = command("eval", *flags)
    line = one_line(done._replace(out=""))
    assert f"{files}/report.json: cannot be written (No space left on device)" in line
    assert "litestage 1,1,1" in done.out, "what was computed is shown all the same"
    (journal,) = journals(files)
    after = snapshot(files)
    del after[journal.name]
    assert after == before and before["report.json"].decode() == REPORT
    with mock.patch("generate.Pipeline.answer", autospec=True, side_effect=answer) as answered:
        assert command("eval", *flags).status == 0
    assert answered.call_count == 4, "for the importance and to warm up, none to be evaluated"
    assert not journals(files), "nothing is left to be gone on with"


@pytest.mark.parametrize(
    "trouble, words",
    [(lambda: full_disk(1500), "cannot be written"), (read_only, "journal cannot be opened")],
    ids=["full", "read-only"],
)
def test_a_disk_that_takes_no_journal_stops_an_evaluation_at_once(trouble, words, files):
    before = snapshot(files)
    with trouble():
        line = one_line(command("eval", *eval_flags(files, "--stage-budgets", "1,1,1")))
    assert f"{files}/report.json." in line and words in line
    for journal in journals(files):
        journal.unlink()
    assert snapshot(files) == before and before["report.json"].decode() == REPORT


def test_a_plan_that_cannot_be_written_costs_no_trial(files):
    old = (files / "plan.json").read_bytes()
    failed = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("os.replace", side_effect=failed):
        line = one_line(search_here(files, *QUICK)._replace(out=""))
    assert f"{files}/plan.json: cannot be written (No space left on device)" in line
    assert (files / "plan.json").read_bytes() == old
    (journal,) = journals(files)
    raw = journal.read_bytes()
    assert search_here(files, *QUICK).status == 0
    assert journal.read_bytes() == raw, "the second search only writes the plan"
    assert not list(files.glob("*.tmp"))


def test_a_journal_on_a_full_disk_stops_the_search_and_is_resumed(known):
    (journal,) = journals(known)
    lines, old = journal.read_bytes().splitlines(keepends=True), (known / "plan.json").read_bytes()
    whole = b"".join(lines[: MEASURED + 2])  # with two trials
    journal.write_bytes(whole)
    with full_disk(len(whole) + 50):
        line = one_line(search_here(known, *QUICK)._replace(out=""))
    assert f"{journal}: cannot be written" in line
    assert journal.read_bytes() == whole + lines[MEASURED + 2][:50], "the next line is torn"
    assert (known / "plan.json").read_bytes() == old
    assert search_here(known, *QUICK).status == 0
    assert journal.read_bytes() == b"".join(lines)
    assert (known / "plan.json").read_bytes() == old


def test_a_journal_that_cannot_be_opened_is_refused_before_any_work(files):
    before = snapshot(files)
    with read_only(), mock.patch("model.Llama.forward", side_effect=AssertionError("work")):
        line = one_line(search_here(files))
    assert "journal cannot be opened (Read-only file system)" in line
    assert snapshot(files) == before


# ---------------------------------------------------------------- nobody reads, no memory


def test_a_reader_that_leaves_early_gets_no_traceback_and_the_report_is_written(files):
    read, write = os.pipe()
    os.close(read)
    flags = eval_flags(files, "--stage-budgets", "1,1,1", "--limit", "2")
    process = start("eval", *flags, stdout=write)
    os.close(write)
    assert process.communicate(timeout=300)[1] == ""
    assert json.loads((files / "report.json").read_text())["n"] == 2


def test_head_gets_its_line(files):
    flags = " ".join(eval_flags(files, "--stage-budgets", "1,1,1", "--limit", "2"))
    shell = f"set -o pipefail; {{ python -u eval.py {flags} | head -1; }} 2>&1"
    root = Path(__file__).parent.parent
    path = f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path}
    done = subprocess.run(["bash", "-c", shell], cwd=root, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("note: ") and done.stdout.count("\n") == 1


def test_a_closed_stdout_does_not_keep_the_report_from_being_written(files):
    flags = eval_flags(files, "--stage-budgets", "1,1,1", "--limit", "2")
    done = finish(start("eval", *flags, stdout=None, preexec_fn=lambda: os.close(1)))
    assert (done.status, done.err) == (0, "")
    assert json.loads((files / "report.json").read_text())["n"] == 2


def test_a_full_disk_behind_stdout_is_one_line(files):
    flags = eval_flags(files, "--stage-budgets", "1,1,1", "--limit", "2")
    with open("/dev/full", "w") as full:
        done = finish(start("eval", *flags, stdout=full))
    assert done.status == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert json.loads((files / "report.json").read_text())["n"] == 2


@contextmanager
def little_memory(megabytes: int):
    """No more address space than that beyond what the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> list[str]:
    """Flags of an evaluation with 85 MB of weights."""
    folder = tmp_path_factory.mktemp("large")
    make_model(folder / "model", hidden_size=512, intermediate_size=4096)
    write_questions(folder / "questions.jsonl", [question(0)])
    return [*eval_flags(folder)[:4], "--max-new-tokens", "2", "--stage-budgets", "1,1,1"]


@pytest.mark.parametrize("megabytes", [0, 40, 100, 140, 200])
def test_too_little_memory_is_one_line(megabytes, large):
    with little_memory(megabytes):
        done = command("eval", *large)
    if megabytes < 85 or done.status:
        one_line(done)


def test_a_process_with_too_little_memory_says_so_in_one_line(large):
    limit = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (60 << 20),) * 2)
"""
    assert "memory" in one_line(forked("eval", *large, before=limit))


# ---------------------------------------------------------------- debug mode, determinism


@pytest.mark.parametrize("value, on", [("1", True), ("0", False), ("", False)])
def test_debug_mode_is_switched_on_by_the_environment(value, on, monkeypatch):
    monkeypatch.setenv("LITESTAGE_DEBUG", value)
    assert runpy.run_path(str(ROOT / "model.py"))["DEBUG"] is on


def test_debug_mode_finds_no_hole_that_is_read(eight):
    def both(run) -> list:
        results = []
        for on in (False, True):
            with mock.patch("model.DEBUG", on):
                results.append(run())
        return results

    flags = [*eval_flags(eight)[:4], "--stage-budgets", "1,3,2", *VARIED]
    plain, debug = both(lambda: command("generate", *flags, "Which?", "this", "that", "a third"))
    assert plain.status == debug.status == 0 and texts_of(plain) == texts_of(debug)

    plain, debug = both(lambda: report(eight, "--stage-budgets", "1,3,2", "--batch", "4"))
    assert plain == debug

    with mock.patch("model.DEBUG", True):
        (journal,) = searched(eight, "--step", "2")
    with mock.patch("model.DEBUG", False):
        assert plan_of(eight) == undisturbed_plan(eight, journal, "--step", "2")


def report(folder: Path, *flags: str) -> dict:
    done = command("eval", *eval_flags(folder, *VARIED, *flags))
    assert done.status == 0, done
    return untimed(json.loads((folder / "report.json").read_text())) | {"batch": None}


def test_the_texts_depend_on_nothing_but_question_model_and_flags(eight):
    flags = ("--stage-budgets", "1,3,2", "--dtype", "float32")
    first = report(eight, *flags)
    rates = [stage["exit_rate"] for run in first["runs"][1:] for stage in run["stages"]]
    assert any(0 < rate < 1 for rate in rates), f"some exit, some do not: {rates}"
    assert 0 < first["runs"][1]["accuracy"] < 1
    assert report(eight, *flags) == first
    assert report(eight, *flags, "--batch", "4") == first
    backwards = [question(i) for i in reversed(range(8))]
    write_questions(eight / "questions.jsonl", backwards)
    again = report(eight, *flags)
    for ordered in (again, *again["runs"]):
        for key in {"ids", "answers"} & set(ordered):
            ordered[key].reverse()
    assert again == first, "what the caches held before does not matter"


def test_what_is_random_follows_the_seed(eight):
    flags = ("--method", "random", "--stage-budgets", "3,3,3")
    first = report(eight, *flags, "--seed", "1")
    assert report(eight, *flags, "--seed", "1") == first
    others = [report(eight, *flags, "--seed", str(seed))["runs"] for seed in (2, 3, 4)]
    assert any(runs != first["runs"] for runs in others)


def test_ctrl_c_while_questions_are_drawn_is_one_line_and_leaves_no_file(tmp_path):
    """The demo's make.py stands alone: it has no part in what the other commands share."""
    code = """
import os, runpy, signal, sys
sys.path[0] = os.path.dirname(sys.argv[0])
replace, os.replace = os.replace, lambda *args: os.kill(os.getpid(), signal.SIGINT)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    script = ROOT / "data" / "demo" / "make.py"
    run = [os.sys.executable, "-c", f"import sys; sys.argv.pop(0)\n{code}", script]
    run += ["--count", "3", "--out", tmp_path / "fresh.jsonl"]
    restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    done = subprocess.run(run, capture_output=True, text=True, preexec_fn=restore)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_two_searches_do_not_write_to_one_journal(files):
    (journal,) = searched(files, *QUICK)
    raw, held = journal.read_bytes(), Journal(journal)
    done = forked("search", *search_flags(files, *QUICK), before=FEW_ROUNDS)
    assert f"{journal}: another process is writing to it" in one_line(done)
    assert journal.read_bytes() == raw
    held.file.close()
    assert forked("search", *search_flags(files, *QUICK), before=FEW_ROUNDS).status == 0


def test_a_report_goes_through_a_link_and_into_a_pipe(files):
    (files / "link.json").symlink_to("target.json")
    os.mkfifo(files / "pipe")
    reader = os.open(files / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link.json", "pipe"):
        flags = eval_flags(files, "--stage-budgets", "1,1,1", "--json", str(files / name))
        assert command("eval", *flags).status == 0
    assert (files / "link.json").is_symlink() and (files / "pipe").is_fifo()
    for raw in ((files / "target.json").read_bytes(), os.read(reader, 1 << 20)):
        assert json.loads(raw)["runs"][1]["budgets"] == [1, 1, 1]
    os.close(reader)


def test_a_letter_that_the_terminal_lacks_is_escaped():
    with subprocess.Popen(
        [sys.executable, "generate.py", "Ж", "--max-new-tokens", "1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.read().startswith(rb"\u0416")
    assert process.returncode == 0
