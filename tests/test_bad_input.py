"""Every mistake of a user gets one line that names the file, key or flag, and exit status 2.

ROWS is the list; tests/bad_input.md shows it with the line that each prints. To rewrite that file:

    python tests/test_bad_input.py
"""

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from damage import (  # must come first: threads, path
    FEW,
    GONE,
    ROOT,
    command,
    edit_header,
    edit_json,
    edit_tensors,
    eval_flags,
    finish,
    forked,
    make_good,
    one_line,
    question,
    search_flags,
    snapshot,
    start,
    write_questions,
)

LISTED = Path(__file__).parent / "bad_input.md"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2200119864\n"


class Row(NamedTuple):
    """A mistake: how it is made in a folder of good files, and words that the line must hold.

    flags are added to a good command line; {DIR} in them is the folder.
    """

    what: str
    damage: Callable[[Path], object] = lambda folder: None
    words: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    name: str = "eval"


# ---------------------------------------------------------------- ways to make a mistake


def config(file: str = "model/config.json", **changes):
    return lambda folder: edit_json(folder / file, **changes)


def raw(file: str, content: bytes | str):
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str, n: int):
    """Leaves the last n bytes out."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-n])


def gone(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


def tensors(edit):
    return lambda folder: edit_tensors(folder / "model" / "model.safetensors", edit)


def header(edit):
    return lambda folder: edit_header(folder / "model" / "model.safetensors", edit)


def put(name: str, value):
    """Replaces a tensor: value(the one that is there)."""
    return tensors(lambda found: found.update({name: value(found[name])}))


def poison(number: float):
    def value(tensor):
        tensor[3, 5] = number
        return tensor

    return put(QUERY, value)


def layers(n: int):
    """Renames layer 2 or adds a copy of it, so that the file has n of the 3."""

    def edit(found):
        for name in [name for name in found if ".layers.2." in name]:
            tensor = found.pop(name) if n == 2 else found[name]
            if n == 4:
                found[name.replace(".2.", ".3.")] = tensor.clone()

    return tensors(edit)


def tied_float8(folder: Path) -> None:
    put(HEAD, lambda t: t.to(torch.float8_e4m3fn))(folder)
    config(tie_word_embeddings=True)(folder)


def long_header(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def offsets(start: int, end: int):
    return header(lambda h: h[NORM].update(data_offsets=[start, end]))


def index(edit):
    """edit(weight_map) changes which shard the index names for each tensor."""

    def damage(folder: Path) -> None:
        path = folder / "sharded" / "model.safetensors.index.json"
        value = json.loads(path.read_text())
        edit(value["weight_map"])
        path.write_text(json.dumps(value))

    return damage


def stored_as(dtype: str):
    return header(lambda h: [entry.update(dtype=dtype) for n, entry in h.items() if n == NORM])


def quantized(folder: Path) -> None:
    """One byte for each weight of a matrix, as bitsandbytes stores them."""
    path = folder / "model" / "model.safetensors"
    edit_tensors(path, lambda found: found.update({QUERY: found[QUERY].to(torch.int8)}))


def tokenizer(edit):
    def damage(folder: Path) -> None:
        path = folder / "model" / "tokenizer.json"
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))

    return damage


def no_end(folder: Path) -> None:
    edit_json(folder / "model" / "config.json", eos_token_id=GONE)
    (folder / "model" / "generation_config.json").unlink()


def line(number: int, edit):
    """edit(row) changes, or gives another value for, a line of the questions."""

    def damage(folder: Path) -> None:
        rows = [question(i) for i in range(4)]
        rows[number - 1] = edit(rows[number - 1]) or rows[number - 1]
        write_questions(folder / "questions.jsonl", rows)

    return damage


def long_question() -> dict:
    return question(0)["question"] | {"stem": "Why? " * 500}


def choices(*labels: str):
    given = [{"label": label, "text": "bee"} for label in labels]
    return line(3, lambda row: row["question"].update(choices=given))


def plan(**changes):
    return config("plan.json", **changes)


def ranked(edit):
    """edit(rankings) changes the rankings of the plan in place."""

    def damage(folder: Path) -> None:
        rankings = json.loads((folder / "plan.json").read_text())["rankings"]
        edit(rankings)
        edit_json(folder / "plan.json", rankings=rankings)

    return damage


WORKED = {"recall": "a fact.", "analyze": ["one.", "two.", "three."], "answerKey": "A"}


def worked_examples(*numbers: int):
    """Writes worked examples beside the questions: questions of these numbers, with targets."""
    rows = [question(number) | WORKED for number in numbers]
    return lambda folder: write_questions(folder / "shots.jsonl", rows)


def of_another_model(folder: Path) -> None:
    edit_tensors(folder / "model" / "model.safetensors", lambda t: t[NORM].mul_(2))


W, C, T = "model/model.safetensors", "model/config.json", "model/tokenizer.json"
INDEX, SHARD = "sharded/model.safetensors.index.json", "sharded/model-00002-of-00002.safetensors"
Q, G = "questions.jsonl", "model/generation_config.json"
SHARDED = ("--model", "{DIR}/sharded")
PLAN = ("--plan", "{DIR}/plan.json")

ROWS = {
    "Weights": [
        Row("missing", gone(W), (W, "cannot be read")),
        Row("empty", raw(W, b""), (W, "not a whole safetensors file")),
        Row("shorter than its header says", cut(W, 100), (W, "not a whole safetensors file")),
        Row("cut within the header", cut(W, 66000), (W, "not a whole safetensors file")),
        Row("a header of 1 TB", long_header, (W, "not a whole safetensors file")),
        Row("a Git LFS pointer", raw(W, LFS), (W, "git lfs pull")),
        Row("a web page", raw(W, "<!DOCTYPE html><html></html>"), (W, "not a whole safetensors")),
        Row("a pickle", raw(W, b"PK\x03\x04" + bytes(500)), (W, "not a whole safetensors file")),
        Row("overlapping offsets", offsets(0, 64), (W, "not a whole safetensors file")),
        Row("offsets beyond the end", offsets(1 << 30, (1 << 30) + 64), (W, "not a whole")),
        Row("offsets backwards", offsets(64, 0), (W, "not a whole safetensors file")),
        Row("a tensor missing", tensors(lambda t: t.pop(QUERY)), ("model", QUERY, "missing, 1 in")),
        Row(
            "a tensor too many",
            tensors(lambda t: t.update({"model.extra.weight": torch.zeros(2)})),
            (W, "unexpected", "model.extra.weight"),
        ),
        Row(
            "a tensor transposed",
            put(EMBED, lambda t: t.t().contiguous()),
            (W, EMBED, "[16, 320]", "[320, 16]"),
        ),
        Row(
            "a tensor of fewer dimensions",
            put(QUERY, lambda t: t.flatten()),
            (W, QUERY, "[256]", "[16, 16]"),
        ),
        Row("fewer layers than the config", layers(2), ("model", "missing, 9 in", "layers.2.")),
        Row("more layers than the config", layers(4), (W, "unexpected", "layers.3.")),
        Row("stored as integers", put(QUERY, lambda t: t.int()), (W, QUERY, "I32", "F32")),
        Row("quantized to bytes", quantized, (W, QUERY, "I8", "BF16")),
        Row("stored as float64", put(QUERY, lambda t: t.double()), (W, QUERY, "F64", "F32")),
        Row("an unknown dtype", stored_as("F12"), (W, "not a whole safetensors file")),
        Row("NaN", poison(float("nan")), (W, QUERY, "NaN")),
        Row("infinite", poison(float("-inf")), (W, QUERY, "Inf")),
        Row(
            "tied, but a head of its own",
            config(tie_word_embeddings=True),
            (W, HEAD, "tie_word_embeddings"),
        ),
        Row("tied, and a head in float8", tied_float8, (W, HEAD, "F8_E4M3", "F32")),
        Row("not tied, but no head", tensors(lambda t: t.pop(HEAD)), ("model", HEAD, "missing")),
        Row(
            "a name of two lines",
            header(lambda h: h.update({"a\nb": h.pop(NORM)})),
            (W, "unexpected tensor", "a b"),
        ),
    ],
    "Shards": [
        Row(
            "a path of 5000 letters",
            index(lambda m: m.update({NORM: "x" * 5000})),
            ("sharded/xxx",),
            SHARDED,
        ),
        Row("a shard missing", gone(SHARD), (SHARD, "cannot be read"), SHARDED),
        Row("a shard cut short", cut(SHARD, 50), (SHARD, "not a whole safetensors"), SHARDED),
        Row(
            "a tensor absent from its shard",
            index(lambda m: m.update({NORM: "model-00001-of-00002.safetensors"})),
            ("model-00001-of-00002", NORM),
            SHARDED,
        ),
        Row(
            "a tensor absent from every shard",
            index(lambda m: m.update({"x.y": m[NORM]})),
            ("model-0000", "x.y"),
            SHARDED,
        ),
        Row(
            "a path outside the folder",
            index(lambda m: m.update({NORM: "../model/model.safetensors"})),
            (INDEX, NORM, "../model/model.safetensors"),
            SHARDED,
        ),
        Row(
            "an absolute path",
            index(lambda m: m.update({NORM: "/etc/passwd"})),
            (INDEX, NORM, "/etc/passwd"),
            SHARDED,
        ),
        Row(
            "a number for a path", index(lambda m: m.update({NORM: 7})), (INDEX, NORM, "7"), SHARDED
        ),
        Row("an index that is not JSON", raw(INDEX, "weight_map:"), (INDEX, "not JSON"), SHARDED),
        Row("an index without its map", raw(INDEX, "{}"), (INDEX, "weight_map"), SHARDED),
        Row(
            "an index with an empty map",
            raw(INDEX, '{"weight_map": {}}'),
            (INDEX, "weight_map"),
            SHARDED,
        ),
        Row(
            "a path with a zero byte",
            index(lambda m: m.update({NORM: "a\0b"})),
            ("sharded/a?b", "cannot be read"),
            SHARDED,
        ),
        Row(
            "a path that is no text",
            index(lambda m: m.update({NORM: "\ud800"})),
            ("sharded", "cannot be read"),
            SHARDED,
        ),
        Row(
            "the folder above for a path",
            index(lambda m: m.update({NORM: ".."})),
            ("sharded/..", "cannot be read"),
            SHARDED,
        ),
    ],
    "config.json": [
        Row("missing", gone(C), (C, "cannot be read")),
        Row("not JSON", raw(C, "{'hidden_size': 16}"), (C, "not JSON")),
        Row("not text", raw(C, b"\xff\xfe\x00"), (C, "not JSON")),
        Row("nested beyond reason", raw(C, "[" * 100000), (C, "not JSON")),
        Row("a list", raw(C, "[]"), (C, "expected an object", "list")),
        Row("of another architecture", config(model_type="gpt2"), (C, "model_type", "gpt2")),
        Row(
            "of a family that is close",
            config(model_type="qwen2", architectures=["Qwen2ForCausalLM"], eos_token_id=9999),
            (C, "model_type", "qwen2", "llama"),
        ),
        Row("of none", config(model_type=GONE), (C, "model_type", "llama")),
        Row("another activation", config(hidden_act="gelu"), (C, "hidden_act", "gelu", "silu")),
        *(
            Row(f"no {key}", config(**{key: GONE}), (C, "missing key", key))
            for key in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "vocab_size",
            )
        ),
        Row("zero layers", config(num_hidden_layers=0), (C, "num_hidden_layers", "found 0")),
        Row("negative width", config(hidden_size=-16), (C, "hidden_size", "found -16")),
        Row("text for a number", config(vocab_size="320"), (C, "vocab_size", "found '320'")),
        Row(
            "a fraction for a count",
            config(num_hidden_layers=2.5),
            (C, "num_hidden_layers", "int", "found 2.5"),
        ),
        Row("true for a number", config(hidden_size=True), (C, "hidden_size", "found True")),
        Row("a list for a number", config(num_attention_heads=[4]), (C, "num_attention_heads")),
        Row("absurd width", config(hidden_size=10**15), (C, "hidden_size", "found 1000000")),
        Row("absurd number of layers", config(num_hidden_layers=10**9), (C, "num_hidden_layers")),
        Row("a context of zero", config(max_position_embeddings=0), (C, "max_position_embedding")),
        Row("norm_eps that is no number", config(rms_norm_eps=float("nan")), (C, "rms_norm_eps")),
        Row("rope_theta of text", config(rope_theta="1e4"), (C, "rope_theta", "'1e4'")),
        Row(
            "KV heads that do not divide 3 heads",
            config(num_attention_heads=3, head_dim=None),
            (C, "num_key_value_heads", "3"),
        ),
        Row(
            "a width that the heads do not divide",
            config(hidden_size=18),
            (C, "num_attention_heads", "18"),
        ),
        Row(
            "KV heads that do not divide 4 heads",
            config(num_key_value_heads=3),
            (C, "num_key_value_heads", "3", "4"),
        ),
        Row("an odd head_dim", config(head_dim=5), (C, "head_dim", "even", "5")),
        Row(
            "another width than the weights",
            config(hidden_size=32),
            (W, "config.json asks for", "32"),
        ),
        Row("biases that the weights lack", config(attention_bias=True), ("model", "bias")),
        Row(
            "a rope_scaling without its type",
            config(rope_scaling={"factor": 2.0}),
            (C, "'rope_scaling'", "linear", "None"),
        ),
        Row(
            "unknown rope_scaling",
            config(rope_scaling={"type": "yarn", "factor": 2.0}),
            (C, "rope_scaling", "yarn", "linear", "llama3"),
        ),
        Row(
            "rope_scaling without its factor",
            config(rope_scaling={"type": "linear"}),
            (C, "missing key", "factor"),
        ),
        Row("a rope_scaling of text", config(rope_scaling="linear"), (C, "rope_scaling")),
        Row(
            "a quantized model", config(quantization_config={"bits": 4}), (C, "quantization_config")
        ),
        Row(
            "tie_word_embeddings of text",
            config(tie_word_embeddings="no"),
            (C, "tie_word_embeddings", "'no'"),
        ),
        Row("a rope_theta that gives no numbers", config(rope_theta=1e-300), ("NaN", "--dtype")),
        Row(
            "a context shorter than every prompt",
            config(max_position_embeddings=9),
            (Q, "context of 9 tokens"),
        ),
    ],
    "Tokenizer": [
        Row("missing", gone(T), ("model", "tokenizer.json", "tokenizer.model")),
        Row("empty", raw(T, ""), (T, "not a readable tokenizer")),
        Row("not JSON", raw(T, "tokens"), (T, "not a readable tokenizer")),
        Row("cut short", cut(T, 500), (T, "not a readable tokenizer")),
        Row(
            "no vocabulary",
            tokenizer(lambda t: t["model"].pop("vocab")),
            (T, "not a readable tokenizer"),
        ),
        Row(
            "a damaged tokenizer.model",
            lambda f: (gone(T)(f), raw("model/tokenizer.model", b"\x0a\x08broken")(f)),
            ("model/tokenizer.model", "not a readable tokenizer"),
        ),
        Row("no end token", no_end, ("model", "eos_token_id")),
        Row(
            "an end token beyond the vocabulary",
            config(G, eos_token_id=9999),
            ("model", "eos_token_id", "9999"),
        ),
        Row(
            "a text for an end token",
            config(G, eos_token_id="</s>"),
            ("model", "eos_token_id", "</s>"),
        ),
        Row("an empty list of end tokens", config(G, eos_token_id=[]), ("model", "eos_token_id")),
        Row("generation_config.json not JSON", raw(G, "eos: 1"), (G, "not JSON")),
        Row(
            "an id beyond the embedding",
            tokenizer(lambda t: t["model"]["vocab"].update(W=99999)),
            ("99999", "320"),
        ),
    ],
    "Questions": [
        Row("missing", gone(Q), (Q, "--data")),
        Row("empty", raw(Q, "\n\n"), (Q, "expected questions")),
        Row("a malformed line", raw(Q, json.dumps(question(0)) + "\n{'id': 1}\n"), (Q, "line 2")),
        Row("not text", raw(Q, b'{"id": "\xe9"}\n'), (Q, "line 1", "UTF-8", "0xe9")),
        Row("a line that is no object", line(2, lambda row: [1]), (Q, "line 2", "an object")),
        *(
            Row(
                f"no {key}",
                line(4, lambda row, key=key: {k: row[k] for k in row if k != key}),
                (Q, "line 4", key, "missing"),
            )
            for key in ("id", "question", "answerKey")
        ),
        Row(
            "no stem",
            line(1, lambda row: row["question"].pop("stem") and row),
            (Q, "line 1", "question.stem"),
        ),
        Row(
            "an empty stem",
            line(1, lambda row: row["question"].update(stem=" ")),
            (Q, "line 1", "question.stem", "empty"),
        ),
        Row("one choice", choices("A"), (Q, "line 3", "question.choices", "found 1")),
        Row("duplicate labels", choices("A", "C", "A"), (Q, "line 3", "choices[2].label", '"A"')),
        Row("a label of two letters", choices("A", "BC"), (Q, "line 3", "choices[1].label", "BC")),
        Row(
            "an option of a number",
            line(3, lambda row: row["question"]["choices"][1].update(text=5)),
            (Q, "line 3", "choices[1].text", "5"),
        ),
        Row(
            "an answerKey that is no label",
            line(2, lambda row: row.update(answerKey="E")),
            (Q, "line 2", "answerKey", "A, B, C", '"E"'),
        ),
        Row("an id twice", line(4, lambda row: question(1)), (Q, "line 4", "q1", "line 2")),
        Row(
            "a benchmark not made yet",
            flags=("--data", "csqa"),
            words=("csqa", "data/prepare.py csqa"),
        ),
        Row(
            "a folder without the split",
            flags=("--data", "{DIR}/model"),
            words=("--data", "test.jsonl"),
        ),
        Row(
            "unreadable by search",
            line(2, lambda row: row.update(answerKey="E")),
            (Q, "line 2", "answerKey"),
            name="search",
        ),
        Row(
            "all longer than the context",
            lambda f: write_questions(f / Q, [question(0) | {"question": long_question()}]),
            (Q, "context of 512 tokens"),
        ),
        Row(
            "all longer than the context, for search",
            lambda f: write_questions(f / Q, [question(0) | {"question": long_question()}]),
            (Q, "context of 512 tokens"),
            name="search",
        ),
    ],
    "Plan": [
        Row("missing", gone("plan.json"), ("plan.json", "cannot be read"), PLAN),
        Row("not JSON", cut("plan.json", 30), ("plan.json", "not JSON"), PLAN),
        Row("of another model", of_another_model, ("plan.json", "another model", "weights"), PLAN),
        Row(
            "of another tokenizer",
            lambda f: (f / T).write_text((f / T).read_text() + "\n"),
            ("plan.json", "another model", "tokenizer"),
            PLAN,
        ),
        Row("of another format", plan(format=3), ("plan.json", "format", "1 or 2", "3"), PLAN),
        Row(
            "a report instead",
            lambda f: (f / "plan.json").write_text('{"runs": []}'),
            ("plan.json", "format"),
            PLAN,
        ),
        *(
            Row(f"no {key}", plan(**{key: GONE}), ("plan.json", key), PLAN)
            for key in ("model", "importance", "budgets", "granularity", "rankings", "data_digest")
        ),
        Row(
            "a sub-layer ranked twice",
            ranked(lambda rankings: rankings[1].__setitem__(0, rankings[1][1])),
            ("plan.json", "rankings", "6 sub-layers once"),
            PLAN,
        ),
        Row(
            "rankings of two stages",
            ranked(lambda rankings: rankings.pop()),
            ("plan.json", "rankings", "expected 3", "found 2"),
            PLAN,
        ),
        Row("ranked by magic", plan(ranking_by="magic"), ("plan.json", "ranking_by", "loss"), PLAN),
        Row("too few budgets", plan(budgets=[1, 2]), ("plan.json", "budgets", "[1, 2]"), PLAN),
        Row("a negative budget", plan(budgets=[1, -2, 0]), ("plan.json", "budgets", "-2"), PLAN),
        Row("more than there are", plan(budgets=[0, 7, 0]), ("plan.json", "budgets", "6"), PLAN),
        Row("budgets of text", plan(budgets="111"), ("plan.json", "budgets"), PLAN),
        Row(
            "importance of fewer layers",
            plan(importance={"similarity": [[1, 1]], "ratio": [[1, 1]]}),
            ("plan.json", "importance", "3 x 2"),
            PLAN,
        ),
        Row(
            "an exit threshold above 1",
            plan(exit={"window": 5, "threshold": 1.5}),
            ("plan.json", "exit"),
            PLAN,
        ),
        Row("an unknown granularity", plan(granularity="head"), ("plan.json", "granular"), PLAN),
        Row(
            "a window of 5.5 tokens",
            plan(exit={"window": 5.5, "threshold": 0.5}),
            ("plan.json", "exit", "5.5"),
            PLAN,
        ),
        Row(
            "a window of 10^30 tokens",
            plan(exit={"window": 10**30, "threshold": 0.5}),
            ("plan.json", "exit", "100000"),
            PLAN,
        ),
        Row("an exit that is a list", plan(exit=[5, 0.5]), ("plan.json", "list"), PLAN),
        Row(
            "an importance that is no number",
            plan(importance={"similarity": [[float("nan"), 1]] * 3, "ratio": [[1, 1]] * 3}),
            ("plan.json", "importance", "3 x 2 numbers"),
            PLAN,
        ),
    ],
    "Flags": [
        Row(
            "a device without numbers",
            flags=("--device", "meta"),
            words=("--device meta", "numbers"),
        ),
        Row(
            "two budgets",
            flags=("--stage-budgets", "2,4"),
            words=("--stage-budgets", "three", "2,4"),
        ),
        Row(
            "a negative budget",
            flags=("--stage-budgets=-1,0,0",),
            words=("--stage-budgets", "-1,0,0"),
        ),
        Row(
            "budgets that are no numbers",
            flags=("--stage-budgets", "a,b,c"),
            words=("--stage-budgets", "a,b,c"),
        ),
        Row(
            "a fraction for a budget",
            flags=("--stage-budgets", "1.5,1,1"),
            words=("--stage-budgets", "1.5,1,1"),
        ),
        Row(
            "more than there are sub-layers",
            flags=("--stage-budgets", "7,0,0"),
            words=("--stage-budgets", "[7, 0, 0]", "6"),
        ),
        Row("an unknown device", flags=("--device", "tpu"), words=("--device tpu", "cpu")),
        Row(
            "a device of another system", flags=("--device", "mps"), words=("--device mps", "cuda")
        ),
        Row("no threads", flags=("--threads", "0"), words=("--threads", "from 1", "0")),
        Row(
            "budgets for the full model",
            flags=("--method", "full"),
            words=("--method full", "skips nothing"),
        ),
        Row(
            "texts in no folder",
            flags=("--texts", "{DIR}/nowhere/texts.jsonl"),
            words=("--texts", "nowhere/texts.jsonl", "a folder that exists"),
        ),
        Row("an unknown dtype", flags=("--dtype", "int8"), words=("--dtype", "int8", "bfloat16")),
        Row(
            "an unknown method", flags=("--method", "magic"), words=("--method", "magic", "adaskip")
        ),
        Row(
            "an unknown granularity",
            flags=("--granularity", "head"),
            words=("--granularity", "head", "sublayer"),
        ),
        Row("an unknown split", flags=("--split", "dev"), words=("--split", "dev", "valid")),
        Row("a limit of zero", flags=("--limit", "0"), words=("--limit", "from 1", "0")),
        Row("a limit that is no number", flags=("--limit", "ten"), words=("--limit", "ten")),
        Row(
            "a threshold above 1",
            flags=("--exit-threshold", "50"),
            words=("--exit-threshold", "from 0 to 1", "50"),
        ),
        Row(
            "a threshold of NaN",
            flags=("--exit-threshold", "nan"),
            words=("--exit-threshold", "from 0 to 1", "nan"),
        ),
        Row("a window of zero", flags=("--exit-window", "0"), words=("--exit-window", "from 1")),
        Row(
            "negative max-new-tokens",
            flags=("--max-new-tokens", "-3"),
            words=("--max-new-tokens", "from 1", "-3"),
        ),
        Row("an unknown flag", flags=("--stage-budget5", "1"), words=("--stage-budget5",)),
        Row(
            "no such checkpoint",
            flags=("--model", "{DIR}/nowhere"),
            words=("--model", "nowhere", "folder"),
        ),
        Row(
            "a plan in no folder",
            flags=("--out", "{DIR}/nowhere/plan.json"),
            name="search",
            words=("--out", "nowhere/plan.json", "a folder that exists"),
        ),
        Row(
            "max-budget above the sub-layers",
            flags=("--max-budget", "7"),
            name="search",
            words=("--max-budget 7", "6 sub-layers"),
        ),
        Row(
            "an epsilon below 0",
            flags=("--epsilon=-0.1",),
            name="search",
            words=("--epsilon", "from 0 to 1", "-0.1"),
        ),
        Row("a step of zero", flags=("--step", "0"), name="search", words=("--step", "from 1")),
        Row(
            "one choice",
            flags=("Which?", "this"),
            name="generate",
            words=("choices", "2 to 26", "found 1"),
        ),
        Row("no text", name="generate", words=("text",)),
        Row(
            "a report in no folder",
            flags=("--json", "{DIR}/nowhere/report.json"),
            words=("--json", "nowhere/report.json", "a folder that exists"),
        ),
        Row(
            "a report that is a folder",
            flags=("--json", "{DIR}/model"),
            words=("--json", "DIR/model", "expected a file"),
        ),
        Row(
            "a plan that is a folder",
            flags=("--out", "{DIR}/model"),
            name="search",
            words=("--out", "DIR/model", "expected a file"),
        ),
        Row(
            "a report of a long name",
            flags=("--json", "x" * 250),
            words=("--json", "230 bytes or fewer"),
        ),
        Row(
            "questions from a pipe",
            lambda folder: os.mkfifo(folder / "pipe"),
            ("--data", "DIR/pipe", "found a pipe"),
            ("--data", "{DIR}/pipe"),
        ),
        Row(
            "a question longer than the context",
            flags=("which " * 100, "a cat", "a dog"),
            name="generate",
            words=("text", "expected 1 to"),
        ),
        Row(
            "a text longer than the context",
            flags=("which " * 100,),
            name="generate",
            words=("text", "expected 1 to"),
        ),
        Row("no model", flags=("--model", ""), words=("--model", "expected a checkpoint")),
        Row(
            "worked examples of the demo",
            flags=("--data", "demo", "--shots", "2"),
            words=("--shots", "none"),
        ),
        Row(
            "worked examples of a file that has none",
            flags=("--shots", "1"),
            words=("--shots", "shots.jsonl", "--shots-file"),
        ),
        Row(
            "a worked example with the id of a question under test",
            worked_examples(7, 2),
            ("shots.jsonl", "q2", "under test"),
            ("--shots", "2"),
        ),
        Row(
            "a worked example that asks what a question under test does",
            lambda f: write_questions(
                f / "own.jsonl", [WORKED | {"id": "other", "question": question(3)["question"]}]
            ),
            ("own.jsonl", "other", "under test", "q3"),
            ("--shots", "1", "--shots-file", "{DIR}/own.jsonl"),
        ),
        Row(
            "the questions under test as worked examples",
            flags=("--shots", "1", "--shots-file", "{DIR}/questions.jsonl"),
            words=("questions.jsonl",),
        ),
        Row(
            "fewer worked examples than asked for",
            worked_examples(7, 8),
            ("--shots 3", "shots.jsonl", "2"),
            ("--shots", "3"),
        ),
        Row(
            "a file of worked examples, but none asked for",
            flags=("--shots-file", "{DIR}/questions.jsonl"),
            words=("--shots-file", "--shots"),
        ),
        Row("a negative seed", flags=("--seed", "-1"), words=("--seed", "-1")),
        Row("a seed of 10^30", flags=("--seed", "1" + "0" * 30), words=("--seed", "2^31")),
        Row(
            "a window of 10^30",
            flags=("--exit-window", "1" + "0" * 30),
            words=("--exit-window", "2^31"),
        ),
        Row(
            "max-new-tokens of 10^30",
            flags=("--max-new-tokens", "1" + "0" * 30),
            words=("--max-new-tokens", "2^31"),
        ),
        Row(
            "a flag of two lines",
            flags=("--stage-budgets", "1\n2"),
            words=("--stage-budgets", "three"),
        ),
        Row("data of two lines", flags=("--data", "a\nb"), words=("--data a b", "expected")),
        Row(
            "a temperature of NaN",
            flags=("--temperature", "nan", "Hi"),
            name="generate",
            words=("--temperature", "from 0", "nan"),
        ),
        Row(
            "a temperature for the stages",
            flags=("--temperature", "1", "Which?", "a cat", "a dog"),
            name="generate",
            words=("--temperature", "greedy"),
        ),
        Row(
            "a negative temperature",
            flags=("--temperature=-1", "Hi"),
            name="generate",
            words=("--temperature", "from 0", "-1"),
        ),
        Row(
            "a text that is not UTF-8",
            flags=("caf\udce9",),
            name="generate",
            words=("text", "UTF-8"),
        ),
        Row(
            "a choice that is not UTF-8",
            flags=("Which?", "caf\udce9", "tea"),
            name="generate",
            words=("choices", "UTF-8"),
        ),
        Row(
            "drafts that are no counts",
            flags=("--draft", "few"),
            words=("--draft", "auto, one count, or three counts", "few"),
        ),
        Row(
            "drafts for two stages",
            flags=("--draft", "2,2"),
            words=("--draft", "three counts, for recall", "2,2"),
        ),
        Row(
            "drafts of another method",
            flags=("--draft", "2", "--method", "unified"),
            words=("--draft", "only litestage", "unified"),
        ),
        Row(
            "drafts where nothing is skipped",
            flags=("--draft", "2", "--stage-budgets", "0,0,0"),
            words=("--draft", "expected budgets"),
        ),
        Row(
            "drafts that are not greedy",
            flags=("Once", "--stage-budgets", "1,1,1", "--draft", "2", "--temperature", "1"),
            name="generate",
            words=("--draft", "--temperature of 0"),
        ),
        Row(
            "drafts for two accuracies",
            flags=("--draft", "auto", "--epsilon", "0.1,0.2"),
            name="search",
            words=("--draft", "one --epsilon"),
        ),
        Row(
            "minutes of NaN",
            flags=("--refine", "nan"),
            name="search",
            words=("--refine", "from 0", "nan"),
        ),
    ],
}


# ---------------------------------------------------------------- tests

NAMED = {f"{group}: {row.what}": row for group, rows in ROWS.items() for row in rows}


def arguments(row: Row, folder: Path) -> list[str]:
    good = {
        "eval": eval_flags(folder, "--stage-budgets", "1,1,1"),
        "search": search_flags(folder, "--step", "3"),
        "generate": ["--model", f"{folder}/model", *FEW],
    }
    return good[row.name] + [flag.replace("{DIR}", str(folder)) for flag in row.flags]


def without_folder(line: str, folder: Path) -> str:
    line = re.sub(r"\b[0-9a-f]{12}\b", "DIGEST", line)
    return line.replace(str(folder), "DIR").replace(str(ROOT), "REPOSITORY")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_good(tmp_path_factory.mktemp("good") / "files")


@pytest.fixture
def files(good, tmp_path) -> Path:
    """A copy of the good files, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "files"))


def test_the_good_files_are_good(files):
    for row in (Row("", flags=SHARDED), Row("", flags=PLAN), Row("", name="search")):
        assert command(row.name, *arguments(row, files)).status == 0
    assert command("generate", *arguments(Row("", name="generate", flags=("Hi",)), files)).out


@pytest.mark.parametrize("row", NAMED.values(), ids=NAMED)
def test_a_mistake_gets_one_line_and_nothing_is_lost(row, files):
    row.damage(files)
    before = snapshot(files)
    line = without_folder(one_line(command(row.name, *arguments(row, files))), files)
    for word in row.words:
        assert word in line, f"{word!r} is not in: {line}"
    assert len(line) < 400, line
    assert snapshot(files) == before, "a refused command changes no file"


@pytest.mark.parametrize(
    "name, what",
    [
        ("eval", "Weights: cut within the header"),
        ("search", "Questions: an answerKey that is no label"),
        ("generate", "config.json: unknown rope_scaling"),
        ("eval", "Flags: an unknown device"),
    ],
)
def test_a_process_of_its_own_says_the_same(name, what, files):
    row = NAMED[what]._replace(name=name)
    row.damage(files)
    given = arguments(row, files) + (["Hi"] if name == "generate" else [])
    done = finish(start(name, *given)) if name == "generate" else forked(name, *given)
    assert one_line(done) == one_line(command(name, *given))


# ---------------------------------------------------------------- the list


def listed_lines() -> dict[str, str]:
    """The line that every row prints."""
    lines = {}
    with tempfile.TemporaryDirectory() as folder:
        good = make_good(Path(folder) / "good")
        for name, row in NAMED.items():
            files = Path(shutil.copytree(good, Path(folder) / "files"))
            row.damage(files)
            lines[name] = without_folder(one_line(command(row.name, *arguments(row, files))), files)
            shutil.rmtree(files)
    return lines


def page(lines: dict[str, str]) -> str:
    """tests/bad_input.md."""
    parts = [
        "# What every mistake prints\n\nOne line on stderr, exit status 2, no file changed. "
        "Written by `python tests/test_bad_input.py` from the\ntable in that file; `DIR` is the "
        "user's folder. What stands in parentheses are words of a library.\n"
    ]
    for group, rows in ROWS.items():
        parts.append(f"\n## {group}\n\n| mistake | line |\n|---|---|\n")
        for row in rows:
            line = lines[f"{group}: {row.what}"].removeprefix("error: ").replace("|", "\\|")
            command = "" if row.name == "eval" else f" (`{row.name}.py`)"
            parts.append(f"| {row.what}{command} | `{line}` |\n")
    return "".join(parts)


def without_library_words(text: str) -> str:
    """What other libraries say changes from version to version."""
    return re.sub(r" \(.*\)| expected JSON: .*|, maybe you meant .*", "", text)


MUTATIONS = """
## Mutations

Good files damaged at random by `tests/test_mutations.py`, and how the commands that read them
ended. Results may be others where a number or a text became another good one: nothing can tell.

"""


def test_the_list_is_up_to_date():
    listed = LISTED.read_text().partition(MUTATIONS)[0]
    now = without_library_words(page(listed_lines()))
    assert without_library_words(listed) == now, "run python tests/test_bad_input.py"


if __name__ == "__main__":
    from test_mutations import table

    LISTED.write_text(page(listed_lines()) + MUTATIONS + table())
    print(f"{LISTED}: {len(NAMED)} mistakes")
