"""Measuring the ranking by loss: a ranking for each stage, journaled, with progress.

The ranking is skip.py's `rank_by_loss`. Here is what it ranks by, the loss and the time of a
sub-layer, and a journal of every loss, so that a killed search goes on where it was.

    python search.py --ranking loss --out plan-loss.json
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.prompts import STAGES
from data.questions import Question
from generate import Pipeline, StageResult, prefill
from model import KVCache, Llama, expect
from skip import ATTENTION, FFN, SubLayer, mask_of, rank_by_loss
from tools.clock import time_steps
from tools.journal import Journal
from tools.progress import progress
from tools.ranks import gather, rank

QUESTIONS = 10  # that losses are measured on: minutes
ROUNDS = 5  # of timing a sub-layer
SHARE = 0.6  # of the sub-layers are ranked one after the other; more is never worth skipping


@dataclass
class SkipLoss:
    """What skipping does to the text: KL(full || skipped), nats per token, in teacher-forced
    decoding of what the full model wrote. (Ours.)"""

    model: Llama
    cache: KVCache  # of the prompts, prefilled by all layers, with room for the texts
    pos: int  # the slot where the texts begin
    tokens: Tensor  # (bsz, seqlen): the texts, padded on the right
    counted: Tensor  # (bsz, seqlen) bool: what is not padding

    def __post_init__(self):
        self.full = self.log_probs(None)

    @torch.inference_mode()
    def log_probs(self, mask: Tensor | None) -> Tensor:
        """(tokens that count, vocab), each given the ones before it."""
        logits = self.model(self.tokens, self.cache, self.pos, mask)[self.counted]
        return logits.log_softmax(-1, dtype=torch.float32)

    def __call__(self, mask: Tensor) -> float:
        skipped = self.log_probs(mask)
        return F.kl_div(skipped, self.full, reduction="batchmean", log_target=True).item()


@torch.inference_mode()
def skip_loss(pipeline: Pipeline, index: int, questions: list[Question], answered) -> SkipLoss:
    """The loss of skipping in stage `index`, on the texts in `answered`; each
    question's stages by the full model. See `SkipLoss`."""
    groups = []
    texts = []
    for question, stages, cache in zip(questions, answered, pipeline.new_caches(len(questions))):
        said = [stage.texts for stage in stages[:index]]
        groups.append((cache, pipeline.prompt_ids(index, question, said)))
        texts += [row.ids for row in stages[index].rows]
    tokens = pad_sequence([torch.tensor(ids) for ids in texts], True, -1).to(pipeline.model.device)
    cache, pos, _ = prefill(pipeline.model, groups, tokens.shape[1])
    return SkipLoss(pipeline.model, cache, pos, tokens.clamp(min=0), tokens >= 0)


class SharedLoss:
    """The loss of skipping in stage `index` over all questions, of which each rank has a share."""

    def __init__(self, pipeline: Pipeline, index: int, questions: list[Question], answered):
        number, world = rank()
        mine = questions[number::world]
        self.mine = None  # more ranks than questions
        if mine:
            self.mine = skip_loss(pipeline, index, mine, answered[number::world])

    def __call__(self, mask: Tensor) -> float:
        part = (0.0, 0)  # nats, tokens
        if self.mine:
            tokens = int(self.mine.counted.sum())
            part = (self.mine(mask) * tokens, tokens)
        nats, tokens = zip(*gather(part))
        return sum(nats) / sum(tokens)


class JournaledLoss:
    """A loss of a mask (n_layers, 2), each measured once and written down."""

    def __init__(self, loss, stage: str, journal: Journal, bar):
        self.loss = loss
        self.stage = stage
        self.journal = journal
        self.bar = bar
        self.known: dict[str, float] = {}
        for line in journal.find("loss"):
            if line["stage"] == stage:
                self.known[line["skipped"]] = line["loss"]

    def __call__(self, mask: Tensor) -> float:
        skipped = "".join(str(int(one)) for one in mask.flatten())
        if skipped not in self.known:
            line = {"stage": self.stage, "skipped": skipped, "loss": self.loss(mask)}
            self.journal.append("loss", line)
            self.known[skipped] = self.journal.find("loss")[-1]["loss"]  # the first rank's
        self.bar.update()
        return self.known[skipped]


def sublayer_seconds(pipeline: Pipeline, questions: list[Question], said: list):
    """Seconds of a decoding step of each stage, (stages,), and of each sub-layer in it, (stages,
    n_layers, 2).

    All layers have the same shape, so attention takes what a step without any saves, by layer; the
    same for FFNs. said: for each question the texts of its stages.
    """
    n_layers = pipeline.model.args.n_layers
    masks = [mask_of([], n_layers)]
    for sub in (ATTENTION, FFN):
        masks.append(mask_of([(layer, sub) for layer in range(n_layers)], n_layers))
    rounds = []
    for i in progress(range(ROUNDS), "time of a sub-layer"):
        i %= len(questions)
        rounds.append(time_steps(pipeline, questions[i], said[i], [masks] * len(STAGES)))
    step_s = torch.tensor(rounds).nanmedian(0).values  # (stages, masks)
    saved = (step_s[:, :1] - step_s[:, 1:]).clamp(min=1e-7) / n_layers  # (stages, 2)
    return step_s[:, 0], saved[:, None].expand(-1, n_layers, -1)


def whole(stage: StageResult) -> bool:
    """Whether a stage said something in each of its texts, and did not run out of context."""
    return "context" not in stage.stops and all(row.ids for row in stage.rows)


def rank_stages(
    pipeline: Pipeline,
    questions: list[Question],
    answered: list[list[StageResult]],
    journal: Journal,
) -> list[list[SubLayer]]:
    """A ranking by loss for each stage; answered: each question's stages by the full model."""
    few = []
    by_full = []
    for question, stages in zip(questions, answered):
        if len(few) < QUESTIONS and all(whole(stage) for stage in stages):
            few.append(question)
            by_full.append(stages)
    expect(bool(few), "--ranking loss: the full model says nothing that fits the context")
    said = [[stage.texts for stage in stages] for stages in by_full]
    if not journal.find("sublayer_s"):
        journal.append("sublayer_s", sublayer_seconds(pipeline, few, said)[1].tolist())
    seconds = torch.tensor(journal.find("sublayer_s")[0])
    rankings = []
    for index, stage in enumerate(STAGES):
        loss = SharedLoss(pipeline, index, few, by_full)
        with progress(desc=f"losses, {stage.name}", unit="loss") as bar:
            measured = JournaledLoss(loss, stage.name, journal, bar)
            most = round(SHARE * 2 * pipeline.model.args.n_layers)
            rankings.append(rank_by_loss(measured, seconds[index], most))
    return rankings
