"""GateSkip (2510.13876): a vector gate on every sub-layer, trained with the weights.

h is what a sub-layer reads, the normed residual stream, and o what it adds to the stream:

    g = sigmoid(W h + b)      x <- x + o * g

W starts small and b at 5, so that all gates are nearly open. In training the mean of g^2 is
added to the loss, and a sub-layer is skipped for the tokens whose mean gate is lowest; their share
rises linearly. In decoding it is skipped for a token whose mean gate is at or below a threshold.
(The authors take a quantile of the scores in the batch; of one score that skips nothing.)

    python tools/train.py --model demo --data data/demo/train.jsonl --out gated --gates --steps 20
"""

import torch
from torch import Tensor, nn

from skip import ATTENTION, FFN
from tools.fast import product
from tools.tokenwise import TokenHook, lowest, run_ffn, threshold_of

INITIAL_STD = 0.01
INITIAL_BIAS = 5.0


class LayerGates(nn.Module):
    """The gates of one layer."""

    def __init__(self, dim: int):
        super().__init__()
        self.attention = nn.Linear(dim, dim)
        self.ffn = nn.Linear(dim, dim)


class Gates(nn.Module):
    """The gates of all layers; what routers.safetensors holds."""

    method = "gateskip"

    def __init__(self, n_layers: int, dim: int):
        super().__init__()
        self.layers = nn.ModuleList(LayerGates(dim) for _ in range(n_layers))
        self.products = []
        for layer in self.layers:
            self.products.append([layer.attention, layer.ffn])

    def initialize(self, seed: int) -> None:
        """As the paper begins; on the CPU, so that it is the same everywhere."""
        rng = torch.Generator().manual_seed(seed)
        for gate in self.products:
            for linear in gate:
                nn.init.normal_(linear.weight, 0.0, INITIAL_STD, generator=rng)
                nn.init.constant_(linear.bias, INITIAL_BIAS)

    def pack(self) -> None:
        """For inference: the products as tools/fast.py computes them."""
        for gate in self.products:
            gate[ATTENTION] = product(gate[ATTENTION])
            gate[FFN] = product(gate[FFN])

    def gain(self, i: int, sub: int, h: Tensor) -> Tensor:
        """g of a sub-layer's normed input h: (bsz, seqlen, dim), in float32."""
        return self.products[i][sub](h).float().sigmoid()

    def hook(self, thresholds: Tensor | None) -> "GateHook":
        return GateHook(self, thresholds)

    def thresholds(self, seen: list[list[list[float]]], budget: int) -> Tensor:
        """Those (n_layers, 2) under which a token skips `budget` sub-layers on average: each skips
        for the same share of the tokens, but for the first attention, which always runs."""
        n_layers = len(seen)
        share = budget / (2 * n_layers - 1)
        table = torch.empty(n_layers, 2, dtype=torch.float64)
        for i, layer in enumerate(seen):
            for sub in (ATTENTION, FFN):
                table[i, sub] = threshold_of(layer[sub], share)
        table[0, ATTENTION] = -torch.inf
        return table


class GateHook(TokenHook):
    """Stands in for every layer's forward, with gates; thresholds as in `TokenHook`.

    A token that skips attention leaves no hole: its slot of the layer's cache takes what the layer
    below has there, whether or not other rows run the attention.
    """

    def __init__(self, gates: Gates, thresholds: Tensor | None):
        super().__init__(thresholds)
        self.gates = gates
        self.below: Tensor | None = None  # the cache of the layer below

    def __call__(self, i, layer, x, places, kv, skip_attention, skip_ffn) -> Tensor:
        h = layer.input_layernorm(x)
        gain = self.gates.gain(i, ATTENTION, h)
        skips = self.rows(i, ATTENTION, gain)
        if not all(skips):
            after = x + layer.self_attn(h, places, kv) * gain.to(x.dtype)
        if not any(skips):
            x = after
        else:
            rows = torch.tensor(skips, device=x.device)  # (bsz,)
            if kv is not None:
                kv[rows, :, places.slots] = self.below[rows, :, places.slots]
            if not all(skips):
                x = torch.where(rows[:, None, None], x, after)
        self.below = kv
        h = layer.post_attention_layernorm(x)
        gain = self.gates.gain(i, FFN, h)
        return run_ffn(layer, x, h, gain.to(x.dtype), self.rows(i, FFN, gain))

    def rows(self, i: int, sub: int, gain: Tensor) -> list[bool]:
        """Which rows skip a sub-layer, by their mean gates."""
        if self.thresholds is None:
            return [False]
        return self.skips(i, sub, gain.mean(-1))


# ---------------------------------------------------------------- training


class GateTraining:
    """How gates are trained; what `tools.train.Trainer` asks.

    weight: of the mean g^2 in the loss. share: of the tokens that skip a sub-layer in the end.
    """

    def __init__(self, gates: Gates, weight: float, share: float):
        self.module = gates
        self.weight = weight
        self.share = share

    def open(self) -> GateHook:
        """All gates on, nothing skipped."""
        return GateHook(self.module, None)

    def hook(self, said: Tensor, progress: float) -> "GateTrainingHook":
        """said: (bsz, seqlen) on the CPU, the tokens that a stage says, which alone may skip, as in
        decoding. progress: from 0 to 1, how much of the training is done."""
        count = int(self.share * progress * int(said.sum()))
        return GateTrainingHook(self, said, count)

    def settle(self, hooks: list) -> None:
        """Called after every step; there is nothing to keep."""


class GateTrainingHook:
    """Stands in for every layer's forward while one micro-batch trains.

    Skipping hides what a sub-layer adds for the tokens with the lowest mean gates in the batch. (As
    in the authors' training, later tokens still read the keys that such a token writes.)
    """

    def __init__(self, training: GateTraining, said: Tensor, count: int):
        self.gates = training.module
        self.weight = training.weight
        self.n = max(int(said.sum()), 1)
        self.count = count
        self.said = said
        self.squares: list[Tensor] = []  # the mean g^2 of each sub-layer

    def __call__(self, i, layer, x, places, kv, skip_attention, skip_ffn) -> Tensor:
        self.said = self.said.to(x.device)
        h = layer.input_layernorm(x)
        x = self.add(i, ATTENTION, h, x, layer.self_attn(h, places, kv))
        h = layer.post_attention_layernorm(x)
        return self.add(i, FFN, h, x, layer.mlp(h))

    def add(self, i: int, sub: int, h: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """x + out * gain, or x for a token that skips; all (bsz, seqlen, dim)."""
        gain = self.gates.gain(i, sub, h.detach())  # closing gates must not change what they read
        squares = gain.pow(2).mean(-1) * self.said
        self.squares.append(squares.sum() / self.n)
        after = x + out * gain
        if i == 0 and sub == ATTENTION:
            return after  # there is no layer below to take keys from
        skipped = lowest(gain.mean(-1), self.said, self.count)
        return torch.where(skipped[..., None], x, after)

    def loss(self) -> Tensor:
        """What is added to the cross-entropy per token."""
        squares = torch.stack(self.squares)
        self.squares = []
        return self.weight * squares.mean()
