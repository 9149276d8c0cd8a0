"""Targets for CommonsenseQA, from what people wrote about its options: ECQA (Aggarwal et al. 2021).

An entry of ECQA has "positives", sentences for the right option, "negatives", sentences against the
wrong ones, and an "explanation", a free text. They become targets by this rule:

    analyze, right option   the first positive that names it, in one of its words
    analyze, wrong option   the negatives that share most of their words with it, or, where none
                            shares a word with any, as many as there are wrong options: its own
    analyze, none of these  the recalled facts support "...", or do not support it, as in the other
                            benchmarks
    recall                  the positives that analyze has not taken, else all of them, else the
                            explanation

Of a long text the first two sentences are taken, and none that names an option's letter. A question
of which ECQA says nothing, or has neither positives nor an explanation, gets no targets.

    python data/prepare.py csqa --targets
"""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from data.prompts import finish
from data.questions import Question, check, get, parse_lines, show
from model import InputError

FILE = "ecqa.jsonl"  # as published
TABLES = "cqa_data*.csv"  # as the authors' script writes them
URL = "https://raw.githubusercontent.com/dair-iitd/ECQA-Dataset/HEAD"
COLUMNS = ("q_no", "taskA_pos", "taskA_neg", "taskB")
SENTENCES = 2  # of a target, at most
LETTER = re.compile(r"\b[Oo]ptions? \(?[A-E]\b")


@dataclass(frozen=True)
class Entry:
    """What ECQA says about one question."""

    positives: list[str]
    negatives: list[str]
    explanation: str


# ---------------------------------------------------------------- the files


def parse_entries(raw: bytes, where: str, is_table: bool) -> dict[str, Entry]:
    """The entries of a file by their question's id; of two with one id, the first.

    Raises InputError naming the line and the key that is wrong.
    """
    entries = {}
    rows = parse_table(raw, where) if is_table else parse_lines(raw, where)
    for line, row in rows:
        try:
            id, entry = parse_entry(row)
        except InputError as error:
            raise InputError(f"{line}: {error}") from None
        entries.setdefault(id, entry)
    return entries


def parse_entry(row: object) -> tuple[str, Entry]:
    if not isinstance(row, dict):
        raise InputError(f"expected an object, found {show(row)}")
    positives = parse_texts(get(row, "positives", list), "positives")
    negatives = parse_texts(get(row, "negatives", list), "negatives")
    explanation = row.get("explanation") or ""
    if explanation:
        (explanation,) = parse_texts([explanation], "explanation") or [""]
    return get(row, "id", str), Entry(positives, negatives, explanation)


def parse_texts(texts: list, key: str) -> list[str]:
    """The texts on one line each, less the sentences that name an option's letter."""
    found = []
    for text in texts:
        if isinstance(text, str) and not text.strip():
            continue
        kept = [part for part in sentences(check(text, str, key)) if not LETTER.search(part)]
        if kept:
            found.append(" ".join(kept))
    return found


def parse_table(raw: bytes, where: str) -> Iterable[tuple[str, dict]]:
    """The lines of a CSV file, as the JSON lines have them."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x}"
        raise InputError(f"{where}: expected UTF-8 text, found {found}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise InputError(f"{where}: expected a column {missing[0]}, found none")
        for row in reader:
            line = f"{where}, line {reader.line_num}"
            if None in (row[name] for name in COLUMNS):
                raise InputError(f"{line}: expected {len(reader.fieldnames)} columns, found fewer")
            yield (
                line,
                {
                    "id": row["q_no"],
                    "positives": row["taskA_pos"].split("\n"),
                    "negatives": row["taskA_neg"].split("\n"),
                    "explanation": row["taskB"],
                },
            )
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: expected CSV: {error}") from None


# ---------------------------------------------------------------- the rule


def teach_all(questions: list[Question], entries: dict[str, Entry]) -> list[Question]:
    """The questions that ECQA explains, with targets."""
    taught = []
    for question in questions:
        entry = entries.get(question.id)
        if entry and (entry.positives or entry.explanation):
            taught.append(teach(question, entry))
    return taught


def teach(question: Question, entry: Entry) -> Question:
    """The question with targets; the module's text has the rule."""
    wrong = [i for i, label in enumerate(question.labels) if label != question.answer]
    right = question.labels.index(question.answer)
    against = assign(entry.negatives, [question.options[i] for i in wrong])

    recalled = list(entry.positives)
    analyses = [""] * len(question.labels)
    for positive in recalled:
        if shared(question.options[right], positive) > 0:
            analyses[right] = positive
            break
    if not analyses[right]:
        analyses[right] = f'the recalled facts support "{question.options[right]}".'
    elif len(recalled) > 1:
        recalled.remove(analyses[right])
    for i, texts in zip(wrong, against):
        analyses[i] = join(texts) or f'the recalled facts do not support "{question.options[i]}".'
    recall = join(recalled or [entry.explanation])
    return replace(question, recall=recall, analyses=tuple(join([text]) for text in analyses))


def assign(negatives: list[str], options: list[str]) -> list[list[str]]:
    """The negatives of each of the wrong options."""
    found = [[] for _ in options]
    strays = 0
    for negative in negatives:
        shares = [shared(option, negative) for option in options]
        if max(shares) > 0:
            found[shares.index(max(shares))].append(negative)
        else:
            strays += 1
    if strays == len(negatives) == len(options):
        return [[negative] for negative in negatives]
    return found


def shared(option: str, sentence: str) -> float:
    """The share of an option's words that a sentence has; endings do not matter much."""
    there = stems(sentence)
    words = stems(option)
    return len(words & there) / max(1, len(words))


def stems(text: str) -> set[str]:
    """The beginnings of a text's words, small ones left out: "running to stores" -> runn, stor."""
    words = re.findall(r"\w+", text.lower())
    return {word[:4] for word in words if len(word) > 3} or set(words)


def join(texts: list[str]) -> str:
    """The first sentences of some texts, each with an end."""
    found = []
    for text in texts:
        found += [finish(sentence) for sentence in sentences(text)]
    return " ".join(found[:SENTENCES])


def sentences(text: str) -> list[str]:
    """The sentences of a text, blanks made single."""
    text = " ".join(text.split())
    return [sentence for sentence in re.split(r"(?<=[.!?]) ", text) if sentence]
