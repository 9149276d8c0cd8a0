"""Prepare a benchmark: write data/NAME/{train,valid,test}.jsonl.

    obqa        OpenBookQA as published: 4957 train, 500 valid, 500 test
    csqa        CommonsenseQA: the official dev set of 1221 is test, since the
                official test set comes without answers; valid is 1221
                questions drawn from the official train set, which keeps 8520
    strategyqa  StrategyQA with the options yes and no: its 2290 questions are
                drawn into 1832 train, 229 valid and 229 test

Drawn means ordered by a salted hash of the question's text, so every machine
draws the same questions, whatever the order or the format of the file they
come from. The split files are the same bytes on every run. Downloads stay in
NAME/download, which may be deleted.

With --targets, train and valid say what the stages should say, for training:
obqa from its facts, strategyqa from its facts, csqa from ECQA's explanations
(data/ecqa.py has the rule); csqa's questions without one are counted and left
out of both. Its test split, the official dev set, stays whole, without targets.

    python data/prepare.py obqa
    python data/prepare.py csqa --targets
"""

import argparse
import hashlib
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

from tqdm import tqdm

from data import ecqa
from data.prompts import finish
from data.questions import (
    FOLDER,
    Question,
    check,
    format_question,
    get,
    parse_json,
    parse_lines,
    parse_question,
    parse_questions,
    show,
)
from model import InputError

SALT = "LiteStage 0"  # of the hash that draws the splits
SPLITS = ("train", "valid", "test")
OBQA = "OpenBookQA-V1-Sep2018"
OBQA_COUNTS = {"train": 4957, "dev": 500, "test": 500}
MAX_BYTES = 64 << 20  # of a zip's member: several times the largest


@dataclass(frozen=True)
class Official:
    """Where a benchmark is published."""

    url: str  # of the folder
    files: dict[str, str | None]  # name -> SHA-256; None: may be edited upstream, so only counted
    parts: str  # what a local copy may consist of, for messages


OFFICIAL = {
    "obqa": Official(
        "https://ai2-public-datasets.s3.amazonaws.com/open-book-qa",
        {f"{OBQA}.zip": "82368cf05df2e3b309c17d162e10b888b4d768fad6e171e0a041954c8553be46"},
        f"{OBQA}.zip or its train, dev and test.jsonl (for --targets, its *_complete.jsonl)",
    ),
    "csqa": Official(
        "https://s3.amazonaws.com/commensenseqa",
        {
            "train_rand_split.jsonl": (
                "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb"
            ),
            "dev_rand_split.jsonl": (
                "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a"
            ),
        },
        "train_rand_split.jsonl or dev_rand_split.jsonl",
    ),
    "strategyqa": Official(
        "https://raw.githubusercontent.com/google/BIG-bench/main/"
        "bigbench/benchmark_tasks/strategyqa",
        {"task.json": None},
        "BIG-bench's task.json or the authors' strategyqa_train.json",
    ),
}

# ---------------------------------------------------------------- the three benchmarks
# Each takes a source (a zip, folder or file, see `read`) and gives the splits that it finds there.


def obqa(source: Path, targets: bool) -> dict[str, list[Question]]:
    """OpenBookQA; the "Additional" files add to each question the fact that it was made from."""
    name = f"{OBQA}/Data/Additional/%s_complete.jsonl" if targets else f"{OBQA}/Data/Main/%s.jsonl"
    parse = parse_with_fact if targets else parse_question
    splits = {}
    for file, count in OBQA_COUNTS.items():
        questions = load(source, name % file, count, parse)
        if questions:
            splits["valid" if file == "dev" else file] = questions
    return splits


def csqa(source: Path, _targets: bool) -> dict[str, list[Question]]:
    """CommonsenseQA, the random split; its targets come from elsewhere, see `explain`."""
    splits = {}
    train = load(source, "train_rand_split.jsonl", 9741, parse_question)
    if train:
        splits["valid"], splits["train"] = draw(train, 1221)
    test = load(source, "dev_rand_split.jsonl", 1221, parse_question)
    if test:
        splits["test"] = test
    return splits


def explain(splits: dict[str, list[Question]], source: Path) -> None:
    """Gives csqa's train and valid targets from ECQA; questions that it lacks are left out.

    source: ECQA's file, or a folder or zip that holds it.
    """
    entries = read_entries(source)
    tested = {question.id for question in splits.get("test", [])}
    for split in ("train", "valid"):
        if split not in splits:
            continue
        taught = ecqa.teach_all(splits[split], entries)
        taught = [question for question in taught if question.id not in tested]
        if not taught:
            raise InputError(f"{source}: expected explanations of csqa's questions, found none")
        left_out = len(splits[split]) - len(taught)
        if left_out:
            print(f"{split}: {left_out} questions without an explanation are left out")
        splits[split] = taught


def read_entries(source: Path) -> dict[str, ecqa.Entry]:
    """All that ECQA's files in `source` say, by a question's id."""
    if source.is_file() and source.suffix != ".zip":
        found = [read(source, source.name)]
    else:
        found = [read(source, ecqa.FILE)]
        if found == [None] and source.is_dir():
            found = [read(table, table.name) for table in sorted(source.glob(ecqa.TABLES))]
    if not found or None in found:
        wanted = f"{ecqa.FILE} or {ecqa.TABLES} of ECQA, for --targets"
        raise InputError(f"{source}: expected {wanted}; found none; --ecqa FILE may name it")
    entries = {}
    for where, raw in found:
        entries = ecqa.parse_entries(raw, where, where.endswith(".csv")) | entries
    return entries


def strategyqa(source: Path, targets: bool) -> dict[str, list[Question]]:
    """StrategyQA from BIG-bench's file or from its authors'; a lone file may have any name."""
    names = ("task.json", "strategyqa_train.json")
    if source.is_file() and source.suffix != ".zip":
        names = (source.name,)
    found = [file for file in (read(source, name) for name in names) if file]
    if not found:
        return {}
    where, raw = found[0]
    rows = parse_json(raw, where)
    if isinstance(rows, dict):
        rows = rows.get("examples")
    if not isinstance(rows, list):
        raise InputError(f"{where}: expected a list of questions, alone or under 'examples'")
    pairs = ((f"{where}, question {i}", (i, row)) for i, row in enumerate(rows, start=1))
    questions = parse_questions(pairs, where, lambda pair: parse_yes_no(*pair, targets))
    expect_count(where, questions, 2290)
    test, rest = draw(questions, 229)
    valid, train = draw(rest, 229)
    return {"train": train, "valid": valid, "test": test}


def parse_yes_no(number: int, row: object, targets: bool) -> Question:
    """The StrategyQA question that is the `number`-th of its file, in either format."""
    if not isinstance(row, dict):
        raise InputError(f"expected an object, found {show(row)}")
    if "input" in row:  # BIG-bench's: no id, and the facts follow the answer in one text
        id = f"strategyqa-{number}"
        stem = get(row, "input", str)
        scores = get(row, "target_scores", dict)
        if scores not in ({"Yes": 1, "No": 0}, {"Yes": 0, "No": 1}):
            raise InputError(f"target_scores: expected 1 for Yes or No, found {show(scores)}")
        yes = scores["Yes"] == 1
        facts = re.sub(r"^(Yes|No)\.", "", get(row, "target", str)) if targets else ""
    else:
        id = get(row, "qid", str)
        stem = get(row, "question", str)
        yes = row.get("answer")
        if not isinstance(yes, bool):
            raise InputError(f"answer: expected true or false, found {show(yes)}")
        given = get(row, "facts", list) if targets else []
        facts = " ".join(check(fact, str, f"facts[{i}]") for i, fact in enumerate(given))
    question = Question(id, stem.strip(), ("A", "B"), ("yes", "no"), "A" if yes else "B")
    return teach(question, facts) if targets else question


def parse_with_fact(row: object) -> Question:
    """An OpenBookQA question with targets from its "fact1"."""
    return teach(parse_question(row), get(row, "fact1", str))


def teach(question: Question, facts: str) -> Question:
    """The question with targets: recall the facts, then tell which option they support.

    The analyses claim no more than the source does: that its facts lead to its answer.
    """
    analyses = []
    for label, option in zip(question.labels, question.options, strict=True):
        verb = "support" if label == question.answer else "do not support"
        analyses.append(f'the recalled facts {verb} "{option}".')
    return replace(question, recall=finish(" ".join(facts.split())), analyses=tuple(analyses))


def draw(questions: list[Question], count: int) -> tuple[list[Question], list[Question]]:
    """`count` drawn questions and the others, both in file order.

    Equal texts are neighbors in the drawing order, and so end up on the same side.
    """
    order = sorted(questions, key=lambda q: hashlib.sha256(f"{SALT} {q.stem}".encode()).digest())
    drawn = {question.id for question in order[:count]}
    return [q for q in questions if q.id in drawn], [q for q in questions if q.id not in drawn]


# ---------------------------------------------------------------- reading the official files


def load(
    source: Path, name: str, count: int, parse: Callable[[object], Question]
) -> list[Question] | None:
    """The `count` questions of the JSON-lines file `name`; None where the source lacks it."""
    found = read(source, name)
    if found is None:
        return None
    where, raw = found
    questions = parse_questions(parse_lines(raw, where), where, parse)
    expect_count(where, questions, count)
    return questions


def expect_count(where: str, questions: list[Question], count: int) -> None:
    if len(questions) != count:
        raise InputError(f"{where}: expected {count} questions, found {len(questions)}")


def read(source: Path, name: str) -> tuple[str, bytes] | None:
    """(where it was found, content) of the file whose path in the official release is `name`.

    The source is a zip of the release, a folder that holds that zip, the whole unpacked release or
    only its last folders, or the very file. None where there is no such file. InputError where it
    cannot be read.
    """
    parts = Path(name).parts
    archive = source if source.suffix == ".zip" else source / f"{parts[0]}.zip"
    try:
        if archive.is_file():
            return read_member(archive, name)
        for path in [source.joinpath(*parts[i:]) for i in range(len(parts))] + [source]:
            if path.name == parts[-1] and path.is_file():
                return str(path), path.read_bytes()
    except OSError as error:
        raise InputError(f"{error.filename or source}: cannot be read: {error.strerror}") from None
    return None


def read_member(archive: Path, name: str) -> tuple[str, bytes] | None:
    """(where, content) of a zip's member, read by name into memory: nothing is ever extracted."""
    where = f"{archive}, {name}"
    try:
        with zipfile.ZipFile(archive) as file:
            if name not in file.namelist():
                return None
            size = file.getinfo(name).file_size
            if size > MAX_BYTES:
                raise InputError(f"{where}: expected at most {MAX_BYTES} bytes, found {size}")
            return where, file.read(name)
    except (zipfile.BadZipFile, UnicodeError) as error:
        raise InputError(f"{archive}: not a whole zip file: {error}") from None
    except (zlib.error, EOFError, RuntimeError) as error:  # damaged; encrypted or of unknown method
        raise InputError(f"{where}: cannot be unpacked: {error}") from None


# ---------------------------------------------------------------- downloading


def download(url: str, path: Path, sha256: str | None) -> None:
    """Fetch `url` into `path`, unless it is there already with the right checksum.

    What has come so far stays in `path` + ".part". With a checksum to prove that the pieces fit,
    the next call goes on from there; without, it starts again. Raises InputError when the server
    refuses, the connection ends early, or the checksum is wrong (and then deletes the file).
    """
    if sha256 and path.is_file() and digest(path) == sha256:
        return
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch(url, part, resume=sha256 is not None)
    except HTTPError as error:
        raise InputError(f"{url}: HTTP {error.code} {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        help = "run the same command again, or take a local copy with --from"
        raise InputError(f"{url}: not downloaded ({reason}); {help}") from None
    if sha256 and (found := digest(part)) != sha256:
        part.unlink()
        raise InputError(f"{url}: expected SHA-256 {sha256}, found {found}")
    os.replace(part, path)


def fetch(url: str, part: Path, resume: bool) -> None:
    """Download into `part`, or only its missing end; OSError or HTTPException if that fails."""
    start = part.stat().st_size if resume and part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=60)
    except HTTPError as error:
        if start and error.code == 416:  # nothing lies beyond `start`: the checksum will tell
            return
        raise
    with response:
        if response.status != 206:
            start = 0  # the server sends the whole file
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        bar = tqdm(desc=part.stem, initial=start, total=total, unit="B", unit_scale=True)
        with part.open("ab" if start else "wb") as file, bar:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        raise OSError(f"the connection ended after {size} of {total} bytes")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- the command


def write(path: Path, questions: list[Question]) -> None:
    """Write a questions file, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = "".join(format_question(question) + "\n" for question in questions)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(text.encode())
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        if os.path.exists(part):
            part.unlink()


def prepare(
    name: str,
    source: Path | None,
    out: Path,
    targets: bool = False,
    url: str | None = None,
    explanations: Path | None = None,
) -> None:
    """Write the splits of benchmark `name` to the folder `out`.

    source: the local copy to take them from; None downloads them (from the folder `url`).
    explanations: for csqa with targets, ECQA's file; None: where the benchmark comes from.
    Every question is read and checked before the first file is written. Raises InputError.
    """
    official = OFFICIAL[name]
    explained = targets and name == "csqa"
    if explanations and not explained:
        raise InputError("--ecqa: expected csqa with --targets")
    if url and not url.startswith(("http://", "https://")):
        raise InputError(f"--url {url}: expected http://... or https://...")
    for flag, path in (("--from", source), ("--ecqa", explanations)):
        if path is not None and not os.path.exists(path):
            raise InputError(f"{flag} {path}: no such file or folder")
    if source is None:
        source = out / "download"
        for file, sha256 in official.files.items():
            download(f"{(url or official.url).rstrip('/')}/{file}", source / file, sha256)
        if explained and explanations is None:
            download(f"{(url or ecqa.URL).rstrip('/')}/{ecqa.FILE}", source / ecqa.FILE, None)
    splits = {"obqa": obqa, "csqa": csqa, "strategyqa": strategyqa}[name](source, targets)
    if not splits:
        raise InputError(f"--from {source}: expected {official.parts}; found none of them")
    if explained:
        explain(splits, explanations or source)
    for split in SPLITS:
        path = out / f"{split}.jsonl"
        if split in splits:
            write(path, splits[split])
            print(f"{path}: {len(splits[split])} questions")
        else:
            print(f"{path}: not written, for {source} has nothing to make it of", file=sys.stderr)


def main(parser: argparse.ArgumentParser) -> None:
    """The command; `parser` comes without flags."""
    parser.add_argument("name", choices=list(OFFICIAL), help="the benchmark")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PATH",
        help="take the official files from this folder, zip or file, and leave out the splits "
        "that it lacks (default: download them)",
    )
    where.add_argument(
        "--url",
        help="download from this folder of a mirror (default: from the benchmark's publisher)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write to (default: data/NAME)"
    )
    parser.add_argument(
        "--targets",
        action="store_true",
        help="add what the stages should say, for training: recall is obqa's fact1 or "
        "strategyqa's facts, analyze tells which option these support; csqa's come from ECQA",
    )
    parser.add_argument(
        "--ecqa",
        type=Path,
        metavar="FILE",
        help="ECQA's ecqa.jsonl or cqa_data_*.csv for csqa --targets (default: in the folder of "
        "--from, or downloaded)",
    )
    args = parser.parse_args()
    out = args.out or FOLDER / args.name
    prepare(args.name, args.source, out, args.targets, args.url, args.ecqa)


if __name__ == "__main__":
    from tools.command import run
    from tools.flags import make_parser

    run(partial(main, make_parser(__doc__)))
