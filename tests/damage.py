"""A small good checkpoint with its questions and plan, ways to damage them, the commands run here.

make_good(DIR)        writes DIR/model, DIR/sharded, DIR/questions.jsonl, DIR/plan.json, ...
command("eval", ...)  runs a command in this process: its exit status, stdout and stderr
forked("eval", ...)   in a process of its own that need not load torch first
start("eval", ...)    in one that begins as a user's does; finish(...) waits for it
"""

import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import tokenizers
from conftest import BASE, ROOT, random_tensors, write_checkpoint  # must come first: threads, path
from safetensors.torch import load_file, save_file

from tools.command import run

CONFIG = BASE | {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 512}
EOS = 1
FEW = ("--max-new-tokens", "3")
REPORT = '{"a report": "from before"}\n'


def small_tokenizer() -> tokenizers.Tokenizer:
    """Bytes, and 62 tokens that each give an answer, so that random weights often do."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    answers = [f" {i}: the answer is option {'ABC'[i % 3]}." for i in range(62)]
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in answers])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def question(number: int) -> dict:
    choices = [{"label": label, "text": f"{label.lower()}{number}"} for label in "ABC"]
    stem = {"stem": f"Which, of {number}?", "choices": choices}
    return {"id": f"q{number}", "question": stem, "answerKey": "ABC"[number % 3]}


def write_questions(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(folder: Path, shards: int = 1, seed: int = 0, **config) -> Path:
    """A whole checkpoint folder of random weights."""
    folder.mkdir()
    config = CONFIG | config
    write_checkpoint(folder, config, random_tensors(config, seed), shards)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return folder


def make_good(folder: Path) -> Path:
    """Everything that the commands read, and a report and a plan from before."""
    folder.mkdir(exist_ok=True)
    make_model(folder / "model")
    make_model(folder / "sharded", shards=2)
    write_questions(folder / "questions.jsonl", [question(i) for i in range(4)])
    (folder / "report.json").write_text(REPORT)
    with mock.patch("search.ROUNDS", 2):  # how fast a step is does not matter here
        done = command("search", *search_flags(folder), "--step", "3")
    assert done.status == 0, done
    return folder


def eval_flags(folder: Path, *more: str) -> list[str]:
    given = ["--model", f"{folder}/model", "--data", f"{folder}/questions.jsonl", *FEW]
    return [*given, "--json", f"{folder}/report.json", *more]


def search_flags(folder: Path, *more: str) -> list[str]:
    given = ["--model", f"{folder}/model", "--data", f"{folder}/questions.jsonl", *FEW]
    return [*given, "--out", f"{folder}/plan.json", *more]


# ---------------------------------------------------------------- running


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


MAINS = {"generate": "tools.ask"}  # where a command's main is, if not in the module it is called by


def command(name: str, *argv: str) -> Done:
    """Runs eval, search or generate in this process; an exception that escapes goes on."""
    main = importlib.import_module(MAINS.get(name, name)).main
    out, err, status = io.StringIO(), io.StringIO(), 0
    streams = redirect_stdout(out), redirect_stderr(err)
    with streams[0], streams[1], mock.patch.object(sys, "argv", [f"{name}.py", *argv]):
        try:
            run(main)
        except SystemExit as e:
            status = e.code
    return Done(status, out.getvalue(), err.getvalue())


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed", "tokenizers", "huggingface_hub"]
)


def in_child(name: str, argv: tuple, before: str, env: dict, folder: str) -> None:
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is ignored
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{stream}", os.O_WRONLY | os.O_CREAT), number)
    main, sys.argv = importlib.import_module(MAINS.get(name, name)).main, [f"{name}.py", *argv]
    exec(before, {})
    run(main)


def forked(name: str, *argv: str, before: str = "", env: dict | None = None) -> Done:
    """Runs a command as a process of its own; `before` is code that runs first.

    It is forked from one that has loaded torch, which takes a tenth of the time of start(). What
    is decided while a process begins or ends (imports, streams that are closed) needs start().
    """
    with tempfile.TemporaryDirectory() as folder:
        given = name, argv, before, env or {}, folder
        process = FORKS.Process(target=in_child, args=given)
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{name} {argv}: it hangs")
        out, err = (Path(folder, stream).read_text() for stream in ("out", "err"))
        return Done(process.exitcode, out, err)


def start(name: str, *argv: str, before: str = "", **options) -> subprocess.Popen:
    """Starts the same command as a user does; `before` is code that runs first."""
    module = MAINS.get(name, name)
    code = f"import sys, {module}; from tools.command import run; sys.argv[0] = '{name}.py'"
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    given = [sys.executable, "-c", f"{code}; {before}\nrun({module}.main)", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(given, **(pipes | {"env": env} | options))


def finish(process: subprocess.Popen) -> Done:
    """Waits for a started command."""
    out, err = process.communicate(timeout=300)
    return Done(process.returncode, out, err)


def one_line(done: Done, status: int = 2) -> str:
    """The only line of a refusal, which must be one: on stderr, nothing but notes on stdout."""
    assert done.status == status, done
    assert [line for line in done.out.splitlines() if not line.startswith("note: ")] == [], done
    assert done.err.endswith("\n") and len(done.err.splitlines()) == 1, done.err
    if status == 2:
        assert done.err.startswith("error: ") and "Traceback" not in done.err, done.err
    return done.err.rstrip("\n")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# keys of a report or a plan that hold times, or follow from them
TIMES = {"latency_s", "speedup", "prefill_s", "decode_s", "ms_per_token", "stage_s"}
TIMES |= {"step_s", "token_s", "command", "time"}


def untimed(value):
    """A report or plan without what differs from run to run."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMES}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def read_untimed(path: Path):
    return untimed(json.loads(path.read_text()))


def texts_of(done: Done) -> str:
    """What generate.py printed, timings left out."""
    return re.sub(r"[\d.]+ ms/token", "", done.out)


# ---------------------------------------------------------------- damage


GONE = object()  # as a key's new value: without the key


def edit_json(path: Path, **changes) -> None:
    """Sets keys of a JSON object, or drops those that are GONE."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not GONE}))


def edit_tensors(path: Path, edit) -> None:
    """edit(tensors) changes the dict of a safetensors file in place."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def read_raw(path: Path) -> tuple[dict, bytes]:
    """(header, payload) of a safetensors file."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_raw(path: Path, header, payload: bytes) -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def edit_header(path: Path, edit) -> None:
    """edit(header) changes the header of a safetensors file in place, the payload stays."""
    header, payload = read_raw(path)
    edit(header)
    write_raw(path, header, payload)
