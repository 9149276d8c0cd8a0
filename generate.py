"""Generation: prefill, decoding under a skip set, the confidence exit, the stages of a question.

Prefill runs all layers, decoding skips. A question is answered in stages (TinyThinker, Piao and
Park 2024): recall general knowledge, analyze each option, summarize into an answer; the prompt of
each stage holds everything that was generated before.

    python generate.py "Which one contains alcohol?" wrench lemonade milk wine
"""

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

import math
import time
from collections import deque
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from data.prompts import STAGES, find_answer, quote, stage_prompts
from data.questions import Question
from data.tokenizer import Tokenizer
from model import KVCache, Llama, Skip, expect
from skip import Importance, measure_importance

Group = tuple[KVCache, list[list[int]]]  # prompts that share a cache of one row


class Exit(NamedTuple):
    """Generation early exit (LiteStage): when the mean of the last `window` confidences, each a
    token's largest softmax probability (the figure says max(token logit), which means something
    else for every model), is at or below `threshold`, the end takes the place of the last token."""

    window: int = 5
    threshold: float = 0.5


class Until(NamedTuple):
    """When a text ends: at an end token, which is not part of it, or one of last_ids, which is; at
    so many tokens; when the exit says so."""

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    last_ids: frozenset[int] = frozenset()
    exit: Exit | None = None


class Timings(NamedTuple):
    """What a batch cost: seconds of the prefill up to the first token, and of each step after; how
    many sub-layers each step skips, [attention, FFN]."""

    prefill_s: float
    step_s: list[float]
    skips: list[list[float]]
    kinds: list[str] = []  # what else steps differ in: how many rows, which hook

    @property
    def skipped(self) -> float:
        """Sub-layers, mean over the steps."""
        return sum(map(sum, self.skips)) / max(len(self.skips), 1)

    @property
    def decode_s(self) -> float:
        """Count x median time of each kind of step, summed: one step that the system preempted does
        not count. Steps of one kind skip as many sub-layers."""
        by_kind: dict[tuple, list[float]] = {}
        for kind, skipped, seconds in zip(cycle(self.kinds or [""]), self.skips, self.step_s):
            by_kind.setdefault((kind, sum(skipped)), []).append(seconds)
        return sum(len(steps) * median(steps) for steps in by_kind.values())

    def share(self, n: int) -> "Timings":
        """One question's part of a batch of n."""
        return self._replace(prefill_s=self.prefill_s / n, step_s=[s / n for s in self.step_s])


class Generation(NamedTuple):
    """What one row generated: ids, the confidence of each; why it stopped: eos, confidence, length
    or context; its decoding steps, none for the first token; the time of its whole batch."""

    ids: list[int]
    confidences: list[float]
    stop: str
    steps: int
    timings: Timings

def common_prefix(texts: list[list[int]]) -> int:
    """How many tokens all texts begin with: ABCD, ABE -> 2."""
    for length, column in enumerate(zip(*texts)):
        if len(set(column)) > 1:
            return length
    return min(map(len, texts))


def prefill_group(model: Llama, group: Group, room: int = 0, skip=None):
    """Runs all layers on prompts that share a cache, in one forward; leaves room for more tokens.

    Say the prompts are ABCD and ABE, and the cache holds A from an earlier prefill. Then B, CD and
    E are run; AB is common to both, CD and E are tails that do not see one another, in slots 2 to 3
    and 4. Returns logits (2, vocab) at the ends, and each prompt's slots, [0, 1, 2, 3] and
    [0, 1, 4]. The cache then holds ABCD, as if it had been run alone.
    """
    cache, prompts = group
    common = min(common_prefix(prompts), min(map(len, prompts)) - 1)  # each ends in a tail
    ready = min(common_prefix([cache.tokens, prompts[0]]), common)
    new = prompts[0][ready:common]
    slots = []
    for prompt in prompts:
        first = ready + len(new)
        new = new + prompt[common:]
        slots.append([*range(common), *range(first, ready + len(new))])
    cache.forget(ready)
    if cache.max_len < ready + len(new) + room:
        cache.grow(model, ready + len(new) + room)
    tails = [len(prompt) - common for prompt in prompts]
    logits = model(torch.tensor([new], device=model.device), cache, ready, skip, tails=tails)[0]
    cache.tokens = list(prompts[0])
    return logits, slots


def prefill(model: Llama, groups: list[Group], room: int, skip=None):
    """Runs all layers on all prompts: (cache with room for more, slots filled, logits). One prompt
    goes on in its own cache; several are copied into one batch, right-aligned."""
    lengths = [len(prompt) for _, prompts in groups for prompt in prompts]
    longest = max(lengths)
    if len(lengths) == 1:
        return groups[0][0], longest, prefill_group(model, groups[0], room, skip)[0]
    batch = KVCache(model, len(lengths), longest + room, [longest - length for length in lengths])
    all_logits = []
    row = 0
    for group in groups:
        logits, slots = prefill_group(model, group, 0, skip)
        # a hole before a shorter prompt is masked, but must not be NaN: it takes slot 0
        aligned = [[0] * (longest - len(its)) + its for its in slots]
        batch.copy_from(group[0], torch.tensor(aligned, device=model.device), row)
        all_logits.append(logits)
        row += len(slots)
    return batch, longest, torch.cat(all_logits)

Picked = list[tuple[int, float]]  # a token and its confidence, for each row


def pick(logits: Tensor, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
    """The next token of each row of logits (bsz, vocab), and its confidence: both (bsz,)."""
    confidences, tokens = logits.softmax(-1, dtype=torch.float32).max(-1)
    if temperature > 0.01:  # less is greedy
        tokens = torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]
    return tokens, confidences


def read(tokens: Tensor, confidences: Tensor) -> Picked:
    """The same as numbers: one small read, the one time that a step waits for a GPU."""
    ids, values = torch.stack((tokens, confidences)).tolist()  # float32 holds ids below 2^24
    return [(int(i), value) for i, value in zip(ids, values)]


class Stepper:
    """Decodes a batch, and times it: `start` prefills, every `step` gives each row its next token.
    tools/fast.py has one that replays recorded steps on a GPU."""

    def __init__(self, model: Llama, temperature: float = 0.0):
        self.model, self.temperature = model, temperature

    def prepare(self, groups: list[Group], room: int, skip) -> None:
        """Called before the clock starts: what will be prefilled, and what steps will skip."""
        self.prefill_s, self.step_s, self.skips, self.kinds = 0.0, [], [], []  # see Timings
        self.in_prefill = getattr(skip, "prefill", None)

    def start(self, groups: list[Group], room: int) -> Picked:
        """Runs all layers on all prompts: the first token of every row."""
        began = time.perf_counter()
        self.cache, self.pos, logits = prefill(self.model, groups, room, self.in_prefill)
        self.tokens, confidences = pick(logits, self.temperature)
        self.load()
        picked = read(self.tokens, confidences)
        self.prefill_s = time.perf_counter() - began
        return picked

    def step(self, skip, rows: list[int]) -> Picked:
        """Goes on with these rows, under a skip set: the next token of each."""
        began = time.perf_counter()
        self.keep(rows)
        picked = self.advance(skip)
        self.step_s.append(time.perf_counter() - began)
        self.skips.append(count_skipped(skip))
        self.kinds.append(f"{len(rows)} {getattr(getattr(skip, 'hook', None), '__name__', '')}")
        return picked

    def load(self) -> None:
        """Called when the first tokens are picked."""

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        if len(rows) < len(self.tokens):
            self.tokens = self.tokens[rows]
            self.cache.keep(rows)

    def advance(self, skip) -> Picked:
        """Runs one token of every row."""
        logits = self.model(self.tokens[:, None], self.cache, self.pos, skip)[:, -1]
        self.tokens, confidences = pick(logits, self.temperature)
        self.pos += 1
        return read(self.tokens, confidences)


def count_skipped(skip) -> list[float]:
    """How many sub-layers a step has left out, [attention, FFN]; a hook that decides by itself
    counts them in its `skipped`."""
    if skip is None:
        return [0.0, 0.0]
    mask, hook = skip if isinstance(skip, Skip) else Skip(skip)
    return getattr(hook, "skipped", None) or mask.sum(0).tolist()


class Row:
    """A row while it is being decoded: its ids so far, and why it stopped once it has."""

    def __init__(self, length: int, until: Until, context: int):
        self.room = context + 1 - length  # after the prompt; the last token needs no slot
        self.until = until
        self.ids, self.confidences = [], []
        self.steps = 0  # of decoding, none for the first token
        self.stop = None if 0 < length <= context else "context"
        self.recent = deque(maxlen=until.exit.window if until.exit else 1)

    def take(self, token: int, confidence: float) -> None:
        """Takes the next token, or the end in its place, and decides whether the row goes on."""
        expect(not math.isnan(confidence), "the logits are NaN: try --dtype float32")
        self.recent.append(confidence)
        window, threshold = self.until.exit or (0, 0.0)
        if token in self.until.eos_ids:
            self.stop = "eos"
        elif window and len(self.recent) == window and sum(self.recent) <= threshold * window:
            self.stop = "confidence"  # LiteStage's exit, in place of this token
        else:
            self.ids.append(token)
            self.confidences.append(confidence)
            if token in self.until.last_ids:
                self.stop = "eos"
            elif len(self.ids) >= self.until.max_new_tokens:
                self.stop = "length"
            elif len(self.ids) >= self.room:
                self.stop = "context"


@torch.inference_mode()
def generate_batch(stepper: Stepper, groups: list[Group], until: Until, skip=None):
    """Continues all prompts of all groups together: a Generation for each, in their order.

    skip: see `generate`; its attribute `prefill`, if it has one, is a `Skip` for the prefill.
    """
    if until.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected 1 or more, found {until.max_new_tokens}")
    context = stepper.model.args.max_seq_len
    rows = [Row(len(prompt), until, context) for _, prompts in groups for prompt in prompts]
    active = [row for row in rows if row.stop is None]
    fitting = []  # groups of the prompts that are not empty and fit the context
    for cache, prompts in groups:
        short = [prompt for prompt in prompts if 0 < len(prompt) <= context]
        fitting += [(cache, short)] if short else []
    room = min(until.max_new_tokens, context)
    stepper.prepare(fitting, room, skip)
    if active:
        picked = stepper.start(fitting, room)
    step = 0
    while active:
        for row, (token, confidence) in zip(active, picked):
            row.take(token, confidence)
        going = [i for i, row in enumerate(active) if row.stop is None]
        active = [active[i] for i in going]
        if active:
            picked = stepper.step(skip(step) if callable(skip) else skip, going)
        step += 1
        for row in active:
            row.steps = step
    timings = Timings(stepper.prefill_s, stepper.step_s, stepper.skips, stepper.kinds)
    return [Generation(row.ids, row.confidences, row.stop, row.steps, timings) for row in rows]


def generate(
    model, prompt_ids, max_new_tokens: int, eos_id=None, skip=None, exit=None, temperature=0.0
) -> Generation:
    """Continues the token ids of one prompt: prefill with all layers, decode under `skip`.

    eos_id: the token, or tokens, that end the text (not part of ids). skip: (n_layers, 2) bool mask
    or `model.Skip`, or a function of the decoding step that gives one. exit: (window, threshold) of
    the confidence exit, None for none. temperature: 0 is greedy. The stop is "eos", "confidence",
    "length" (max_new_tokens reached) or "context" (it is full, or the prompt does not fit: ids is
    then empty). Raises ValueError if max_new_tokens is below 1.
    """
    eos_ids = () if eos_id is None else eos_id
    eos_ids = {eos_id} if isinstance(eos_id, int) else eos_ids
    until = Until(max_new_tokens, frozenset(eos_ids), exit=exit and Exit(*exit))
    group = (KVCache(model, 1, 0), [list(prompt_ids)])
    return generate_batch(Stepper(model, temperature), [group], until, skip)[0]


# ---------------------------------------------------------------- the stages of a question


@dataclass
class StageResult:
    """One stage of one question: its prompts, what each was continued with (one text, or one for
    each option), the texts as later prompts quote them, the time of the stage."""

    name: str
    prompts: list[str]
    prompt_tokens: int  # of the longest prompt
    rows: list[Generation]
    texts: list[str]
    timings: Timings

    def __post_init__(self):
        self.tokens = sum(len(row.ids) for row in self.rows)  # generated, all texts together
        self.steps = max(row.steps for row in self.rows)  # of decoding
        self.stops = [row.stop for row in self.rows]

    @property
    def latency_s(self) -> float:
        return self.timings.prefill_s + self.timings.decode_s


@dataclass
class Pipeline:
    """A model that answers questions in stages.

    shots: worked examples put before each prompt; each of their texts ends at a newline, and so
    generated texts end there, too. stepper: decodes; a plain one unless given.
    """

    model: Llama
    tokenizer: Tokenizer
    max_new_tokens: int = 64
    shots: str = ""
    stepper: Stepper | None = None

    @torch.inference_mode()
    def __post_init__(self):
        self.stepper = self.stepper or Stepper(self.model)
        self.shared = KVCache(self.model, 1, 0)  # holds what all prompts begin with: the shots
        ids = self.tokenizer.encode(self.shots)
        ids = ids[: common_prefix([ids, self.tokenizer.encode(self.shots + "A")])]
        if self.shots and 0 < len(ids) <= self.model.args.max_seq_len:
            prefill_group(self.model, (self.shared, [ids]))

    @property
    def shared_tokens(self) -> int:
        """How many tokens every prompt begins with that are prefilled once, for all questions."""
        return len(self.shared.tokens)

    def new_caches(self, n: int) -> list[KVCache]:
        """Caches of one row for n questions; what all prompts share is in them already."""
        return [deepcopy(self.shared) for _ in range(n)]

    def prompts(self, index: int, question: Question, said: list[list[str]]) -> list[str]:
        """The prompts of stage `index`; said: the texts of every stage before."""
        return [self.shots + prompt for prompt in stage_prompts(index, question, said)]

    def prompt_ids(self, index: int, question: Question, said: list[list[str]]) -> list[list[int]]:
        """The same as token ids."""
        return [self.tokenizer.encode(prompt) for prompt in self.prompts(index, question, said)]

    def run_stage(self, index, questions, said, caches, skip=None, exit=None) -> list[StageResult]:
        """Generates stage `index` of questions side by side, under a skip set; see `answer`.

        said: for each question the texts of the stages before. caches: of one row, one for each
        question; their prefix is reused. All texts of the stage are decoded as one batch.
        """
        groups = []
        for question, texts, cache in zip(questions, said, caches):
            groups.append((cache, self.prompt_ids(index, question, texts)))
        last_ids = frozenset(self.tokenizer.newline_ids if self.shots else ())
        until = Until(self.max_new_tokens, frozenset(self.tokenizer.eos_ids), last_ids, exit)
        rows = generate_batch(self.stepper, groups, until, skip)
        timings = rows[0].timings.share(len(questions))
        results = []
        for question, before, (_, ids) in zip(questions, said, groups):
            mine, rows = rows[: len(ids)], rows[len(ids) :]
            texts = [self.tokenizer.decode(row.ids) for row in mine]
            if self.shots:
                texts = [text.split("\n")[0] for text in texts]
            texts = [quote(index, text) for text in texts]
            prompts = self.prompts(index, question, before)
            longest = max(len(prompt) for prompt in ids)
            results.append(
                StageResult(STAGES[index].name, prompts, longest, mine, texts, timings)
            )
        return results

    def answer(self, questions: list[Question], skips=None, exit=None, caches=None):
        """Answers questions side by side: [(label or None, StageResult of every stage)].

        skips: a skip set for each stage, as `generate` takes it; None skips nothing. exit: (window,
        threshold) or None. caches: from `new_caches`, to reuse what they hold. A batch's time is
        shared out evenly. Raises ValueError if there is not one skip set for each stage.
        """
        skips = [None] * len(STAGES) if skips is None else skips
        if len(skips) != len(STAGES):
            raise ValueError(f"skips: expected {len(STAGES)}, one for each stage")
        exit = exit and Exit(*exit)
        caches = caches or self.new_caches(len(questions))
        done: list[list[StageResult]] = [[] for _ in questions]
        for index, skip in enumerate(skips):
            said = [[stage.texts for stage in stages] for stages in done]
            results = self.run_stage(index, questions, said, caches, skip, exit)
            for stages, result in zip(done, results):
                stages.append(result)
        ends = [stages[-1].texts[0] for stages in done]
        labels = [find_answer(text, q.labels) for text, q in zip(ends, questions)]
        return list(zip(labels, done))


def importance_of(pipeline: Pipeline, questions: list[Question], answered) -> Importance:
    """Importance over the questions' prompts in all stages; answered: for each its stages' results,
    written by the full model."""
    prompts = []
    for question, stages in zip(questions, answered):
        said = [stage.texts for stage in stages]
        for index in range(len(STAGES)):
            ids = pipeline.prompt_ids(index, question, said[:index])[0]
            if len(ids) <= pipeline.model.args.max_seq_len:
                prompts.append(ids)
    expect(bool(prompts), "importance: every prompt is longer than the model's context")
    return measure_importance(pipeline.model, prompts)


if __name__ == "__main__":
    from tools.ask import main  # it stands on this module
    from tools.command import run

    run(main)
