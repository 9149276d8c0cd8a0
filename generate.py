"""Generation: prefill, decoding under a skip set, the confidence exit, the stages of a question.

A question is answered in stages (TinyThinker, Piao and Park 2024): recall general knowledge,
analyze each option, summarize; a stage's prompt holds everything that was generated before.

    python generate.py "Which one contains alcohol?" wrench lemonade milk wine
"""

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

import math
import time
from collections import deque
from copy import deepcopy
from dataclasses import dataclass
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
Said = list[list[tuple[int, float]]]  # for each row what comes next: tokens, their confidences


class Exit(NamedTuple):
    """Generation early exit (LiteStage): when the mean of the last `window` confidences is at or
    below `threshold`, the end takes the place of the last token."""

    window: int = 5
    threshold: float = 0.5


class Until(NamedTuple):
    """When a text ends: before an end token, after one of last_ids, or when the exit says so."""

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    last_ids: frozenset[int] = frozenset()
    exit: Exit | None = None


class Timings(NamedTuple):
    """What a batch cost: seconds of the prefill up to the first token, and of each step after."""

    prefill_s: float
    step_s: list[float]
    skips: list[list[float]]  # how many sub-layers each step leaves out, [attention, FFN]
    kinds: list[str]  # what else steps differ in: how many rows, which hook, draft or verify

    @property
    def skipped(self) -> float:
        """Sub-layers, mean over the steps."""
        return sum(map(sum, self.skips)) / max(len(self.skips), 1)

    @property
    def decode_s(self) -> float:
        """Count x median of each kind of step, summed: one that was preempted does not count."""
        by_kind: dict[tuple, list[float]] = {}
        for kind, skipped, seconds in zip(self.kinds, self.skips, self.step_s):
            by_kind.setdefault((kind, sum(skipped)), []).append(seconds)
        return sum(len(steps) * median(steps) for steps in by_kind.values())

    def share(self, n: int) -> "Timings":
        """One question's part of a batch of n."""
        return self._replace(prefill_s=self.prefill_s / n, step_s=[s / n for s in self.step_s])


class Generation(NamedTuple):
    """What one row generated."""

    ids: list[int]
    confidences: list[float]  # of each
    stop: str  # eos, confidence, length or context
    steps: int  # of decoding, or rounds of drafts; none for the first token
    timings: Timings  # of its whole batch
    accepted: int = 0  # of the tokens that it drafted


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
    ready = min(common_prefix([cache.tokens, prompts[0]]), common)  # in the cache already
    new = prompts[0][ready:common]  # what is run: the common rest, then all tails
    slots = []
    for prompt in prompts:
        tail = ready + len(new)  # where it begins
        new = new + prompt[common:]
        slots.append([*range(common), *range(tail, ready + len(new))])
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


class Draft(NamedTuple):
    """A skip set that only drafts, `n_tokens` a round; see `Stepper.draft_and_verify`."""

    skip: Tensor
    n_tokens: int


def pick(logits: Tensor, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
    """The tokens that logits (bsz, seqlen, vocab) choose, and their confidences: (bsz, seqlen). A
    confidence is the largest softmax probability; the figure's max(token logit) means something
    else for every model."""
    confidences, tokens = logits.softmax(-1, dtype=torch.float32).max(-1)
    if temperature > 0.01:  # less is greedy
        flat = (logits[:, -1].float() / temperature).softmax(-1)
        tokens = torch.multinomial(flat, 1)
    return tokens, confidences


def read(tokens: Tensor, confidences: Tensor) -> Said:
    """The same as numbers: one small read, the one time that a step waits for a GPU."""
    ids, values = torch.stack((tokens, confidences)).tolist()  # float32 holds ids below 2^24
    return [list(zip(map(int, row), sure)) for row, sure in zip(ids, values)]


class Stepper:
    """Decodes a batch, and times it; tools/fast.py has one that replays steps on a GPU."""

    def __init__(self, model: Llama, temperature: float = 0.0):
        self.model, self.temperature = model, temperature

    def start(self, groups: list[Group], room: int, skip) -> Said:
        """Runs all layers on all prompts: the first token of every row. skip: as in `generate`."""
        self.step_s, self.skips, self.kinds = [], [], []  # see Timings
        began = time.perf_counter()
        in_prefill = getattr(skip, "prefill", None)
        self.cache, self.pos, logits = prefill(self.model, groups, room, in_prefill)
        self.tokens, confidences = pick(logits[:, None], self.temperature)  # (bsz, 1)
        said = read(self.tokens, confidences)
        self.prefill_s = time.perf_counter() - began
        return said

    def step(self, skip, rows: list[int]) -> Said:
        """Goes on with these rows, under a skip set."""
        self.began = time.perf_counter()
        self.keep(rows)
        if isinstance(skip, Draft):
            return self.draft_and_verify(*skip)
        said = self.advance(skip)
        self.clock(skip, getattr(getattr(skip, "hook", None), "__name__", ""))
        return said

    def clock(self, skip, kind: str) -> None:
        """A step ends here, and the next one begins."""
        now = time.perf_counter()
        self.step_s.append(now - self.began)
        self.skips.append(count_skipped(skip))
        self.kinds.append(f"{len(self.tokens)} {kind}")
        self.began = now

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        if len(rows) < len(self.tokens):
            self.tokens = self.tokens[rows]
            self.cache.keep(rows)
            if torch.is_tensor(self.pos):
                self.pos = self.pos[rows]

    def advance(self, skip) -> Said:
        """Runs one token of every row."""
        logits = self.model(self.tokens, self.cache, self.pos, skip)
        self.tokens, confidences = pick(logits, self.temperature)
        self.pos += 1
        return read(self.tokens, confidences)

    def draft_and_verify(self, skip: Tensor, count: int) -> Said:
        """One round of lossless decoding: every row goes on as the full model would. (Ours, after
        Draft & Verify, 2309.08168, and LayerSkip, 2404.16710.)

          draft   `count` tokens, one by one, under the skip set
          verify  the last token and the drafts, in one forward of all layers, which also writes
                  their slots of the cache anew
          accept  the drafts up to the first that is not the full model's, then its own token
        """
        if len(self.tokens) > 1 and not torch.is_tensor(self.pos):
            self.cache.fill(self.pos)  # rows will differ, and a NaN would get through their mask
            self.pos = torch.full_like(self.tokens[:, 0], self.pos)
        window = self.tokens  # (bsz, 1), (bsz, 2), .. (bsz, count + 1)
        for ahead in range(count):
            logits = self.model(window[:, -1:], self.cache, self.pos + ahead, skip)
            window = torch.cat((window, pick(logits)[0]), 1)
            self.clock(skip, "draft")
        tokens, confidences = pick(self.model(window, self.cache, self.pos))  # the full model's
        same = tokens[:, :-1] == window[:, 1:]  # (bsz, count)
        accepted = same.cumprod(1).sum(1, keepdim=True)  # (bsz, 1)
        self.tokens = tokens.gather(1, accepted)
        picked = read(tokens, confidences)
        said = [row[: n + 1] for row, n in zip(picked, accepted[:, 0].tolist())]
        if torch.is_tensor(self.pos):
            self.pos = self.pos + accepted[:, 0] + 1
        else:
            self.cache.tokens += window[0, : len(said[0])].tolist()  # as if they were prefilled
            self.pos += len(said[0])
        self.clock(None, "verify")
        return said


def count_skipped(skip) -> list[float]:
    """How many [attention, FFN] a step left out; a hook that decides itself has its `skipped`."""
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
        self.accepted = 0  # of the tokens that it drafted
        self.stop = None if 0 < length <= context else "context"
        self.recent = deque(maxlen=until.exit.window if until.exit else 1)

    def take(self, said: list[tuple[int, float]]) -> None:
        """Takes what comes next, token by token, while the row goes on."""
        self.accepted += len(said) - 1
        for token, confidence in said:
            if self.stop is None:
                self.take_one(token, confidence)

    def take_one(self, token: int, confidence: float) -> None:
        """Takes a token, or the end in its place, and decides whether the row goes on."""
        expect(not math.isnan(confidence), "the logits are NaN: try --dtype float32")
        self.recent.append(confidence)
        window, threshold = self.until.exit or (0, 0.0)  # 0: there is no exit
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
    """Continues all prompts of all groups together: a Generation for each, in their order. skip: as
    in `generate`, or a `Draft`; what has an attribute `prefill`, a `Skip`, prefills under that."""
    if until.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected 1 or more, found {until.max_new_tokens}")
    context = stepper.model.args.max_seq_len
    rows = [Row(len(prompt), until, context) for _, prompts in groups for prompt in prompts]
    active = [row for row in rows if row.stop is None]
    fitting = []  # groups of the prompts that are not empty and fit the context
    for cache, prompts in groups:
        short = [prompt for prompt in prompts if 0 < len(prompt) <= context]
        fitting += [(cache, short)] if short else []
    room = min(until.max_new_tokens, context) + (skip.n_tokens if isinstance(skip, Draft) else 0)
    timings = Timings(0.0, [], [], [])
    if active:
        said = stepper.start(fitting, room, skip)
        timings = Timings(stepper.prefill_s, stepper.step_s, stepper.skips, stepper.kinds)
    while active:
        for row, its in zip(active, said):
            row.take(its)
        going = [i for i, row in enumerate(active) if row.stop is None]
        active = [active[i] for i in going]
        if active:
            said = stepper.step(skip(active[0].steps) if callable(skip) else skip, going)
        for row in active:
            row.steps += 1
    return [Generation(r.ids, r.confidences, r.stop, r.steps, timings, r.accepted) for r in rows]


def generate(
    model, prompt_ids, max_new_tokens, eos_id=None, skip=None, exit=None, temperature=0.0, draft=0
) -> Generation:
    """Continues the token ids of one prompt: prefill with all layers, decode under `skip`.

    eos_id: the token, or tokens, that end the text (not part of ids). skip: (n_layers, 2) bool mask
    or `model.Skip`, or a function of the decoding step that gives one. exit: (window, threshold) or
    None. temperature: 0 is greedy. draft: the skip set only drafts, so many tokens a round, and the
    text is the full model's. The stop is "eos", "confidence", "length" (max_new_tokens reached) or
    "context" (it is full, or the prompt does not fit: ids is then empty). Raises ValueError if
    max_new_tokens is below 1, or for drafts that are not greedy."""
    if draft and temperature > 0:
        raise ValueError("draft: expected a temperature of 0")
    skip = Draft(skip, draft) if draft else skip
    eos_ids = {eos_id} if isinstance(eos_id, int) else eos_id or ()
    until = Until(max_new_tokens, frozenset(eos_ids), exit=exit and Exit(*exit))
    group = (KVCache(model, 1, 0), [list(prompt_ids)])
    stepper = getattr(model, "stepper", Stepper)(model, temperature)  # a compiled one has its own
    return generate_batch(stepper, [group], until, skip)[0]


@dataclass
class StageResult:
    """One stage of one question."""

    name: str
    prompts: list[str]  # one, or one for each option
    prompt_tokens: int  # of the longest
    rows: list[Generation]  # what each prompt was continued with
    texts: list[str]  # the same as later prompts quote it
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
    """A model that answers questions in stages."""

    model: Llama
    tokenizer: Tokenizer
    max_new_tokens: int = 64
    shots: str = ""  # before each prompt; each of their texts ends at a newline, as generated ones
    stepper: Stepper | None = None  # a plain one unless given

    @torch.inference_mode()
    def __post_init__(self):
        self.stepper = self.stepper or Stepper(self.model)
        self.shared = KVCache(self.model, 1, 0)  # holds what all prompts begin with: the shots
        ids = self.tokenizer.encode(self.shots)
        longer = self.tokenizer.encode(self.shots + "A")  # the last token may join what follows
        ids = ids[: common_prefix([ids, longer])]
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
        """Generates stage `index` of questions side by side, all their texts in one batch; see
        `answer`. said: for each question the texts of the stages before. caches: one for each
        question, of one row; their prefix is reused."""
        groups = []
        for question, texts, cache in zip(questions, said, caches):
            groups.append((cache, self.prompt_ids(index, question, texts)))
        last_ids = frozenset(self.tokenizer.newline_ids if self.shots else ())
        until = Until(self.max_new_tokens, frozenset(self.tokenizer.eos_ids), last_ids, exit)
        rows = generate_batch(self.stepper, groups, until, skip)
        timings = rows[0].timings.share(len(questions))
        name = STAGES[index].name
        results = []
        for question, before, (_, ids) in zip(questions, said, groups):
            mine, rows = rows[: len(ids)], rows[len(ids) :]
            texts = [self.tokenizer.decode(row.ids) for row in mine]
            if self.shots:
                texts = [text.split("\n")[0] for text in texts]
            texts = [quote(index, text) for text in texts]
            prompts = self.prompts(index, question, before)
            results.append(StageResult(name, prompts, max(map(len, ids)), mine, texts, timings))
        return results

    def answer(self, questions: list[Question], skips=None, exit=None, caches=None):
        """Answers questions side by side: [(label or None, StageResult of every stage)].

        skips: a skip set for each stage, as `generate` takes it, or a `Draft`; None: none. exit:
        (window, threshold) or None. caches: from `new_caches`, to reuse what they hold. A batch's
        time is shared out evenly. Raises ValueError unless there is a skip set for each stage.
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
        labels = [find_answer(stages[-1].texts[0], q.labels) for stages, q in zip(done, questions)]
        return list(zip(labels, done))


def importance_of(pipeline: Pipeline, questions: list[Question], answered) -> Importance:
    """Importance over the prompts of all stages; answered: each question's results, unskipped."""
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
