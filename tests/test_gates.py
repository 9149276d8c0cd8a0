"""GateSkip by hand-worked cases: what gates multiply by, who skips, what the cache then holds."""

import math
from types import SimpleNamespace

import pytest
import torch

import model as model_module
from generate import Stepper, Until, generate, generate_batch
from model import KVCache, Llama, Places, Skip
from skip import ATTENTION, FFN, mask_of
from tools.gates import Gates, GateTraining
from tools.tokenwise import TokenSkip, lowest, threshold_of

OPEN = 1 / (1 + math.exp(-5))


def made(n_layers: int = 3, dim: int = 32, spread: float = 0.5) -> Gates:
    """Gates that differ from token to token."""
    gates = Gates(n_layers, dim).requires_grad_(False)
    gates.initialize(seed=0)
    for name, parameter in gates.named_parameters():
        if name.endswith("weight"):
            parameter.mul_(spread / 0.01)
        else:
            parameter.zero_()
    return gates


class FakeLayer:
    """Norms that change nothing, an attention that adds 1 and an FFN that adds 10; both remember
    how many rows they ran."""

    def __init__(self):
        self.ran = {ATTENTION: [], FFN: []}

    def input_layernorm(self, x):
        return x

    post_attention_layernorm = input_layernorm

    def self_attn(self, h, places, kv):
        self.ran[ATTENTION].append(len(h))
        if kv is not None:
            kv[:, :, places.slots] = 7
        return torch.ones_like(h)

    def mlp(self, h):
        self.ran[FFN].append(len(h))
        return torch.full_like(h, 10)


def by_sign(n_layers: int = 2) -> Gates:
    """Gates of dim 1 that open where the stream is positive."""
    gates = Gates(n_layers, 1).requires_grad_(False)
    for gate in gates.products:
        for linear in gate:
            linear.weight.fill_(100)
            linear.bias.fill_(0)
    return gates


PLACES = Places(slice(3, 4), 4, None, None)


# ---------------------------------------------------------------- gates


def test_gates_begin_almost_open():
    gates = Gates(2, 300)
    gates.initialize(seed=1)
    for name, parameter in gates.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 5).all()
        else:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.02)
    again = Gates(2, 300)
    again.initialize(seed=1)
    assert all(map(torch.equal, gates.parameters(), again.parameters()))


def test_a_new_gate_multiplies_by_sigmoid_5():
    gates = Gates(2, 4).requires_grad_(False)
    gates.initialize(seed=0)
    for gate in gates.products:
        for linear in gate:
            linear.weight.zero_()
    x = torch.zeros(1, 1, 4)
    after = gates.hook(None)(0, FakeLayer(), x, PLACES, None, False, False)
    assert after.flatten().tolist() == pytest.approx([11 * OPEN] * 4, rel=1e-5)


def test_gates_compute_the_same_packed(llama):
    gates = made()
    x = torch.randn(2, 1, 32)
    before = gates.gain(1, FFN, x)
    gates.pack()
    torch.testing.assert_close(gates.gain(1, FFN, x), before)


# ---------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("share", "skipped"), [(0.0, 0), (0.2, 2), (0.25, 2), (0.5, 5), (1.0, 10), (1.2, 10)]
)
def test_the_share_skipped_is_the_quantile(share, skipped):
    scores = [0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.6, 0.4, 0.8, 0.95]
    threshold = threshold_of(scores, share)
    assert sum(score <= threshold for score in scores) == skipped


@pytest.mark.parametrize("budget", [0, 1, 2, 4, 5])
def test_a_budget_is_the_mean_number_of_sublayers_skipped(budget):
    n_layers, n = 3, 100
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(n_layers, 2, n, generator=rng, dtype=torch.float64)
    table = made(n_layers).thresholds(scores.tolist(), budget)
    skips = scores <= table[..., None]
    assert skips.sum().item() / n == budget
    assert not skips[0, ATTENTION].any()


def test_training_skips_the_lowest_of_what_is_said():
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    said = torch.tensor([[False, True, True], [True, False, True]])
    assert lowest(scores, said, 0).sum() == 0
    assert lowest(scores, said, 2).tolist() == [[False, True, True], [False, False, False]]


@pytest.mark.parametrize(("progress", "count"), [(0.1, 1), (0.5, 5), (1.0, 10)])
def test_the_share_skipped_in_training_rises_linearly(progress, count):
    said = torch.zeros(2, 30, dtype=torch.bool)
    said[:, 5:] = True  # 50 tokens, of which 0.2 in the end
    x = torch.randn(2, 30, 32)
    layer = FakeLayer()
    layer.self_attn = lambda h, places, kv: torch.ones_like(h)
    hook = GateTraining(made(), 0.01, 0.2).hook(said, progress)
    after = hook(1, layer, x, None, None, False, False)
    # both sub-layers add to a token that runs both; each is skipped by `count` tokens
    untouched = (after == x).all(-1)
    assert not untouched[:, :5].any()
    half = (after - x).abs().amax(-1) < 1.0 + 1e-6  # no FFN: at most the attention's 1
    assert (half & said).sum() == count


def test_the_loss_is_the_mean_square_of_what_is_said():
    gates = Gates(2, 4)
    gates.initialize(seed=0)
    for name, parameter in gates.named_parameters():
        if name.endswith("weight"):
            parameter.data.zero_()
    said = torch.tensor([[False, True, True]])
    hook = GateTraining(gates, 0.5, 0.0).hook(said, 1.0)
    x = torch.randn(1, 3, 4)
    for i in range(2):
        x = hook(i, FakeLayer(), x, None, None, False, False)
    assert hook.loss().item() == pytest.approx(0.5 * OPEN**2, rel=1e-5)


# ---------------------------------------------------------------- a step


def test_ffn_runs_on_the_rows_that_keep_it():
    gates = by_sign()
    table = torch.tensor([[-math.inf, 0.5], [-math.inf, 0.5]])
    hook = gates.hook(table)
    layer = FakeLayer()
    x = torch.tensor([[[5.0]], [[-5.0]], [[3.0]]])
    after = hook(0, layer, x, PLACES, None, False, False)
    # the second row's gates are shut: its attention adds 0 and its FFN does not run
    assert layer.ran == {ATTENTION: [3], FFN: [2]}
    assert after.flatten().tolist() == pytest.approx([16, -5, 14])
    assert hook.skipped == pytest.approx([0, 1 / 3])


@pytest.mark.parametrize("rows", [[-5.0], [5.0, -5.0], [-5.0, -3.0]])
def test_a_row_that_skips_attention_takes_the_slot_from_below(rows):
    hook = by_sign().hook(torch.tensor([[-math.inf, -math.inf], [0.5, -math.inf]]))
    x = torch.tensor(rows)[:, None, None]
    below = torch.arange(5.0).expand(len(rows), 2, 5)[..., None].clone()
    own = torch.full((len(rows), 2, 5, 1), math.nan)
    hook.below = below
    layer = FakeLayer()
    after = hook(1, layer, x, PLACES, own, False, False)
    for row, value in enumerate(rows):
        wanted = 7.0
        if value < 0:
            wanted = 3.0  # of slot 3 below
            assert after[row].item() == pytest.approx(value, abs=1e-5)
        assert own[row, :, 3].flatten().tolist() == [wanted] * 2
        assert own[row, :, :3].isnan().all() and own[row, :, 4:].isnan().all()
    ran = [len(rows)] if max(rows) > 0 else []
    assert layer.ran[ATTENTION] == ran


def test_a_token_alone_skips():
    hook = by_sign().hook(torch.tensor([[-math.inf, 0.5], [0.5, 0.5]]))
    for i in range(2):
        x = hook(i, FakeLayer(), torch.tensor([[[-5.0]]]), PLACES, None, False, False)
        hook.below = torch.zeros(1, 2, 5, 1)
    assert x.item() == -5 and hook.skipped == [1, 2]


# ---------------------------------------------------------------- in a model


def skipping(gates: Gates, share: float = 0.5) -> TokenSkip:
    """A skip set for a share of the tokens, more or less."""
    table = torch.full((3, 2), 0.5, dtype=torch.float64)  # zero biases: half of the scores
    table += (share - 0.5) * 0.2
    table[0, ATTENTION] = -math.inf
    return TokenSkip(3, gates.hook(table), gates.hook(None))


def ids_of(n: int, seed: int) -> list[int]:
    return torch.randint(2, 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_row_alone_equals_it_among_four(llama):
    prompts = [ids_of(n, n) for n in (9, 5, 12, 7)]
    skip = skipping(made())
    groups = [(KVCache(llama, 1, 0), [prompt]) for prompt in prompts]
    together = generate_batch(Stepper(llama), groups, Until(12), skip)
    assert 0 < together[0].timings.skipped < 5
    for prompt, row in zip(prompts, together):
        alone = generate(llama, prompt, 12, skip=skip)
        assert alone.ids == row.ids
        assert alone.confidences == pytest.approx(row.confidences, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_no_token_reads_a_hole(llama, share, monkeypatch):
    skip = skipping(made(), share)
    plain = generate(llama, ids_of(9, 1), 12, skip=skip)
    monkeypatch.setattr(model_module, "DEBUG", True)
    assert generate(llama, ids_of(9, 1), 12, skip=skip).ids == plain.ids


def test_budget_0_is_gates_on(llama):
    """One forward of all layers, gates on, over the text that decoding at budget 0 gave."""
    gates = made()
    nothing = gates.hook(torch.full((3, 2), -math.inf))
    skip = TokenSkip(3, nothing, gates.hook(None))
    prompt = ids_of(9, 3)
    made_ids = generate(llama, prompt, 10, skip=skip).ids
    tokens = torch.tensor([prompt + made_ids])
    on = Skip(mask_of([], 3), gates.hook(None))
    with torch.inference_mode():
        logits = llama(tokens, skip=on)[0, len(prompt) - 1 : -1]
        off = llama(tokens)[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == made_ids
    assert not torch.allclose(logits, off)


def test_training_sees_the_gates_that_decoding_has(folder):
    """With nothing skipped, the training hook is the open gates; their gradients arrive."""
    llama = Llama.from_pretrained(folder)
    gates = made().requires_grad_(True)
    training = GateTraining(gates, 0.01, 0.2)
    tokens = torch.tensor([ids_of(10, 0)])
    hook = training.hook(torch.ones(1, 10, dtype=torch.bool), 0.0)
    logits = llama(tokens, skip=Skip(mask_of([], 3), hook))
    opened = llama(tokens, skip=Skip(mask_of([], 3), training.open()))
    torch.testing.assert_close(logits, opened)
    (logits.sum() + hook.loss()).backward()
    assert all(p.grad.abs().sum() > 0 for p in gates.parameters())
    assert SimpleNamespace(settle=training.settle).settle([hook]) is None
