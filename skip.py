"""Which sub-layers to skip: importance, ranking, and every policy the paper compares.

A decoder layer has two sub-layers, attention (MHSA, column 0) and feed-forward (FFN, column 1). A
skip set is a mask (n_layers, 2) for `model.Llama.forward`, or a function of the decoding step that
returns one. A budget is the number of sub-layers that a skip set leaves out.

    python skip.py --limit 32
"""

import data  # noqa: F401  # isort: skip  (first, so that Ctrl-C is one line while torch loads)

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Llama

ATTENTION, FFN = 0, 1
SubLayer = tuple[int, int]  # (layer, ATTENTION or FFN)


def mask_of(sublayers: Iterable[SubLayer], n_layers: int) -> Tensor:
    """The bool mask (n_layers, 2) that skips the given sub-layers."""
    mask = torch.zeros(n_layers, 2, dtype=torch.bool)
    for layer, sub in sublayers:
        mask[layer, sub] = True
    return mask


def whole_layers(layers: Iterable[int], n_layers: int) -> Tensor:
    return mask_of(((layer, sub) for layer in layers for sub in (ATTENTION, FFN)), n_layers)


# ---------------------------------------------------------------- importance


class Importance(NamedTuple):
    """What is known of the sub-layers, each (n_layers, 2): mean similarity and mean norm ratio."""

    similarity: Tensor
    ratio: Tensor


class ImportanceProbe:
    """A probe for `Llama.forward`: how much every sub-layer changes the residual stream.

    similarity(MHSA) = cos(x1, x2), similarity(FFN) = cos(x2, x3), with x1 the residual stream
    before a layer's attention norm, x2 after attention is added, x3 after the FFN is added; ratio
    is the norm after by the norm before (AdaSkip's rho). Both in float32, averaged over the tokens
    of a forward and over forwards; 0 where a sub-layer never ran. (LiteStage, overview figure.)
    """

    def __init__(self, n_layers: int):
        self.sums = torch.zeros(2, n_layers, 2, dtype=torch.float64)
        self.counts = torch.zeros(n_layers, 2, dtype=torch.float64)

    def __call__(self, layer: int, sub: int, before: Tensor, after: Tensor) -> None:
        before, after = before.float(), after.float()  # (bsz, seqlen, dim)
        self.sums[0, layer, sub] += F.cosine_similarity(before, after, dim=-1).mean().item()
        self.sums[1, layer, sub] += (after.norm(dim=-1) / before.norm(dim=-1)).mean().item()
        self.counts[layer, sub] += 1

    def means(self) -> Importance:
        return Importance(*(self.sums / self.counts.clamp(min=1)))


@torch.inference_mode()
def measure_importance(model: Llama, prompts: Iterable[list[int]]) -> Importance:
    """Layer importance, step 1 of LiteStage's offline phase.

    prompts: the token ids of every validation question's prompts in the three stages (question;
    question + recall; question + recall + analysis), which are prefilled by all layers. The
    similarities of all prefills are accumulated: we give the mean, which ranks the same.
    """
    probe = ImportanceProbe(model.args.n_layers)
    for ids in prompts:
        model(torch.tensor([ids], device=model.device), probe=probe, tails=[1])
    return probe.means()


def rank(similarity: Tensor, granularity: str = "sublayer") -> list[SubLayer]:
    """All sub-layers, the most similar (first to be skipped) first; ties in the model's order.

    granularity "layer" ranks whole layers, by their mean, and keeps their two sub-layers together.
    """
    if granularity == "layer":
        similarity = similarity.mean(1, keepdim=True).expand_as(similarity)
    order = similarity.flatten().argsort(descending=True, stable=True)
    return [divmod(i, 2) for i in order.tolist()]


# ---------------------------------------------------------------- policies


@dataclass(frozen=True)
class Setting:
    """What a policy may use beside the budget."""

    importance: Importance
    ranking: list[SubLayer]
    granularity: str = "sublayer"
    seed: int = 0
    horizon: int = 16  # decoding steps that a stage is expected to take

    @property
    def n_layers(self) -> int:
        return len(self.importance.similarity)


def full(setting: Setting, budget: int) -> Tensor:
    """Skips nothing, whatever the budget: the baseline."""
    return mask_of([], setting.n_layers)


def litestage(setting: Setting, budget: int) -> Tensor:
    """The first `budget` sub-layers of the ranking; each stage has its own budget (LiteStage)."""
    if setting.granularity == "layer":
        budget -= budget % 2  # whole layers only
    return mask_of(setting.ranking[:budget], setting.n_layers)


def unified(setting: Setting, budget: int) -> Tensor:
    """Unified Layer Skipping (2404.06954): whole layers at even intervals, first and last kept.

    The authors' integer interval bunches up at small ratios; we space the layers evenly.
    """
    inner = setting.n_layers - 2
    count = max(min(budget // 2, inner), 0)
    return whole_layers((1 + (2 * i + 1) * inner // (2 * count) for i in range(count)), inner + 2)


def early_exit(setting: Setting, budget: int) -> Tensor:
    """Early exit as AdaSkip (2501.02336) compares it: the last layers, at every step."""
    n_layers = setting.n_layers
    return whole_layers(range(n_layers - budget // 2, n_layers), n_layers)


def skipdecode(setting: Setting, budget: int) -> Callable[[int], Tensor]:
    """SkipDecode (2307.02628): the number of whole layers skipped grows linearly with the step,
    from low layers up, first and last kept, so that a layer never returns.

    It reaches twice the budget after `horizon` steps: the mean over them is the budget.
    """
    n_layers = setting.n_layers

    def skip(step: int) -> Tensor:
        grown = round(budget * min(step / max(setting.horizon - 1, 1), 1))
        return whole_layers(range(1, 1 + min(grown, n_layers - 2)), n_layers)

    return skip


def shuffled(setting: Setting, budget: int) -> Tensor:
    """Random sub-layers, drawn once by the seed: the floor that every method must beat."""
    order = random.Random(setting.seed).sample(setting.ranking, len(setting.ranking))
    return mask_of(order[:budget], setting.n_layers)


class AdaSkip:
    """AdaSkip (2501.02336): the `budget` most similar sub-layers, the same ranking for every stage.

    A skipped sub-layer's output is its input times rho, the mean ratio of the norms after and
    before. Per batch, FFNs whose similarity over the first `window` decoding steps reaches the
    budget-th largest prefill similarity are skipped as well. The authors' code watches 20 steps,
    more than a stage of ours lasts.
    """

    def __init__(self, setting: Setting, budget: int, window: int = 4):
        importance = setting.importance
        chosen = mask_of(rank(importance.similarity)[:budget], setting.n_layers)
        self.mask = chosen * importance.ratio
        largest = importance.similarity.flatten().sort(descending=True).values
        self.threshold = largest[budget - 1].item() if budget else float("inf")
        self.window = window
        self.probe: ImportanceProbe | None = None  # watches what runs in the first steps

    def __call__(self, step: int) -> Tensor:
        if step == 0:  # a new request
            self.probe, self.now = ImportanceProbe(len(self.mask)), self.mask
        if step == self.window:
            similarity, ratio = self.probe.means()
            extra = (similarity >= self.threshold) & (self.probe.counts > 0)
            extra[:, ATTENTION] = False
            self.now = torch.where(extra, ratio, self.mask)
            self.probe = None
        return self.now


# name: function of (setting, budget) -> skip set. Add your own here, then `--method NAME`.
POLICIES: dict[str, Callable] = {
    "full": full,
    "unified": unified,
    "skipdecode": skipdecode,
    "early-exit": early_exit,
    "adaskip": AdaSkip,
    "random": shuffled,
    "litestage": litestage,
}


if __name__ == "__main__":
    from data.ask import show_importance  # they stand on this module
    from data.cli import run

    run(show_importance)
