"""What the flags mean: the checkpoint, the plan or the budgets, the importance of the sub-layers.

python generate.py -h
"""

import argparse
import os
import re
from pathlib import Path

import huggingface_hub
import torch
from tqdm import tqdm

from data.prompts import STAGES, stage_prompts
from data.questions import Question, locate, read_questions
from generate import Exit, Tokenizer, answer
from model import DTYPES, InputError, Llama, checkpoint_digests, expect, read_json
from skip import Importance, Setting, measure_importance, rank

ROOT = Path(__file__).resolve().parent.parent
SMALL = 30_000_000  # parameters; below, products are too short to be shared among threads
IMPORTANCE_QUESTIONS = 32  # enough: with more of the demo's the first half does not change


def load(args: argparse.Namespace) -> tuple[Path, Llama, Tokenizer]:
    """The checkpoint that --model, --device and --dtype name: its folder, model and tokenizer."""
    folder = find_checkpoint(args.model)
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"--device {args.device}: expected cpu or a cuda ({reason})") from None
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Llama.from_pretrained(folder, device, DTYPES.get(args.dtype))
    sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.args.vocab_size}"
    expect(tokenizer.vocab_size <= model.args.vocab_size, f"{folder}: {sizes}")
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    return folder, model, tokenizer


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: the demo's, a local one, or one fetched from the hub."""
    folder = ROOT / "data" / "demo" / "model" if name == "demo" else Path(name)
    if folder.is_dir():
        return folder
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    expect(hub_id is not None, f"--model {name}: expected a checkpoint folder or a hub id ORG/NAME")
    try:
        files = ["*.json", "*.safetensors", "tokenizer.model"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise InputError(
            f"--model {name}: neither a folder nor to be had from the hub ({reason:.150}); where "
            f"there is a network, run `hf download {name} --local-dir DIR`, then use --model DIR"
        ) from None


def read_plan(path: Path, folder: Path, n_layers: int) -> dict:
    """The plan that search.py wrote for this checkpoint. Raises InputError for any other."""
    plan = read_json(path)
    expect(plan.get("format") == 1, f"{path}: 'format' must be 1, found {plan.get('format')!r}")
    try:
        for key, digest in checkpoint_digests(folder).items():
            found = plan["model"][key]
            which = f"its {key} digest is {found!s:.12}, that of {folder} is {digest:.12}"
            expect(found == digest, f"{path}: a plan of another model: {which}")
        importance = Importance(**{k: torch.tensor(v) for k, v in plan["importance"].items()})
        for table in (importance.similarity, importance.ratio):
            expect(table.shape == (n_layers, 2), f"{path}: 'importance' must be {n_layers} x 2")
        for point in [plan, *plan.get("frontier", [])]:
            check_budgets(f"{path}: 'budgets'", point["budgets"], n_layers)
            exit = Exit(**(point["exit"] or {}))
            fits = exit.window > 0 and 0 <= exit.threshold <= 1
            expect(fits, f"{path}: 'exit' must hold a window and a threshold, found {exit}")
        grained = plan["granularity"] in ("sublayer", "layer")
        expect(grained, f"{path}: 'granularity' must be sublayer or layer")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path}: not a plan of search.py ({type(e).__name__}: {e})") from None
    return plan | {"importance": importance}


def check_budgets(name: str, budgets: list[int], n_layers: int) -> None:
    """Raises InputError unless there are three budgets, from 0 to 2 x n_layers."""
    fit = len(budgets) == 3 and all(type(b) is int and 0 <= b <= 2 * n_layers for b in budgets)
    expect(fit, f"{name} {budgets}: expected three numbers from 0 to {2 * n_layers}, a stage each")


def importance_of(model: Llama, tokenizer: Tokenizer, questions: list[Question]):
    """(Importance over the questions' three prefills, their stages), written by the full model."""
    answered, prompts = [], []
    for question in tqdm(questions, "importance", leave=False, disable=None):
        stages = answer(model, tokenizer, [question])[0][1]
        said = [stage.texts for stage in stages]
        rows = [tokenizer.encode(stage_prompts(i, question, said)[0]) for i in range(len(STAGES))]
        prompts.append([row for row in rows if len(row) <= model.args.max_seq_len])
        answered.append(stages)
    return measure_importance(model, prompts), answered


def configure(args: argparse.Namespace, folder: Path, model: Llama, tokenizer: Tokenizer):
    """(setting, budgets, exit, plan) as the flags ask: those of a plan, or --stage-budgets with an
    importance measured now on validation questions. The demo comes with a plan."""
    n_layers, plan, path = model.args.n_layers, {}, args.plan
    if path is None and args.stage_budgets is None and args.model == "demo":
        path = ROOT / "data" / "demo" / "plan.json"
    if path is not None:
        plan = read_plan(path, folder, n_layers)
    budgets = args.stage_budgets or plan.get("budgets", [0, 0, 0])
    check_budgets("--stage-budgets", budgets, n_layers)
    found = Exit(**(plan.get("exit") or {}))
    threshold = found.threshold if args.exit_threshold is None else args.exit_threshold
    exit = Exit(args.exit_window or found.window, threshold) if threshold > 0 else None
    granularity = args.granularity or plan.get("granularity", "sublayer")
    importance = plan.get("importance")
    if importance is None:
        questions = read_questions(locate_validation(args.data))[:IMPORTANCE_QUESTIONS]
        importance, _ = importance_of(model, tokenizer, questions)
    ranking = rank(importance.similarity, granularity)
    return Setting(importance, ranking, granularity, args.seed), budgets, exit, plan


def locate_validation(data: str) -> Path:
    """The validation questions of a data set, or else its test questions: importance, which is
    all that is measured on them, does not look at the answers."""
    try:
        return locate(data, "valid")
    except InputError:
        return locate(data, "test")
