"""Two processes, as torchrun starts them, give what one gives: the same report, plan and errors."""

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
    question,
    read_untimed,
    search_flags,
    write_questions,
)

from data.setup import find_device

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


def two(name: str, *argv: str) -> list[Done]:
    """The command on both of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ThreadPoolExecutor(2) as pool:
        ranks = [place | {"RANK": str(rank)} for rank in range(2)]
        quick = "import search; search.ROUNDS, search.BATCH = 2, 3"
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
