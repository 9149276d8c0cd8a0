"""DLO (2407.11030): a router at every layer's entry decides whether a token's FFN runs.

    score = sigmoid(w x)      x <- r + FFN(r) * (1 + 0.05 (score - 0.5))      if score > 0.5

x is the residual stream where the layer begins, r after attention, which always runs; a router
starts at zero. In training the (layer, token) pairs whose FFN changes the direction of the stream
least, by cos(r, r + FFN(r)), are labelled to skip; the share of the others, the capacity, falls
from 1 to 0.9, and each layer has the part of it that the labels of the step before gave it.

    python tools/train.py --model demo --data data/demo/train.jsonl --out dlo --routers --steps 20
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skip import FFN
from tools.tokenwise import TokenHook, lowest, run_ffn, threshold_of

RUNS_ABOVE = 0.5  # the score, as published
GAIN_RANGE = 0.05  # gains from 0.975 to 1.025
ANNEALED_BY = 0.5  # of the training, then the capacity stays


def gain_of(scores: Tensor) -> Tensor:
    """What a FFN's output is multiplied by."""
    return 1 + GAIN_RANGE * (scores - RUNS_ABOVE)


class Routers(nn.Module):
    """The routers of all layers; what routers.safetensors holds. capacities: while training, the
    share of the tokens that run each layer's FFN, (n_layers,)."""

    method = "dlo"

    def __init__(self, n_layers: int, dim: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, 1, bias=False) for _ in range(n_layers))
        self.capacities = nn.Parameter(torch.ones(n_layers), requires_grad=False)

    def initialize(self, seed: int) -> None:
        """As the paper begins: at zero."""
        for router in self.layers:
            nn.init.zeros_(router.weight)

    def pack(self) -> None:
        """There is nothing to pack."""

    def logits(self, i: int, x: Tensor) -> Tensor:
        """Of layer i's residual stream x (bsz, seqlen, dim): (bsz, seqlen), in float32."""
        weight = self.layers[i].weight.float()
        return F.linear(x.float(), weight)[..., 0].float()  # autocast would leave bfloat16

    def hook(self, thresholds: Tensor | None) -> "RouterHook":
        return RouterHook(self, thresholds)

    def published(self) -> "RouterHook":
        """A FFN runs if its score is above 0.5."""
        return RouterHook(self, torch.full((len(self.layers), 2), RUNS_ABOVE))

    def thresholds(self, seen: list[list[list[float]]], budget: int) -> Tensor:
        """Those (n_layers, 2) under which a token skips `budget` FFNs on average, all n_layers at
        most: one for all layers, since routers compare layers. (Ours.)"""
        scores = []
        for layer in seen:
            scores += layer[FFN]
        one = threshold_of(scores, budget / len(seen))
        return torch.full((len(seen), 2), one, dtype=torch.float64)


class RouterHook(TokenHook):
    """Stands in for every layer's forward, with routers; thresholds as in `TokenHook`."""

    first = FFN

    def __init__(self, routers: Routers, thresholds: Tensor | None):
        super().__init__(thresholds)
        self.routers = routers

    def __call__(self, i, layer, x, places, kv, skip_attention, skip_ffn) -> Tensor:
        scores = self.routers.logits(i, x).sigmoid()  # (bsz, seqlen)
        x = x + layer.self_attn(layer.input_layernorm(x), places, kv)
        skips = [False]
        if self.thresholds is not None:
            skips = self.skips(i, FFN, scores)
        if all(skips):
            return x
        gain = gain_of(scores)[..., None].to(x.dtype)
        return run_ffn(layer, x, layer.post_attention_layernorm(x), gain, skips)


# ---------------------------------------------------------------- training


class RouterTraining:
    """How routers are trained; what `tools.train.Trainer` asks.

    capacity: the share of (layer, token) pairs that run in the end.
    """

    def __init__(self, routers: Routers, capacity: float):
        self.module = routers
        self.capacity = capacity

    def open(self) -> RouterHook:
        """All FFNs run."""
        return RouterHook(self.module, None)

    def hook(self, said: Tensor, progress: float) -> "RouterTrainingHook":
        """said: (bsz, seqlen) on the CPU, the tokens that a stage says, which alone may skip, as in
        decoding. progress: from 0 to 1, how much of the training is done."""
        annealed = min(progress / ANNEALED_BY, 1.0)
        capacity = 1 - (1 - self.capacity) * annealed
        return RouterTrainingHook(self.module, said, capacity)

    def settle(self, hooks: list) -> None:
        """Called after every step with its micro-batches' hooks: the labels' share of each layer is
        its capacity in the next step."""
        n = sum(hook.n for hook in hooks)
        shares = sum(hook.shares * (hook.n / n) for hook in hooks)
        self.module.capacities.data.copy_(shares)


class RouterTrainingHook:
    """Stands in for every layer's forward while one micro-batch trains."""

    def __init__(self, routers: Routers, said: Tensor, capacity: float):
        self.routers = routers
        self.n = max(int(said.sum()), 1)
        self.said = said
        self.capacity = capacity
        self.capacities = routers.capacities.tolist()
        self.logits: list[Tensor] = []
        self.similarities: list[Tensor] = []  # cos(r, r + FFN(r)), each (bsz, seqlen)
        self.shares: Tensor | None = None  # of the labels that run, (n_layers,)

    def __call__(self, i, layer, x, places, kv, skip_attention, skip_ffn) -> Tensor:
        self.said = self.said.to(x.device)
        scores = self.routers.logits(i, x).sigmoid()
        r = x + layer.self_attn(layer.input_layernorm(x), places, kv)
        out = layer.mlp(layer.post_attention_layernorm(r))
        with torch.no_grad():
            after = (r + out).float()
            self.similarities.append(F.cosine_similarity(r.float(), after, dim=-1))
        self.logits.append(self.routers.logits(i, x.detach()))
        few = math.ceil(self.capacities[i] * self.n)
        runs = lowest(-scores, self.said, few) | ~self.said  # the highest scores
        return torch.where(runs[..., None], r + out * gain_of(scores)[..., None], r)

    def loss(self) -> Tensor:
        """The routers' cross-entropy against the labels, the mean over layers and tokens.

        The authors let it reach the weights, too, summed over the layers; then in 20 steps the loss
        of the demo on held-out questions rises sixfold, so here it teaches the routers alone.
        """
        logits = torch.stack(self.logits)  # (n_layers, bsz, seqlen)
        among = self.said.expand_as(logits)
        count = math.ceil(self.capacity * self.n * len(logits))
        labels = lowest(torch.stack(self.similarities), among, count).float()
        self.shares = labels.flatten(1).sum(1) / self.n
        self.logits = []
        self.similarities = []
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (losses * self.said).sum() / (self.n * len(logits))
