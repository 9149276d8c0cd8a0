"""The trainer: inference's own prompts, learning, exact resuming, what is skipped, its refusals."""

import json
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from damage import Done, forked, snapshot  # must come first: threads, path
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from data import prompts
from data.prompts import stage_prompts
from data.questions import Question, format_question, read_questions
from data.tokenizer import Tokenizer
from model import KVCache, Llama, ModelArgs, Skip
from skip import ATTENTION, FFN, mask_of
from tools import checkpoint, skip_training, train
from tools.command import run as run_command
from tools.sequences import (
    LAST_STAGE_WEIGHT,
    PROMPT,
    draw_orders,
    draw_sequences,
    longest,
    make_batch,
    sequences,
)

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
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty questions with their texts."""
    file = tmp_path_factory.mktemp("data") / "some.jsonl"
    lines = (DEMO / "train.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:40]))
    return file


@pytest.fixture(scope="module")
def base(start, data, tmp_path_factory):
    """A tiny model that was trained a little: what fine-tuning starts from."""
    folder = tmp_path_factory.mktemp("base") / "model"
    done = run(start, data, folder, "--scratch")
    assert done.status == 0, done.err
    return folder


def flags_for(model, data, out, *more):
    flags = ["--model", model, "--data", data, "--out", out, "--steps", 10, "--batch-size", 8]
    flags += ["--save-every", 2, "--warmup", 2, "--lr", 0.01, "--stochastic-depth", 0.5, *more]
    return [str(flag) for flag in flags]


def run(model, data, out, *more, before="") -> Done:
    return forked("tools.train", *flags_for(model, data, out, *more), before=before)


def plain(model, data, out, *more) -> list[str]:
    """Flags of a short run of one step, with the defaults otherwise."""
    flags = ["--model", model, "--data", data, "--out", out, "--steps", 1, "--batch-size", 4]
    return [str(flag) for flag in [*flags, *more]]


def run_here(monkeypatch, argv) -> int:
    """Runs the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    try:
        run_command(train.main)
    except SystemExit as e:
        return e.code
    return 0


# ---------------------------------------------------------------- sequences


def said_of(question: Question) -> list[list[str]]:
    """The targets of every stage, as later prompts quote them."""
    said = []
    for index, stage in enumerate(prompts.STAGES):
        said.append([prompts.quote(index, text) for text in stage.targets(question)])
    return said


def test_sequences_hold_the_stage_prompts_and_end_every_segment(start, data):
    tokenizer = Tokenizer.from_pretrained(start)
    eos = min(tokenizer.eos_ids)
    question = read_questions(data)[0]
    said = said_of(question)
    (row,) = sequences(question, tokenizer)

    def segment(row, prompt, text):
        """Asserts that the sequence has `text` as the labels right after `prompt`."""
        before = tokenizer.encode(prompt)
        after = tokenizer.encode(prompt + text)
        assert row.ids[: len(after)] == after
        taught = slice(len(before) - 1, len(after))
        assert row.labels[taught] == after[len(before) :] + [eos]
        assert all(row.weights[taught])
        return len(after) - len(before) + 1

    count = 0
    for index in range(3):  # the first option's prompt is the one that is used
        prompt = stage_prompts(index, question, said)[0]
        count += segment(row, prompt, f" {said[index][0]}")
    for text in said[1][1:]:
        count += len(tokenizer.encode(f" {text}", bos=False)) + 1
    assert sum(weight > 0 for weight in row.weights) == count
    summary = said[2][0]
    heavy = [weight for weight in row.weights if weight > 1]
    assert heavy == [LAST_STAGE_WEIGHT] * (len(summary.split()) + 2)

    order = [2, 0, 3, 1]  # shuffled: the same prompt that inference gives option C
    (row,) = sequences(question, tokenizer, [[0], order, [0]])
    segment(row, stage_prompts(1, question, said)[2], f" {said[1][2]}")
    assert tokenizer.decode(row.ids).endswith(f"{said[1][1]}\nSummarize: {summary}")


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
LLAMA3 += r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PATTERNS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama3": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"), BYTES]
    ),
    "none": BYTES,  # pieces of several words, across every border
}


def quoted_question() -> Question:
    return Question(
        id="q",
        stem='What did she say about 12 of the "robins"?',
        labels=("A", "B", "C"),
        options=("that they can fly", "nothing", "'no'"),
        answer="A",
        recall='People say "robins can fly".',
        analyses=('she said "they can fly".', 'she did not say "nothing"', "she said 'yes'"),
    )


@pytest.fixture(params=[*PATTERNS, "llama2"])
def pattern(request, tmp_path):
    """(name, a tokenizer folder with that pre-tokenizer and pieces across borders)."""
    name = request.param
    eos = 2 if name == "llama2" else 1
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    if name == "llama2":
        file = ROOT.parent / "shared" / "tokenizers" / "llama2" / "tokenizer.model"
        if not file.exists():
            pytest.skip("no folder of real tokenizers beside the repository")
        shutil.copy(file, tmp_path)
        return name, tmp_path
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = PATTERNS[name]
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    question = quoted_question()
    texts = [text + "\n" for index in range(3) for text in said_of(question)[index]]
    texts += ["".join(text for text, _ in prompts.pieces(question))]
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return name, tmp_path


def test_training_sees_the_prompts_that_inference_makes(pattern):
    """Issue 17, 12: Llama 3 has a piece for `".` and a newline, across the end of a text."""
    name, folder = pattern
    tokenizer = Tokenizer.from_pretrained(folder)
    eos = min(tokenizer.eos_ids)
    question = quoted_question()
    said = said_of(question)
    rows = sequences(question, tokenizer)

    def taught(row, start):
        """The text whose first token stands at `start`, without its end."""
        end = row.labels.index(eos, start - 1)
        assert row.ids[start : end + 1] == row.labels[start - 1 : end]
        assert all(row.weights[start - 1 : end + 1])
        return row.ids[start : end + 1]

    for index, texts in enumerate(said):
        for prompt, text in zip(stage_prompts(index, question, said), texts):
            ids = tokenizer.encode(prompt)
            tail = ids
            if prompt.endswith(("B,", "C,")):  # after another's analysis, its prompt's end
                tail = ids[-1:] if name == "none" else ids[-3:]
            found = []
            for row in rows:
                for i in range(len(row.ids)):
                    begins = row.stages[i] == index and row.stages[i - 1] == PROMPT
                    if begins and row.ids[:i][-len(tail) :] == tail:
                        found.append(tokenizer.decode(ids + taught(row, i)))
            assert found.count(f"{prompt} {text}") == 1, (name, prompt, text)
            assert len(found) == 1 or name == "none"
    assert sum(row.labels.count(eos) for row in rows) == 5
    assert longest(question, tokenizer) == max(len(row.ids) for row in rows)
    if name == "llama3":
        assert '".\n' in [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        assert len(rows) == 3, "a border inside a piece begins a sequence"
    elif name != "none":
        assert len(rows) == 1


def test_the_order_of_options_is_drawn(start, data):
    question = read_questions(data)[0]
    drawn = [draw_orders(question, random.Random(i), None) for i in range(400)]
    shuffled = [orders for orders in drawn if orders is not None]
    assert 160 < len(shuffled) < 240
    assert len({tuple(orders[1]) for orders in shuffled}) == 24
    answer = question.labels.index(question.answer)
    for i in range(20):
        orders = draw_orders(question, random.Random(i), 2)
        assert orders[0] == orders[2] == [0]
        assert len(set(orders[1])) == 2 and answer in orders[1]
    tokenizer = Tokenizer.from_pretrained(start)
    (row,) = draw_sequences([question], tokenizer, random.Random(0), 2)
    assert tokenizer.decode(row.ids).count("For option") == 2
    orders = draw_orders(question, random.Random(0), 9)
    assert sorted(orders[1]) == [0, 1, 2, 3], "never more than there are"


def test_another_list_of_stages_trains_its_own_wording(start, data, monkeypatch):
    """The wording stands once: a fork changes the list, and sequences follow."""
    question = read_questions(data)[0]
    reason = replace(prompts.STAGES[0], name="reason", opening="\nThink first:")
    answer = replace(prompts.STAGES[2], opening="\nAnswer:")
    monkeypatch.setattr(prompts, "STAGES", [reason, answer])
    tokenizer = Tokenizer.from_pretrained(start)
    (row,) = sequences(question, tokenizer)
    base = prompts.base_prompt(question)
    summary = f"So the answer is option {question.answer}."
    expected = f"{base}\nThink first: {question.recall}\nAnswer: {summary}"
    assert tokenizer.decode(row.ids) == expected
    assert max(row.weights) == LAST_STAGE_WEIGHT and set(row.stages) == {PROMPT, 0, 1}


# ---------------------------------------------------------------- what is skipped


def test_stochastic_depth_rises_with_depth():
    rng = random.Random(0)
    masks = torch.stack([skip_training.draw_depth(8, 0.5, rng) for _ in range(4000)]).float()
    share = masks.mean(0).flatten()
    expected = 0.5 * torch.arange(16) / 15
    assert share[0] == 0 and torch.allclose(share, expected, atol=0.03)
    assert skip_training.draw_depth(8, 0.0, rng) is None


def test_nested_skips_are_the_first_of_each_stages_ranking():
    first = [(layer, sub) for layer in range(4) for sub in (ATTENTION, FFN)]
    rankings = [first, first[::-1], first]
    nested = skip_training.NestedSkips(rankings, 4, 0.5)
    rng = random.Random(0)
    drawn = [nested.draw(rng) for _ in range(2000)]
    some = [masks for masks in drawn if masks is not None]
    assert abs(len(some) / 2000 - 0.7) < 0.04, "all layers run in 30%"
    budgets = torch.stack([masks.sum((1, 2)) for masks in some])
    for stage, ranking in enumerate(rankings):
        for masks in some[:50]:
            budget = int(masks[stage].sum())
            assert torch.equal(masks[stage], mask_of(ranking[:budget], 4))
        counts = torch.bincount(budgets[:, stage], minlength=5)
        assert len(counts) == 5 and counts.min() > 0.8 * len(some) / 5, "uniform from 0 to half"
    assert not torch.equal(budgets[:, 0], budgets[:, 2]), "every stage draws its own"


def test_training_skips_exactly_where_decoding_skips(base, data):
    """The first stage's logits: a prefill by all layers, then steps under its skip set."""
    llama = Llama.from_pretrained(base)
    tokenizer = Tokenizer.from_pretrained(base)
    rows = [sequences(question, tokenizer)[0] for question in read_questions(data)[:3]]
    batch = make_batch(rows)
    masks = torch.stack([mask_of([(1, ATTENTION), (0, FFN)], 2), *torch.zeros(2, 2, 2).bool()])
    skipped = skip_training.skipped_tokens(masks, batch.stages)
    assert skipped.shape == (2, 2, *batch.tokens.shape)
    hook = skip_training.LayerHook(skipped, masks.any(0))
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    trained = llama(batch.tokens, skip=Skip(nothing, hook))
    full = llama(batch.tokens)
    for i, row in enumerate(rows):
        n = row.stages.index(0)
        end = n + row.stages.count(0)
        cache = KVCache(llama, 1, len(row.ids))
        ids = torch.tensor([row.ids])
        decoded = [llama(ids[:, :n], cache)[0, -1]]
        for pos in range(n, end):
            decoded.append(llama(ids[:, pos : pos + 1], cache, pos, masks[0])[0, -1])
        assert torch.allclose(trained[i, n - 1 : end], torch.stack(decoded), atol=1e-4)
        assert torch.allclose(trained[i, :n], full[i, :n], atol=1e-5)
        assert not torch.allclose(trained[i, n:end], full[i, n:end], atol=1e-2)


def plan_file(path: Path, version: int = 2, n_layers: int = 2) -> Path:
    ranking = [[layer, sub] for layer in range(n_layers) for sub in (0, 1)]
    plan = {"format": version, "ranking": ranking}
    if version == 2:
        plan = {"format": version, "rankings": [ranking] * 3}
    path.write_text(json.dumps(plan))
    return path


@pytest.mark.parametrize("version", [1, 2])
def test_a_plan_trains_under_its_skip_sets(base, data, tmp_path, monkeypatch, version):
    plan = plan_file(tmp_path / "plan.json", version)
    outs = []
    for name in ("skips", "again"):
        more = ["--skip-plan", plan, "--skip-most", 1]
        argv = plain(base, data, tmp_path / name, "--steps", 4, *more)
        assert run_here(monkeypatch, argv) == 0
        outs.append((tmp_path / name / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]
    assert run_here(monkeypatch, plain(base, data, tmp_path / "full", "--steps", 4)) == 0
    assert outs[0] != (tmp_path / "full" / "model.safetensors").read_bytes()


def test_frozen_layers_have_neither_graph_nor_gradient(base, data, tmp_path, monkeypatch):
    llama = Llama.from_pretrained(base).requires_grad_(True)
    train.freeze(llama, 1)
    tokenizer = Tokenizer.from_pretrained(base)
    batch = make_batch(sequences(read_questions(data)[0], tokenizer))
    graphs = []

    class Watch(skip_training.LayerHook):
        def run(self, *args):
            x = super().run(*args)
            graphs.append(x.grad_fn is not None)
            return x

    nothing = torch.zeros(2, 2, dtype=torch.bool)
    train.loss_sum(llama, batch, Skip(nothing, Watch(None, None, freeze_below=1)))
    assert graphs == [False, True]
    before = load_file(base / "model.safetensors")
    argv = plain(base, data, tmp_path / "out", "--freeze-below", 1, "--steps", 2, "--warmup", 0)
    assert run_here(monkeypatch, argv) == 0
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        frozen = "layers.0." in name or ("embed" in name and not llama.args.tied)
        assert torch.equal(tensor, before[name]) == frozen, name


# ---------------------------------------------------------------- learning, resuming

# Code for a process of its own, that kills itself: in the step after it saved, while it saves
IN_A_STEP = """
import os, signal
from tools import train
save = train.save_state
def saved(*args):
    save(*args)
    train.loss_sum = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
train.save_state = saved
"""
WHILE_SAVING = """
import os, signal
from tools import train
save = train.save_state
def saved(*args):
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(*args)
train.save_state = saved
"""


@pytest.mark.parametrize("more", [["--scratch"], ["--freeze-below", "1"]])
def test_a_killed_run_resumes_to_the_same_weights(start, base, data, tmp_path, more):
    model = start if "--scratch" in more else base
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    done = run(model, data, whole, *more)
    assert done.status == 0, done.err
    for before in (WHILE_SAVING, IN_A_STEP, IN_A_STEP, WHILE_SAVING):
        done = run(model, data, killed, *more, before=before)
        assert done.status == -signal.SIGKILL, done.err
        assert not (killed / "model.safetensors").exists()
    done = run(model, data, killed, *more)
    assert done.status == 0, done.err
    assert "step 6: " in done.out and "step 4: " not in done.out, "from where it last saved"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in killed.iterdir()} - {checkpoint.RESUME + ".tmp"} == names
    for name in names:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_fine_tuning_lowers_the_loss_and_side_by_side_changes_nothing(base, data, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    for out, workers in ((one, 1), (two, 2)):
        done = run(base, data, out, "--lr", 0.003, "--workers", workers)
        assert done.status == 0, done.err
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    tokenizer = Tokenizer.from_pretrained(base)
    batches = train.valid_batches(read_questions(data), tokenizer, 8)

    def loss(folder):
        return trainer_of(Llama.from_pretrained(folder)).validate(batches)

    assert loss(one) < loss(base) - 0.1


def trainer_of(llama: Llama) -> train.Trainer:
    optimizer = train.make_optimizer(llama.requires_grad_(True), 1e-3, 0.1)
    return train.Trainer(llama, optimizer, False, 0, 1e-3, 0, 1, 1.0)


@pytest.fixture
def killed(base, data, tmp_path):
    """(model, data, out) of a fine-tuning run that was killed after two steps, all copies."""
    model = shutil.copytree(base, tmp_path / "base")
    file = Path(shutil.copy(data, tmp_path / "data.jsonl"))
    out = tmp_path / "out"
    done = run(model, file, out, before=IN_A_STEP)
    assert done.status == -signal.SIGKILL, done.err
    return model, file, out


def other_data(model, data):
    question = replace(read_questions(data)[0], stem="Which can fly?")
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([format_question(question) + "\n", *lines[1:]]))


def other_weights(model, data):
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    checkpoint.save_tensors(file, tensors, {"format": "pt"})


def other_tokenizer(model, data):
    file = model / "tokenizer.json"
    file.write_text(file.read_text() + "\n")


def other_config(model, data):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    "change, more, named",
    [
        (other_data, [], "the data"),
        (other_weights, [], "the base weights"),
        (other_tokenizer, [], "the tokenizer"),
        (other_config, [], "config.json"),
        (None, ["--lr", "0.02"], "--lr"),
        (None, ["--steps", "12"], "--steps"),
        (None, ["--options-per-step", "2"], "--options-per-step"),
    ],
)
def test_a_run_resumes_only_on_the_same_content(killed, change, more, named):
    """Issue 17, 11: the content decides, and what differs is named."""
    model, data, out = killed
    if change is not None:
        change(model, data)
    before = snapshot(out)
    done = run(model, data, out, *more)
    assert done.status == 2 and done.err.count("\n") == 1, done.err
    differs = done.err.partition("differs in ")[2].partition(";")[0]
    assert named in differs and "," not in differs
    assert str(out / checkpoint.RESUME) in done.err
    assert snapshot(out) == before


def test_a_moved_copy_of_the_same_content_resumes(killed, tmp_path):
    model, data, out = killed
    model = model.rename(tmp_path / "moved")
    data = data.rename(tmp_path / "moved.jsonl")
    done = run(model, data, out, "--save-every", 3)
    assert done.status == 0 and "step 3: " in done.out, done.err


# ---------------------------------------------------------------- the folder


def test_training_in_the_folder_of_a_sharded_model_is_not_lost(
    base, data, make_checkpoint, tmp_path, monkeypatch
):
    """Issue 17, 9: the old shards were read instead of the new weights."""
    config = json.loads((base / "config.json").read_text())
    for key in checkpoint.DTYPE_KEYS:
        del config[key]
    folder = make_checkpoint(shards=2, **config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    whole = tmp_path / "whole"
    assert run_here(monkeypatch, plain(folder, data, whole)) == 0
    assert run_here(monkeypatch, plain(folder, data, folder)) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    expected = load_file(whole / "model.safetensors")
    for name, tensor in Llama.from_pretrained(folder).tensors():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_folder_of_another_model_is_refused(base, data, tmp_path, monkeypatch, capsys, name):
    """Issue 17, 10: the earlier model's tokenizer was kept, and read with the new weights."""
    out = shutil.copytree(base, tmp_path / "out")
    content = json.loads((out / name).read_text()) if (out / name).exists() else {}
    (out / name).write_text(json.dumps(content | {"eos_token_id": 3}))
    before = snapshot(out)
    assert run_here(monkeypatch, plain(base, data, out)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(out) in err and name in err
    assert snapshot(out) == before


def test_a_tokenizer_that_only_the_folder_has_is_refused(base, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.model").write_bytes(b"another")
    assert run_here(monkeypatch, plain(base, data, out)) == 2
    assert "tokenizer.model" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["tokenizer.model"]


def test_all_files_but_weights_are_copied(base, data, tmp_path, monkeypatch):
    """Issue 17, 10: chat_template.jinja was dropped."""
    source = shutil.copytree(base, tmp_path / "source")
    kept = {"chat_template.jinja": "{{ x }}", "generation_config.json": '{"eos_token_id": 1}'}
    kept |= {"added_tokens.json": "{}", "LICENSE": "free", "README.md": "theirs"}
    left = {"pytorch_model.bin": "old", ".gitattributes": "", "extra.safetensors": "old"}
    for name, text in (kept | left).items():
        (source / name).write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    for _ in range(2):  # the second time over a finished run of the same model
        assert run_here(monkeypatch, plain(source, data, out)) == 0
        for name, text in kept.items():
            assert (out / name).read_text() == ("mine" if name == "README.md" else text)
        assert not any((out / name).exists() for name in left)


def test_the_config_names_the_dtype_of_the_new_weights(base, data, tmp_path, monkeypatch):
    """Issue 17, 10: where `dtype` and `torch_dtype` differ, `dtype` wins in transformers."""
    source = shutil.copytree(base, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"dtype": "bfloat16", "torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    assert run_here(monkeypatch, plain(source, data, out)) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.float32
    ids = torch.tensor([[0, 5, 9, 17]])
    assert torch.allclose(theirs(ids).logits, Llama.from_pretrained(out)(ids), atol=1e-4)


# ---------------------------------------------------------------- refusals, defaults


def test_the_learning_rate_suits_what_is_trained(start, data, monkeypatch):
    """Issue 17, 19: the default was that of a model from scratch."""
    monkeypatch.setattr(sys, "argv", ["train.py", *plain(start, data, "out")])
    assert train.parse_args().lr == 1e-4
    monkeypatch.setattr(sys, "argv", ["train.py", *plain(start, data, "out", "--scratch")])
    assert train.parse_args().lr == 1e-3


def test_questions_without_targets_say_where_these_come_from(
    base, data, tmp_path, monkeypatch, capsys
):
    """Issue 17, 18."""
    file = tmp_path / "bare.jsonl"
    question = replace(read_questions(data)[0], analyses=None)
    file.write_text(format_question(question) + "\n")
    assert run_here(monkeypatch, plain(base, file, tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "data/prepare.py NAME --targets" in err and str(file) in err


def test_a_state_that_is_damaged_is_named(base, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / checkpoint.RESUME).write_bytes(b"not a file of tensors")
    assert run_here(monkeypatch, plain(base, data, out)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(out / checkpoint.RESUME) in err


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
        (["--skip-plan", str(DEMO / "plan.json")], "--skip-plan and --stochastic-depth"),
        (["--skip-plan", str(DEMO / "plan.json"), "--stochastic-depth", "0"], "plan.json"),
        (["--skip-plan", str(DEMO / "config.json"), "--stochastic-depth", "0"], "config.json"),
        (["--freeze-below", "3"], "--freeze-below 3"),
    ],
)
def test_bad_input_is_one_line(start, data, tmp_path, monkeypatch, capsys, more, named):
    monkeypatch.chdir(tmp_path)
    argv = flags_for(start, data, tmp_path / "out", "--scratch", *more)
    assert run_here(monkeypatch, argv) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_from_scratch_depend_on_the_seed_alone(start):
    shape = ModelArgs.from_config(json.loads((start / "config.json").read_text()))
    torch.rand(7)
    one = dict(train.initialize(shape, 0.02, 1).tensors())
    two = dict(train.initialize(shape, 0.02, 1).tensors())
    other = dict(train.initialize(shape, 0.02, 2).tensors())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
