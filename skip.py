"""Which sub-layers to skip: importance, ranking, and every policy the paper compares.

A decoder layer has two sub-layers, attention (MHSA, column 0) and feed-forward (FFN, column 1). A
skip set is a mask (n_layers, 2) for `model.Llama.forward`, or a function of the decoding step that
returns one. A budget is the number of sub-layers that a skip set leaves out.

    python skip.py --limit 32
"""

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Llama, Skip

ATTENTION, FFN = 0, 1
SubLayer = tuple[int, int]  # (layer, ATTENTION or FFN)


def mask_of(sublayers: Iterable[SubLayer], n_layers: int) -> Tensor:
    """The bool mask (n_layers, 2) that skips the given sub-layers."""
    mask = torch.zeros(n_layers, 2, dtype=torch.bool)
    for layer, sub in sublayers:
        mask[layer, sub] = True
    return mask


def whole_layers(layers: Iterable[int], n_layers: int) -> Tensor:
    """The bool mask (n_layers, 2) that skips both sub-layers of the given layers."""
    return mask_of([(layer, sub) for layer in layers for sub in (ATTENTION, FFN)], n_layers)


class Importance(NamedTuple):
    """What is known of the sub-layers; see `ImportanceProbe`."""

    similarity: Tensor  # (n_layers, 2), mean
    ratio: Tensor  # the same, of norms


class ImportanceProbe:
    """A hook for `model.Skip`: how much every sub-layer changes the residual stream.

    similarity(MHSA) = cos(x1, x2), similarity(FFN) = cos(x2, x3): x1 is the residual stream before
    a layer's attention norm, x2 after attention is added, x3 after the FFN is. ratio: the norm
    after by the norm before (AdaSkip's rho). In float32, averaged over the tokens of a forward,
    then over forwards; 0 where a sub-layer never ran. (LiteStage, overview figure.)
    """

    def __init__(self, n_layers: int):
        self.similarity, self.ratio, self.counts = torch.zeros(3, n_layers, 2, dtype=torch.float64)

    def __call__(self, i, layer, x1, places, kv, skip_attention, skip_ffn) -> Tensor:
        x2 = layer(x1, places, kv, skip_attention, skip_ffn=True)
        x3 = layer(x2, places, kv, skip_attention=True, skip_ffn=skip_ffn)
        if not skip_attention:
            self.compare(i, ATTENTION, x1, x2)
        if not skip_ffn:
            self.compare(i, FFN, x2, x3)
        return x3

    def compare(self, layer: int, sub: int, before: Tensor, after: Tensor) -> None:
        """Takes in the residual stream (bsz, seqlen, dim) around a sub-layer."""
        before, after = before.float(), after.float()
        similarity = F.cosine_similarity(before, after, dim=-1)  # (bsz, seqlen)
        ratio = after.norm(dim=-1) / before.norm(dim=-1)
        self.similarity[layer, sub] += similarity.mean().item()
        self.ratio[layer, sub] += ratio.mean().item()
        self.counts[layer, sub] += 1

    def means(self) -> Importance:
        """The averages over all forwards so far."""
        n = self.counts.clamp(min=1)
        return Importance(self.similarity / n, self.ratio / n)


@torch.inference_mode()
def measure_importance(model: Llama, prompts: Iterable[list[int]]) -> Importance:
    """Layer importance, step 1 of LiteStage's offline phase: all layers prefill the prompts (token
    ids) of every validation question in all stages. The figure accumulates the similarities of all
    prefills: we give the mean, which ranks the same."""
    probe = ImportanceProbe(model.args.n_layers)
    watched = Skip(mask_of([], model.args.n_layers), probe)
    for ids in prompts:
        model(torch.tensor([ids], device=model.device), skip=watched, tails=[1])
    return probe.means()


def rank(similarity: Tensor, granularity: str = "sublayer") -> list[SubLayer]:
    """All sub-layers, the most similar (first to be skipped) first; ties in the model's order.
    granularity "layer" ranks whole layers, by their mean, and keeps their sub-layers together."""
    if granularity == "layer":
        similarity = similarity.mean(1, keepdim=True).expand_as(similarity)
    order = similarity.flatten().argsort(descending=True, stable=True)
    return [divmod(i, 2) for i in order.tolist()]


def rank_by_loss(loss, seconds: Tensor, most: int, few: int = 3, pool: int = 20) -> list[SubLayer]:
    """A stage's ranking by loss per time saved, the least first. (Ours; the iteration is
    BlockPruner's, 2406.10594, and FinerCut's, 2405.18218.)

    loss(mask): KL(full || skipped), nats per token, in teacher-forced decoding of the full model's
    own texts; see tools/losses.py. seconds (n_layers, 2): of each sub-layer in a decoding step. In
    every round the `pool` that were cheapest are measured again, on top of those chosen, and up to
    `few` join, the later ones only if they are still cheapest with the earlier ones gone: of two
    that stand in for each other one stays. After `most` the rest follows as is.
    """
    n_layers = len(seconds)
    ranking: list[SubLayer] = []
    left = [(layer, sub) for layer in range(n_layers) for sub in (ATTENTION, FFN)]
    prices: dict[SubLayer, float] = {}

    def measure(sublayers: list[SubLayer]) -> None:
        so_far = loss(mask_of(ranking, n_layers))
        for sublayer in sublayers:
            more = loss(mask_of([*ranking, sublayer], n_layers)) - so_far
            prices[sublayer] = more / seconds[sublayer].item()

    measure(left)
    while left and len(ranking) < most:
        left.sort(key=prices.get)
        for joined in range(min(few, len(left))):
            if joined:
                measure(left[:1])
            if prices[left[0]] > min(prices[other] for other in left):
                break
            ranking.append(left.pop(0))
        measure(left[:pool])
    return ranking + sorted(left, key=prices.get)


@dataclass(frozen=True)
class Setting:
    """What a policy may use beside the budget."""

    importance: Importance
    rankings: list[list[SubLayer]]  # one for each stage; all the same if by similarity
    granularity: str = "sublayer"
    seed: int = 0
    horizon: int = 16  # decoding steps that a stage is expected to take
    stage: int = 0
    trained: dict[str, Callable] = field(default_factory=dict)  # policies of a trained checkpoint

    def at(self, stage: int) -> "Setting":
        """The same in another stage."""
        return replace(self, stage=stage)

    @property
    def ranking(self) -> list[SubLayer]:
        """This stage's, what is skipped first in front."""
        return self.rankings[self.stage]

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
    """Unified Layer Skipping (2404.06954): whole layers at even intervals, first and last kept. The
    authors' integer interval bunches up at small ratios; we space the layers evenly."""
    inner = setting.n_layers - 2
    count = max(min(budget // 2, inner), 0)
    layers = [1 + (2 * i + 1) * inner // (2 * count) for i in range(count)]
    return whole_layers(layers, setting.n_layers)


def early_exit(setting: Setting, budget: int) -> Tensor:
    """Early exit as AdaSkip (2501.02336) compares it: the last layers, at every step."""
    return whole_layers(range(setting.n_layers - budget // 2, setting.n_layers), setting.n_layers)


def skipdecode(setting: Setting, budget: int) -> Callable[[int], Tensor]:
    """SkipDecode (2307.02628): the number of whole layers skipped grows linearly with the step,
    from low layers up, first and last kept, so that a layer never returns. It reaches twice the
    budget after `horizon` steps, or all it may: the mean over them is the budget at most."""
    n_layers = setting.n_layers

    def skip(step: int) -> Tensor:
        grown = round(budget * min(step / max(setting.horizon - 1, 1), 1))
        return whole_layers(range(1, 1 + min(grown, n_layers - 2)), n_layers)

    return skip


def shuffled(setting: Setting, budget: int) -> Tensor:
    """Random sub-layers, drawn once by the seed: the floor that every method must beat."""
    order = random.Random(setting.seed).sample(sorted(setting.ranking), len(setting.ranking))
    return mask_of(order[:budget], setting.n_layers)


class AdaSkip:
    """AdaSkip (2501.02336): the `budget` most similar sub-layers, the same ranking for every stage.

    A skipped sub-layer's output is its input times rho, the mean norm ratio. Per batch, FFNs whose
    similarity over the first `window` steps reaches the budget-th largest prefill similarity are
    skipped as well. The authors' code watches 20 steps, more than a stage of ours lasts; we watch
    5, the paper's smallest window.
    """

    def __init__(self, setting: Setting, budget: int, window: int = 5):
        similarity = setting.importance.similarity
        self.offline = mask_of(rank(similarity)[:budget], setting.n_layers)
        self.ratio = setting.importance.ratio
        largest = similarity.flatten().sort(descending=True).values
        self.threshold = largest[budget - 1].item() if budget else float("inf")
        self.window = window

    def __call__(self, step: int) -> Skip:
        if step == 0:  # a new request
            self.mask = self.offline
            self.rho = self.ratio.tolist()
            self.probe = ImportanceProbe(len(self.mask))
        if step == self.window:
            online = self.probe.means()
            similar = (online.similarity >= self.threshold) & (self.probe.counts > 0)
            similar[:, ATTENTION] = False
            self.mask = self.offline | similar
            self.rho = torch.where(similar, online.ratio, self.ratio).tolist()
        return Skip(self.mask, self.watch if step < self.window else self.scale)

    def watch(self, i, layer, *given) -> Tensor:
        """A hook of the first steps: what runs is probed, the rest scaled."""
        return self.scale(i, partial(self.probe, i, layer), *given)

    def scale(self, i, layer, x, places, kv, skip_attention, skip_ffn) -> Tensor:
        """A hook: a skipped sub-layer multiplies the residual stream by its rho."""
        if skip_attention:
            x = x * self.rho[i][ATTENTION]
        if not (skip_attention and skip_ffn):
            x = layer(x, places, kv, skip_attention, skip_ffn)
        if skip_ffn:
            x = x * self.rho[i][FFN]
        return x


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
    from tools.ask import show_importance  # it stands on this module
    from tools.command import run

    run(show_importance)
