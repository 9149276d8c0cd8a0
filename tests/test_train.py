"""The trainer: targets in the stages' own prompts, learning, exact resuming, and its refusals."""

import json
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from damage import Done, forked  # must come first: threads, path

from data import cli, train
from data.prompts import analyze_prompt, recall_prompt, summarize_prompt
from data.questions import read_questions
from generate import Tokenizer
from model import Llama

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with the demo's tokenizer and the configuration of a tiny model, and some data."""
    folder = tmp_path_factory.mktemp("start")
    config = json.loads((DEMO / "config.json").read_text())
    config |= {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, folder / name)
    lines = (DEMO / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[:40]))
    return folder


def flags_for(start, out, *more, scratch=True):
    flags = ["--model", start, *(["--scratch"] if scratch else [])]
    flags += ["--data", start / "some.jsonl", "--out", out]
    flags += ["--steps", 10, "--batch-size", 8, "--save-every", 2, "--warmup", 2, "--lr", 0.01]
    flags += ["--stochastic-depth", 0.5, *more]
    return [str(flag) for flag in flags]


def run(*args, before="", **options) -> Done:
    return forked("data.train", *flags_for(*args, **options), before=before)


def test_sequences_hold_the_stage_prompts_and_end_every_segment(start):
    tokenizer = Tokenizer.from_pretrained(start)
    eos = min(tokenizer.eos_ids)
    question = read_questions(start / "some.jsonl", targets=True)[0]
    ids, labels, weights = train.sequence(question, None, tokenizer)

    def segment(prompt, text):
        """Asserts that the sequence has `text` as the labels right after `prompt`."""
        before, after = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
        assert ids[: len(after)] == after
        assert labels[len(before) - 1 : len(after)] == after[len(before) :] + [eos]
        return len(after) - len(before) + 1

    analyses = list(question.analyses)
    count = segment(recall_prompt(question), f" {question.recall}")
    count += segment(
        analyze_prompt(question, question.recall, "A"), f" {analyses[0]}"
    )  # the first option's prompt is the one that is used
    summary = f" So the answer is option {question.answer}."
    count += segment(summarize_prompt(question, question.recall, analyses), summary)
    for text in analyses[1:]:
        count += len(tokenizer.encode(f" {text}", bos=False)) + 1
    assert sum(weight > 0 for weight in weights) == count
    assert [w for w in weights if w > 1] == [train.SUMMARY_WEIGHT] * (len(summary.split()) + 2)

    order = [2, 0, 3, 1]  # shuffled: the same prompt that inference gives option C
    ids, labels, weights = train.sequence(question, order, tokenizer)
    segment(analyze_prompt(question, question.recall, question.labels[2]), f" {analyses[2]}")
    assert tokenizer.decode(ids).endswith(f"{analyses[1]}\nSummarize:{summary}")


def test_stochastic_depth_rises_with_depth():
    rng = random.Random(0)
    masks = torch.stack([train.draw_skip(8, 0.5, rng) for _ in range(4000)]).float()
    share = masks.mean(0).flatten()
    expected = 0.5 * torch.arange(16) / 15
    assert share[0] == 0 and torch.allclose(share, expected, atol=0.03)
    assert train.draw_skip(8, 0.0, rng) is None


# Code for a process of its own, that kills itself: in the step after it saved, while it saves
IN_A_STEP = """
import os, signal
from data import train
save = train.save_state
def saved(*args):
    save(*args)
    train.batch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
train.save_state = saved
"""
WHILE_SAVING = """
import os, signal
from data import train
save = train.save_state
def saved(*args):
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(*args)
train.save_state = saved
"""


def test_a_killed_run_resumes_to_the_same_weights(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(start, whole)
    assert done.status == 0, done.err
    for before in (WHILE_SAVING, IN_A_STEP, IN_A_STEP, WHILE_SAVING):
        done = run(start, killed, before=before)
        assert done.status == -signal.SIGKILL, done.err
        assert not (killed / "model.safetensors").exists()
    done = run(start, killed)
    assert done.status == 0, done.err
    assert "step 6: " in done.out and "step 4: " not in done.out, "from where it last saved"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in killed.iterdir()} - {train.RESUME + ".tmp"} == names
    for name in names:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_fine_tuning_lowers_the_loss_and_side_by_side_changes_nothing(start, tmp_path):
    first, one, two = tmp_path / "first", tmp_path / "one", tmp_path / "two"
    assert run(start, first).status == 0
    for out, n in ((one, 1), (two, 2)):
        tuned = "--model", first, "--lr", 0.003, "--workers", n
        done = run(start, out, *tuned, scratch=False)
        assert done.status == 0, done.err
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    tokenizer = Tokenizer.from_pretrained(start)
    questions = read_questions(start / "some.jsonl", targets=True)
    rows = [train.sequence(q, None, tokenizer) for q in questions]

    def loss(folder):
        model = Llama.from_pretrained(folder, pack=False)
        return train.validate(model, rows, torch.device("cpu"), 8, train.nullcontext)

    assert loss(one) < loss(first) - 0.1


def test_settings_of_another_run_are_refused(start, tmp_path):
    model = Llama(train.ModelArgs.from_config(json.loads((start / "config.json").read_text())))
    optimizer = train.make_optimizer(model, 1e-3, 0.1)
    train.save_state(model, optimizer, tmp_path, 2, "other settings")
    done = run(start, tmp_path)
    assert done.status == 2 and done.err.count("\n") == 1
    assert str(tmp_path / train.RESUME) in done.err


@pytest.mark.parametrize(
    "more, named",
    [
        (["--lr", "0"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--weight-decay", "nan"], "--weight-decay"),
        (["--device", "meta"], "--device meta"),
        (["--lr", "1e5", "--warmup", "0", "--steps", "40", "--clip", "1e6"], "a smaller --lr"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--stochastic-depth", "2"], "--stochastic-depth"),
        (["--device", "tpu9"], "--device"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--model", "missing"], "missing"),
        (["--data", str(DEMO / "config.json")], "config.json"),
    ],
)
def test_bad_input_is_one_line(start, tmp_path, monkeypatch, capsys, more, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags_for(start, tmp_path / "out", *more)])
    with pytest.raises(SystemExit) as exit:
        cli.run(train.main)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and named in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()
