"""The latency-aware budget search: LiteStage's offline configuration, once for a model and a task.

  1. Measure: importance of the sub-layers, time of a decoding step for every stage and budget,
     accuracy of the full model; target = that accuracy - epsilon, on validation questions.

  2. From the slowest stage to the fastest: scan all budgets of this stage, the stages already done
     at the budget chosen for them, the others at 0; of those that meet the target keep the one of
     lowest end-to-end latency. Neither accuracy nor latency is monotone, so no scan stops early.

Every finished trial is in a journal beside the plan: a killed search goes on where it was.

    python search.py --out plan.json --epsilon 0.01
"""

from data import cli  # isort: skip  (first, so that Ctrl-C is one line while torch is loading)

import itertools
import math
import time
from collections.abc import Callable
from statistics import mean, median

import numpy
import torch
from torch import Tensor

from data.plan import journal_of, write_plans
from data.prompts import STAGES, find_answer
from data.questions import Question
from data.report import meets, print_full, print_scan
from data.setup import IMPORTANCE_QUESTIONS, importance_of, load, load_questions
from generate import Exit, Pipeline, Stage, generate_batch
from model import KVCache, expect
from skip import Importance, Setting, litestage, rank

THRESHOLDS = (0.5, 0.0, 0.4, 0.6, 0.7, 0.8)  # what --exit-threshold auto tries; 0 never exits
KNOTS, ROUNDS, TIMED = 9, 15, 6  # step times: budgets timed, rounds, steps in each
BATCH = 20  # questions generated side by side; latencies come from the measured step times

# What is searched: a budget for each stage, and the exit's threshold. A trial is a point's outcome
# on the validation questions, a dict as the plan and the journal keep it: budgets, threshold,
# accuracy, latency_s, stage_s, tokens, exit_rate, and abandoned (then accuracy is its upper bound).
Point = tuple[tuple[int, int, int], float]
FULL: Point = ((0, 0, 0), 0.0)

# ---------------------------------------------------------------- step 2: the search


def best(trials: list[dict], target: float, noise: float = 0.0) -> dict | None:
    """The fastest trial that meets the target; of those equally fast, within the relative noise,
    the most accurate, then the one that skips and exits less."""
    meeting = [trial for trial in trials if meets(trial, target)]
    fastest = min((trial["latency_s"] for trial in meeting), default=0.0)
    top = [trial for trial in meeting if trial["latency_s"] <= fastest * (1 + noise)]
    return min(top, key=lambda t: (-t["accuracy"], sum(t["budgets"]), t["threshold"]), default=None)


def greedy(
    evaluate: Callable, order, budgets, target, thresholds, show=lambda *_: None, noise=0.0
) -> Point:
    """LiteStage's stage-wise search (step 2): the chosen point.

    evaluate(point, target) tries a point. order: the stages, slowest first. budgets: what a scan
    tries; a stage of which none meets the target keeps 0. thresholds: the first is kept in the
    scans, then all are tried at the budgets found; an exit must gain more than the noise.
    """
    point = (0, 0, 0), thresholds[0]
    for stage in [*order, None]:
        if stage is None:
            candidates = [(point[0], threshold) for threshold in sorted(thresholds)]
        else:
            before, after = point[0][:stage], point[0][stage + 1 :]
            candidates = [((*before, budget, *after), point[1]) for budget in budgets]
        trials = [evaluate(candidate, target) for candidate in candidates]
        chosen = best(trials, target, noise if stage is None else 0.0)
        if chosen is not None:
            point = tuple(chosen["budgets"]), chosen["threshold"]
        show(stage, trials, chosen)
    return point


def refine(evaluate: Callable, point: Point, budgets, target: float, time_left: Callable) -> Point:
    """Ours: descent from the greedy's point. Tries all points one budget off in any of the stages,
    so that one stage may give what another takes, and goes to the fastest that meets the target,
    until none is faster or time is up."""
    now = evaluate(point, target)
    while time_left():
        at = [budgets.index(budget) for budget in point[0]]
        near = itertools.product(*(budgets[max(i - 1, 0) : i + 2] for i in at))
        trials = [evaluate((tried, point[1]), target) for tried in near if time_left()]
        chosen = best(trials, target)
        if chosen is None or (meets(now, target) and chosen["latency_s"] >= now["latency_s"]):
            break
        now, point = chosen, (tuple(chosen["budgets"]), chosen["threshold"])
    return point


# ---------------------------------------------------------------- step 1: measuring


def prefilled_tokens(stages: list[Stage]) -> list[int]:
    """How many tokens each stage's longest prompt adds to the one before: what `token_s` is per."""
    lengths = [stage.prompt_tokens for stage in stages]
    return [max(now - before, 1) for before, now in zip([0, *lengths], lengths)]


def time_steps(pipeline: Pipeline, question: Question, stages: list[Stage], masks) -> list:
    """Seconds of a decoding step, the median of TIMED in a generation, in each stage of a question
    under every mask; NaN if the prompt does not fit the context."""
    model, said, times = pipeline.model, [stage.texts for stage in stages], []
    for index in range(len(STAGES)):
        group = KVCache(model, 1, 0), pipeline.prompt_ids(index, question, said)
        runs = [
            generate_batch(model, [group], TIMED + 1, skip=mask, static=pipeline.static)[0]
            for mask in [masks[0], *masks]  # the first one warms up
        ]
        times.append([median(run.timings.step_s or [math.nan]) for run in runs[1:]])
    return times


def relative_noise(times: Tensor) -> float:
    """About that of medians over n rows: interquartile range / (median sqrt(n)), column means."""
    low, middle, high = times.nanquantile(torch.tensor([0.25, 0.5, 0.75]), 0)
    return float(((high - low) / middle).nanmean().nan_to_num()) / len(times) ** 0.5


def measure(pipeline: Pipeline, questions: list[Question], granularity: str) -> dict:
    """Step 1, as the journal keeps it: importance, seconds per decoding step of every stage and
    budget, seconds per prefilled token of every stage, and how noisy these times are.

    Steps are timed at KNOTS budgets and interpolated, as if all sub-layers between two of them took
    equally long. The budgets take turns in ROUNDS rounds, a question each, and each time is divided
    by the full model's of that round, so that a slow minute of the machine favours none.
    """
    n_sublayers = 2 * pipeline.model.args.n_layers
    importance, answered = importance_of(pipeline, questions[:IMPORTANCE_QUESTIONS], batch=1)
    setting = Setting(importance, rank(importance.similarity, granularity), granularity)
    sizes = [int(litestage(setting, budget).sum()) for budget in range(n_sublayers + 1)]
    knots = sorted({sizes[n_sublayers * i // (KNOTS - 1)] for i in range(KNOTS)})
    masks = [litestage(setting, knot) for knot in knots]
    rounds = itertools.islice(itertools.cycle(zip(questions, answered)), ROUNDS)
    rounds = cli.progress(rounds, "step times", total=ROUNDS)
    times = torch.tensor([time_steps(pipeline, *each, masks) for each in rounds])
    full_s = times[:, :, :1]  # (ROUNDS, stages, 1)
    step_s = full_s.nanmedian(0).values * (times / full_s).nanmedian(0).values  # (stages, knots)
    prefill_s = torch.tensor([[stage.timings.prefill_s for stage in each] for each in answered])
    token_s = prefill_s / torch.tensor([prefilled_tokens(stages) for stages in answered])
    return {
        "importance": {key: value.tolist() for key, value in importance._asdict().items()},
        "step_s": [numpy.interp(sizes, knots, row).tolist() for row in step_s.nan_to_num()],
        "token_s": token_s.median(0).values.tolist(),
        "noise": max(relative_noise(times / full_s), relative_noise(token_s)),
    }


class Evaluator:
    """Tries points on the validation questions, exactly and never twice.

    A generation depends on its prompt, its skip set and the threshold alone, so one that an
    earlier trial made of the same texts is taken from there. A trial is abandoned the moment its
    target is out of reach even if all remaining questions were right.
    """

    def __init__(self, pipeline: Pipeline, questions: list[Question], journal: cli.Journal, args):
        self.pipeline, self.questions = pipeline, questions
        self.journal, self.args = journal, args
        self.measured = journal.find("measured")[0]
        tables = self.measured["importance"].items()
        importance = Importance(**{k: torch.tensor(v, dtype=torch.float64) for k, v in tables})
        ranking = rank(importance.similarity, args.granularity)
        self.setting = Setting(importance, ranking, args.granularity)
        self.caches = [KVCache(pipeline.model, 1, 0) for _ in range(BATCH)]
        self.made: dict[tuple, Stage] = {}  # by question, stage, budget, threshold, texts before
        self.trials = {(tuple(t["budgets"]), t["threshold"]): t for t in journal.find("trial")}
        self.generated, self.naive = 0, 0  # question-stages, run and without any saving

    def stages(self, chosen: list[int], point: Point) -> list[list[Stage]]:
        """The three stages of the chosen questions at a point."""
        budgets, threshold = point
        exit = Exit(self.args.exit_window, threshold) if threshold else None
        done: list[list[Stage]] = [[] for _ in chosen]
        for index, budget in enumerate(budgets):
            said = [[stage.texts for stage in stages] for stages in done]
            keys = [(q, index, budget, threshold, str(s)) for q, s in zip(chosen, said)]
            new = [i for i, key in enumerate(keys) if key not in self.made]
            if new:
                given = [(self.questions[chosen[i]], said[i], self.caches[i]) for i in new]
                skip = litestage(self.setting, budget)
                made = self.pipeline.run_stage(index, *zip(*given), skip, exit)
                self.made |= {keys[i]: stage for i, stage in zip(new, made)}
                self.generated += len(new)
            for stages, key in zip(done, keys):
                stages.append(self.made[key])
        return done

    def __call__(self, point: Point, target: float) -> dict:
        """The point's trial: from the journal, or run now."""
        n, right, done = len(self.questions), 0, []
        self.naive += len(STAGES) * n
        known = self.trials.get(point)
        if known and not (known["abandoned"] and known["accuracy"] >= target - 1e-9):
            return known
        number, ranks = cli.rank()
        for start in range(0, n, BATCH * ranks):
            chosen = list(range(start, min(start + BATCH * ranks, n)))
            done += cli.interleave(self.stages(chosen[number::ranks], point))
            labels = [find_answer(stages[2].texts[0]) for stages in done[start:]]
            right += sum(label == self.questions[q].answer for q, label in zip(chosen, labels))
            at_best = right + n - len(done)
            if at_best / n < target - 1e-9:
                break
        # a stage's latency: its new prompt tokens and its steps, at the seconds measured up front
        prefilled = [mean(column) for column in zip(*map(prefilled_tokens, done))]
        stage_s = [
            self.measured["token_s"][i] * prefilled[i]
            + self.measured["step_s"][i][budget] * mean(stages[i].steps for stages in done)
            for i, budget in enumerate(point[0])
        ]
        stops = [stop for stages in done for stage in stages for stop in stage.stops]
        trial = {
            "budgets": list(point[0]),
            "threshold": point[1],
            "accuracy": at_best / n,
            "latency_s": sum(stage_s),
            "stage_s": stage_s,
            "tokens": mean(sum(stage.tokens for stage in stages) for stages in done),
            "exit_rate": stops.count("confidence") / len(stops),
            "abandoned": len(done) < n,
        }
        self.trials[point] = trial
        self.journal.append("trial", trial)
        return trial


# ---------------------------------------------------------------- command


def find_plan(evaluator: Evaluator, order: list[int], budgets: list[int], target: float):
    """(point, trials in their order) for one target, shown as they come in."""
    args, noise, log = evaluator.args, evaluator.measured["noise"], []
    thresholds = THRESHOLDS if args.exit_threshold is None else (args.exit_threshold,)
    total = len(order) * len(budgets) + len(thresholds)
    with cli.progress(total=total, desc=f"target {target:.1%}") as bar:

        def evaluate(point: Point, target: float) -> dict:
            bar.update()
            return evaluator(point, target)

        def show(stage: int | None, trials: list[dict], chosen: dict | None) -> None:
            name = "exit" if stage is None else STAGES[stage]
            tried = [t["threshold"] if stage is None else t["budgets"][stage] for t in trials]
            log.extend({"stage": name, "budget": b} | t for b, t in zip(tried, trials))
            bar.clear()
            print_scan(name, tried, trials, target, chosen, noise)

        point = greedy(evaluate, order, budgets, target, thresholds, show, noise)
        if args.refine:
            start, time_left = point, cli.timer(60 * args.refine)
            point = refine(evaluate, start, budgets, target, time_left)
            gain = evaluator(start, 0.0)["latency_s"] / evaluator(point, 0.0)["latency_s"]
            print(f"\nrefined from {start[0]} to {point[0]}: {gain:.3f}x faster")
    return point, log


def main() -> None:
    flags = ("--out", "--epsilon", "--max-budget", "--step", "--refine")
    parser = cli.make_parser(__doc__, *cli.MODEL_FLAGS, *cli.SEARCH_FLAGS, *flags)
    parser.set_defaults(granularity="sublayer", exit_window=Exit().window)
    args = parser.parse_args()
    began = time.monotonic()
    pipeline, folder = load(args)
    n_sublayers = 2 * pipeline.model.args.n_layers
    last = args.max_budget or n_sublayers - 2
    expect(last <= n_sublayers, f"--max-budget {last}: the model has {n_sublayers} sub-layers")
    file, questions = load_questions(args, pipeline, "valid", args.limit)
    journal, key = journal_of(args, pipeline, folder, file, len(questions))
    if not journal.find("measured"):
        journal.append("key", key)
        journal.append("measured", measure(pipeline, questions, args.granularity))
    evaluator = Evaluator(pipeline, questions, journal, args)
    full = evaluator(FULL, 0.0)
    order = sorted(range(len(STAGES)), key=lambda stage: -full["stage_s"][stage])
    print_full(full, order, evaluator.measured["noise"])
    found, budgets = {}, list(range(0, last + 1, args.step))
    for epsilon in sorted(args.epsilon, reverse=True):
        # the loosest first: what it abandons could not have met a stricter target either
        target = full["accuracy"] - epsilon
        point, log = find_plan(evaluator, order, budgets, target)
        found[epsilon] = evaluator(point, 0.0), log
    write_plans(args, key, evaluator, full, found)
    run, took = sum(cli.gather(evaluator.generated)), time.monotonic() - began
    print(f"\n{run} question-stages generated, naively {evaluator.naive}; {took:.0f} s")


if __name__ == "__main__":
    cli.run(main)
