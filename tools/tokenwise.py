"""Skipping token by token, what GateSkip and DLO share: every decoded token decides by its score.

A sub-layer is skipped for a token whose score there is at or below a threshold. Thresholds are
quantiles of the scores that were seen while decoding, not of those in a batch, so that a token
alone skips as often as one among many.

    python -c "from tools.tokenwise import threshold_of; print(threshold_of([.1, .4, .3], 2 / 3))"
"""

import math

import torch
from torch import Tensor

from model import Skip
from skip import ATTENTION


def threshold_of(scores: list[float], share: float) -> float:
    """The score at or below which a share of the scores lies, -inf for none: 2/3 of .1 .4 .3 is
    at .3. More lie there only if some are equal."""
    count = round(min(share, 1.0) * len(scores))
    if count == 0:
        return -math.inf
    return sorted(scores)[count - 1]


def lowest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Which tokens have the `count` lowest scores, or one equal to them: a bool mask.

    scores, among: of the same shape; only tokens that `among` marks are taken. No number leaves the
    device, so that a GPU is not waited for.
    """
    if count == 0:
        return torch.zeros_like(among)
    flat = scores.detach().float().masked_fill(~among, math.inf).flatten()
    return among & (scores.detach().float() <= flat.kthvalue(count).values)


class TokenHook:
    """What hooks of both methods hold while they decode one token of each row; see `model.Skip`.

    thresholds: (n_layers, 2) numbers, -inf where nothing is skipped; None: all sub-layers run for
        all tokens, of which a row may then have several, as in a prefill.
    skipped: how many sub-layers the last forward left out, [attention, FFN], mean over its rows.
    seen: the scores of all tokens by layer and sub-layer, if they are to be kept, else None.
    """

    first = ATTENTION  # the sub-layer that a layer's scores are for first

    def __init__(self, thresholds: Tensor | None):
        self.thresholds = None if thresholds is None else thresholds.tolist()
        self.skipped = [0.0, 0.0]
        self.seen: list[list[list[float]]] | None = None

    def keep_scores(self, n_layers: int) -> None:
        """From now on, in `seen`."""
        self.seen = [[[], []] for _ in range(n_layers)]

    def skips(self, i: int, sub: int, scores: Tensor) -> list[bool]:
        """Which rows skip a sub-layer, by their scores (bsz, 1); waits for a GPU."""
        if i == 0 and sub == self.first:
            self.skipped = [0.0, 0.0]
        values = scores[:, 0].tolist()
        if self.seen is not None:
            self.seen[i][sub] += values
        skips = [value <= self.thresholds[i][sub] for value in values]
        self.skipped[sub] += sum(skips) / len(skips)
        return skips


class TokenSkip:
    """A skip set that hooks decide: a function of the decoding step, as `generate` takes it.

    decoding, prefill: the hooks of both. A prefill skips nothing, but what gates and routers
    multiply by is there, too.
    """

    def __init__(self, n_layers: int, decoding: TokenHook, prefill: TokenHook):
        nothing = torch.zeros(n_layers, 2, dtype=torch.bool)
        self.decoding = Skip(nothing, decoding)
        self.prefill = Skip(nothing, prefill)

    def __call__(self, step: int) -> Skip:
        return self.decoding


def run_ffn(layer, x: Tensor, h: Tensor, gain: Tensor, skips: list[bool]) -> Tensor:
    """x + FFN(h) * gain on the rows that do not skip, x on the others; all (bsz, seqlen, ...)."""
    if all(skips):
        return x
    if not any(skips):
        return x + layer.mlp(h) * gain
    kept = [row for row, skip in enumerate(skips) if not skip]
    rows = torch.tensor(kept, device=x.device)
    return x.index_add(0, rows, layer.mlp(h[rows]) * gain[rows])
