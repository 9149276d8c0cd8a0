"""The demo's world and questions: true, counted, reproducible, and no question in two splits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parent.parent / "data" / "demo"
sys.path.insert(0, str(DEMO))

import make  # noqa: E402
import world  # noqa: E402

SPLITS = ("train", "valid", "test")
STEMS = {stem.format(p=world.say(name)): name for stem in make.STEMS for name in world.PROPERTIES}


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def meaning(row):
    """What a question asks, whatever its phrasing and the order of its options."""
    question = row["question"]
    return STEMS[question["stem"]], frozenset(c["text"] for c in question["choices"])


@pytest.fixture(scope="module")
def shipped():
    return {split: read(DEMO / f"{split}.jsonl") for split in SPLITS}


def run_make(*args):
    command = [sys.executable, str(DEMO / "make.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_world_is_large_enough():
    assert len(world.THINGS) >= 200 and len(world.KINDS) >= 25 and len(world.PROPERTIES) >= 40


def test_every_property_has_enough_things_on_both_sides():
    for name in world.PROPERTIES:
        assert world.HAVE[name] and len(world.LACK[name]) >= 6, name


def test_exceptions_and_matters_of_opinion():
    facts = {
        ("can fly", "robin"): True,
        ("can fly", "penguin"): False,
        ("can fly", "ostrich"): False,
        ("can fly", "bat"): True,
        ("can fly", "chicken"): None,
        ("lives in water", "whale"): True,
        ("lives in water", "dog"): False,
        ("lays eggs", "platypus"): True,
        ("lays eggs", "scorpion"): False,
        ("is liquid at room temperature", "mercury"): True,
        ("has an engine", "bicycle"): False,
        ("gives light", "firefly"): True,
    }
    for (name, thing), expected in facts.items():
        assert world.truth(name, thing) is expected, (name, thing)
    assert world.rule("can fly", "bird") == (True, "most")
    assert world.rule("has feathers", "bird") == (True, "all")
    assert world.rule("is yellow", "fruit") == (None, "")


def test_grammar():
    assert world.say("lays eggs", False) == "does not lay eggs"
    assert world.say("lays eggs", True, many=True) == "lay eggs"
    assert world.say("is good to eat", False, many=True) == "are not good to eat"
    assert world.say("can fly", False) == "cannot fly"
    assert [world.article(x) for x in ("oak", "robin", "gold", "furniture")] == [
        "an oak", "a robin", "gold", "a piece of furniture",
    ]  # fmt: skip
    assert [world.plural(x) for x in ("wolf", "fox", "canary", "gas", "fish")] == [
        "wolves", "foxes", "canaries", "gases", "fish",
    ]  # fmt: skip


def test_shipped_questions_have_one_right_answer(shipped):
    for rows in shipped.values():
        for row in rows:
            name, _ = meaning(row)
            right = [c["label"] for c in row["question"]["choices"] if world.truth(name, c["text"])]
            wrong = [world.truth(name, c["text"]) is False for c in row["question"]["choices"]]
            assert right == [row["answerKey"]] and sum(wrong) == 3, row["id"]
            assert len(row["analyze"]) == 4 and row["recall"].endswith(".")


def test_recalls_and_analyses_are_true(shipped):
    for row in shipped["test"]:
        name, _ = meaning(row)
        for choice, text in zip(row["question"]["choices"], row["analyze"]):
            thing = choice["text"]
            start = f"{world.article(thing)} is {world.article(world.THINGS[thing])}, "
            assert text.startswith(start)
            says_no = " not " in text[len(start) :] or "cannot" in text[len(start) :]
            assert says_no is (world.truth(name, thing) is False), text


def test_splits_share_no_question(shipped):
    meanings = {split: [meaning(row) for row in rows] for split, rows in shipped.items()}
    assert {split: len(rows) for split, rows in shipped.items()} == make.SHIPPED
    assert make.SHIPPED["test"] >= 500 and make.SHIPPED["valid"] >= 300
    for split, found in meanings.items():
        assert len(set(found)) == len(found)
        assert {make.meaning_split(*m) for m in found} == {split}
    for a, b in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not set(meanings[a]) & set(meanings[b])


def test_the_split_depends_on_the_meaning_alone():
    options = ["robin", "trout", "oak", "shovel"]
    assert make.meaning_split("can fly", options) == make.meaning_split("can fly", options[::-1])


def test_fresh_questions_are_in_no_split_and_reproducible(shipped, tmp_path):
    known = {meaning(row) for rows in shipped.values() for row in rows}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        done = run_make("--seed", seed, "--count", 300, "--out", tmp_path / name)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    fresh = read(tmp_path / "a")
    assert len(fresh) == 300 and not {meaning(row) for row in fresh} & known
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_the_shipped_splits_are_made_again_byte_for_byte(tmp_path):
    assert run_make("--splits", tmp_path).returncode == 0
    for split in SPLITS:
        made = (tmp_path / f"{split}.jsonl").read_bytes()
        assert made == (DEMO / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize(
    "args, named",
    [
        (["--count", "0", "--out", "x"], "--count"),
        (["--count", "many", "--out", "x"], "--count"),
        ([], "--out"),
        (["--out", "no/such/folder/x"], "no/such/folder/x"),
        (["--split", "exam", "--out", "x"], "--split"),
    ],
)
def test_bad_flags_are_one_line(args, named, tmp_path):
    done = subprocess.run(
        [sys.executable, str(DEMO / "make.py"), *args], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1


def test_the_world_is_printed_as_far_as_it_is_read():
    script = [sys.executable, str(DEMO / "world.py")]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read()
    assert told == b"" and process.returncode == 0
    with open("/dev/full", "w") as full:
        done = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "error: No space left on device\n" and done.returncode == 2


def test_questions_never_take_the_place_of_a_pipe_or_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "pipe", tmp_path):
        done = run_make("--count", 1, "--out", out)
        assert done.returncode == 2 and f"--out {out}: expected a file" in done.stderr
    assert (tmp_path / "pipe").is_fifo()


def run_tokenizer(data, out):
    script = [sys.executable, str(DEMO / "tokenizer.py"), "--data", str(data), "--out", str(out)]
    return subprocess.run(script, capture_output=True, text=True)


def test_the_tokenizer_reads_questions_as_everybody_does(tmp_path):
    lines = (DEMO / "valid.jsonl").read_text().splitlines()[:40]
    made = []
    for between in ("\n", "\n\n"):  # a blank line says nothing
        (tmp_path / "some.jsonl").write_text(between.join(lines))
        done = run_tokenizer(tmp_path / "some.jsonl", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        made.append((tmp_path / "out" / "tokenizer.json").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "line 1: expected JSON"),
        ('{"id": "1", "question": {}}', "line 1: recall: missing"),
        (None, "some.jsonl: cannot be read: No such file"),
    ],
)
def test_the_tokenizer_refuses_in_one_line(tmp_path, content, message):
    if content:
        (tmp_path / "some.jsonl").write_text(content)
    done = run_tokenizer(tmp_path / "some.jsonl", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert message in done.stderr and done.stderr.count("\n") == 1
