"""What is skipped while training: stochastic depth, the method's own skip sets, frozen layers.

NestedSkips  every stage skips the first few of its ranking, exactly where decoding would (ours)
draw_depth   stochastic depth: random sub-layers, the deeper the more often (Huang et al. 2016)
LayerHook    runs a layer so, for `model.Skip`; below --freeze-below it keeps no graph, either

    python tools/train.py --model DIR --data FILE --out tuned --skip-plan plan.json
"""

from pathlib import Path
from random import Random

import torch
from torch import Tensor

from data import prompts
from model import InputError, read_json
from skip import ATTENTION, FFN, SubLayer, mask_of
from tools.plan import read_rankings

FULL = 0.3  # the share of micro-batches in which all layers run


def draw_depth(n_layers: int, most: float, rng: Random) -> Tensor | None:
    """A skip mask (n_layers, 2) for one micro-batch, None for no stochastic depth.

    The rate is drawn anew each time, uniform between 0 and twice `most`; a sub-layer is skipped
    with probability rate x its depth (0 at the first, 1 at the last), at most 1. So the last
    sub-layers are skipped `most` of the time on average, and some micro-batches skip nearly
    nothing, others all of the upper half.
    """
    if not most:
        return None
    rate = rng.random() * 2 * most
    last = 2 * n_layers - 1
    flat = [rng.random() < rate * i / last for i in range(2 * n_layers)]
    return torch.tensor(flat).view(n_layers, 2)


class NestedSkips:
    """The skip sets of a plan's rankings, of all sizes up to a share of the sub-layers.

    For each micro-batch every stage draws a budget, uniformly from 0 to `most`, and skips the
    first so many of its ranking; in 30% of the micro-batches all layers run. Skip sets of one
    ranking are nested, so training sees the sub-layers that are skipped first most often.

    Where: decoding feeds back what it generated, so a token that a stage says is read under the
    stage's skip set, its first one, too. All that stands before the first one is the prompt, which
    a prefill runs through all layers. (In terms of what is predicted: all of a text but its first
    token, and its end.)

    A fair approximation: in one sequence, later tokens read the keys that a skipped run left
    behind, where inference prefills the earlier texts again, by all layers, and within a stage
    nobody reads what a skipped attention would have written.
    """

    def __init__(self, rankings: list[list[SubLayer]], n_layers: int, share: float):
        self.rankings = rankings
        self.n_layers = n_layers
        self.most = round(share * 2 * n_layers)

    def draw(self, rng: Random) -> Tensor | None:
        """Masks (n_stages, n_layers, 2) of one micro-batch; None: all layers run."""
        if rng.random() < FULL:
            return None
        masks = []
        for ranking in self.rankings:
            budget = rng.randint(0, self.most)
            masks.append(mask_of(ranking[:budget], self.n_layers))
        return torch.stack(masks)


def skipped_tokens(masks: Tensor, stages: Tensor) -> Tensor:
    """Which token skips which sub-layer: (n_layers, 2, bsz, seqlen) bool.

    masks: (n_stages, n_layers, 2). stages: (bsz, seqlen), of the stage that says each token, or -1
    for a prompt's, which skips nothing.
    """
    nothing = torch.zeros_like(masks[:1])
    by_stage = torch.cat((masks, nothing))  # -1 is the last one
    return by_stage[stages].permute(2, 3, 0, 1).contiguous()


class LayerHook:
    """Stands in for every layer's forward in training; see `model.Skip`.

    skipped: of `skipped_tokens`, on the model's device; None: no token skips by itself.
    some: (n_layers, 2) bool, on the CPU: which of those sub-layers any token may skip.
    freeze_below: layers below this one keep no graph and get no gradient.
    """

    def __init__(self, skipped: Tensor | None, some: Tensor | None, freeze_below: int = 0):
        self.skipped = skipped
        self.some = None if some is None else some.tolist()
        self.freeze_below = freeze_below

    def __call__(self, i, layer, x, places, kv, skip_attention, skip_ffn) -> Tensor:
        if i < self.freeze_below:
            with torch.no_grad():
                return self.run(i, layer, x, places, kv, skip_attention, skip_ffn)
        return self.run(i, layer, x, places, kv, skip_attention, skip_ffn)

    def run(self, i, layer, x, places, kv, skip_attention, skip_ffn) -> Tensor:
        """The residual stream (bsz, seqlen, dim) after layer i."""
        if self.skipped is None:
            return layer(x, places, kv, skip_attention, skip_ffn)
        if not skip_attention:
            after = layer(x, places, kv, skip_attention=False, skip_ffn=True)
            x = self.choose(i, ATTENTION, x, after)
        if not skip_ffn:
            after = layer(x, places, kv, skip_attention=True, skip_ffn=False)
            x = self.choose(i, FFN, x, after)
        return x

    def choose(self, i: int, sub: int, before: Tensor, after: Tensor) -> Tensor:
        """Each token's residual stream: as it was where the token skips, else what comes after."""
        if not self.some[i][sub]:
            return after
        return torch.where(self.skipped[i, sub, :, :, None], before, after)


# ---------------------------------------------------------------- the plan's rankings


def read_skip_plan(path: Path, n_layers: int) -> list[list[SubLayer]]:
    """One ranking a stage from a plan of search.py; a plan of the first format has one for all.

    The plan may be of another checkpoint of the same shape: a model that goes on training is one.
    Raises InputError if these are not rankings for a model of n_layers.
    """
    plan = read_json(path)
    try:
        if plan["format"] == 1:
            stored = [plan["ranking"]] * len(prompts.STAGES)
        else:
            stored = plan["rankings"]
        return read_rankings(path, stored, n_layers)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not a plan of search.py ({type(e).__name__}: {e})") from None
