"""What data/prepare.py makes of the official files, and how it refuses what they should not be.

The releases here are made up, but laid out like the official ones; a server on loopback serves
them. python -m pytest -q tests/test_prepare.py
"""

import csv
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import ecqa, prepare
from data.questions import FOLDER, Question, format_question, read_questions
from tools.command import run
from tools.flags import make_parser

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "benchmarks"
MAIN = f"{prepare.OBQA}/Data/Main"
ADDITIONAL = f"{prepare.OBQA}/Data/Additional"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no local copies of the benchmarks")

# ---------------------------------------------------------------- releases made up


def made_up(prefix: str, count: int, **more: str) -> bytes:
    """`count` questions as JSON lines, each with the keys `more` besides."""
    lines = []
    for i in range(count):
        stem = f"{prefix} {i}: what is next?"
        question = Question(f"{prefix}-{i}", stem, ("A", "B"), (f"{i + 1}", "a goat"), "AB"[i % 2])
        lines.append(json.dumps(json.loads(format_question(question)) | more) + "\n")
    return "".join(lines).encode()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def obqa_members() -> dict[str, bytes]:
    members = {}
    for file, count in prepare.OBQA_COUNTS.items():
        members[f"{MAIN}/{file}.jsonl"] = made_up(file, count)
        members[f"{ADDITIONAL}/{file}_complete.jsonl"] = made_up(file, count, fact1="goats  eat")
    return members


@pytest.fixture(scope="module")
def obqa_zip(obqa_members) -> bytes:
    return zipped(obqa_members)


@pytest.fixture(scope="module")
def csqa_files() -> dict[str, bytes]:
    return {
        "train_rand_split.jsonl": made_up("train", 9741),
        "dev_rand_split.jsonl": made_up("dev", 1221),
    }


def bigbench(count: int = 2290) -> dict:
    examples = [
        {
            "input": f" Is {i} even? ",
            "target_scores": {"Yes": 1 - i % 2, "No": i % 2},
            "target": f"{'No' if i % 2 else 'Yes'}. Numbers end in digits.  {i} does. ",
        }
        for i in range(count)
    ]
    return {"name": "strategyqa", "examples": examples}


def authors(count: int = 2290) -> list[dict]:
    return [
        {
            "qid": f"q{i}",
            "term": "number",
            "question": f"Is {i} even?",
            "answer": i % 2 == 0,
            "facts": ["Numbers end in digits.", f"{i} does."],
        }
        for i in range(count)
    ]


# ---------------------------------------------------------------- running it


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command in this process: (exit status, stdout, stderr)."""

    def call(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        status = 0
        try:
            run(partial(prepare.main, make_parser(prepare.__doc__)))
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def refused(command, tmp_path):
    """Runs the command, which must fail with one line and write nothing; that line."""

    def call(*args) -> str:
        status, out, err = command(*args, "--out", tmp_path / "refused")
        assert (status, out) == (2, ""), err
        assert not list((tmp_path / "refused").glob("*.jsonl"))
        *progress, line = err.splitlines()
        assert line.startswith("error: ")
        assert all("B/s]" in text for text in progress if text), err
        return line.removeprefix("error: ")

    return call


class Server(ThreadingHTTPServer):
    """Serves `files` from memory and notes in `ranges` the Range header of every request."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.ranges = []
        self.honours_ranges = True
        self.sends_at_most = None  # bytes of a body, after which the connection is closed
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        body = self.server.files.get(self.path.rsplit("/", 1)[-1])
        wanted = self.headers["Range"]
        self.server.ranges.append(wanted)
        if body is None:
            return self.send_error(404)
        start = 0
        if wanted and self.server.honours_ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][: self.server.sends_at_most])


@pytest.fixture
def serve(monkeypatch):
    """Starts a server of some files that passes for the publisher of a benchmark."""
    servers = []

    def start(name: str, files: dict[str, bytes], check: bool = True) -> Server:
        server = Server(files)
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.01)).start()
        servers.append(server)
        sums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        sums = sums if check else dict.fromkeys(files)
        official = replace(prepare.OFFICIAL[name], url=server.url + "/", files=sums)
        monkeypatch.setitem(prepare.OFFICIAL, name, official)
        return server

    monkeypatch.setenv("no_proxy", "*")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


def read(folder: Path, split: str, targets: bool = False) -> list[Question]:
    return read_questions(folder / f"{split}.jsonl", targets)


# ---------------------------------------------------------------- what is written


def test_obqa_is_downloaded_as_published(serve, command, tmp_path, obqa_members, obqa_zip):
    server = serve("obqa", {f"{prepare.OBQA}.zip": obqa_zip})
    status, out, err = command("obqa", "--out", tmp_path)
    assert status == 0, err
    assert out.splitlines() == [
        f"{tmp_path}/train.jsonl: 4957 questions",
        f"{tmp_path}/valid.jsonl: 500 questions",
        f"{tmp_path}/test.jsonl: 500 questions",
    ]
    assert f"{prepare.OBQA}.zip: 100%" in err, "progress belongs on stderr"
    for split, file in (("train", "train"), ("valid", "dev"), ("test", "test")):
        official = tmp_path / "official.jsonl"
        official.write_bytes(obqa_members[f"{MAIN}/{file}.jsonl"])
        assert read(tmp_path, split) == read_questions(official)
    official.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "download",
        "test.jsonl",
        "train.jsonl",
        "valid.jsonl",
    ]
    first = contents(tmp_path)
    assert command("obqa", "--out", tmp_path)[0] == 0
    assert contents(tmp_path) == first, "the same bytes on every run"
    assert len(server.ranges) == 1, "what is there already is not fetched again"


def test_obqa_targets_come_from_its_facts(command, tmp_path, obqa_zip):
    source = unpacked(tmp_path / "from", {"copy.zip": obqa_zip}) / "copy.zip"
    assert command("obqa", "--from", source, "--out", tmp_path / "plain")[0] == 0
    assert command("obqa", "--from", source, "--out", tmp_path / "taught", "--targets")[0] == 0
    for split in prepare.SPLITS:
        plain = read(tmp_path / "plain", split)
        taught = read(tmp_path / "taught", split, targets=True)
        assert [replace(question, recall=None, analyses=None) for question in taught] == plain
    assert taught[1].answer == "B"
    assert taught[1].recall == "goats eat."
    assert taught[1].analyses == (
        'the recalled facts do not support "2".',
        'the recalled facts support "a goat".',
    )


def test_csqa_draws_valid_from_train(serve, command, tmp_path, csqa_files):
    serve("csqa", csqa_files)
    assert command("csqa", "--out", tmp_path)[0] == 0
    ids = {split: [question.id for question in read(tmp_path, split)] for split in prepare.SPLITS}
    assert [len(ids[split]) for split in prepare.SPLITS] == [8520, 1221, 1221]
    assert ids["test"] == [f"dev-{i}" for i in range(1221)]
    assert set(ids["train"]) | set(ids["valid"]) == {f"train-{i}" for i in range(9741)}
    for split in ("train", "valid"):
        numbers = [int(id.removeprefix("train-")) for id in ids[split]]
        assert numbers == sorted(numbers), "the order of the official file is kept"
    assert 400 < sum(int(id.removeprefix("train-")) < 9741 // 2 for id in ids["valid"]) < 800


def test_csqa_draws_the_same_whatever_the_order(command, tmp_path, csqa_files):
    lines = csqa_files["train_rand_split.jsonl"].splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    drawn = []
    for name, content in (("a", csqa_files["train_rand_split.jsonl"]), ("b", b"".join(lines))):
        source = unpacked(tmp_path / name, {"train_rand_split.jsonl": content})
        status, _, err = command("csqa", "--from", source, "--out", source)
        assert status == 0
        assert f"{source}/test.jsonl: not written" in err
        assert not (source / "test.jsonl").exists()
        drawn.append({question.id for question in read_questions(source / "valid.jsonl")})
    assert drawn[0] == drawn[1]


# ---------------------------------------------------------------- csqa's targets, from ECQA


def explained(ids, **more) -> list[dict]:
    """Entries of ECQA for these questions of `made_up`."""
    entries = []
    for id in ids:
        entry = {
            "id": id,
            "positives": ["Numbers go up.", f"A goat says nothing of  {id}."],
            "negatives": ["Numbers are no goats"],
            "explanation": "Numbers go up, goats do not.",
        }
        entries.append(entry | more)
    return entries


def as_lines(entries: list[dict]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def as_table(entries: list[dict]) -> bytes:
    """The CSV of the authors' script, which has a number first."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    columns = ["q_no", "q_concept", "q_text", *(f"q_op{i}" for i in range(1, 6)), "q_ans"]
    writer.writerow(["", *columns, "taskA_pos", "taskA_neg", "taskB"])
    for i, entry in enumerate(entries):
        texts = ("\n".join(entry["positives"]), "\n".join(entry["negatives"]))
        writer.writerow([i, entry["id"], *["x, y"] * 8, *texts, entry["explanation"]])
    return file.getvalue().encode()


@pytest.fixture(scope="module")
def entries() -> list[dict]:
    known = [f"train-{i}" for i in range(0, 9741, 2)] + [f"dev-{i}" for i in range(1221)]
    return explained(known) + explained(known[:5], positives=["Twice."])  # the first counts


def test_csqa_targets_come_from_ecqa(command, tmp_path, csqa_files, entries):
    source = unpacked(tmp_path / "from", csqa_files | {"ecqa.jsonl": as_lines(entries)})
    status, out, err = command("csqa", "--from", source, "--out", tmp_path, "--targets")
    assert (status, err) == (0, "")
    assert "train: 4256 questions without an explanation are left out" in out
    found = [read(tmp_path, split, targets=True) for split in ("train", "valid")]
    ids = [question.id for part in found for question in part]
    assert len(ids) == len(set(ids)) == 4871, "an id that ECQA has twice comes once"
    assert all(id.startswith("train-") for id in ids), "the official dev set is never trained on"
    test = read(tmp_path, "test")
    assert len(test) == 1221 and test[0].recall is None
    first = next(question for question in found[0] if question.answer == "A")
    assert first.recall == f"Numbers go up. A goat says nothing of {first.id}."


@pytest.mark.parametrize("layout", ["lines", "table", "tables"])
@pytest.mark.parametrize("flag", ["--from", "--ecqa"])
def test_ecqa_is_read_in_either_layout(command, tmp_path, csqa_files, entries, layout, flag):
    half = len(entries) // 2
    files = {
        "lines": {"ecqa.jsonl": as_lines(entries)},
        "table": {"cqa_data_train.csv": as_table(entries)},
        "tables": {
            "cqa_data_test.csv": as_table(entries[:half]),
            "cqa_data_train.csv": as_table(entries[half:]),
        },
    }[layout]
    source = unpacked(tmp_path / "from", csqa_files)
    there = unpacked(tmp_path / "ecqa" if flag == "--ecqa" else source, files)
    more = []
    if flag == "--ecqa":
        more = ["--ecqa", there if layout == "tables" else there / next(iter(files))]
    assert command("csqa", "--from", source, *more, "--out", tmp_path, "--targets")[0] == 0
    found = read(tmp_path, "train", targets=True)
    assert len(found) == 4264
    assert found[1].analyses[found[1].labels.index("B")].startswith(("A goat", "Numbers are"))


def test_ecqa_is_downloaded_like_the_benchmark(serve, command, tmp_path, csqa_files, entries):
    serve("csqa", csqa_files | {"ecqa.jsonl": as_lines(entries)})
    url = prepare.OFFICIAL["csqa"].url
    assert command("csqa", "--out", tmp_path, "--targets", "--url", url)[0] == 0
    assert len(read(tmp_path, "train", targets=True)) == 4264


GARDEN = Question(
    "1",
    "Where do tomatoes grow?",
    ("A", "B", "C", "D"),
    ("gardens", "the desert", "sea", "shop window"),
    "A",
)


@pytest.mark.parametrize(
    "positives, negatives, recall, analyses",
    [
        (
            ["Plants need soil.", "A garden has soil"],
            ["In a window nothing grows.", "Deserts are dry. They are hot. Few plants live there."],
            "Plants need soil.",
            [
                "A garden has soil.",
                "Deserts are dry. They are hot.",
                'the recalled facts do not support "sea".',
                "In a window nothing grows.",
            ],
        ),
        (
            ["Plants need soil."],
            ["Too dry.", "Too salty.", "Too dark."],
            "Plants need soil.",
            ['the recalled facts support "gardens".', "Too dry.", "Too salty.", "Too dark."],
        ),
        (
            [],
            ["Too dry."],
            "Tomatoes grow in soil. Soil is in gardens.",
            [
                'the recalled facts support "gardens".',
                'the recalled facts do not support "the desert".',
                'the recalled facts do not support "sea".',
                'the recalled facts do not support "shop window".',
            ],
        ),
    ],
)
def test_the_rule_that_makes_targets(positives, negatives, recall, analyses):
    explanation = "Tomatoes grow in soil. Soil is in gardens. The rest is long."
    taught = ecqa.teach(GARDEN, ecqa.Entry(positives, negatives, explanation))
    assert taught.recall == recall
    assert list(taught.analyses) == analyses


def test_a_question_without_an_explanation_gets_no_targets():
    empty = ecqa.Entry([], ["Too dry."], "")
    assert ecqa.teach_all([GARDEN], {"1": empty}) == []
    assert ecqa.teach_all([GARDEN], {}) == []


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("ecqa.jsonl", b"{", "ecqa.jsonl, line 1: expected JSON"),
        ("ecqa.jsonl", b"[1]", "ecqa.jsonl, line 1: expected an object"),
        ("ecqa.jsonl", b'{"id": "1"}', "ecqa.jsonl, line 1: positives: missing"),
        ("ecqa.jsonl", as_lines(explained("1", positives=[1])), "positives: expected a text"),
        ("ecqa.jsonl", as_lines(explained("1", explanation=[1])), "explanation: expected a text"),
        ("ecqa.jsonl", as_lines(explained("1")), "expected explanations of csqa's questions"),
        ("cqa_data_a.csv", b"q_no,taskB\n1,x\n", "cqa_data_a.csv: expected a column taskA_pos"),
        ("cqa_data_a.csv", b"", "cqa_data_a.csv: expected a column q_no"),
        ("cqa_data_a.csv", b"\xff", "cqa_data_a.csv: expected UTF-8 text, found byte 0xff"),
        ("cqa_data_a.csv", b"q_no,taskA_pos,taskA_neg,taskB\n1,2\n", "line 2: expected 4 columns"),
        ("other.jsonl", b"", "expected ecqa.jsonl or cqa_data*.csv of ECQA"),
    ],
)
def test_what_is_not_ecqa_is_refused(refused, tmp_path, csqa_files, name, content, message):
    source = unpacked(tmp_path / "from", csqa_files | {name: content})
    assert message in refused("csqa", "--from", source, "--targets")
    assert "--ecqa nosuch: no such" in refused("csqa", "--targets", "--ecqa", "nosuch")


@needs_shared
def test_the_real_ecqa_makes_targets(command, tmp_path):
    assert command("csqa", "--from", SHARED / "csqa", "--out", tmp_path, "--targets")[0] == 0
    found = [read(tmp_path, split, targets=True) for split in ("train", "valid")]
    assert [len(part) for part in found] == [2552, 352]
    official = {question.id for question in read_questions(SHARED / "csqa/dev_rand_split.jsonl")}
    for question in found[0] + found[1]:
        assert question.id not in official
        for text in (question.recall, *question.analyses):
            assert text.endswith((".", '"', "'")) and "\n" not in text
            assert not re.search(r"[Oo]ption [A-E]\b", text), text
    own = [text for q in found[0] for text in q.analyses if "the recalled facts" not in text]
    assert len(own) > 0.8 * 5 * len(found[0]), "most options have a text of their own"


@pytest.mark.parametrize("targets", [(), ("--targets",)])
def test_strategyqa_draws_the_same_from_both_formats(command, tmp_path, targets):
    files = {"task.json": bigbench(), "theirs.json": authors()}
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
        arguments = ("--from", tmp_path / name, "--out", tmp_path / name[:-5], *targets)
        assert command("strategyqa", *arguments)[0] == 0
    for split, count in (("train", 1832), ("valid", 229), ("test", 229)):
        task = read(tmp_path / "task", split, bool(targets))
        theirs = read(tmp_path / "theirs", split, bool(targets))
        assert len(task) == count
        assert [replace(question, id="") for question in task] == [
            replace(question, id="") for question in theirs
        ]
        for mine, other in zip(task, theirs, strict=True):
            number = int(other.id.removeprefix("q"))
            assert mine.id == f"strategyqa-{number + 1}"
            assert mine.stem == f"Is {number} even?"
            assert mine.options == ("yes", "no")
            assert mine.answer == "AB"[number % 2]
            if targets:
                assert mine.recall == f"Numbers end in digits. {number} does."
                right = mine.analyses[number % 2]
                assert right == f'the recalled facts support "{("yes", "no")[number % 2]}".'


def test_the_draw_is_pinned():
    """Published accuracies refer to these splits: another draw must not come in unnoticed."""
    yes_no = ("A", "B"), ("yes", "no"), "A"
    questions = [Question(str(i), f"Is {i} even?", *yes_no) for i in range(100)]
    drawn, others = prepare.draw(questions, 8)
    assert [question.id for question in drawn] == ["10", "34", "40", "70", "72", "79", "90", "99"]
    assert [question for question in questions if question not in drawn] == others


def test_equal_texts_stay_in_one_split():
    texts = [Question(str(i), f"text {i // 2}", ("A", "B"), ("x", "y"), "A") for i in range(200)]
    drawn, others = prepare.draw(texts, 40)
    assert not {question.stem for question in drawn} & {question.stem for question in others}


@needs_shared
def test_local_copies_of_the_real_benchmarks(command, tmp_path):
    for repeat in ("one", "two"):
        for name in prepare.OFFICIAL:
            arguments = ("--from", SHARED / name, "--out", tmp_path / repeat / name)
            assert command(name, *arguments)[0] == 0
    counts = {
        f"{name}/{split}": len(read(tmp_path / "one" / name, split))
        for name, split in (("obqa", "valid"), ("obqa", "test"), ("csqa", "test"))
    }
    assert counts == {"obqa/valid": 500, "obqa/test": 500, "csqa/test": 1221}
    splits = [read(tmp_path / "one" / "strategyqa", split) for split in prepare.SPLITS]
    assert [len(split) for split in splits] == [1832, 229, 229]
    stems = [{question.stem for question in split} for split in splits]
    assert len(set.union(*stems)) == sum(map(len, stems)), "a question lies in two splits"
    for name in prepare.OFFICIAL:
        one, two = contents(tmp_path / "one" / name), contents(tmp_path / "two" / name)
        assert one == two and one


@needs_shared
def test_targets_of_the_real_strategyqa(command, tmp_path):
    source = SHARED / "strategyqa" / "task.json"
    assert command("strategyqa", "--from", source, "--out", tmp_path, "--targets")[0] == 0
    for question in read_questions(tmp_path / "train.jsonl", targets=True):
        assert not question.recall.startswith(("Yes.", "No.")), "the answer is no fact"
        assert question.recall == question.recall.strip() and "  " not in question.recall


# ---------------------------------------------------------------- local copies


@pytest.mark.parametrize("inside", ["", prepare.OBQA, f"{prepare.OBQA}/Data", MAIN])
def test_a_folder_of_the_release_is_found_at_any_depth(command, tmp_path, obqa_members, inside):
    source = unpacked(tmp_path / "from", obqa_members)
    status, out, _ = command("obqa", "--from", source / inside, "--out", tmp_path / "out")
    assert status == 0
    assert len(out.splitlines()) == 3


def test_a_folder_with_the_zip_and_a_single_file(command, tmp_path, obqa_members, obqa_zip):
    source = unpacked(tmp_path / "from", {f"{prepare.OBQA}.zip": obqa_zip})
    assert len(command("obqa", "--from", source, "--out", tmp_path / "a")[1].splitlines()) == 3
    lone = unpacked(tmp_path, {"dev.jsonl": obqa_members[f"{MAIN}/dev.jsonl"]}) / "dev.jsonl"
    status, out, err = command("obqa", "--from", lone, "--out", tmp_path / "b")
    assert status == 0
    assert out == f"{tmp_path}/b/valid.jsonl: 500 questions\n"
    assert err.count("not written") == 2
    assert contents(tmp_path / "b")["valid.jsonl"] == contents(tmp_path / "a")["valid.jsonl"]


def test_sources_that_are_not_the_benchmark(refused, tmp_path):
    assert "--from nosuch: no such file or folder" in refused("obqa", "--from", "nosuch")
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, wanted in (("obqa", "dev"), ("csqa", "dev_rand_split"), ("strategyqa", "task.json")):
        message = refused(name, "--from", empty)
        assert f"--from {empty}: expected" in message and wanted in message
    assert "_complete.jsonl" in refused("obqa", "--from", empty, "--targets")
    told = refused("obqa", "--from", empty, "--targets", "--ecqa", empty)
    assert "--ecqa: expected csqa with --targets" in told


def test_a_wrong_count_is_refused(refused, tmp_path):
    source = unpacked(tmp_path / "from", {"test.jsonl": made_up("test", 499)})
    message = refused("obqa", "--from", source)
    assert message == f"{source}/test.jsonl: expected 500 questions, found 499"
    (source / "task.json").write_text(json.dumps(bigbench(2289)))
    message = refused("strategyqa", "--from", source)
    assert message == f"{source}/task.json: expected 2290 questions, found 2289"


def test_a_malformed_line_is_named_and_nothing_is_written(refused, tmp_path, obqa_members):
    lines = obqa_members[f"{MAIN}/test.jsonl"].splitlines()
    lines[7] = lines[7].replace(b'"answerKey"', b'"answer"')
    changed = {f"{MAIN}/test.jsonl": b"\n".join(lines)}
    source = unpacked(tmp_path, {"some.zip": zipped(obqa_members | changed)}) / "some.zip"
    message = refused("obqa", "--from", source)
    assert message == f"{source}, {MAIN}/test.jsonl, line 8: answerKey: missing"
    without = zipped({f"{ADDITIONAL}/dev_complete.jsonl": made_up("dev", 500)})
    source.write_bytes(without)
    message = refused("obqa", "--from", source, "--targets")
    assert message == f"{source}, {ADDITIONAL}/dev_complete.jsonl, line 1: fact1: missing"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[", "expected JSON: Expecting value"),
        ("7", "expected a list of questions, alone or under 'examples'"),
        ('{"examples": 7}', "expected a list of questions, alone or under 'examples'"),
        ("[]", "expected questions, found none"),
        ("[7]", "question 1: expected an object, found 7"),
        ('[{"qid": "1", "question": "?"}]', "question 1: answer: expected true or false"),
        ('[{"qid": "1", "question": "?", "answer": 1}]', "answer: expected true or false, found 1"),
        ('[{"question": "?", "answer": true}]', "question 1: qid: missing"),
        ('[{"qid": "1", "question": "?", "answer": true}]', "question 1: facts: missing"),
        (
            '[{"qid": "1", "question": "?", "answer": true, "facts": ["x", 1]}]',
            "question 1: facts[1]: expected a text, found 1",
        ),
        (
            '{"examples": [{"input": "?", "target": "Yes. x", "target_scores": {"Yes": 1}}]}',
            "question 1: target_scores: expected 1 for Yes or No",
        ),
    ],
)
def test_a_strategyqa_file_of_another_form(refused, tmp_path, value, message):
    path = tmp_path / "some.json"
    path.write_text(value)
    told = refused("strategyqa", "--from", path, "--targets")
    assert told.startswith(f"{path}") and message in told


# ---------------------------------------------------------------- zip files


def test_members_are_read_by_name_and_none_is_extracted(
    command, tmp_path, obqa_members, monkeypatch
):
    for method in ("extract", "extractall"):
        monkeypatch.setattr(zipfile.ZipFile, method, None)
    monkeypatch.chdir(tmp_path)
    evil = {"../evil": b"x", "/evil": b"x", f"{prepare.OBQA}/../../evil": b"x", "C:\\evil": b"x"}
    source = unpacked(tmp_path / "a" / "b", {"some.zip": zipped(evil | obqa_members)})
    before = {path for path in tmp_path.rglob("*")}
    assert command("obqa", "--from", source / "some.zip", "--out", source / "out")[0] == 0
    made = {path.relative_to(source).as_posix() for path in set(tmp_path.rglob("*")) - before}
    assert made == {"out", "out/train.jsonl", "out/valid.jsonl", "out/test.jsonl"}


def test_zips_that_are_not_the_release(refused, tmp_path, obqa_zip, monkeypatch):
    path = tmp_path / "some.zip"
    path.write_bytes(zipped({"Main/train.jsonl": b"", "../Data/Main/dev.jsonl": b""}))
    assert "found none of them" in refused("obqa", "--from", path)
    path.write_bytes(b"")
    assert "not a whole zip file" in refused("obqa", "--from", path)
    path.write_bytes(obqa_zip[: len(obqa_zip) // 2])
    assert "not a whole zip file" in refused("obqa", "--from", path)
    damaged = bytearray(obqa_zip)
    damaged[2000:2100] = bytes(100)
    path.write_bytes(damaged)
    assert f"{path}" in refused("obqa", "--from", path)
    path.write_bytes(obqa_zip)
    monkeypatch.setattr(prepare, "MAX_BYTES", 1000)
    message = refused("obqa", "--from", path)
    assert f"{path}, {MAIN}/train.jsonl: expected at most 1000 bytes, found " in message


# ---------------------------------------------------------------- downloading


def test_a_download_cut_short_is_resumed(serve, command, refused, tmp_path, obqa_zip):
    server = serve("obqa", {f"{prepare.OBQA}.zip": obqa_zip})
    server.sends_at_most = 5000
    out = tmp_path / "refused"
    for so_far in (5000, 10000):
        message = refused("obqa")
        assert f"ended after {so_far} of {len(obqa_zip)} bytes" in message
        assert "run the same command again" in message
    server.sends_at_most = None
    assert command("obqa", "--out", out)[0] == 0
    assert server.ranges == [None, "bytes=5000-", "bytes=10000-"]
    assert [path.name for path in (out / "download").iterdir()] == [f"{prepare.OBQA}.zip"]
    assert (out / "download" / f"{prepare.OBQA}.zip").read_bytes() == obqa_zip


@pytest.mark.parametrize("honours_ranges", [True, False])
@pytest.mark.parametrize("part", ["a whole file", "half a file"])
def test_a_partial_file_ends_up_whole(serve, command, tmp_path, obqa_zip, honours_ranges, part):
    server = serve("obqa", {f"{prepare.OBQA}.zip": obqa_zip})
    server.honours_ranges = honours_ranges
    size = len(obqa_zip) if part == "a whole file" else len(obqa_zip) // 2
    unpacked(tmp_path / "download", {f"{prepare.OBQA}.zip.part": obqa_zip[:size]})
    status, _, err = command("obqa", "--out", tmp_path)
    assert status == 0, err
    assert server.ranges == [f"bytes={size}-"]
    assert (tmp_path / "download" / f"{prepare.OBQA}.zip").read_bytes() == obqa_zip


@pytest.mark.parametrize("extra", [-9000, 5000])
def test_a_wrong_checksum_is_refused_and_forgotten(
    serve, command, refused, tmp_path, obqa_zip, extra
):
    serve("obqa", {f"{prepare.OBQA}.zip": obqa_zip})
    wrong = bytes(len(obqa_zip) + extra)
    folder = unpacked(tmp_path / "refused" / "download", {f"{prepare.OBQA}.zip.part": wrong})
    assert f"expected SHA-256 {hashlib.sha256(obqa_zip).hexdigest()}, found " in refused("obqa")
    assert not list(folder.iterdir()), "or the next try would resume from it"
    assert command("obqa", "--out", tmp_path / "refused")[0] == 0


def test_a_damaged_download_is_fetched_again(serve, command, tmp_path, csqa_files):
    server = serve("csqa", csqa_files)
    assert command("csqa", "--out", tmp_path)[0] == 0
    (tmp_path / "download" / "dev_rand_split.jsonl").write_bytes(b"damaged")
    assert command("csqa", "--out", tmp_path)[0] == 0
    assert server.ranges == [None] * 3


def test_a_file_without_checksum_is_never_pieced_together(serve, refused, command, tmp_path):
    content = json.dumps(bigbench()).encode()
    server = serve("strategyqa", {"task.json": content}, check=False)
    server.sends_at_most = 5000
    assert "ended after 5000 of" in refused("strategyqa")
    server.sends_at_most = None
    server.files["task.json"] = content[:-1]
    assert "expected JSON" in refused("strategyqa")
    server.files["task.json"] = json.dumps(bigbench(2291)).encode()
    assert "expected 2290 questions, found 2291" in refused("strategyqa")
    server.files["task.json"] = content
    assert command("strategyqa", "--out", tmp_path)[0] == 0
    assert server.ranges == [None] * 4


def test_servers_that_do_not_have_it(serve, refused):
    server = serve("csqa", {"train_rand_split.jsonl": b""})
    server.files.clear()
    message = refused("csqa")
    assert message == f"{server.url}/train_rand_split.jsonl: HTTP 404 Not Found"
    assert "/mirror/train_rand_split.jsonl: HTTP" in refused(
        "csqa", "--url", f"{server.url}/mirror"
    )
    message = refused("csqa", "--url", "http://127.0.0.1:1")  # nobody listens there
    assert "not downloaded" in message and "--from" in message
    assert "--url ftp://x: expected http" in refused("csqa", "--url", "ftp://x")
    assert "not downloaded" in refused("csqa", "--url", "http://[")


# ---------------------------------------------------------------- the command itself


def test_an_interruption_leaves_whole_files_only(command, tmp_path, obqa_members, monkeypatch):
    source = unpacked(tmp_path / "from", obqa_members)
    replaced = []

    def interrupted(part, path):
        if replaced:
            raise KeyboardInterrupt
        replaced.append(path)
        os.rename(part, path)

    monkeypatch.setattr(os, "replace", interrupted)
    status, _, err = command("obqa", "--from", source, "--out", tmp_path / "out")
    assert (status, len(err.splitlines())) == (130, 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.jsonl"]
    assert len(read_questions(tmp_path / "out" / "train.jsonl")) == 4957


def test_a_folder_that_cannot_be_written(command, tmp_path, obqa_members):
    source = unpacked(tmp_path / "from", obqa_members)
    (tmp_path / "out").write_bytes(b"a file")
    status, _, err = command("obqa", "--from", source, "--out", tmp_path / "out")
    assert (status, err) == (
        2,
        f"error: {tmp_path}/out/train.jsonl: cannot be written: File exists\n",
    )


def test_wrong_arguments_are_one_line(command):
    for arguments in (("nosuch",), (), ("obqa", "--from", "x", "--url", "y"), ("obqa", "--nosuch")):
        status, out, err = command(*arguments)
        assert (status, out, len(err.splitlines())) == (2, "", 1)


def test_help_fits_a_terminal_and_names_the_defaults(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = command("-h")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    for text in ("python data/prepare.py obqa", "--targets", "default: data/NAME", "(default:"):
        assert text in out


def test_the_script_runs_from_any_folder(tmp_path):
    unpacked(tmp_path, {"test.jsonl": made_up("test", 500)})
    script = [sys.executable, ROOT / "data" / "prepare.py"]
    arguments = ["obqa", "--from", ".", "--out", "out"]
    done = subprocess.run([*script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "out/test.jsonl: 500 questions\n"), done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_by_default_the_splits_go_where_their_name_finds_them(monkeypatch, command):
    calls = []
    monkeypatch.setattr(prepare, "prepare", lambda *args: calls.append(args))
    assert command("csqa")[0] == 0
    assert calls == [("csqa", None, FOLDER / "csqa", False, None, None)]
