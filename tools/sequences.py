r"""Training sequences: the very prompts that inference makes, and what is to be said after them.

A question with its targets becomes one sequence of tokens, which holds all stages:

    base prompt  Recall: {knowledge}  Analyze: For option A, {analysis} ...  Summarize: {answer}

Only what a stage says is taught. Its last token is taught to be followed by the end of the text,
although the sequence goes on.

Inference encodes every prompt as a whole, and then generates token by token. So a text's tokens
stand right after the tokens of its prompt, whatever one encoding of all the text would make of the
border: Llama 3 has a piece `".\n`, and a model that is taught on it learns to stop before the
quote. Where the prompt of a later stage makes such a piece of the end of an earlier text and what
follows, no sequence can hold both, so that prompt begins a sequence of its own, in which only what
comes after it is taught.

    python tools/train.py --model demo --data data/demo/train.jsonl --out tuned --steps 20
"""

from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from data import prompts
from data.questions import Question
from data.tokenizer import Tokenizer

LAST_STAGE_WEIGHT = 8.0  # of a token of the last stage in the loss: few, and one is the answer
PROMPT = -1  # the stage of a token that no stage said


class Sequence(NamedTuple):
    """Tokens to train on, four lists of the same length.

    ids: the tokens. labels: what the model shall say after each. weights: what that counts in the
    loss, 0 for nothing. stages: the index of the stage that says the token itself, or PROMPT.
    """

    ids: list[int]
    labels: list[int]
    weights: list[float]
    stages: list[int]

    def add_prompt(self, ids: list[int]) -> None:
        """Tokens that are given."""
        self.ids.extend(ids)
        self.labels.extend([0] * len(ids))
        self.weights.extend([0.0] * len(ids))
        self.stages.extend([PROMPT] * len(ids))

    def add_text(self, ids: list[int], stage: int, weight: float, eos: int) -> None:
        """Tokens that a stage says, after those that are here. The last is followed by eos."""
        self.labels[-1] = ids[0]
        self.weights[-1] = weight
        self.ids.extend(ids)
        self.labels.extend([*ids[1:], eos])
        self.weights.extend([weight] * len(ids))
        self.stages.extend([stage] * len(ids))


def sequences(
    question: Question, tokenizer: Tokenizer, orders: list[list[int]] | None = None
) -> list[Sequence]:
    """What one question teaches: one sequence, or more where a token crosses a border.

    orders: for each stage the order of its texts, as for `data.prompts.pieces`.
    """
    eos = min(tokenizer.eos_ids)
    found: list[Sequence] = []
    text = ""
    for piece, stage in prompts.pieces(question, orders):
        if stage is None:
            text += piece
            continue
        prompt = tokenizer.encode(text)
        if not found or prompt[: len(found[-1].ids)] != found[-1].ids:
            found.append(Sequence([], [], [], []))
        sequence = found[-1]
        sequence.add_prompt(prompt[len(sequence.ids) :])
        ids = said(prompt, text, piece, tokenizer)
        sequence.add_text(ids, stage, weight_of(stage), eos)
        text += piece
    return found


def said(before: list[int], prompt: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text that a model says after the tokens `before` of its prompt."""
    whole = tokenizer.encode(prompt + text)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    # A piece spans the border. The prompt is given, so the text is said in tokens of its own.
    # SentencePiece puts a blank before what it encodes, so there the text's own may be too much.
    for alone in (text, text.removeprefix(" ")):
        ids = tokenizer.encode(alone, bos=False)
        if tokenizer.decode(before + ids) == prompt + text:
            return ids
    return tokenizer.encode(text, bos=False)


def weight_of(stage: int) -> float:
    if stage == len(prompts.STAGES) - 1:
        return LAST_STAGE_WEIGHT
    return 1.0


def longest(question: Question, tokenizer: Tokenizer) -> int:
    """The tokens of its longest sequence, which is the one with the last text."""
    *before, last = prompts.pieces(question)
    prompt = "".join(text for text, _ in before)
    ids = tokenizer.encode(prompt)
    return len(ids) + len(said(ids, prompt, last[0], tokenizer))


# ---------------------------------------------------------------- what is drawn


def draw_orders(question: Question, rng: Random, options: int | None) -> list[list[int]] | None:
    """The order of every stage's texts, None for their own: one half of the time each.

    In use each option is analyzed with no other before it, so the order must not matter.
    options: how many options' texts are taught, the answer's among them; None: all of them.
    """
    orders = []
    for stage in prompts.STAGES:
        order = list(range(len(stage.leads(question))))
        rng.shuffle(order)
        orders.append(order)
    shuffled = rng.random() < 0.5
    if options is None:
        return orders if shuffled else None
    answer = question.labels.index(question.answer)
    for order in orders:
        if len(order) == len(question.labels):
            some = draw_options(answer, order, options, rng)
            order[:] = [i for i in order if i in some]
        if not shuffled:
            order.sort()
    return orders


def draw_options(answer: int, order: list[int], n: int, rng: Random) -> set[int]:
    """The answer's option and others, n in all if there are as many."""
    others = [i for i in order if i != answer]
    return {answer, *rng.sample(others, min(n - 1, len(others)))}


def draw_sequences(
    questions: list[Question], tokenizer: Tokenizer, rng: Random, options: int | None = None
) -> list[Sequence]:
    """The sequences of some questions, short ones first, so that micro-batches pad little."""
    found = []
    for question in questions:
        found += sequences(question, tokenizer, draw_orders(question, rng, options))
    return sorted(found, key=lambda sequence: len(sequence.ids))


# ---------------------------------------------------------------- tensors


class Batch(NamedTuple):
    """Sequences as tensors, padded on the right, where causality hides the padding.

    tokens, stages: (bsz, seqlen), as in `Sequence`. where, labels, weights: (n,) of the positions
    that are taught; `where` counts in tokens.flatten().
    """

    tokens: Tensor
    stages: Tensor
    where: Tensor
    labels: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device. From pinned memory nothing waits for the copy."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pinned(self) -> "Batch":
        """The same in memory that a GPU reads by itself."""
        return Batch(*(tensor.pin_memory() for tensor in self))


def make_batch(rows: list[Sequence]) -> Batch:
    """The batch of some sequences, on the CPU."""
    seqlen = max(len(row.ids) for row in rows)
    tokens = torch.zeros(len(rows), seqlen, dtype=torch.long)
    stages = torch.full((len(rows), seqlen), PROMPT)
    labels = torch.zeros(len(rows), seqlen, dtype=torch.long)
    weights = torch.zeros(len(rows), seqlen)
    for i, row in enumerate(rows):
        length = len(row.ids)
        tokens[i, :length] = torch.tensor(row.ids)
        stages[i, :length] = torch.tensor(row.stages)
        labels[i, :length] = torch.tensor(row.labels)
        weights[i, :length] = torch.tensor(row.weights)
    where = weights.flatten().nonzero()[:, 0]
    return Batch(tokens, stages, where, labels.flatten()[where], weights.flatten()[where])
