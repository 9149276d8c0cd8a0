"""Evaluation: accuracy and latency of LiteStage against the full model, side by side.

The methods answer the same questions in the same run, alternating question by question, so that a
slow minute of the machine hits all of them. A stage's latency is its prefill + decoding steps x
median time of such a step. `python eval.py` alone runs the plan that ships with the demo.

    python eval.py --stage-budgets 2,4,1
"""

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

from data.questions import Question
from generate import Draft, Exit, Pipeline, StageResult
from skip import POLICIES, Setting
from tools import command
from tools.flags import METHOD_FLAGS, MODEL_FLAGS, SEARCH_FLAGS, make_parser
from tools.progress import progress
from tools.ranks import interleave, rank
from tools.report import Kept, keep_answers, make_entry, make_report, publish
from tools.runs import plan_runs, set_up
from tools.setup import say_if_chance

Z = 1.959964  # of a 95% interval


def wilson(right: int, n: int) -> list[float]:
    """Wilson's 95% interval of an accuracy, `right` of n."""
    p = right / n
    spread = Z * Z / n
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / n + spread / n / 4) / (1 + spread)
    return [middle - half if right else 0.0, middle + half if right < n else 1.0]


def paired(base: Sequence[bool], other: Sequence[bool]) -> list[float]:
    """95% interval of accuracy(other) - accuracy(base) over the same questions.

    Wald's interval with half a question added to each kind of disagreement (Agresti and Min 2005),
    so that it does not vanish when the two never disagree.
    """
    gained, lost = 0.5, 0.5
    for before, after in zip(base, other):
        gained += after > before
        lost += before > after
    n = len(base) + 2
    middle = (gained - lost) / n
    half = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return [max(middle - half, -1.0), min(middle + half, 1.0)]


@dataclass
class Run:
    """One method on the questions, and what came of it."""

    method: str
    budgets: list[int]
    skips: list  # a skip set for each stage
    exit: Exit | None = None
    variant: str | None = None  # an ablation of LiteStage: "uniform" or "no-exit"
    draft: list[int] | None = None  # tokens that each stage drafts
    answers: list[str | None] = field(default_factory=list)
    stages: list[list[StageResult]] = field(default_factory=list)  # all stages of each question


def make_run(
    policy: str, setting: Setting, budgets: list[int], exit=None, name="", variant=None, draft=None
) -> Run:
    """A run of a policy, by another name if it is given one."""
    skips = []
    for stage, budget in enumerate(budgets):
        skip = (POLICIES | setting.trained)[policy](setting.at(stage), budget)
        skips.append(Draft(skip, draft[stage]) if draft and draft[stage] else skip)
    return Run(name or policy, budgets, skips, exit, variant, draft)


def evaluate(pipeline: Pipeline, questions: list[Question], runs: list[Run], batch=1, kept=None):
    """Answers the questions, `batch` side by side, with every run in turn, after a warm-up. What
    was `kept` of an evaluation that was killed is taken from there."""
    kept = kept or Kept(None)
    number, world = rank()
    caches = []
    for run in runs:
        caches.append(pipeline.new_caches(batch))
        pipeline.answer(questions[:batch], run.skips, run.exit)
    with progress(total=len(questions) * len(runs), desc="questions") as bar:
        for turn, start in enumerate(range(0, len(questions), batch * world)):
            together = questions[start : start + batch * world]
            mine = together[number::world]
            answered = kept.get(turn)
            if answered is None:
                answered = [[] for _ in runs]
                for i in range(len(runs)):
                    k = (turn + i) % len(runs)  # no run is always first
                    if mine:
                        own = caches[k][: len(mine)]
                        answered[k] = pipeline.answer(mine, runs[k].skips, runs[k].exit, own)
                    answered[k] = interleave(answered[k])
                kept.put(answered)
            for run, rows in zip(runs, answered):
                run.answers += [label for label, _ in rows]
                run.stages += [stages for _, stages in rows]
            bar.update(len(together) * len(runs))


def latency_s(run: Run) -> float:
    """Seconds per question, end to end."""
    return mean(sum(stage.latency_s for stage in stages) for stages in run.stages)


def describe(run: Run, full: Run, questions: list[Question]) -> dict:
    """One run's entry in the report; differences and speed-up are against the full model."""
    right = [given == question.answer for given, question in zip(run.answers, questions)]
    base = [given == question.answer for given, question in zip(full.answers, questions)]
    n = len(questions)
    latency = latency_s(run)
    numbers = {
        "accuracy": sum(right) / n,
        "accuracy_ci95": wilson(sum(right), n),
        "latency_s": latency,
        "speedup": latency_s(full) / latency if latency else 1.0,
        "accuracy_delta": (sum(right) - sum(base)) / n,
        "accuracy_delta_ci95": paired(base, right),
    }
    return make_entry(run, full, numbers)


def main() -> None:
    own = ("--split", "--json", "--texts", "--compare", "--batch")
    args = make_parser(__doc__, *MODEL_FLAGS, *SEARCH_FLAGS, *METHOD_FLAGS, *own).parse_args()
    asked, pipeline, plans = set_up(args)
    runs = [make_run(*planned) for planned in plan_runs(plans, args)]
    kept = keep_answers(args, pipeline, asked, plans, runs)
    evaluate(pipeline, asked.questions, runs, args.batch, kept)
    entries = [describe(each, runs[0], asked.questions) for each in runs]
    report = make_report(args, pipeline, asked.questions, entries, args.batch)
    publish(args, report, runs, kept)
    say_if_chance(entries[0]["accuracy_ci95"], asked.questions)


if __name__ == "__main__":
    command.run(main)
