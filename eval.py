"""Evaluation: accuracy and latency of LiteStage against the full model, side by side.

The methods answer the same questions in the same run, alternating question by question, so that a
slow minute of the machine hits all of them. A stage's latency is its prefill + decoding steps x
median step time. `python eval.py` alone runs the plan that ships with the demo.

    python eval.py --stage-budgets 2,4,1
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data import cli
from data.questions import Question
from data.report import describe, make_report, print_report
from data.setup import configure, load, load_questions
from generate import Exit, Pipeline, Stage
from model import KVCache
from skip import POLICIES, Setting

DEMO_LIMIT = 200  # questions of the demo unless --limit asks for more: a minute or two


@dataclass
class Run:
    """One method on the questions, and what came of it."""

    method: str
    budgets: Sequence[int]
    skips: Sequence
    exit: Exit | None = None
    answers: list[str | None] = field(default_factory=list)
    stages: list[list[Stage]] = field(default_factory=list)  # three for each question


def make_run(method: str, setting: Setting, budgets: Sequence[int], exit=None, name="") -> Run:
    skips = [POLICIES[method](setting, budget) for budget in budgets]
    return Run(name or method, budgets, skips, exit)


def compared(setting: Setting, exit: Exit | None, points: list[dict], budgets=None) -> list[Run]:
    """The runs of --compare: every method at one to six eighths of all sub-layers, and at budgets,
    LiteStage at its plans, and its ablations: plans without exit, one budget for all stages."""
    uniform = [[setting.n_layers * eighths // 4] * 3 for eighths in range(1, 7)]
    grid = [*uniform, budgets] if budgets else uniform
    others = [method for method in POLICIES if method not in ("full", "litestage")]
    runs = [make_run(method, setting, budgets) for method in others for budgets in grid]
    runs += [make_run("litestage", setting, b, exit, "litestage-uniform") for b in uniform]
    for point in points:
        own = point["exit"] and Exit(**point["exit"])
        runs.append(make_run("litestage", setting, point["budgets"], own))
        if own:
            runs.append(make_run("litestage", setting, point["budgets"], None, "litestage-no-exit"))
    return runs


def evaluate(pipeline: Pipeline, questions: list[Question], runs: list[Run], batch: int = 1):
    """Answers the questions, `batch` side by side, with every run in turn, after a warm-up."""
    chunks = [questions[i : i + batch] for i in range(0, len(questions), batch)]
    caches = [[KVCache(pipeline.model, 1, 0) for _ in questions[:batch]] for _ in runs]
    with cli.progress(total=len(questions) * len(runs), desc="questions") as bar:
        for r in runs:
            pipeline.answer(questions[:batch], r.skips, r.exit)
        for i, chunk in enumerate(chunks):
            for k in range(i, i + len(runs)):  # no run is always first
                r, mine = runs[k % len(runs)], caches[k % len(runs)][: len(chunk)]
                answered = pipeline.answer(chunk, r.skips, r.exit, mine)
                r.answers += [label for label, _ in answered]
                r.stages += [stages for _, stages in answered]
                bar.update(len(chunk))


def main() -> None:
    own = ("--split", "--json", "--compare", "--batch")
    parser = cli.make_parser(__doc__, *cli.MODEL_FLAGS, *cli.SEARCH_FLAGS, *cli.METHOD_FLAGS, *own)
    args = parser.parse_args()
    pipeline, folder = load(args)
    quick = DEMO_LIMIT if args.data == "demo" else None
    _, questions = load_questions(args, pipeline, args.split, args.limit or quick)
    setting, budgets, exit, points = configure(args, pipeline, folder)
    runs = [make_run("full", setting, [0, 0, 0])]
    if args.compare:
        others = compared(setting, exit, points, args.stage_budgets)
        runs += [r for r in others if r.method.startswith(args.method or "")]
    else:
        runs.append(make_run(args.method or "litestage", setting, budgets, exit))
    number, ranks = cli.rank()
    evaluate(pipeline, questions[number::ranks], runs, args.batch)
    for r in runs:  # rank k answered questions k, k + ranks, ...: back into their order
        r.answers, r.stages = cli.interleave(r.answers), cli.interleave(r.stages)
    correct = [question.answer for question in questions]
    entries = [describe(r, runs[0], correct) for r in runs]
    report = make_report(args, pipeline.model, entries, len(questions), args.batch)
    try:
        if args.json and number == 0:
            cli.write_json(args.json, report)
    finally:  # a closed pipe loses no file, a full disk no table
        print_report(report)


if __name__ == "__main__":
    cli.run(main)
