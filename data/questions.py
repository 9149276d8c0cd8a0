"""Multiple-choice questions: what one is, how a file of them is read, where a named set lies.

A file holds one JSON object a line, in the layout of OpenBookQA and CommonsenseQA:

    {"id": "7", "question": {"stem": "What do bees make?", "choices": [
        {"label": "A", "text": "honey"}, {"label": "B", "text": "milk"}]}, "answerKey": "A"}

Two optional keys hold what the stages should say, for training and for worked examples:
"recall" (text) and "analyze" (a list with one text per choice, in the order of the choices).
A label is one letter, A-Z or a-z, or one digit, 1-9.

    python -c "from data.questions import *; print(read_questions(locate('demo', 'test'))[0])"
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from model import InputError, expect

FOLDER = Path(__file__).resolve().parent  # where a named data set has its folder
BENCHMARKS = ("obqa", "csqa", "strategyqa")  # made by data/prepare.py
SPLITS = ("train", "valid", "test")
LABEL = "[A-Za-z1-9]"


@dataclass(frozen=True)
class Question:
    """One question; `labels`, `options` and `analyses` have one entry per choice, in file order."""

    id: str
    stem: str
    labels: tuple[str, ...]  # one letter or digit each, all different
    options: tuple[str, ...]
    answer: str  # one of the labels
    recall: str | None = None  # target of the recall stage
    analyses: tuple[str, ...] | None = None  # targets of the analyze stage


def locate(data: str | os.PathLike, split: str) -> Path:
    """The questions file that `data` and `split` ("train", "valid" or "test") mean.

    `data` is the name of a data set (demo, obqa, csqa, strategyqa: a folder beside this file,
    whatever the current directory), or a folder that holds `{split}.jsonl`, or a questions file,
    for which `split` does not matter. `./obqa` is always the path, `obqa` the data set.
    Raises InputError when there is no such file, naming the command that makes it.
    """
    name = os.fspath(data)
    named = name in BENCHMARKS or (re.fullmatch(r"\w+", name) and os.path.isdir(FOLDER / name))
    path = FOLDER / name if named else Path(name)
    if named or os.path.isdir(path):
        path = path / f"{split}.jsonl"
    if os.path.exists(path):
        whole = os.path.isfile(path)  # a pipe would be empty when it is read again
        expect(whole, f"--data {name}: expected a file or a folder, found a pipe or a device")
        return path
    if name in BENCHMARKS:
        made = [split for split in SPLITS if (path.parent / f"{split}.jsonl").exists()]
        missing = "not there yet"
        command = f"python data/prepare.py {name}"
        if made:
            missing = f"not there, only {' and '.join(made)}"
            command += ", without --from or with a --from that holds all its files"
        raise InputError(f"{path}: {missing}; make it with: {command}")
    expected = f"a questions file, a folder with {split}.jsonl, demo, {', '.join(BENCHMARKS)}"
    raise InputError(f"--data {name}: expected {expected}; found no {path}")


def read_questions(path: str | os.PathLike, targets: bool = False) -> list[Question]:
    """Read every question of a JSON-lines file, in file order; blank lines are skipped.

    With `targets`, every question must carry "recall" and "analyze"; otherwise they may be absent.
    Raises InputError naming the file, the line and the key that is wrong, or how to make targets.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    rows = parse_lines(raw, path)
    if targets:
        rows = check_targets(rows, path)
    return parse_questions(rows, path, parse_question)


def check_targets(rows: Iterable[tuple[str, object]], path: Path) -> Iterator[tuple[str, object]]:
    """The same rows, as long as they have targets; else InputError says what makes them."""
    name = path.resolve().parent.name
    if name not in BENCHMARKS:
        name = "csqa"
    for where, row in rows:
        for key in ("recall", "analyze"):
            if isinstance(row, dict) and key not in row:
                command = f"python data/prepare.py {name} --targets"
                raise InputError(f"{where}: {key}: missing; make them with: {command}")
        yield where, row


def parse_lines(raw: bytes, name: str | os.PathLike) -> Iterator[tuple[str, object]]:
    """(where it stands, decoded value) of every line of JSON lines that is not blank."""
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            yield where, parse_json(line, where)


def parse_questions(
    rows: Iterable[tuple[str, object]], name: str | os.PathLike, parse: Callable[[object], Question]
) -> list[Question]:
    """Questions that `parse` makes of (where it stands, decoded value) pairs, all ids different.

    `name` is the file's. Raises InputError, with `where` in front, for what `parse` refuses.
    """
    questions = []
    seen = {}  # id -> where
    for where, row in rows:
        try:
            question = parse(row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if question.id in seen:
            raise InputError(f"{where}: id {show(question.id)} is taken by {seen[question.id]}")
        seen[question.id] = where
        questions.append(question)
    if not questions:
        raise InputError(f"{name}: expected questions, found none")
    return questions


def parse_json(raw: bytes, where: str) -> object:
    """The value that UTF-8 bytes of JSON hold; InputError names `where` they stand."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x}"
        raise InputError(f"{where}: expected UTF-8 text, found {found}") from None
    except (ValueError, RecursionError) as error:  # also a number too long, nesting too deep
        problem = str(error).replace("line 1 column", "column")  # of JSON lines, `where` has it
        raise InputError(f"{where}: expected JSON: {problem}") from None


def parse_question(row: object) -> Question:
    """A question from one decoded line; raises InputError without file or line."""
    if not isinstance(row, dict):
        raise InputError(f"expected an object, found {show(row)}")
    id = get(row, "id", str)
    question = get(row, "question", dict)
    stem = get(question, "stem", str, "question.stem")
    labels, options = parse_choices(get(question, "choices", list, "question.choices"))
    answer = get(row, "answerKey", str)
    if answer not in labels:
        raise InputError(f"answerKey: expected one of {', '.join(labels)}, found {show(answer)}")
    recall = None
    if "recall" in row:
        recall = get(row, "recall", str)
    analyses = None
    if "analyze" in row:
        analyses = parse_analyses(get(row, "analyze", list), len(labels))
    return Question(id, stem, tuple(labels), tuple(options), answer, recall, analyses)


def parse_choices(choices: list) -> tuple[list[str], list[str]]:
    """The labels and the options' texts."""
    if len(choices) < 2:
        raise InputError(f"question.choices: expected 2 or more, found {len(choices)}")
    labels = []
    options = []
    for index, choice in enumerate(choices):
        where = f"question.choices[{index}]"
        if not isinstance(choice, dict):
            raise InputError(f"{where}: expected an object, found {show(choice)}")
        label = get(choice, "label", str, f"{where}.label")
        if not re.fullmatch(LABEL, label):
            expected = "expected one letter, A to Z or a to z, or a digit from 1 to 9"
            raise InputError(f"{where}.label: {expected}, found {show(label)}")
        if label in labels:
            raise InputError(f"{where}.label: {show(label)} is another choice's label already")
        labels.append(label)
        options.append(get(choice, "text", str, f"{where}.text"))
    return labels, options


def parse_analyses(texts: list, count: int) -> tuple[str, ...]:
    """One text per choice."""
    if len(texts) != count:
        raise InputError(f"analyze: expected {count} texts, found {len(texts)}")
    return tuple(check(text, str, f"analyze[{i}]") for i, text in enumerate(texts))


def format_question(question: Question) -> str:
    """The line, without its end, that `read_questions` reads back as the same question."""
    choices = zip(question.labels, question.options, strict=True)
    row = {
        "id": question.id,
        "question": {
            "stem": question.stem,
            "choices": [{"label": label, "text": text} for label, text in choices],
        },
        "answerKey": question.answer,
    }
    if question.recall is not None:
        row["recall"] = question.recall
    if question.analyses is not None:
        row["analyze"] = list(question.analyses)
    return json.dumps(row, ensure_ascii=False)


def get(row: dict, key: str, kind: type, where: str = "") -> object:
    """`row[key]`, checked to be of `kind`; `where` names the key in messages."""
    if key not in row:
        raise InputError(f"{where or key}: missing")
    return check(row[key], kind, where or key)


def check(value: object, kind: type, where: str) -> object:
    """`value`, if it is of `kind` and, when a text, holds more than blanks and can be encoded."""
    if not isinstance(value, kind):
        expected = {str: "a text", list: "a list", dict: "an object"}[kind]
        raise InputError(f"{where}: expected {expected}, found {show(value)}")
    if kind is str and not value.strip():
        raise InputError(f"{where}: expected a text, found an empty one")
    if kind is str and re.search("[\ud800-\udfff]", value):
        raise InputError(f"{where}: expected a text, found half of a surrogate pair")
    return value


def show(value: object) -> str:
    """`value` as JSON, short enough for a message."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
