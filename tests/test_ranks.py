"""Two processes, as torchrun starts them, give what one gives: the same report, plan and errors.

A mistake is one line from one of them, whichever makes it.
"""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from damage import (
    Done,
    command,
    eval_flags,
    forked,
    make_model,
    one_line,
    question,
    read_untimed,
    search_flags,
    write_questions,
)

from tools.setup import find_device

VARIED = ("--max-new-tokens", "4", "--exit-window", "2", "--exit-threshold", "0.25")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A model, and an odd number of questions."""
    folder = tmp_path_factory.mktemp("good")
    make_model(folder / "model")
    write_questions(folder / "questions.jsonl", [question(i) for i in range(7)])
    return folder


@pytest.fixture
def files(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "files"))


def two(name: str, *argv: str, before: str = "") -> list[Done]:
    """The command on both of two ranks; `before` is code that runs first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ThreadPoolExecutor(2) as pool:
        ranks = [place | {"RANK": str(rank)} for rank in range(2)]
        quick = f"import search; search.ROUNDS, search.BATCH = 2, 3\n{before}"
        return list(pool.map(lambda env: forked(name, *argv, before=quick, env=env), ranks))


def table(done: Done) -> list[str]:
    """The first words of the lines that it printed: no times."""
    return [line.split()[:2] for line in done.out.splitlines()]


def test_two_ranks_report_what_one_reports(files):
    flags = eval_flags(files, *VARIED, "--stage-budgets", "1,3,2")
    one = command("eval", *flags)
    assert one.status == 0, one
    report = read_untimed(files / "report.json")
    first, second = two("eval", *flags)
    assert (first.status, second.status, second.out, first.err, second.err) == (0, 0, "", "", "")
    assert read_untimed(files / "report.json") == report | {"ranks": 2}
    assert table(first)[:3] == table(one)[:3]


def test_two_ranks_find_the_plan_that_one_finds(files):
    flags = search_flags(files, *VARIED[:4], "--step", "3", "--epsilon", "0.2")
    with mock.patch("search.ROUNDS", 2), mock.patch("search.BATCH", 3):
        assert command("search", *flags).status == 0
    (journal,) = files.glob("*.journal")
    raw, plan = journal.read_bytes(), read_untimed(files / "plan.json")
    journal.write_bytes(raw.partition(b'{"trial"')[0])  # the same measured times
    first, second = two("search", *flags)
    assert (first.status, second.status, second.out, first.err, second.err) == (0, 0, "", "", "")
    assert journal.read_bytes() == raw and raw.count(b'{"trial"') > 5
    assert read_untimed(files / "plan.json") == plan


def test_two_ranks_measure_once_and_resume(files):
    flags = search_flags(files, "--step", "3")
    first, second = two("search", *flags)
    assert (first.status, second.status, second.out) == (0, 0, "")
    (journal,) = files.glob("*.journal")
    raw = journal.read_bytes()
    assert raw.count(b'{"measured"') == 1
    journal.write_bytes(raw[: int(0.8 * len(raw))])
    first, second = two("search", *flags)
    assert (first.status, second.status) == (0, 0)
    assert journal.read_bytes() == raw


def test_a_mistake_is_told_by_one_rank(files):
    first, second = two("eval", *eval_flags(files, "--stage-budgets", "1,1,99"))
    assert (first.status, second.status) == (2, 2)
    assert first.err.startswith("error: ") and first.err.count("\n") == 1
    assert first.out == second.out == second.err == ""


# Code that runs first: one of the ranks comes to grief in the middle of its work.
FAILS = """
import os, eval, time
from model import InputError
def fails(*_, **__):
    {what}
if os.environ["RANK"] in "{ranks}":
    eval.evaluate = fails
"""
RAISES = 'raise InputError("no memory left here")'
TOLD = "error: no memory left here\n"


@pytest.mark.parametrize("ranks, told", [("0", [TOLD, ""]), ("1", ["", TOLD]), ("01", [TOLD, ""])])
def test_a_mistake_of_any_rank_is_told_once(ranks, told, files):
    before = FAILS.format(what=RAISES, ranks=ranks)
    done = two("eval", *eval_flags(files, "--stage-budgets", "1,1,1"), before=before)
    assert [rank.status for rank in done] == [2, 2]
    assert [rank.err for rank in done] == told


def test_a_rank_that_makes_the_mistake_a_little_later_is_silent(files):
    what = f'time.sleep(int(os.environ["RANK"]))\n    {RAISES}'
    before = FAILS.format(what=what, ranks="01")
    done = two("eval", *eval_flags(files, "--stage-budgets", "1,1,1"), before=before)
    assert [(rank.status, rank.err) for rank in done] == [(2, TOLD), (2, "")]


def test_a_rank_that_is_killed_is_one_line_of_the_first(files):
    before = FAILS.format(what="os._exit(9)", ranks="1")
    first, second = two("eval", *eval_flags(files, "--stage-budgets", "1,1,1"), before=before)
    assert (first.status, second.status, second.err) == (2, 9, "")
    assert first.err == "error: another of the processes has ended\n"


@pytest.mark.parametrize(
    "env, words",
    [
        ({"RANK": "0"}, "WORLD_SIZE: expected a whole number, as torchrun sets it, found none"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK: expected a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: expected a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: expected a number below WORLD_SIZE 2, found 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK: the processes cannot meet"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "RANK: the processes cannot meet",
        ),
    ],
)
def test_a_place_among_the_ranks_that_is_none_is_one_line(env, words, files):
    done = forked("eval", *eval_flags(files, "--stage-budgets", "1,1,1"), env=env)
    assert words in one_line(done)


def test_a_number_of_ranks_without_a_rank_is_a_batch_system_and_not_torchrun(files):
    done = forked("eval", *eval_flags(files, "--stage-budgets", "1,3,2"), env={"WORLD_SIZE": "2"})
    assert (done.status, done.err) == (0, "")
    assert read_untimed(files / "report.json")["ranks"] == 1


def test_every_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    on = lambda _, device: SimpleNamespace(device=torch.device(device))  # noqa: E731
    monkeypatch.setattr("torch.empty", on)
    found = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(str(find_device("cuda")))
    assert found == ["cuda:0", "cuda:1", "cuda:0"]
    assert str(find_device("cuda:1")) == "cuda:1"
