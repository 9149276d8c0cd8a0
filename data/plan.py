"""The plan: what search.py writes and eval.py --plan reads, and which checkpoint it belongs to.

python search.py --out plan.json
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from data.cli import Journal, rank, write_json
from data.report import print_plan
from generate import Exit, Pipeline
from model import InputError, expect, read_json, weight_files
from skip import Importance

ROOT = Path(__file__).resolve().parent.parent
CODE = [f"{name}.py" for name in ("model", "skip", "generate", "search")]
CODE += [f"data/{name}.py" for name in ("prompts", "questions", "setup", "tokenizer")]


def read_plan(path: Path, folder: Path, n_layers: int) -> dict:
    """The plan that search.py wrote for this checkpoint. Raises InputError for any other."""
    plan = read_json(path)
    expect(plan.get("format") == 1, f"{path}: 'format' must be 1, found {plan.get('format')!r}")
    try:
        for key, digest in checkpoint_digests(folder).items():
            found = plan["model"][key]
            which = f"its {key} digest is {found!s:.12}, that of {folder} is {digest:.12}"
            expect(found == digest, f"{path}: a plan of another model: {which}")
        tables = {k: torch.tensor(v, dtype=torch.float64) for k, v in plan["importance"].items()}
        for table in tables.values():
            fits = table.shape == (n_layers, 2) and table.isfinite().all()
            expect(fits, f"{path}: 'importance' must be {n_layers} x 2 numbers")
        importance = Importance(**tables)
        for point in [plan, *plan.get("frontier", [])]:
            check_budgets(f"{path}: 'budgets'", point["budgets"], n_layers)
            exit = Exit(**(point["exit"] or {}))
            fits = type(exit.window) is int and 0 < exit.window < 1 << 31
            fits = fits and 0 <= exit.threshold <= 1
            expect(fits, f"{path}: 'exit' must hold a window and a threshold, found {exit}")
        grained = plan["granularity"] in ("sublayer", "layer")
        expect(grained, f"{path}: 'granularity' must be sublayer or layer")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path}: not a plan of search.py ({type(e).__name__}: {e})") from None
    return plan | {"importance": importance}


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's configuration, weights and tokenizer: what a result belongs to."""
    folder = Path(folder)
    files = {
        "config": [folder / "config.json", folder / "generation_config.json"],
        "weights": sorted(weight_files(folder)),
        "tokenizer": [folder / "tokenizer.json", folder / "tokenizer.model"],
    }
    return {key: digest_of(filter(Path.exists, paths)) for key, paths in files.items()}


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the SHA-256 of files."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


def check_budgets(name: str, budgets: list[int], n_layers: int) -> None:
    """Raises InputError unless there are three budgets, from 0 to 2 x n_layers."""
    fit = len(budgets) == 3 and all(type(b) is int and 0 <= b <= 2 * n_layers for b in budgets)
    expect(fit, f"{name} {budgets}: expected three numbers from 0 to {2 * n_layers}, a stage each")


def journal_of(args, pipeline: Pipeline, folder: Path, file: Path, n: int) -> tuple[Journal, dict]:
    """The journal of a search beside its plan, named by the digest of all that its trials depend
    on, the code and the prompts among it, so that nothing stale is taken from it; and that key."""
    model = pipeline.model
    key = {
        "model": {"name": args.model, **checkpoint_digests(folder)},
        "data": hashlib.sha256(file.read_bytes() + pipeline.shots.encode()).hexdigest(),
        "n": n,
        "settings": [args.granularity, args.exit_window, args.max_new_tokens, args.shots],
        "code": digest_of(ROOT / name for name in CODE),
        "machine": [str(model.device), str(model.dtype), torch.get_num_threads(), args.compile],
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return Journal(Path(f"{args.out}.{digest[:12]}.journal")), key


def write_plans(args, key: dict, evaluator, full: dict, found: dict[float, tuple]) -> None:
    """Writes and prints a plan for every epsilon in `found`: (chosen trial, all trials). The first
    that --epsilon lists is the plan, with the whole frontier in it; the others lie beside it, named
    by their epsilon."""
    frontier = []
    for epsilon, (chosen, _) in sorted(found.items()):
        exit = Exit(args.exit_window, chosen["threshold"])
        exit = exit._asdict() if exit.threshold else None
        own = {"epsilon": epsilon, "budgets": chosen["budgets"], "exit": exit, "chosen": chosen}
        frontier.append(own)
    for own in frontier:
        epsilon = own["epsilon"]
        first = epsilon == args.epsilon[0]
        name = args.out.name if first else f"{args.out.stem}-{epsilon:g}{args.out.suffix}"
        plan = {
            "format": 1,
            "model": key["model"],
            "data": args.data,
            "split": "valid",
            "n": key["n"],
            "granularity": args.granularity,
            "ranking": evaluator.setting.ranking,
            **evaluator.measured,
            "full": full,
            "command": shlex.join(["python", *sys.argv]),
            **own,
            "trials": found[epsilon][1],
        }
        print_plan(args.out.with_name(name), plan)
        if rank()[0] == 0:
            write_json(args.out.with_name(name), plan | ({"frontier": frontier} if first else {}))
