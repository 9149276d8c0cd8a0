"""What the flags mean: the checkpoint, the plan or the budgets, the importance of the sub-layers.

python generate.py -h
"""

import argparse
import os
import re
import sys
from pathlib import Path

import huggingface_hub
import torch

from data.cli import progress
from data.plan import ROOT, check_budgets, read_plan
from data.prompts import STAGES, worked
from data.questions import Question, locate, read_questions
from data.tokenizer import Tokenizer
from generate import Exit, Pipeline
from model import DTYPES, InputError, Llama, expect, weight_files
from skip import Importance, Setting, measure_importance, rank

SMALL = 120_000_000  # bytes of weights; below, products are too short for several threads
IMPORTANCE_QUESTIONS = 32  # enough: with more of the demo's the first half does not change


def load(args: argparse.Namespace) -> tuple[Pipeline, Path]:
    """The checkpoint that --model, --device and --dtype name, ready to answer, and its folder."""
    folder = find_checkpoint(args.model)
    device = find_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where graphs are recorded
    torch.manual_seed(args.seed)
    size = check_memory(folder, device)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Llama.from_pretrained(folder, device, DTYPES.get(args.dtype))
    sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.args.vocab_size}"
    expect(tokenizer.vocab_size <= model.args.vocab_size, f"{folder}: {sizes}")
    if "OMP_NUM_THREADS" not in os.environ and size < SMALL:
        torch.set_num_threads(1)
    if args.compile and device.type != "cuda":
        print("--compile: no CUDA graphs without --device cuda; decoding as usual", file=sys.stderr)
    static = {} if args.compile and device.type == "cuda" else None
    return Pipeline(model, tokenizer, args.max_new_tokens, read_shots(args), static), folder


def find_device(name: str) -> torch.device:
    """The device that --device names, with its index; under torchrun each rank has its own GPU."""
    if name == "cuda":
        rank_here, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        name = f"cuda:{rank_here % max(gpus, 1)}"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"--device {name}: expected cpu or a cuda ({reason})") from None
    expect(device.type != "meta", "--device meta: expected one that holds numbers")
    return device


def check_memory(folder: Path, device: torch.device) -> int:
    """The bytes of the weights. Raises InputError if the device has less memory free."""
    files = filter(os.path.isfile, weight_files(folder))  # a missing one is named when it is read
    needed = sum(map(os.path.getsize, files))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        meminfo = Path("/proc/meminfo")  # elsewhere nothing is known, and nothing refused
        lines = meminfo.read_text().splitlines() if meminfo.exists() else []
        free = next((int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvail")), needed)
    figures = f"{needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB of memory free"
    expect(needed <= free, f"{folder}: too large for {device}: {figures}")
    return needed


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: the demo's, a local one, or one fetched from the hub."""
    folder = ROOT / "data" / "demo" / "model" if name == "demo" else Path(name)
    if name and folder.is_dir():
        return folder
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    expect(hub_id is not None, f"--model {name}: expected a checkpoint folder or a hub id ORG/NAME")
    try:
        files = ["*.json", "*.safetensors", "tokenizer.model"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise InputError(
            f"--model {name}: neither a folder nor available from the hub ({reason:.150}); where "
            f"there is a network, run `hf download {name} --local-dir DIR`, then use --model DIR"
        ) from None


def importance_of(pipeline: Pipeline, questions: list[Question], batch: int = 16):
    """(Importance over the questions' three prefills, their stages), written by the full model,
    `batch` questions side by side."""
    answered, prompts = [], []
    for start in progress(range(0, len(questions), batch), "importance"):
        answered += [stages for _, stages in pipeline.answer(questions[start : start + batch])]
    for question, stages in zip(questions, answered):
        said = [stage.texts for stage in stages]
        rows = [pipeline.prompt_ids(i, question, said)[0] for i in range(len(STAGES))]
        prompts += [row for row in rows if len(row) <= pipeline.model.args.max_seq_len]
    return measure_importance(pipeline.model, prompts), answered


def exit_of(planned: dict | None, default: float, args: argparse.Namespace) -> Exit | None:
    """A plan's exit, or one with the default threshold, as the flags change it; 0 means none.
    The exit is LiteStage's: other methods have it only when it is asked for."""
    exit = Exit(**planned) if planned else Exit(threshold=default)
    others = getattr(args, "method", None) not in (None, "litestage")
    threshold = 0.0 if others else exit.threshold
    threshold = threshold if args.exit_threshold is None else args.exit_threshold
    return Exit(args.exit_window or exit.window, threshold) if threshold > 0 else None


def configure(args: argparse.Namespace, pipeline: Pipeline, folder: Path):
    """(setting, budgets, exit, points) as the flags ask: those of a plan, or --stage-budgets with
    an importance measured now on validation questions. The points are what --compare runs: the
    plan's frontier, each with budgets and exit. The demo comes with a plan, and with the importance
    that the search measured."""
    n_layers, plan, importance = pipeline.model.args.n_layers, {}, None
    if args.plan is not None:
        plan = read_plan(args.plan, folder, n_layers)
    elif args.model == "demo":
        plan = read_plan(ROOT / "data" / "demo" / "plan.json", folder, n_layers)
        importance = plan["importance"] if args.data == "demo" else None
        plan = {} if args.stage_budgets else plan
    budgets = args.stage_budgets or plan.get("budgets", [0, 0, 0])
    check_budgets("--stage-budgets", budgets, n_layers)
    exit = exit_of(plan.get("exit"), 0.0 if plan else 0.5, args)
    points = plan.get("frontier", [plan] if plan else [])
    for point in points:
        own = exit_of(point["exit"], 0.0, args)
        point["exit"] = own and own._asdict()
    granularity = args.granularity or plan.get("granularity", "sublayer")
    importance = plan.get("importance", importance)
    if importance is None and not any(budgets) and not getattr(args, "compare", False):
        importance = Importance(torch.zeros(n_layers, 2), torch.ones(n_layers, 2))  # not needed
    if importance is None:
        questions = validation_questions(args.data)[:IMPORTANCE_QUESTIONS]
        importance, _ = importance_of(pipeline, questions)
    setting = Setting(importance, rank(importance.similarity, granularity), granularity, args.seed)
    if args.stage_budgets:
        points = [{"budgets": budgets, "exit": exit and exit._asdict()}]
    return setting, budgets, exit, points


def load_questions(args, pipeline: Pipeline, split: str, limit: int | None):
    """(the file, its first `limit` questions) of --data and a split. Raises InputError unless a
    question's first prompt fits the model's context."""
    file, context = locate(args.data, split), pipeline.model.args.max_seq_len
    questions = read_questions(file)[:limit]
    fits = any(len(pipeline.prompt_ids(0, q, [])[0]) <= context for q in questions)
    expect(fits, f"{file}: every prompt is longer than the model's context of {context} tokens")
    return file, questions


def read_shots(args: argparse.Namespace) -> str:
    """The first --shots worked examples of the data set, "" for none."""
    if not args.shots:
        return ""
    expect(args.data != "demo", "--shots: the demo has none, its model knows the prompts")
    file = locate(args.data, "shots")
    examples = read_questions(file, targets=True)
    expect(len(examples) >= args.shots, f"--shots {args.shots}: {file} has {len(examples)}")
    return "".join(map(worked, examples[: args.shots]))


def validation_questions(data: str) -> list[Question]:
    """Those of a data set, or else its test questions: importance, which is all that is measured
    on them, does not look at the answers."""
    try:
        file = locate(data, "valid")
    except InputError:
        file = locate(data, "test")
    return read_questions(file)
