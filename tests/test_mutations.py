"""Damaged files at random: 720 of them, always the same ones, give the same results or one line.

    python -m pytest -q -s tests/test_mutations.py     # prints the count by outcome

A mutation is harmless when nothing that is read changed: then the results must be those of the good
files. A flipped bit of a weight, another number in a question or in the importance cannot be told
from a good one: those runs must end well, whatever they answer.
"""

import json
import random
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from damage import (  # must come first: threads, path
    FEW,
    Done,
    command,
    eval_flags,
    make_good,
    one_line,
    question,
    read_raw,
    read_untimed,
    search_flags,
    texts_of,
    write_questions,
    write_raw,
)

N = 720
MOST = 1 << 30  # bytes that a run may have beyond what the process has already
SLOWEST = 60  # seconds, for a run that takes 0.1

# ---------------------------------------------------------------- mutations

ODD = (None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e300, float("nan"), float("inf"), 10**30)
ODD += (1 << 31, 1 << 63, "", "x", "\ud800", "\0", "a\nb", "..", "9" * 5000)
ODD += ([], {}, [[]], [1, 2, 3], {"x": 1})


def nodes(value, path: tuple = ()):
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in inner:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from nodes(child, (*path, key))


def mutate_json(rng: random.Random, value) -> str:
    """Changes one value inside a JSON value in place: drops it, or gives it another type, an
    absurd number, or another value of the file. Returns what it was, as "key.key: change"."""
    paths = list(nodes(value))
    depth = rng.randint(1, max(map(len, paths)))  # else most would be deep inside tables
    path = rng.choice([path for path in paths if len(path) <= depth])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    kind, key = rng.choice(("drop", "odd", "odd", "scale", "other")), path[-1]
    if kind == "drop":
        del holder[key]
    elif kind == "scale" and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice((-1, 0, 0.5, 2, 10**6, 10**12))
    elif kind == "other":
        other = value
        for step in rng.choice(paths):
            other = other[step] if isinstance(other, dict) or step < len(other) else other[-1]
        holder[key] = json.loads(json.dumps(other))
    else:
        holder[key] = rng.choice(ODD)
    return f"{'.'.join(map(str, path))}: {kind}"


def mutate_bytes(rng: random.Random, raw: bytes) -> tuple[bytes, str]:
    """Flips a bit, cuts off the end, takes bytes out, puts bytes in, or doubles some."""
    kind, at = rng.choice(("flip", "cut", "out", "in", "zeros", "double")), rng.randrange(len(raw))
    n = rng.choice((1, 2, 8, 100))
    changed = {
        "flip": raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :],
        "cut": raw[:at],
        "out": raw[:at] + raw[at + n :],
        "in": raw[:at] + rng.randbytes(n) + raw[at:],
        "zeros": raw[:at] + bytes(n) + raw[at + n :],
        "double": raw[: at + n] + raw[at:],
    }
    return changed[kind], f"byte {at} of {len(raw)}: {kind} {n}"


def as_json(file: str):
    def mutate(rng: random.Random, folder: Path) -> str:
        value = json.loads((folder / file).read_text())
        what = mutate_json(rng, value)
        (folder / file).write_text(json.dumps(value))
        return what

    return mutate


def as_lines(file: str):
    """One line of JSON lines is mutated, dropped or doubled."""

    def mutate(rng: random.Random, folder: Path) -> str:
        lines = (folder / file).read_text().splitlines()
        at = rng.randrange(len(lines))
        value = json.loads(lines[at])
        what = rng.choice(("drop", "double", "odd", "inside", "inside", "inside"))
        if what == "inside":
            what = mutate_json(rng, value)
        new = {"drop": [], "double": [lines[at]] * 2, "odd": [json.dumps(rng.choice(ODD))]}
        lines[at : at + 1] = new.get(what, [json.dumps(value)])
        (folder / file).write_text("\n".join(lines) + "\n")
        return f"line {at + 1}: {what}"

    return mutate


def as_bytes(file: str):
    def mutate(rng: random.Random, folder: Path) -> str:
        raw, what = mutate_bytes(rng, (folder / file).read_bytes())
        (folder / file).write_bytes(raw)
        return what

    return mutate


def in_header(rng: random.Random, folder: Path) -> str:
    """The safetensors header: a value of it, a byte, or the length in front of it."""
    path = folder / "model" / "model.safetensors"
    header, payload = read_raw(path)
    kind = rng.choice(("value", "byte", "length"))
    if kind == "value":
        what = mutate_json(rng, header)
        write_raw(path, header, payload)
    elif kind == "byte":
        raw, what = mutate_bytes(rng, json.dumps(header).encode())
        write_raw(path, raw, payload)
    else:
        raw, at = bytearray(path.read_bytes()), rng.randrange(8)
        raw[at] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        what = f"length, byte {at}"
    return what


def in_payload(rng: random.Random, folder: Path) -> str:
    path = folder / "model" / "model.safetensors"
    header, payload = read_raw(path)
    raw, what = mutate_bytes(rng, payload)
    write_raw(path, header, raw)
    return what


# ---------------------------------------------------------------- runs


def generate(folder: Path, model: str = "model") -> tuple[Done, object]:
    """(how it ended, the texts): all of the checkpoint is in them."""
    flags = ("--model", f"{folder}/{model}", "--data", f"{folder}/one.jsonl", *FEW)
    done = command("generate", *flags, "--stage-budgets", "1,2,1", "Which?", "this", "that")
    return done, texts_of(done)


def generate_sharded(folder: Path) -> tuple[Done, object]:
    return generate(folder, "sharded")


def evaluate(folder: Path, *flags: str) -> tuple[Done, object]:
    """(how it ended, the report)."""
    flags = flags or ("--stage-budgets", "1,2,1")
    done = command("eval", *eval_flags(folder, *flags))
    return done, done.status or read_untimed(folder / "report.json")


def evaluate_plan(folder: Path) -> tuple[Done, object]:
    return evaluate(folder, "--plan", f"{folder}/plan.json", *("--limit", "2"))


def search(folder: Path) -> tuple[Done, object]:
    """(how it ended, the plan)."""
    with mock.patch("search.ROUNDS", 2):
        done = command("search", *search_flags(folder, "--step", "3"))
    return done, done.status or read_untimed(folder / "plan.json")


class Family(NamedTuple):
    """Mutations of one file, and the command that reads it.

    differ: whether a run that ends well may give other results, by what was mutated.
    """

    mutate: Callable[[random.Random, Path], str]
    run: Callable[[Path], tuple[Done, object]]
    differ: Callable[[str], bool]


def starts(*keys: str) -> Callable[[str], bool]:
    return lambda what: what.startswith(keys)


def always(what: str) -> bool:
    return True


def never(what: str) -> bool:
    return False


CONFIG, TOKENIZER = "model/config.json", "model/tokenizer.json"
INDEX = "sharded/model.safetensors.index.json"
USED = ("num_key_value_heads", "num_attention_heads", "head_dim", "rope", "rms_norm_eps")
USED += ("max_position_embeddings", "eos_token_id", "hidden_act")
FOLLOWED = ("budgets", "exit", "importance", "granularity", "ranking")  # of a plan
FAMILIES = {
    "config.json, a value": Family(as_json(CONFIG), generate, starts(*USED)),
    "config.json, a byte": Family(as_bytes(CONFIG), generate, always),
    "safetensors header": Family(in_header, generate, never),
    "safetensors payload": Family(in_payload, generate, always),
    "index, a value": Family(as_json(INDEX), generate_sharded, never),
    "index, a byte": Family(as_bytes(INDEX), generate_sharded, never),
    "a shard, a byte": Family(
        as_bytes("sharded/model-00002-of-00002.safetensors"), generate_sharded, always
    ),
    "tokenizer.json, a value": Family(as_json(TOKENIZER), generate, always),
    "tokenizer.json, a byte": Family(as_bytes(TOKENIZER), generate, always),
    "generation_config.json": Family(
        as_json("model/generation_config.json"), generate, starts("eos_token_id")
    ),
    "questions, a value": Family(as_lines("questions.jsonl"), evaluate, always),
    "questions, a byte": Family(as_bytes("questions.jsonl"), evaluate, always),
    "plan, a value": Family(as_json("plan.json"), evaluate_plan, starts(*FOLLOWED)),
    "plan, a byte": Family(as_bytes("plan.json"), evaluate_plan, always),
    "journal, a line": Family(as_lines("journal"), search, always),
    "journal, a byte": Family(as_bytes("journal"), search, always),
}


def shuffled(rng: random.Random, value: dict) -> dict:
    return dict(rng.sample(list(value.items()), len(value)))


def harmless(rng: random.Random, folder: Path, file: str) -> str:
    """Changes what nothing reads: the order of keys, blanks, keys of others."""
    path = folder / file
    if path.suffix == ".safetensors":
        header, payload = read_raw(path)
        header = shuffled(rng, header) | {"__metadata__": {"format": "pt", "by": str(rng.random())}}
        write_raw(path, header, payload)
    elif path.suffix == ".json":
        value = shuffled(rng, json.loads(path.read_text()) | {"of_others": rng.choice(ODD)})
        path.write_text(json.dumps(value, indent=rng.randrange(4)) + " \n" * rng.randrange(4))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [shuffled(rng, row | {"of_others": rng.choice(ODD)}) for row in rows]
        blank = "\r\n" * rng.randrange(4)
        path.write_text(blank + f"\n{blank}".join(map(json.dumps, rows)))
    return file


# ---------------------------------------------------------------- the test


@contextmanager
def limits():
    """No more memory than MOST from here on, and no more time than SLOWEST."""

    def late(*_):
        raise TimeoutError(f"a run took more than {SLOWEST} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST, before[1]))
    signal.alarm(SLOWEST)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, previous)


def kept(folder: Path) -> Path:
    """A copy of good files; runs find them in the folder beside it: a journal knows its model."""
    make_good(folder)
    write_questions(folder / "one.jsonl", [question(0)])
    return Path(shutil.copytree(folder, folder.parent / "kept"))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return kept(tmp_path_factory.mktemp("good") / "files")


def restore(good: Path) -> Path:
    folder = good.parent / "files"
    shutil.rmtree(folder)
    shutil.copytree(good, folder)
    journals = list(folder.glob("plan.json.*.journal"))
    assert len(journals) == 1
    (folder / "journal").symlink_to(journals[0].name)
    return folder


def outcome(family: Family, number: int, folder: Path, expected) -> str:
    """Mutates and runs; "refused", "the same results" or "other results", all else raises."""
    what = family.mutate(random.Random(number), folder)
    try:
        with limits():
            done, results = family.run(folder)
        if done.status == 2:
            line = one_line(done._replace(out=""))
            assert "memory" not in line, line
            return "refused"
        assert done.status == 0 and done.err == "", done
        if results == expected:
            return "the same results"
        assert family.differ(what), "other results, where nothing that counts had changed"
        return "other results"
    except Exception as e:
        e.add_note(f"mutation {number}: {what}")
        raise


def outcomes(family: Family, good: Path) -> Counter:
    """How often each outcome came."""
    done, expected = family.run(restore(good))
    assert done.status == 0, f"the good files are good: {done}"
    numbers = range(N // len(FAMILIES))
    return Counter(outcome(family, number, restore(good), expected) for number in numbers)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_mutated_file_is_harmless_or_refused_in_one_line(family, good):
    counts = outcomes(family, good)
    print("", ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())), end=" ")
    assert counts["refused"] > 0, "some mutations do harm"


def table() -> str:
    """The counts of all families, in Markdown."""
    kinds = ("refused", "the same results", "other results")
    with tempfile.TemporaryDirectory() as folder:
        good = kept(Path(folder) / "files")
        counts = {name: outcomes(family, good) for name, family in FAMILIES.items()}
    counts["all"] = sum(counts.values(), Counter())
    rows = [("mutated", *kinds), ("---",) * 4]
    rows += [(name, *(str(count[kind]) for kind in kinds)) for name, count in counts.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


READ_BY = {
    CONFIG: generate,
    "model/generation_config.json": generate,
    "model/model.safetensors": generate,
    INDEX: generate_sharded,
    "questions.jsonl": evaluate,
    "plan.json": evaluate_plan,
}


@pytest.mark.parametrize("file", READ_BY)
def test_what_nothing_reads_may_change(file, good):
    expected = READ_BY[file](restore(good))[1]
    family = Family(lambda rng, folder: harmless(rng, folder, file), READ_BY[file], never)
    for number in range(5):
        assert outcome(family, number, restore(good), expected) == "the same results"
