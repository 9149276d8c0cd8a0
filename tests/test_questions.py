"""What data/questions.py reads, and which line, key and file it names when it cannot.

python -m pytest -q tests/test_questions.py
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from data import questions
from data.questions import Question, format_question, locate, read_questions
from model import InputError

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "benchmarks"
PLAIN = Question("7", "What do bees make?", ("A", "B"), ("honey", "milk"), "A")
TAUGHT = Question(
    "8",
    "What does an owl, “at night”, hunt?",
    ("A", "B", "D"),
    ("mice, voles", "oaks", "cars"),
    "A",
    "Owls eat small animals.",
    ("mice are small animals.", "an oak is a tree.", "a car is a machine."),
)


def row(**changes) -> dict:
    """A good line as an object, with some keys replaced, or dropped where the new value is None."""
    good = json.loads(format_question(TAUGHT)) | changes
    return {key: value for key, value in good.items() if value is not None}


def choices(*pairs) -> dict:
    return {"stem": "Which?", "choices": [{"label": label, "text": text} for label, text in pairs]}


def write(folder: Path, *lines: dict | str | bytes) -> Path:
    path = folder / "some.jsonl"
    raw = [json.dumps(line).encode() if isinstance(line, dict) else line for line in lines]
    raw = [line.encode() if isinstance(line, str) else line for line in raw]
    path.write_bytes(b"\n".join(raw))
    return path


def test_reads_back_what_it_writes(tmp_path):
    path = write(tmp_path, format_question(PLAIN), "", "  \r", format_question(TAUGHT) + "\r")
    assert read_questions(path) == [PLAIN, TAUGHT]
    assert "“" in path.read_text(encoding="utf-8"), "text stays readable, not escaped"
    assert read_questions(write(tmp_path, format_question(TAUGHT)), targets=True) == [TAUGHT]


def test_a_byte_order_mark_and_line_separators_in_a_text_are_no_mistake(tmp_path):
    odd = row(recall="one\u2028two")
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(odd, ensure_ascii=False).encode())
    assert read_questions(path)[0].recall == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "1",', "expected JSON: Expecting property name"),
        ("[1, 2]", "expected an object, found [1, 2]"),
        (b'{"id": "\xff"}', "expected UTF-8 text, found byte 0xff"),
        ("[" * 100_000, "expected JSON: "),
        ("9" * 5_000, "expected JSON: "),
        (row(id=None), "id: missing"),
        (row(id=7), "id: expected a text, found 7"),
        (row(question=None), "question: missing"),
        (row(question="Which?"), 'question: expected an object, found "Which?"'),
        (row(question={"stem": "Which?"}), "question.choices: missing"),
        (
            row(question={"stem": "?", "choices": []}),
            "question.choices: expected 2 or more, found 0",
        ),
        (row(question={"stem": "?", "choices": {}}), "question.choices: expected a list"),
        (row(question={"stem": "?", "choices": [1, 2]}), "choices[0]: expected an object"),
        (row(question=choices(("A", "x"))), "question.choices: expected 2 or more, found 1"),
        (row(question=choices(("A", "x"), ("A", "y"))), 'choices[1].label: "A" is another'),
        (row(question=choices(("A", "x"), ("0", "y"))), "expected one letter, A to Z or a to z"),
        (row(question=choices(("A", "x"), ("AB", "y"))), "expected one letter, A to Z or a to z"),
        (row(question=choices(("A", "x"), ("É", "y"))), "expected one letter, A to Z or a to z"),
        (row(question=choices(("A", "x"), ("A\n", "y"))), "expected one letter, A to Z or a to z"),
        (row(question=choices(("A", "x"), ("B", " "))), "choices[1].text: expected a text"),
        (row(question=choices(("A", "x"), ("B", None))), "choices[1].text: expected a text"),
        (row(question=choices(("A", "x"), ("B", "y")) | {"stem": " "}), "question.stem: expected"),
        (row(question=choices(("A", "x"), ("B", "\ud800"))), "half of a surrogate pair"),
        (row(answerKey=None), "answerKey: missing"),
        (row(answerKey="C"), 'answerKey: expected one of A, B, D, found "C"'),
        (row(answerKey=["A"]), "answerKey: expected a text"),
        (row(recall=3), "recall: expected a text, found 3"),
        (row(analyze="no list"), "analyze: expected a list"),
        (row(analyze=["one", "two"]), "analyze: expected 3 texts, found 2"),
        (row(analyze=["one", "two", ""]), "analyze[2]: expected a text, found an empty one"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_file_line_and_key(tmp_path, line, message):
    path = write(tmp_path, format_question(PLAIN), "", line)
    with pytest.raises(InputError) as caught:
        read_questions(path)
    text = str(caught.value)
    assert text.startswith(f"{path}, line 3: "), text
    assert message in text
    assert "\n" not in text and len(text) < len(str(path)) + 250, "one short line"


def test_two_questions_with_one_id_are_refused(tmp_path):
    path = write(tmp_path, row(), format_question(PLAIN), row())
    with pytest.raises(InputError, match='line 3: id "8" is taken by .*, line 1'):
        read_questions(path)


@pytest.mark.parametrize("key", ["recall", "analyze"])
def test_targets_are_required_when_asked_for(tmp_path, key):
    path = write(tmp_path, row(), row(id="9", **{key: None}))
    assert len(read_questions(path)) == 2
    with pytest.raises(InputError, match=f"line 2: {key}: missing; .*prepare.py csqa --targets"):
        read_questions(path, targets=True)


def test_missing_targets_name_the_command_that_makes_them(tmp_path):
    (tmp_path / "obqa").mkdir()
    path = write(tmp_path / "obqa", format_question(PLAIN))
    made = "make them with: python data/prepare.py obqa --targets"
    with pytest.raises(InputError, match=f"line 1: recall: missing; {made}$"):
        read_questions(path, targets=True)


@pytest.mark.parametrize("labels", ["12", "ab", "Zz", "A1b", "987654321"])
def test_labels_may_be_letters_and_digits(tmp_path, labels):
    given = choices(*((label, f"option {label}") for label in labels))
    path = write(tmp_path, row(question=given, answerKey=labels[-1], analyze=None))
    (question,) = read_questions(path)
    assert question.labels == tuple(labels) and question.answer == labels[-1]
    assert read_questions(write(tmp_path, format_question(question))) == [question]


def test_files_that_hold_no_questions(tmp_path):
    with pytest.raises(InputError, match="some.jsonl: expected questions, found none"):
        read_questions(write(tmp_path, "", " "))
    with pytest.raises(InputError, match="absent.jsonl: cannot be read: No such file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_questions(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path, row())
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        read_questions(path)


def test_locate_a_file_a_folder_and_a_named_set(tmp_path, monkeypatch):
    (tmp_path / "sets" / "obqa").mkdir(parents=True)
    (tmp_path / "sets" / "obqa" / "valid.jsonl").touch()
    (tmp_path / "here" / "obqa").mkdir(parents=True)
    (tmp_path / "here" / "obqa" / "valid.jsonl").touch()
    monkeypatch.setattr(questions, "FOLDER", tmp_path / "sets")
    monkeypatch.chdir(tmp_path / "here")
    assert locate("obqa", "valid") == tmp_path / "sets" / "obqa" / "valid.jsonl"
    assert locate("./obqa", "valid") == Path("obqa/valid.jsonl")
    assert locate(Path("obqa").resolve(), "valid") == tmp_path / "here" / "obqa" / "valid.jsonl"
    assert locate("obqa/valid.jsonl", "test") == Path("obqa/valid.jsonl")


def test_locate_says_what_is_missing_and_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "FOLDER", tmp_path)
    for name in ("obqa", "csqa", "strategyqa"):
        with pytest.raises(InputError, match=f"{name}/test.jsonl: .*data/prepare.py {name}$"):
            locate(name, "test")
    (tmp_path / "csqa").mkdir()
    (tmp_path / "csqa" / "test.jsonl").touch()  # made of the dev file alone
    with pytest.raises(InputError, match="csqa/valid.jsonl: not there, only test; .*--from"):
        locate("csqa", "valid")
    with pytest.raises(InputError, match="--data nosuch: expected .*; found no nosuch$"):
        locate("nosuch", "test")
    with pytest.raises(InputError, match="--data .*; found no .*/test.jsonl$"):
        locate(tmp_path, "test")
    with pytest.raises(InputError, match="--data x+: expected"):
        locate("x" * 300, "test")  # longer than a file's name may be


@pytest.mark.parametrize("name", ["obqa", "csqa", "strategyqa"])
def test_shots_are_whole_and_balanced(name):
    shots = read_questions(ROOT / "data" / name / "shots.jsonl", targets=True)
    assert len(shots) >= 6
    labels = {"obqa": "ABCD", "csqa": "ABCDE", "strategyqa": "AB"}[name]
    for shot in shots:
        texts = (shot.stem, *shot.options, shot.recall, *shot.analyses)
        assert "".join(shot.labels) == labels, shot.id
        assert all(text == " ".join(text.split()) for text in texts), "one line, single spaces"
        assert all(text.endswith(".") for text in (shot.recall, *shot.analyses)), shot.id
        assert len(" ".join(texts)) < 900, f"{shot.id}: a shot must be short"
    used = Counter(shot.answer for shot in shots)
    assert max(used[label] for label in labels) - min(used[label] for label in labels) <= 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="no local copies of the benchmarks")
@pytest.mark.parametrize(
    ("file", "count", "options"),
    [
        ("obqa/dev.jsonl", 500, 4),
        ("obqa/test.jsonl", 500, 4),
        ("csqa/dev_rand_split.jsonl", 1221, 5),
    ],
)
def test_the_official_files_are_read_whole(file, count, options):
    found = read_questions(SHARED / file)
    assert len(found) == count
    assert {len(question.options) for question in found} == {options}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no local copies of the benchmarks")
def test_no_shot_is_a_benchmark_question():
    task = json.loads((SHARED / "strategyqa" / "task.json").read_text(encoding="utf-8"))
    stems = {example["input"].strip().lower() for example in task["examples"]}
    for file in ("obqa/dev.jsonl", "obqa/test.jsonl", "csqa/dev_rand_split.jsonl"):
        stems |= {question.stem.strip().lower() for question in read_questions(SHARED / file)}
    for name in ("obqa", "csqa", "strategyqa"):
        for shot in read_questions(ROOT / "data" / name / "shots.jsonl"):
            assert shot.stem.lower() not in stems, shot.id
