"""Evaluation: accuracy and latency of LiteStage against the full model, side by side.

The methods answer the same questions in the same run, alternating question by question, so that a
slow minute of the machine hits all of them. A stage's latency is its prefill + decoding steps x
median step time. `python eval.py` alone runs the plan that ships with the demo.

    python eval.py --stage-budgets 2,4,1
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from data.cli import FLAGS, interleave, make_parser, positive, progress, rank, run, write_json
from data.questions import Question, locate, read_questions
from data.report import describe, print_differences, print_runs, print_stages
from data.setup import configure, load
from generate import Exit, Pipeline, Stage
from model import KVCache
from skip import POLICIES, Setting


@dataclass
class Run:
    """One method on the questions, and what came of it."""

    method: str
    budgets: Sequence[int]
    skips: Sequence
    exit: Exit | None = None
    caches: list[KVCache] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    stages: list[list[Stage]] = field(default_factory=list)  # three for each question


def make_run(method: str, setting: Setting, budgets: Sequence[int], exit: Exit | None) -> Run:
    return Run(method, budgets, [POLICIES[method](setting, b) for b in budgets], exit)


def compared(setting: Setting, budgets: Sequence[int], exit: Exit | None, plans: list[dict]):
    """The runs of --compare: every method over a range of budgets, LiteStage at its plans."""
    most = 2 * setting.n_layers
    runs = []
    for method in POLICIES:
        if method not in ("full", "litestage"):
            for budget in range(most // 8, most, most // 8):
                runs.append(make_run(method, setting, [budget] * 3, None))
    for plan in plans:
        exit = plan["exit"] and Exit(**plan["exit"])
        runs.append(make_run("litestage", setting, plan["budgets"], exit))
    return runs


def evaluate(pipeline: Pipeline, questions: list[Question], runs: list[Run], batch: int = 1):
    """Answers the questions, `batch` side by side, with every run in turn, after a warm-up."""
    chunks = [questions[i : i + batch] for i in range(0, len(questions), batch)]
    for r in runs:
        r.caches = [KVCache(pipeline.model, 1, 0) for _ in range(batch)]
    with progress(total=len(questions) * len(runs), desc="questions") as bar:
        for i, chunk in enumerate([*chunks[:1], *chunks]):
            for r in runs[i % len(runs) :] + runs[: i % len(runs)]:  # nobody is always first
                answered = pipeline.answer(chunk, r.skips, r.exit, r.caches[: len(chunk)])
                if i > 0:
                    r.answers += [label for label, _ in answered]
                    r.stages += [stages for _, stages in answered]
                    bar.update(len(chunk))


def main() -> None:
    parser = make_parser(__doc__, *FLAGS)
    parser.add_argument("--compare", action="store_true", help="every method over its budgets")
    parser.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="N",
        help="questions side by side: latencies are then shares of a batch (default: 1)",
    )
    args = parser.parse_args()
    pipeline, folder = load(args)
    model = pipeline.model
    questions = read_questions(locate(args.data, args.split))[: args.limit]
    setting, budgets, exit, plan = configure(args, pipeline, folder)
    runs = [make_run("full", setting, [0, 0, 0], None)]
    if args.compare:
        runs += compared(setting, budgets, exit, plan.get("frontier", [plan] if plan else []))
    else:
        runs.append(make_run(args.method, setting, budgets, exit))
    number, ranks = rank()
    evaluate(pipeline, questions[number::ranks], runs, args.batch)
    for r in runs:  # rank k answered questions k, k + ranks, ...: back into their order
        r.answers, r.stages = interleave(r.answers), interleave(r.stages)
    correct = [question.answer for question in questions]
    entries = [describe(r, runs[0], correct) for r in runs]
    print_runs(entries)
    if not args.compare:
        print_stages(entries)
    print_differences(entries, len(questions))
    if ranks > 1 or args.batch > 1:
        print(f"latencies: {ranks} processes at once, shares of batches of {args.batch}")
    report = {
        "model": args.model,
        "data": args.data,
        "split": args.split,
        "n": len(questions),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "command": shlex.join(["python", *sys.argv]),
        "batch": args.batch,
        "ranks": ranks,
        "runs": entries,
    }
    if args.json and number == 0:
        write_json(args.json, report)


if __name__ == "__main__":
    run(main)
