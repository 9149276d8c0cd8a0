"""Generation: prefill, decoding under a skip set, the confidence exit, the three stages.

Prefill runs all layers, decoding skips. A question is answered in three stages (TinyThinker, Piao
and Park 2024): recall general knowledge, analyze each option, summarize into an answer; the prompt
of each stage holds everything that was generated before.

    python generate.py "Which one contains alcohol?" wrench lemonade milk wine
"""

from data.prompts import STAGES, find_answer, finish, stage_prompts  # isort: skip  (for Ctrl-C)

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix  # of any sequences, token ids among them
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from data.questions import Question
from data.tokenizer import Tokenizer
from model import KVCache, Llama, expect


class Exit(NamedTuple):
    """Confidence exit (LiteStage): stop when the mean of the last `window` confidences, each a
    token's largest softmax probability, is at or below `threshold`; with fewer it goes on."""

    window: int = 5
    threshold: float = 0.5


class Timings(NamedTuple):
    """What a batch cost: seconds of the prefill up to the first token, and of each step after."""

    prefill_s: float
    step_s: list[float]
    skipped: float = 0.0  # sub-layers, mean over the steps

    @property
    def decode_s(self) -> float:
        """Steps x median step time: one step that the system preempted does not count."""
        return len(self.step_s) * median(self.step_s) if self.step_s else 0.0

    def share(self, n: int) -> "Timings":
        """One question's part of a batch of n."""
        return Timings(self.prefill_s / n, [step / n for step in self.step_s], self.skipped)


class Generation(NamedTuple):
    """What one row generated; why it stopped: eos, confidence, length or context; the time of the
    whole batch it was generated in."""

    ids: list[int]
    stop: str
    timings: Timings
    steps: int  # decoding steps it took, none for the first token


def prefill(model: Llama, groups: list[tuple[KVCache, list[list[int]]]], room: int):
    """Runs all layers on prompts, each group of which shares a cache of one row.

    One forward a group: what its prompts have in common, less the tokens that are in the cache
    from earlier prefills (the longest common token prefix that all layers wrote), and then what
    each goes on with, as tails that do not see one another. The slots of several prompts are then
    copied into one batch. Returns (cache with `room` more slots, logits (bsz, vocab) at the ends).
    """
    lengths = [len(prompt) for _, prompts in groups for prompt in prompts]
    n, longest, logits = len(lengths), max(lengths), []
    pad = [longest - length for length in lengths]
    batch = KVCache(model, n, longest + room, pad) if n > 1 else None
    for cache, prompts in groups:
        shared = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
        ready = min(len(commonprefix([cache.tokens, prompts[0]])), shared)
        tails, slot = [prompt[shared:] for prompt in prompts], shared
        size = shared + sum(map(len, tails)) + (0 if batch else room)
        cache.forget(ready)
        if cache.max_len < size:
            cache.grow(model, size)
        new = torch.tensor([sum(tails, prompts[0][ready:shared])], device=model.device)
        first = sum(map(len, logits))  # row of this group in the batch
        logits.append(model(new, cache, ready, tails=[len(tail) for tail in tails])[0])
        cache.tokens = prompts[0][:]  # the first tail stands where it would stand alone
        if batch is None:
            return cache, logits[0]
        slots = []
        for tail, holes in zip(tails, pad[first:]):  # a hole is masked, but must not be NaN
            slots.append([0] * holes + [*range(shared), *range(slot, slot + len(tail))])
            slot += len(tail)
        batch.copy_from(cache, torch.tensor(slots, device=model.device), first)
    return batch, torch.cat(logits)


def pick(logits: Tensor, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
    """The next token of each row of logits (bsz, vocab), and its confidence: both (bsz,)."""
    confidences, tokens = logits.softmax(-1, dtype=torch.float32).max(-1)
    if temperature > 0.01:  # less is greedy
        tokens = torch.multinomial((logits.float() / temperature).softmax(-1), 1)[:, 0]
    return tokens, confidences


def read(tokens: Tensor, confidences: Tensor) -> tuple[list[int], list[float]]:
    """The same as lists: one small read, the one time that a step waits for a GPU."""
    ids, values = torch.stack((tokens, confidences)).tolist()  # float32 holds ids below 2^24
    return [int(i) for i in ids], values


class StaticStep:
    """A decoding step whose tensors stay where they are and keep their shapes, token after token.

    That is what a CUDA graph needs: on a GPU the step is recorded once for each skip set and then
    replayed without the interpreter; elsewhere it just runs, to the same tokens. It attends to all
    of its own cache, (bsz, ..., size, ...), under a mask; finished rows stay, for on a GPU they
    cost next to nothing. Its results are `tokens` and `confidences`, each (bsz,).
    """

    def __init__(self, model: Llama, bsz: int, size: int):
        self.model = model
        self.cache = KVCache(model, bsz, size)
        zeros = torch.zeros(bsz, dtype=torch.long, device=model.device)
        self.cache.pad, self.tokens, self.pos = zeros, zeros.clone(), zeros[:1].clone()
        self.confidences = torch.zeros(bsz, device=model.device)
        self.recorded: dict[str, Callable] = {}  # by skip set

    def load(self, cache: KVCache, tokens: Tensor, pos: int) -> None:
        """Starts anew: the next step decodes what follows the tokens (bsz,) at slot pos."""
        for mine, its in zip(self.cache.layers, cache.layers):
            mine[:, :, :pos] = its[:, :, :pos]
            mine[:, :, pos:] = 0  # masked, but a NaN would get through a mask
        self.cache.pad.copy_(torch.zeros_like(tokens) if cache.pad is None else cache.pad)
        self.tokens.copy_(tokens)
        self.pos.fill_(pos)

    def under(self, skip: Tensor | None) -> Callable[[], None]:
        """The step that skips `skip`, recorded when it is first asked for."""
        key = str(skip if skip is None else skip.tolist())
        if key not in self.recorded:
            self.recorded[key] = self.record(skip)
        return self.recorded[key]

    def record(self, skip: Tensor | None) -> Callable[[], None]:
        def step() -> None:
            logits = self.model(self.tokens[:, None], self.cache, self.pos, skip)[:, -1]
            for mine, new in zip((self.tokens, self.confidences), pick(logits)):
                mine.copy_(new)
            self.pos += 1

        if self.model.device.type != "cuda":
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up, which no graph may record
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


class Row:
    """A row while it is being decoded: its ids so far, and why it stopped once it has."""

    def __init__(self, length: int, exit: Exit | None):
        self.length, self.exit = length, exit
        self.ids, self.steps, self.stop = [], 0, None
        self.recent: deque[float] = deque(maxlen=exit.window if exit else 1)

    def take(self, token: int, confidence: float, ends, max_new_tokens: int, context: int) -> None:
        """Appends a token and decides whether the row goes on."""
        expect(confidence == confidence, "the logits are NaN: try --dtype float32")
        if ends.get(token, True):
            self.ids.append(token)
            self.recent.append(confidence)
        window, threshold = self.exit or (0, 0.0)
        if token in ends:
            self.stop = "eos"
        elif window and len(self.recent) == window and sum(self.recent) <= threshold * window:
            self.stop = "confidence"
        elif len(self.ids) >= max_new_tokens:
            self.stop = "length"
        elif self.length + len(self.ids) > context:
            self.stop = "context"
        self.steps += self.stop is None  # it goes on


@torch.inference_mode()
def generate_batch(
    model, groups, max_new_tokens, ends=None, skip=None, exit=None, temperature=0.0, static=None
) -> list[Generation]:
    """Continues all prompts of all groups together, in their order; see `prefill`, `generate`.

    ends: for each token that ends a text, whether it belongs to it. static: {(bsz, size): recorded
    StaticStep}, to which new ones are added; None decodes without, and drops finished rows.
    """
    ends = ends or {}
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected 1 or more, found {max_new_tokens}")
    context = model.args.max_seq_len
    rows = [Row(len(prompt), exit) for _, prompts in groups for prompt in prompts]
    fits = [(cache, [p for p in prompts if 0 < len(p) <= context]) for cache, prompts in groups]
    active = [row for row in rows if 0 < row.length <= context]
    prefill_s, step_s, skipped, replay = 0.0, [], 0, None
    if active:
        room, pos = min(max_new_tokens, context), max(row.length for row in active)
        if static is not None and not callable(skip) and not temperature:
            key = (len(active), (pos + room + 255) // 256 * 256)  # few sizes, so few recordings
            if key not in static:
                static[key] = StaticStep(model, *key)
            step = static[key]
            replay = step.under(skip)  # recorded once, which is not timed
        begin = time.perf_counter()
        cache, logits = prefill(model, [group for group in fits if group[1]], room)
        tokens, confidences = pick(logits, temperature)
        if replay is not None:
            step.load(cache, tokens, pos)
        new = read(tokens, confidences)
        prefill_s = time.perf_counter() - begin
    while active:
        for row, token, confidence in zip(active, *new):
            if row.stop is None:
                row.take(token, confidence, ends, max_new_tokens, context)
        keep = [i for i, row in enumerate(active) if row.stop is None]
        if not keep:
            break
        begin = time.perf_counter()
        if len(keep) < len(active) and replay is None:  # a finished row costs nothing more
            active, tokens = [active[i] for i in keep], tokens[keep]
            cache.keep(keep)
        now = skip(len(step_s)) if callable(skip) else skip
        skipped += 0 if now is None else int(now.count_nonzero())
        if replay is not None:
            replay()
            new = read(step.tokens, step.confidences)
        else:
            logits = model(tokens[:, None], cache, pos, now, getattr(skip, "probe", None))[:, -1]
            tokens, confidences = pick(logits, temperature)
            new = read(tokens, confidences)
        pos += 1
        step_s.append(time.perf_counter() - begin)
    timings = Timings(prefill_s, step_s, skipped / max(len(step_s), 1))
    return [Generation(row.ids, row.stop or "context", timings, row.steps) for row in rows]


def generate(
    model, prompt_ids, max_new_tokens: int, eos_id=None, skip=None, exit=None, temperature=0.0
) -> Generation:
    """Continues one prompt: prefill with all layers, decode under `skip`.

    eos_id: the token, or tokens, that end the text (not part of ids). skip: (n_layers, 2) mask of
    `model.Llama.forward`, or a function of the decoding step that gives one. exit: (window,
    threshold) of the confidence exit (LiteStage, generation early exit); None never exits.
    temperature: 0 is greedy. The stop is "eos", "confidence", "length" (max_new_tokens reached) or
    "context" (the model's context is full, or the prompt alone does not fit: ids is then empty).
    """
    eos_ids = () if eos_id is None else {eos_id} if isinstance(eos_id, int) else set(eos_id)
    exit, ends = None if exit is None else Exit(*exit), dict.fromkeys(eos_ids, False)
    group = (KVCache(model, 1, 0), [list(prompt_ids)])
    return generate_batch(model, [group], max_new_tokens, ends, skip, exit, temperature)[0]


# ---------------------------------------------------------------- the three stages


@dataclass
class Stage:
    """One stage of one question: the texts (one, or one per option), what they cost, why they
    stopped."""

    name: str
    texts: list[str]
    stops: list[str]
    tokens: int  # generated, all texts together
    steps: int  # decoding steps, of the longest text
    prompt_tokens: int  # of the longest prompt
    timings: Timings

    @property
    def latency_s(self) -> float:
        return self.timings.prefill_s + self.timings.decode_s


@dataclass
class Pipeline:
    """A model that answers questions in stages. shots: worked examples put before each prompt;
    each of their texts ends at a newline, and so generated texts end there, too. static: recorded
    decoding steps, of `generate_batch`."""

    model: Llama
    tokenizer: Tokenizer
    max_new_tokens: int = 64
    shots: str = ""
    static: dict[tuple[int, int], StaticStep] | None = None

    def prompt_ids(self, index: int, question: Question, said: list[list[str]]) -> list[list[int]]:
        prompts = stage_prompts(index, question, said)
        return [self.tokenizer.encode(self.shots + prompt) for prompt in prompts]

    def run_stage(self, index, questions, said, caches, skip=None, exit=None) -> list[Stage]:
        """Generates stage `index` (0 recall, 1 analyze, 2 summarize) of questions side by side.

        said: for each question the texts of the stages before. caches: a cache of one row for
        each question, whose prefix is reused. All rows, every option of the analyze stage among
        them, are decoded as one batch.
        """
        prompts = [self.prompt_ids(index, *each) for each in zip(questions, said)]
        ends = dict.fromkeys(self.tokenizer.eos_ids, False)
        ends |= dict.fromkeys(self.tokenizer.newline_ids if self.shots else (), True)
        groups, most = list(zip(caches, prompts)), self.max_new_tokens
        rows = generate_batch(self.model, groups, most, ends, skip, exit, static=self.static)
        stages, rows = [], iter(rows)
        for question_prompts in prompts:
            mine = [next(rows) for _ in question_prompts]
            texts = [self.tokenizer.decode(row.ids) for row in mine]
            texts = [text.split("\n")[0] for text in texts] if self.shots else texts
            stage = Stage(
                STAGES[index],
                texts if index == 2 else [finish(text) for text in texts],
                stops=[row.stop for row in mine],
                tokens=sum(len(row.ids) for row in mine),
                steps=max(row.steps for row in mine),
                prompt_tokens=max(map(len, question_prompts)),
                timings=mine[0].timings.share(len(questions)),
            )
            stages.append(stage)
        return stages

    def answer(self, questions, skips=(None, None, None), exit=None, caches=None):
        """Answers questions side by side in three stages, each under its own skip set.

        Returns (label or None, the three stages) for each; a batch's time is shared out evenly.
        """
        caches = caches or [KVCache(self.model, 1, 0) for _ in questions]
        done: list[list[Stage]] = [[] for _ in questions]
        for index, skip in enumerate(skips):
            said = [[stage.texts for stage in stages] for stages in done]
            new = self.run_stage(index, questions, said, caches, skip, exit)
            done = [[*stages, stage] for stages, stage in zip(done, new)]
        return [(find_answer(stages[2].texts[0]), stages) for stages in done]


if __name__ == "__main__":
    from data.ask import main  # they stand on this module
    from data.cli import run

    run(main)
