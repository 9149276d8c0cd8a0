"""DLO by hand-worked cases: which FFNs run, with which gain, and what the labels are."""

import math

import pytest
import torch
from test_gates import PLACES, FakeLayer, ids_of

import model as model_module
from generate import Stepper, Until, generate, generate_batch
from model import KVCache, Llama, Skip
from skip import ATTENTION, FFN, mask_of
from tools.routers import Routers, RouterTraining, gain_of
from tools.tokenwise import TokenSkip


def made(n_layers: int = 3, dim: int = 32) -> Routers:
    """Routers that differ from token to token."""
    routers = Routers(n_layers, dim).requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    for router in routers.layers:
        router.weight.normal_(0, 0.5, generator=rng)
    return routers


def half(routers: Routers) -> TokenSkip:
    return TokenSkip(3, routers.published(), routers.hook(None))


def test_a_zero_router_runs_no_ffn():
    routers = Routers(2, 4)
    routers.initialize(seed=0)
    layer = FakeLayer()
    hook = routers.published()
    x = torch.ones(2, 1, 4)
    for i in range(2):
        x = hook(i, layer, x, PLACES, None, False, False)
    assert layer.ran == {ATTENTION: [2, 2], FFN: []}
    assert hook.skipped == [0, 2]
    assert (x == 3).all()  # two attentions add 1 each


def test_above_a_half_an_ffn_runs_with_its_gain():
    routers = Routers(1, 1).requires_grad_(False)
    routers.layers[0].weight.fill_(1.0)
    layer = FakeLayer()
    hook = routers.published()
    x = torch.tensor([[[2.0]], [[-2.0]], [[0.0]], [[100.0]]])
    after = hook(0, layer, x, PLACES, None, False, False)
    gain = 1 + 0.05 * (1 / (1 + math.exp(-2)) - 0.5)
    assert after.flatten().tolist() == pytest.approx([3 + 10 * gain, -1, 1, 101 + 10.25])
    assert layer.ran == {ATTENTION: [4], FFN: [2]}
    assert hook.skipped == [0, 0.5]


def test_gains_are_near_one():
    gains = gain_of(torch.tensor([0.0, 0.5, 1.0]))
    assert gains.tolist() == pytest.approx([0.975, 1.0, 1.025])


@pytest.mark.parametrize(("budget", "skipped"), [(0, 0), (1, 1), (2, 2), (3, 3), (6, 3)])
def test_a_budget_is_the_mean_number_of_ffns_skipped(budget, skipped):
    scores = torch.rand(3, 1, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = [[[], layer[0].tolist()] for layer in scores]
    table = made().thresholds(seen, budget)
    skips = scores[:, 0] <= table[:, [FFN]]
    assert skips.sum().item() / 100 == skipped


# ---------------------------------------------------------------- in a model


def test_attention_is_never_skipped(llama):
    skip = half(made())
    skipped = []
    for seed in range(4):
        timings = generate(llama, ids_of(9, seed), 12, skip=skip).timings
        assert timings.skipped > 0 and all(attention == 0 for attention, _ in timings.skips)
        skipped.append(timings.skipped)
    assert 0 < sum(skipped) < 4 * 3


def test_a_row_alone_equals_it_among_four(llama):
    prompts = [ids_of(n, n) for n in (9, 5, 12, 7)]
    skip = half(made())
    groups = [(KVCache(llama, 1, 0), [prompt]) for prompt in prompts]
    together = generate_batch(Stepper(llama), groups, Until(12), skip)
    for prompt, row in zip(prompts, together):
        assert generate(llama, prompt, 12, skip=skip).ids == row.ids


def test_no_token_reads_a_hole(llama, monkeypatch):
    skip = half(made())
    plain = generate(llama, ids_of(9, 1), 12, skip=skip)
    monkeypatch.setattr(model_module, "DEBUG", True)
    assert generate(llama, ids_of(9, 1), 12, skip=skip).ids == plain.ids


def test_budget_0_runs_every_ffn_with_its_gain(llama):
    routers = made()
    nothing = routers.hook(torch.full((3, 2), -math.inf))
    prompt = ids_of(9, 3)
    ids = generate(llama, prompt, 10, skip=TokenSkip(3, nothing, routers.hook(None))).ids
    on = Skip(mask_of([], 3), routers.hook(None))
    with torch.inference_mode():
        logits = llama(torch.tensor([prompt + ids]), skip=on)[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == ids


# ---------------------------------------------------------------- training


class TurningLayer(FakeLayer):
    """Its attention adds nothing; its FFN adds (0, the token's second component)."""

    def self_attn(self, h, places, kv):
        return torch.zeros_like(h)

    def input_layernorm(self, x):
        return x

    def mlp(self, h):
        return torch.stack((torch.zeros_like(h[..., 0]), self.turn), -1)


def test_those_that_turn_the_stream_most_are_labelled_to_run():
    routers = Routers(2, 2)
    routers.initialize(seed=0)
    said = torch.tensor([[True, True, True, False]])
    hook = RouterTraining(routers, capacity=0.5).hook(said, progress=1.0)
    x = torch.tensor([[[1.0, 0.0]] * 4])
    for i, turns in enumerate([[3.0, 2.0, 0.1, 9.0], [0.2, 1.0, 0.3, 9.0]]):
        layer = TurningLayer()
        layer.turn = torch.tensor([turns])
        after = hook(i, layer, x, None, None, False, False)
        assert (after[0, :, 1] == layer.turn[0]).all()  # all equal, at the capacity of 1: all run
    loss = hook.loss()
    # of six pairs three run: tokens 0 and 1 of the first layer, 1 of the second
    assert hook.shares.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert loss.item() == pytest.approx(math.log(2))
    # a step later, each layer has its share of the capacity
    RouterTraining(routers, 0.5).settle([hook])
    assert routers.capacities.tolist() == pytest.approx([2 / 3, 1 / 3])


def test_in_training_the_highest_scores_run_and_prompts_always():
    routers = Routers(1, 2).requires_grad_(False)
    routers.layers[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
    routers.capacities.fill_(0.5)
    said = torch.tensor([[False, True, True, True, True]])
    x = torch.tensor([[[-9.0, 0], [1, 0], [4, 0], [2, 0], [3, 0]]])
    layer = TurningLayer()
    layer.turn = torch.ones(1, 5)
    hook = RouterTraining(routers, 0.5).hook(said, 1.0)
    after = hook(0, layer, x, None, None, False, False)
    assert (after[0, :, 1] > 0).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(("progress", "capacity"), [(0.0, 1.0), (0.25, 0.95), (0.5, 0.9), (1, 0.9)])
def test_the_capacity_falls_in_the_first_half(progress, capacity):
    hook = RouterTraining(Routers(1, 2), 0.9).hook(torch.ones(1, 3, dtype=torch.bool), progress)
    assert hook.capacity == pytest.approx(capacity)


def test_the_labels_teach_the_routers_alone(folder):
    llama = Llama.from_pretrained(folder).requires_grad_(True)
    routers = Routers(3, 32)
    routers.initialize(seed=0)
    hook = RouterTraining(routers, 0.5).hook(torch.ones(1, 10, dtype=torch.bool), 1.0)
    llama(torch.tensor([ids_of(10, 0)]), skip=Skip(mask_of([], 3), hook))
    hook.loss().backward()
    assert all(p.grad is None for p in llama.parameters())
    assert all(router.weight.grad.abs().sum() > 0 for router in routers.layers)
