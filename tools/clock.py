"""How long a decoding step takes at every budget, and a prefilled token; how noisy times are.

python search.py --limit 20 --step 8
"""

import math
from statistics import median

import numpy
import torch
from torch import Tensor

from data.prompts import STAGES
from data.questions import Question
from generate import Draft, Pipeline, StageResult, Until, generate_batch
from skip import Setting, litestage
from tools.journal import Journal
from tools.progress import progress

KNOTS = 9  # budgets whose steps are timed
TIMED = 6  # steps in a generation
VERIFY_ROUNDS = 5


def time_steps(pipeline: Pipeline, question: Question, said: list, masks: list) -> list:
    """Seconds of a decoding step, the median of TIMED in a generation, in each stage of a question
    under each of the stage's masks; NaN if the prompt does not fit the context.

    said: the texts of every stage. masks: for every stage a list of skip sets.
    """
    times = []
    for index, own in enumerate(masks):
        prompts = pipeline.prompt_ids(index, question, said[:index])
        group = (pipeline.new_caches(1)[0], prompts)
        row = []
        for mask in [own[0], *own]:  # the first one warms up
            made = generate_batch(pipeline.stepper, [group], Until(TIMED + 1), mask)[0]
            row.append(median(made.timings.step_s or [math.nan]))
        times.append(row[1:])
    return times


def relative_noise(times: Tensor) -> float:
    """About that of medians over n rows: interquartile range / (median sqrt(n)), column means."""
    low, middle, high = times.nanquantile(torch.tensor([0.25, 0.5, 0.75]), 0)
    return float(((high - low) / middle).nanmean().nan_to_num()) / len(times) ** 0.5


def step_times(
    pipeline: Pipeline,
    setting: Setting,
    questions: list[Question],
    said: list,
    rounds: int,
    journal: Journal,
) -> tuple[list[list[float]], float]:
    """(Seconds per decoding step for every stage and budget, how noisy they are).

    Steps are timed at KNOTS budgets and interpolated, as if all sub-layers between two of them took
    equally long. The budgets take turns in rounds, a question each, and each time is divided by
    the full model's of that round, so that a slow minute of the machine favours none. Rounds that
    are in the journal are not timed again.

    said: the texts of every stage of the questions; rounds: how many are enough.
    """
    n_sublayers = 2 * setting.n_layers
    sizes = [int(litestage(setting, budget).sum()) for budget in range(n_sublayers + 1)]
    knots = sorted({sizes[n_sublayers * i // (KNOTS - 1)] for i in range(KNOTS)})
    masks = []
    for stage in range(len(STAGES)):
        masks.append([litestage(setting.at(stage), knot) for knot in knots])
    ready = len(journal.find("round"))
    for i in progress(range(ready, rounds), "step times"):
        i %= len(said)
        journal.append("round", time_steps(pipeline, questions[i], said[i], masks))
    times = torch.tensor(journal.find("round"))  # (rounds, stages, knots)
    full_s = times[:, :, :1]
    relative = times / full_s
    step_s = full_s.nanmedian(0).values * relative.nanmedian(0).values  # (stages, knots)
    at_budgets = [numpy.interp(sizes, knots, row).tolist() for row in step_s.nan_to_num()]
    return at_budgets, relative_noise(relative)


# ---------------------------------------------------------------- drafts


def verify_times(
    pipeline: Pipeline, questions: list[Question], said: list, counts: list[int], journal: Journal
) -> list[dict[str, float]]:
    """Seconds of the forward that verifies, for every stage by how many tokens were drafted; the
    median over rounds, a question each, which are journaled. said: see `step_times`."""
    name = f"verify {counts}"
    ready = len(journal.find(name))
    for i in progress(range(ready, VERIFY_ROUNDS), "verify times"):
        question = questions[i % len(said)]
        texts = said[i % len(said)]
        row = []
        for index in range(len(STAGES)):
            prompts = pipeline.prompt_ids(index, question, texts[:index])
            group = (pipeline.new_caches(1)[0], prompts)
            times = {}
            for count in counts:
                until = Until(3 * (count + 1) + 1)
                made = generate_batch(pipeline.stepper, [group], until, Draft(None, count))[0]
                kinds = zip(made.timings.kinds, made.timings.step_s)
                taken = [seconds for kind, seconds in kinds if kind.endswith("verify")]
                times[str(count)] = median(taken or [math.nan])
            row.append(times)
        journal.append(name, row)
    medians = []
    for stage in zip(*journal.find(name)):
        by_count = {}
        for count in map(str, counts):
            by_count[count] = float(numpy.nanmedian([times[count] for times in stage]))
        medians.append(by_count)
    return medians


def step_seconds(measured: dict, point, stage: int) -> float:
    """Seconds of a stage's step, or of a round: its drafts and the forward that verifies them."""
    seconds = measured["step_s"][stage][point.budgets[stage]]
    if point.draft is None or not point.draft[stage]:
        return seconds
    count = point.draft[stage]
    return count * seconds + measured["verify_s"][stage][str(count)]


# ---------------------------------------------------------------- prefills


def prefilled_tokens(stages: list[StageResult], shared: int) -> list[int]:
    """How many tokens each stage's longest prompt adds to the one before: what is billed for it.
    shared: how many all prompts begin with, which are prefilled once for all questions."""
    added = []
    before = shared
    for stage in stages:
        added.append(max(stage.prompt_tokens - before, 1))
        before = stage.prompt_tokens
    return added


def token_times(answered: list[list[StageResult]], shared: int) -> list[list[float]]:
    """Seconds per prefilled token, (questions, stages); answered: all stages of each question."""
    times = []
    for stages in answered:
        row = []
        for stage, added in zip(stages, prefilled_tokens(stages, shared)):
            row.append(stage.timings.prefill_s / added)
        times.append(row)
    return times
