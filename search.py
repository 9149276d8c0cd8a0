"""The latency-aware budget search: LiteStage's offline configuration, once for a model and a task.

  1. Measure: importance of the sub-layers, time of a decoding step for every stage and budget,
     accuracy of the full model; target = that accuracy - epsilon, on validation questions.

  2. From the slowest stage to the fastest: scan all budgets of this stage, the stages already done
     at the budget chosen for them, the others at 0; of those that meet the target keep the one of
     lowest end-to-end latency. Neither accuracy nor latency is monotone, so no scan stops early.

Every finished trial is in a journal beside the plan: a killed search goes on where it was.

    python search.py --out plan.json --epsilon 0.01
"""

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import NamedTuple

import torch

from data.prompts import STAGES
from data.questions import Question
from eval import wilson
from generate import Pipeline, importance_of
from skip import Setting, rank
from tools.clock import prefilled_tokens, relative_noise, step_seconds, step_times, token_times
from tools.command import run
from tools.drafts import find_drafts
from tools.journal import Journal
from tools.losses import rank_stages
from tools.plan import read_setting, store_setting
from tools.progress import progress
from tools.ranks import timer
from tools.refine import refine
from tools.setup import IMPORTANCE_QUESTIONS, answer_all, note, say_if_chance
from tools.tables import print_full, print_scan
from tools.trials import Answers, Session

THRESHOLDS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8)  # what --exit-threshold auto tries; 0 never exits
FIRST = 0.5  # the one of them with which the stages are scanned
ROUNDS = 15  # of timing steps, at most
BATCH = 20  # questions generated side by side; latencies come from the measured step times
GPU_BATCH = 100  # the same where a step of many takes about as long as one of few


class Point(NamedTuple):
    """What is searched. A *trial* is what came of it, a dict in plan and journal: the point,
    accuracy, accuracy_ci95, latency_s, stage_s, tokens, exit_rate, abandoned. An abandoned one
    stopped when the target was out of reach: its accuracy is an upper bound."""

    budgets: tuple[int, ...]  # one for each stage
    threshold: float = 0.0  # of the exit; 0: none
    draft: tuple[int, ...] | None = None  # tokens that each stage drafts; None: none does

    def at(self, stage: int, budget: int) -> "Point":
        """The same with another budget in one stage."""
        return self._replace(budgets=(*self.budgets[:stage], budget, *self.budgets[stage + 1 :]))


def meets(trial: dict, target: float) -> bool:
    """Whether a trial ran to its end and is accurate enough."""
    return not trial["abandoned"] and trial["accuracy"] >= target - 1e-9


def best(trials: list[dict], target: float, noise: float = 0.0) -> dict | None:
    """The fastest trial that meets the target; of those equally fast, within the relative noise,
    the most accurate, then what skips least, then what exits least."""
    meeting = [trial for trial in trials if meets(trial, target)]
    fastest = min((trial["latency_s"] for trial in meeting), default=0.0)
    top = [trial for trial in meeting if trial["latency_s"] <= fastest * (1 + noise)]
    top.sort(key=lambda trial: (-trial["accuracy"], sum(trial["budgets"]), trial["threshold"]))
    return top[0] if top else None


def best_exit(trials: list[dict], target: float, noise: float) -> dict | None:
    """The best of trials at the same budgets, the first of them without an exit: one with an exit
    must be faster than that by more than the noise, unless that misses the target."""
    none, *exits = trials
    if meets(none, target):
        exits = [exit for exit in exits if exit["latency_s"] * (1 + noise) < none["latency_s"]]
    return best(exits, target, noise) or best([none], target)


@dataclass
class Search:
    """LiteStage's stage-wise search for one target, and all that it tried."""

    evaluate: Callable  # of a point and a target: the point's trial
    target: float
    noise: float = 0.0  # of latencies, relative
    trials: dict[tuple[str, Point], dict] = field(default_factory=dict)  # by stage, in their order

    def trial(self, stage: str, point: Point) -> dict:
        """Tries a point for a stage, and remembers it."""
        trial = self.evaluate(point, self.target)
        self.trials[stage, point] = {"stage": stage} | trial
        return trial

    def scan(self, stage: str, tried, candidates: list[Point], choose=best, noise=0.0) -> Point:
        """The chosen candidate, or else the first. tried: in what they differ, for the table."""
        trials = []
        for knob, point in zip(tried, progress(candidates, f"{stage}, target {self.target:.1%}")):
            trial = self.trial(stage, point)
            trials.append(trial | {"tried": knob, "meets": meets(trial, self.target)})
        chosen = choose(trials, self.target, noise)
        number = trials.index(chosen) if chosen else None
        print_scan(stage, self.target, trials, number, self.noise)
        return candidates[number or 0]

    def greedy(self, order: list[int], budgets: list[int], thresholds: Sequence[float]) -> Point:
        """The chosen point. order: the stages, slowest first. budgets: what a scan tries, 0 first;
        a stage of which none meets the target keeps 0. thresholds: one, or those to choose from,
        0 first, at the budgets found."""
        several = len(thresholds) > 1
        point = Point((0,) * len(STAGES), FIRST if several else thresholds[0])
        for stage in order:
            candidates = [point.at(stage, budget) for budget in budgets]
            point = self.scan(STAGES[stage].name, budgets, candidates)
        if several:
            self.evaluate(Point(point.budgets), 0.0)  # to its end: exits are compared with it
            candidates = [Point(point.budgets, threshold) for threshold in thresholds]
            point = self.scan("exit", thresholds, candidates, best_exit, self.noise)
        return point


def run_trial(answers: Answers, measured: dict, point: Point, target: float) -> dict:
    """Tries a point on the questions of `answers`, some more each time, until the target is out of
    reach even if all remaining questions were right."""
    n = len(answers.questions)
    for done in answers.growing(*point):
        right = answers.count_right(done)
        accuracy = (right + n - len(done)) / n
        if accuracy < target - 1e-9:
            break
    stage_s = latency(measured, point, done, answers.pipeline.shared_tokens)
    stops = [stop for stages in done for stage in stages for stop in stage.stops]
    return {
        "budgets": list(point.budgets),
        "threshold": point.threshold,
        "draft": point.draft and list(point.draft),
        "accuracy": accuracy,
        "accuracy_ci95": wilson(right, n) if len(done) == n else None,
        "latency_s": sum(stage_s),
        "stage_s": stage_s,
        "tokens": mean(sum(stage.tokens for stage in stages) for stages in done),
        "exit_rate": stops.count("confidence") / len(stops),
        "abandoned": len(done) < n,
    }


def latency(measured: dict, point: Point, done: list, shared: int) -> list[float]:
    """Seconds of each stage of a question: its new prompt tokens and its steps, each at the seconds
    that were measured up front. done, shared: see `prefilled_tokens`, for each question."""
    seconds = []
    for i in range(len(point.budgets)):
        tokens = mean(prefilled_tokens(stages, shared)[i] for stages in done)
        steps = mean(stages[i].steps for stages in done)
        seconds.append(tokens * measured["token_s"][i] + steps * step_seconds(measured, point, i))
    return seconds


def rank_sublayers(pipeline: Pipeline, questions: list[Question], args, journal: Journal) -> dict:
    """The rankings, as the journal keeps them; what the full model said meanwhile, and the seconds
    of each stage per prefilled token, (questions, stages)."""
    answered = answer_all(pipeline, questions)
    importance = importance_of(pipeline, questions, answered)
    rankings = [rank(importance.similarity, args.granularity)] * len(STAGES)  # one for all
    if args.ranking == "loss":
        rankings = rank_stages(pipeline, questions, answered, journal)
    ranked = store_setting(Setting(importance, rankings, args.granularity), args.ranking)
    ranked["said"] = [[stage.texts for stage in stages] for stages in answered]
    ranked["token_s"] = token_times(answered, pipeline.shared_tokens)
    return ranked


def measure(pipeline: Pipeline, questions: list[Question], args, rounds: int, journal) -> dict:
    """Step 1: rankings, seconds of a decoding step for every stage and budget and of a prefilled
    token for every stage, and how noisy these times are; journaled."""
    few = questions[:IMPORTANCE_QUESTIONS]
    ranked = dict(journal.once("ranked", rank_sublayers, pipeline, few, args, journal))
    said = ranked.pop("said")
    token_s = torch.tensor(ranked.pop("token_s"))
    setting = read_setting(ranked, args.granularity)
    ranked["step_s"], noise = step_times(pipeline, setting, questions, said, rounds, journal)
    ranked["token_s"] = token_s.median(0).values.tolist()
    ranked["noise"] = max(noise, relative_noise(token_s))
    return ranked


def find_plan(search: Search, order: list[int], args) -> dict:
    """Searches as the flags ask; the chosen trial, which ran to its end."""
    budgets = list(range(0, args.max_budget + 1, args.step))
    if args.draft:
        start = Point((0,) * len(STAGES), args.exit_threshold or 0.0, (0,) * len(STAGES))
        return search.evaluate(find_drafts(search, start, order, budgets, args.draft), 0.0)
    thresholds = THRESHOLDS if args.exit_threshold is None else (args.exit_threshold,)
    point = search.greedy(order, budgets, thresholds)
    if args.refine:
        point = refine(search, best, point, budgets, timer(60 * args.refine))
    chosen = search.evaluate(point, 0.0)
    if not meets(chosen, search.target):
        note(f"with the exit at {point.threshold} not even budgets of 0 meet the target")
    return chosen


def main() -> None:
    session = Session(__doc__)
    args = session.args
    measured = session.measured(measure, ROUNDS)
    evaluate = session.trials(run_trial, measured, BATCH, GPU_BATCH)
    full = evaluate(Point((0,) * len(STAGES)), 0.0)
    order = sorted(range(len(STAGES)), key=lambda stage: -full["stage_s"][stage])
    print_full(full, order, measured["noise"])
    say_if_chance(full["accuracy_ci95"], session.questions)
    for epsilon in sorted(args.epsilon, reverse=True):
        # the loosest first: what it abandons could not have met a stricter target either
        search = Search(evaluate, full["accuracy"] - epsilon, measured["noise"])
        session.keep(epsilon, find_plan(search, order, args), search.trials)
    session.close(measured | {"full": full}, evaluate)


if __name__ == "__main__":
    run(main)
