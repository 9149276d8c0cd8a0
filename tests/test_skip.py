"""Importance, ranking, and every policy's choice, worked by hand on small cases.

What runs a model runs the plain and the packed one.

python -m pytest -q tests/test_skip.py
"""

import json

import plain
import pytest
import torch
from safetensors.torch import load_file

from model import KVCache, Skip
from skip import (
    ATTENTION,
    FFN,
    POLICIES,
    AdaSkip,
    Importance,
    ImportanceProbe,
    Setting,
    mask_of,
    measure_importance,
    rank,
)

L = 22  # TinyLlama's layers
BUDGETS = range(2 * L + 1)


def make_setting(n_layers=L, seed=0, granularity="sublayer", horizon=16) -> Setting:
    """A random importance; only `seed` of the policies differs, not the importance."""
    rng = torch.Generator().manual_seed(5)
    similarity = torch.rand(n_layers, 2, generator=rng, dtype=torch.float64)
    ratio = 1 + torch.rand(n_layers, 2, generator=rng, dtype=torch.float64)
    rankings = [rank(similarity, granularity)] * 3
    return Setting(Importance(similarity, ratio), rankings, granularity, seed, horizon)


def setting_of(similarity, ratio=None, **options) -> Setting:
    similarity = torch.tensor(similarity, dtype=torch.float64)
    ratio = torch.ones_like(similarity) if ratio is None else torch.tensor(ratio).double()
    rankings = [rank(similarity, options.get("granularity", "sublayer"))] * 3
    return Setting(Importance(similarity, ratio), rankings, **options)


def mask_at(skip, step: int) -> torch.Tensor:
    """What a policy's choice leaves out at a step."""
    now = skip(step) if callable(skip) else skip
    return now.mask if isinstance(now, Skip) else now


def chosen(mask) -> set[tuple[int, int]]:
    return {(layer, sub) for layer, sub in mask.nonzero().tolist()}


def layers(mask) -> list[int]:
    """The layers that a mask skips; each must be skipped as a whole."""
    assert torch.equal(mask[:, ATTENTION], mask[:, FFN])
    return mask[:, ATTENTION].nonzero()[:, 0].tolist()


# ---------------------------------------------------------------- masks and ranking


def test_mask_of_marks_exactly_the_given_sublayers():
    mask = mask_of([(0, FFN), (2, ATTENTION)], 3)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False, True], [False, False], [True, False]]


def test_rank_puts_the_most_similar_first():
    similarity = torch.tensor([[0.2, 0.9], [0.8, -0.5], [0.3, 0.7]])
    assert rank(similarity) == [(0, 1), (1, 0), (2, 1), (2, 0), (0, 0), (1, 1)]


def test_rank_breaks_ties_in_the_models_order():
    similarity = torch.full((20, 2), 0.5)
    similarity[13, 1] = 0.6
    in_order = [(layer, sub) for layer in range(20) for sub in (0, 1)]
    assert rank(similarity) == [(13, 1)] + [pair for pair in in_order if pair != (13, 1)]


def test_rank_of_layers_goes_by_their_mean_and_keeps_pairs():
    similarity = torch.tensor([[0.25, 0.75], [0.625, 0.625], [1.0, 0.0], [0.625, 0.625]])
    layer_order = [1, 3, 0, 2]  # means 1/2, 5/8, 1/2, 5/8; ties in order
    assert rank(similarity, "layer") == [(i, sub) for i in layer_order for sub in (0, 1)]


# ---------------------------------------------------------------- importance


def test_similarity_and_ratio_of_vectors_worked_by_hand():
    probe = ImportanceProbe(2)
    before = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    after = torch.tensor([[[6.0, 8.0], [0.0, 2.0]]])  # cosines 1 and 0, norms 10/5 and 2/1
    probe.compare(0, FFN, before, after)
    probe.compare(0, FFN, before, -before)  # another forward: cosines -1 and -1, norms as they were
    similarity, ratio = probe.means()
    assert similarity.tolist() == [[0, pytest.approx((0.5 - 1) / 2)], [0, 0]]
    assert ratio.tolist() == [[0, pytest.approx((2 + 1) / 2)], [0, 0]]


def test_similarity_is_computed_in_float32_whatever_the_model_computes_in():
    """In bfloat16 the cosine of two nearly equal streams would be a round 1."""
    rng = torch.Generator().manual_seed(0)
    before = torch.randn(1, 4, 64, generator=rng).bfloat16()
    after = (before.float() + 0.02 * torch.randn(1, 4, 64, generator=rng)).bfloat16()
    probe = ImportanceProbe(1)
    probe.compare(0, ATTENTION, before, after)
    x, y = before.double(), after.double()
    expected = ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean().item()
    assert probe.means()[0][0, ATTENTION].item() == pytest.approx(expected, abs=1e-6)
    assert expected != 1


def test_importance_is_the_mean_over_tokens_then_prefills(folder, llama):
    prompts = [[0, 5, 9], [0, 5, 9, 7, 3], [4, 8, 15, 16, 23, 42], [3]]
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    similarity, ratio = torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    for ids in prompts:
        _, streams = plain.forward(tensors, config, [ids])
        for i, (before, after) in enumerate(streams):
            norms = before.norm(dim=-1), after.norm(dim=-1)
            cosines = (before * after).sum(-1) / (norms[0] * norms[1])
            similarity.view(-1)[i] += cosines.mean() / 4
            ratio.view(-1)[i] += (norms[1] / norms[0]).mean() / 4
    found = measure_importance(llama, prompts)
    assert torch.allclose(found.similarity, similarity, atol=1e-6)
    assert torch.allclose(found.ratio, ratio, atol=1e-5)
    assert found.similarity.shape == found.ratio.shape == (3, 2)
    assert similarity.std() > 0.05, "sub-layers that are all alike show nothing"


# ---------------------------------------------------------------- how many are skipped


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_policy_skips_what_its_budget_allows(budget):
    """L = 22: sub-layer policies skip the budget, whole-layer ones its even part, and where the
    first and the last layer stay, 40 of the 44 sub-layers at most."""
    setting, even = make_setting(), budget - budget % 2
    expected = {
        "full": 0,
        "unified": min(even, 40),
        "early-exit": even,
        "random": budget,
        "litestage": budget,
    }
    for name, number in expected.items():
        mask = POLICIES[name](setting, budget)
        assert mask.shape == (L, 2) and mask.dtype == torch.bool
        assert mask.count_nonzero() == number, name
    assert mask_at(POLICIES["adaskip"](setting, budget), 0).count_nonzero() == budget
    assert set(POLICIES) == set(expected) | {"adaskip", "skipdecode"}


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_models_of_few_layers_are_no_special_case(name, n_layers):
    for budget in range(2 * n_layers + 1):
        skip = POLICIES[name](make_setting(n_layers), budget)
        mask = mask_at(skip, 0)
        assert mask.shape == (n_layers, 2) and mask.dtype == torch.bool
        if name in ("unified", "skipdecode"):
            assert not {0, n_layers - 1} & set(layers(mask_at(skip, 99)))


# ---------------------------------------------------------------- unified, early exit, random


@pytest.mark.parametrize(
    "budget, expected",
    [(0, []), (1, []), (2, [11]), (3, [11]), (4, [6, 16]), (8, [3, 8, 13, 18])]
    + [(40, [*range(1, 21)]), (44, [*range(1, 21)])],
)
def test_unified_spaces_whole_layers_evenly(budget, expected):
    """20 layers lie between the first and the last; each of n has the middle of 20 / n of them."""
    assert layers(POLICIES["unified"](make_setting(), budget)) == expected


@pytest.mark.parametrize("budget", range(4, 2 * L + 1))
def test_unified_never_bunches_up_and_keeps_first_and_last(budget):
    skipped = layers(POLICIES["unified"](make_setting(), budget))
    gaps = [b - a for a, b in zip(skipped, skipped[1:])]
    assert 0 not in skipped and L - 1 not in skipped
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
    assert abs((skipped[0] - 1) - (L - 2 - skipped[-1])) <= 1, "as much before as behind"


@pytest.mark.parametrize("budget", BUDGETS)
def test_early_exit_skips_only_the_last_layers(budget):
    skipped = layers(POLICIES["early-exit"](make_setting(), budget))
    assert skipped == list(range(L))[L - budget // 2 :]


def test_random_is_drawn_by_the_seed_alone():
    def draw(seed, budget=9):
        return chosen(POLICIES["random"](make_setting(seed=seed), budget))

    torch.manual_seed(1)
    first = draw(3)
    torch.manual_seed(2)
    assert draw(3) == first
    assert len({frozenset(draw(seed)) for seed in range(8)}) == 8
    drawn = set().union(*(draw(seed) for seed in range(60)))
    assert len(drawn) == 2 * L, "any sub-layer may be drawn, the first and the last too"
    assert first < draw(3, 10), "a larger budget adds to a smaller one"


# ---------------------------------------------------------------- SkipDecode


@pytest.mark.parametrize("budget", BUDGETS)
def test_skipdecode_never_lets_a_layer_return(budget):
    skip, before = POLICIES["skipdecode"](make_setting(), budget), set()
    for step in range(40):
        now = layers(skip(step))
        assert before <= set(now)
        assert now == list(range(1, 1 + len(now))), "from low layers up, the first kept"
        assert L - 1 not in now
        before = set(now)
    assert len(before) == min(budget, L - 2)


@pytest.mark.parametrize("budget", range(L - 1))
def test_skipdecode_grows_linearly_to_twice_its_budget(budget):
    """Its mean over the steps of a stage is the budget, to within what rounding makes."""
    skip = POLICIES["skipdecode"](make_setting(horizon=11), budget)
    counts = [skip(step).count_nonzero().item() for step in range(11)]
    assert counts[0] == 0 and counts[10] == 2 * budget
    for step, count in enumerate(counts):
        assert abs(count - 2 * budget * step / 10) <= 1
    assert sum(counts) / 11 == pytest.approx(budget, abs=0.5)


def test_skipdecode_step_by_step():
    skip = POLICIES["skipdecode"](make_setting(n_layers=6, horizon=4), 3)
    assert [layers(skip(step)) for step in range(6)] == [
        [],
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 3],
        [1, 2, 3],
    ]


# ---------------------------------------------------------------- LiteStage


@pytest.mark.parametrize("budget", BUDGETS)
def test_litestage_skips_the_first_of_the_ranking(budget):
    setting = make_setting()
    assert chosen(POLICIES["litestage"](setting, budget)) == set(setting.ranking[:budget])


def test_litestage_by_hand():
    setting = setting_of([[0.2, 0.9], [0.8, 0.1], [0.3, 0.7]])
    assert chosen(POLICIES["litestage"](setting, 3)) == {(0, FFN), (1, ATTENTION), (2, FFN)}


def test_each_stage_has_its_own_ranking():
    """What a policy ranks by is its stage's; AdaSkip has one set for all."""
    orders = [[(0, 0), (0, 1), (1, 0), (1, 1)], [(1, 1), (1, 0), (0, 1), (0, 0)]]
    similarity = torch.tensor([[0.1, 0.2], [0.9, 0.3]])
    setting = Setting(Importance(similarity, torch.ones(2, 2)), orders)
    found = [chosen(POLICIES["litestage"](setting.at(stage), 2)) for stage in (0, 1)]
    assert found == [{(0, 0), (0, 1)}, {(1, 0), (1, 1)}]
    for stage in (0, 1):
        assert setting.at(stage).ranking == orders[stage]
        mask = mask_at(POLICIES["adaskip"](setting.at(stage), 2), 0)
        assert chosen(mask) == {(1, ATTENTION), (1, FFN)}
    assert setting.stage == 0, "a setting is not changed"


@pytest.mark.parametrize("budget", BUDGETS)
def test_litestage_by_layers_keeps_pairs(budget):
    setting = make_setting(granularity="layer")
    skipped = layers(POLICIES["litestage"](setting, budget))
    means = setting.importance.similarity.mean(1)
    most_similar = sorted(range(L), key=lambda layer: -means[layer].item())
    assert skipped == sorted(most_similar[: budget // 2])


# ---------------------------------------------------------------- AdaSkip

SIMILARITY = [[0.9, 0.2], [0.5, 0.8], [0.7, 0.1]]  # ranks (0, A) (1, F) (2, A) (1, A) (0, F) (2, F)
RATIO = [[1.1, 1.2], [1.3, 1.4], [1.5, 1.6]]


def numbers(skip) -> torch.Tensor:
    """What an AdaSkip multiplies the stream by at its last step; 0 where the sub-layer runs."""
    return torch.where(skip.mask, torch.tensor(skip.rho), 0)


def show(skip, step, cosines: dict, ratio=1.0):
    """One decoding step: its `numbers`, and what the probe then sees of (layer, sub): cosine."""
    now = skip(step)
    found = numbers(skip)
    assert torch.equal(now.mask, found != 0)
    if skip.probe is not None:
        for (layer, sub), cosine in cosines.items():
            after = torch.tensor([[[cosine, (1 - cosine**2) ** 0.5]]]) * ratio
            skip.probe.compare(layer, sub, torch.tensor([[[1.0, 0.0]]]), after)
    return found


def test_adaskip_multiplies_by_the_ratio_where_it_skips():
    skip = AdaSkip(setting_of(SIMILARITY, RATIO), 3)
    assert torch.allclose(show(skip, 0, {}), torch.tensor([[1.1, 0], [0, 1.4], [1.5, 0]]))


SUBLAYERS = [(layer, sub) for layer in range(3) for sub in (0, 1)]
SETS = [[(1, 0)], [(1, 1)], [(0, 1), (2, 0), (2, 1)], SUBLAYERS]


def scaled(table) -> Skip:
    """Multiplies the stream by each number of the table (n_layers, 2) that is not 0."""
    skip = AdaSkip(make_setting(len(table)), 0)
    skip(0)
    skip.rho = torch.tensor(table).tolist()
    return Skip(torch.tensor(table) != 0, skip.scale)


@pytest.mark.parametrize("value", [1.0, 0.8, 1.3])
@pytest.mark.parametrize("skipped", SETS)
def test_a_ratio_multiplies_the_stream(folder, llama, skipped, value):
    table = (value * mask_of(skipped, 3)).tolist()
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    tokens = torch.tensor([[0, 5, 9, 30, 7, 3, 3, 200]])
    expected, _ = plain.forward(tensors, config, tokens, torch.tensor(table))
    assert (llama(tokens, skip=scaled(table)) - expected).abs().max() < 1e-4


def test_each_sublayer_has_its_own_ratio(folder, llama):
    table = [[0, 0.7], [1.2, 1], [1.1, 0]]
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    tokens = torch.tensor([[0, 5, 9, 30, 7, 3, 3, 200]])
    expected, _ = plain.forward(tensors, config, tokens, torch.tensor(table))
    assert (llama(tokens, skip=scaled(table)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("skipped", SETS)
def test_a_sublayer_that_is_scaled_is_left_out(llama, skipped):
    """It reads no key of its own, and writes none."""
    cache = KVCache(llama, 1, 4)
    before = [kv.clone() for kv in cache.layers]
    llama(torch.tensor([[0, 5, 9]]), cache, skip=scaled((0.5 * mask_of(skipped, 3)).tolist()))
    for i in range(3):
        same = torch.equal(cache.layers[i].nan_to_num(), before[i].nan_to_num())
        assert same == ((i, ATTENTION) in skipped)


def test_adaskip_ignores_the_stage_and_the_granularity():
    """One set for every stage: the most similar sub-layers, even where others rank layers."""
    skip = AdaSkip(setting_of(SIMILARITY, RATIO, granularity="layer"), 3)
    assert chosen(skip(0).mask) == {(0, ATTENTION), (1, FFN), (2, ATTENTION)}


def test_adaskip_adds_ffns_that_reach_the_threshold_while_decoding():
    """Budget 3: the third largest prefill similarity is 0.7. Over steps 0, 1 FFN 0 has the mean
    0.7 and FFN 2 less; attention 1 is above it, but only FFNs are added. Rho is the one seen."""
    skip = AdaSkip(setting_of(SIMILARITY, RATIO), 3, window=2)
    assert skip.threshold == pytest.approx(0.7)
    first = show(skip, 0, {(0, FFN): 0.65, (1, ATTENTION): 0.95, (2, FFN): 0.9}, ratio=2.0)
    second = show(skip, 1, {(0, FFN): 0.77, (1, ATTENTION): 0.95, (2, FFN): 0.4}, ratio=3.0)
    rest = [show(skip, step, {}) for step in (2, 3, 30)]
    base = torch.tensor([[1.1, 0], [0, 1.4], [1.5, 0]])
    assert torch.allclose(first, base) and torch.allclose(second, base)
    for found in rest:
        assert torch.allclose(found, torch.tensor([[1.1, 2.5], [0, 1.4], [1.5, 0]]))


def test_adaskip_adds_an_ffn_whose_similarity_just_reaches_the_threshold():
    """The third largest is 0, and so is the cosine of what FFN 0 does: orthogonal, exactly."""
    skip = AdaSkip(setting_of([[0.5, -1.0], [0.25, 0.0]]), 3, window=1)
    show(skip, 0, {(0, FFN): 0.0})
    assert show(skip, 1, {}).tolist() == [[1, 1], [1, 1]]
    show(skip, 0, {(0, FFN): -0.01})
    assert show(skip, 1, {}).tolist() == [[1, 0], [1, 1]]


def test_adaskip_starts_anew_with_every_request():
    skip = AdaSkip(setting_of(SIMILARITY, RATIO), 3, window=2)
    for step in range(2):
        show(skip, step, {(0, FFN): 0.99})
    assert show(skip, 2, {})[0, FFN] > 0
    for step in range(2):  # a request whose FFN 0 changes much
        assert show(skip, step, {(0, FFN): 0.3})[0, FFN] == 0
    assert show(skip, 2, {})[0, FFN] == 0
    assert skip.threshold == pytest.approx(0.7)


def test_adaskip_drops_what_a_request_saw_that_ended_early():
    skip = AdaSkip(setting_of(SIMILARITY, RATIO), 3, window=2)
    show(skip, 0, {(0, FFN): 1.0})  # ends here
    for step in range(2):
        show(skip, step, {(0, FFN): 0.6})
    assert show(skip, 2, {})[0, FFN] == 0, "the mean of 0.6, 0.6 is below 0.7, of 1, 0.6, 0.6 above"


def test_adaskip_without_budget_skips_nothing_ever():
    skip = AdaSkip(setting_of(SIMILARITY, RATIO), 0, window=1)
    show(skip, 0, {(0, FFN): 1.0, (1, FFN): 1.0})
    for step in (0, 1):
        assert show(skip, step, {}).count_nonzero() == 0


def test_adaskip_watches_five_steps():
    """The smallest window of its paper. FFN 0 is at 0.75 in steps 0 to 3 and at 0.45 in step 4, so
    that five have a mean of 0.69, below the 0.7 of budget 3, and any four before 0.75."""
    skip = AdaSkip(setting_of(SIMILARITY, RATIO), 3)
    for step in range(4):
        assert show(skip, step, {(0, FFN): 0.75})[0, FFN] == 0
    assert show(skip, 4, {(0, FFN): 0.45})[0, FFN] == 0
    assert show(skip, 5, {})[0, FFN] == 0
    for step in range(5):
        assert show(skip, step, {(0, FFN): 0.75})[0, FFN] == 0, "not before the window is full"
    assert show(skip, 5, {})[0, FFN] > 0


def test_adaskip_watches_the_model_itself(llama):
    """On a real decoder the probe sees what runs, and no sub-layer that was skipped."""
    prompts = [[0, 5, 9, 30, 7]]
    importance = measure_importance(llama, prompts)
    skip = AdaSkip(Setting(importance, [rank(importance.similarity)] * 3), 2, window=1)
    now = skip(0)
    llama(torch.tensor([[4]]), skip=now)
    assert now.mask.count_nonzero() == 2
    assert torch.equal(skip.probe.counts == 0, now.mask)


def test_adaskip_probes_the_streams_that_are_scaled(folder, llama):
    """What it learns online is what the textbook says of a model with the scaled sub-layers."""
    importance = measure_importance(llama, [[0, 5, 9, 30, 7]])
    skip = AdaSkip(Setting(importance, [rank(importance.similarity)] * 3), 3, window=1)
    llama(torch.tensor([[4]]), skip=skip(0))
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    _, streams = plain.forward(tensors, config, [[4]], numbers(skip))
    found = skip.probe.means()
    for (layer, sub), (before, after) in zip(SUBLAYERS, streams):
        if not skip.mask[layer, sub]:
            cosine = torch.cosine_similarity(before, after, dim=-1).item()
            ratio = (after.norm() / before.norm()).item()
            assert found.similarity[layer, sub].item() == pytest.approx(cosine, abs=1e-5)
            assert found.ratio[layer, sub].item() == pytest.approx(ratio, abs=1e-4)


def test_random_sublayers_depend_on_the_seed_alone():
    ranking = rank(torch.rand(6, 2))
    importance = Importance(torch.zeros(6, 2), torch.ones(6, 2))
    one = POLICIES["random"](Setting(importance, [ranking]), 4)
    other = POLICIES["random"](Setting(importance, [ranking[::-1]]), 4)
    assert torch.equal(one, other)


def test_adaskips_probed_steps_are_a_kind_of_their_own():
    ranking = rank(torch.rand(6, 2))
    importance = Importance(torch.rand(6, 2), torch.ones(6, 2))
    policy = POLICIES["adaskip"](Setting(importance, [ranking]), 2)
    names = [policy(step).hook.__name__ for step in range(5)]
    assert names == ["watch"] * 5
