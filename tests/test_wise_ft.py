"""The interpolation is the formula, at full size and for every key; alpha, Table 4 and the figures' pairs against slow definitions."""
import numpy as np
import open_clip
import pytest
import torch

from newsrepro.core.checkpoints import find_backbone
from newsrepro.core.base import InputError
from newsrepro.models.loader import build_model, load_encoder
from newsrepro.methods.fine_tune import DecodedPool
from newsrepro.ranking.pool import Pool
from newsrepro.ranking.metrics import measure
from newsrepro.methods.wise_ft import (ALPHAS, RECIPES, cases, choose_alpha, interpolate, rank_changes, soup,
                               state_of, sweep, with_weights)


def same_bits(one, other): return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def some_pool(start, draw):
    ids = tuple(map(str, range(13)))
    pixels = torch.randint(0, 256, (13, 3, 56, 56), dtype=torch.uint8, generator=draw)
    return DecodedPool(Pool.of(ids, ids, dict(zip(ids, ids))), start.tokenize([f'text {i}' for i in ids]), pixels)


def random_state(seed, name='ViT-B-32'):
    "Full-size weights, with a negative zero in each tensor."
    torch.manual_seed(seed)
    with torch.device('meta'): model = open_clip.create_model(name, load_weights=False, device='meta')
    state = {key: torch.randn(value.shape) for key, value in model.state_dict().items()}
    for value in state.values(): value.view(-1)[0] = -0.
    return state


def test_full_size_formula():
    "Exact at both ends, the formula in between, linear in alpha, for every key of both towers."
    theta_0, theta_1 = random_state(0), random_state(1)
    assert len(theta_0) > 300 and sum(value.numel() for value in theta_0.values()) > 151e6
    assert list(interpolate(theta_0, theta_1, .3)) == list(theta_0)
    for alpha, end in ((0, theta_0), (1, theta_1)):
        assert all(same_bits(value, end[key]) for key, value in interpolate(theta_0, theta_1, alpha).items())
    for key in theta_0:
        one, other = {key: theta_0[key]}, {key: theta_1[key]}
        quarter, half, three = (interpolate(one, other, alpha)[key] for alpha in (.25, .5, .75))
        exact = .75*theta_0[key].double() + .25*theta_1[key].double()
        assert (quarter - exact).abs().max() <= 2**-23*(theta_0[key].abs() + theta_1[key].abs()).max(), key
        assert torch.allclose((quarter + three)/2, half, rtol=0, atol=2e-6), key
        assert half.numel() == 1 or not torch.equal(half, theta_0[key]), key


def test_batch_norm_counts_are_taken_not_averaged():
    theta_0 = {key: value.clone() for key, value in build_model(find_backbone('RN50', 'mini')).state_dict().items()}
    theta_1 = {key: value + 7 for key, value in theta_0.items()}
    counters = [key for key, value in theta_0.items() if not value.is_floating_point()]
    assert counters
    for alpha, nearer in ((0, theta_0), (.3, theta_0), (.7, theta_1), (1, theta_1)):
        mixed = interpolate(theta_0, theta_1, alpha)
        assert all(torch.equal(mixed[key], nearer[key]) and mixed[key].dtype == torch.int64 for key in counters)
        assert all(torch.allclose(mixed[key], theta_0[key] + 7*alpha, atol=1e-5) for key in theta_0 if key not in counters)
    assert all(torch.equal(soup([theta_0, theta_1])[key], theta_0[key]) for key in counters)


@pytest.mark.parametrize('change, message', [
    (lambda theta: theta.pop('ln_final.weight'), 'ln_final.weight: float32 .* in one model, absent in the other'),
    (lambda theta: theta.update(extra=torch.ones(1)), 'extra: absent in one model'),
    (lambda theta: theta.update({'visual.proj': torch.ones(3, 5)}), r'visual.proj: .* float32 \(3, 5\) in the other'),
    (lambda theta: theta.update({'logit_scale': torch.tensor(1, dtype=torch.int64)}), 'logit_scale: float32 .* int64')])
def test_mismatch_names_the_key(change, message):
    theta_0 = state_of(load_encoder(find_backbone('ViT-B/32')))
    theta_1 = dict(theta_0)
    change(theta_1)
    with pytest.raises(InputError, match=message): interpolate(theta_0, theta_1, .5)
    with pytest.raises(InputError, match=message): interpolate(theta_0, theta_1, 0)  # at the ends too
    with pytest.raises(InputError, match=message): soup([theta_0, theta_1])


def test_soup_is_the_mean():
    draw = torch.Generator().manual_seed(0)
    thetas = [dict(a=torch.randn(3, 5, generator=draw), b=torch.randn((), generator=draw)) for _ in range(3)]
    for key, value in soup(thetas).items(): assert torch.allclose(value, torch.stack([theta[key] for theta in thetas]).mean(0))
    assert all(torch.allclose(value, interpolate(*thetas[:2], .5)[key]) for key, value in soup(thetas[:2]).items())


def test_alpha_is_chosen_by_r1_then_mrr_then_small():
    draw = np.random.default_rng(0)
    for _ in range(50):
        ranks = {alpha: draw.integers(0, 4, 11) for alpha in ALPHAS}
        keys = {alpha: (measure(r, 'R@1').mean(), measure(r, 'MRR@100').mean()) for alpha, r in ranks.items()}
        assert choose_alpha(ranks) == min(alpha for alpha in ALPHAS if keys[alpha] == max(keys.values()))


def test_table_4_against_its_definition():
    draw = np.random.default_rng(1)
    for _ in range(20):
        zero, tuned, mixed = draw.integers(0, 101, (3, 97))
        won, lost = [], []
        for z, t, m in zip(zero, tuned, mixed):
            if not t or not m or (z and t >= z): continue
            if m < t: won.append(t - m)
            if m > t: lost.append(m - t)
        found = rank_changes(zero, tuned, mixed)
        assert (found['mean rank improvement'].tolist(), found['mean rank decrease'].tolist()) == (won, lost)


def test_cases_are_what_the_figures_say():
    draw = np.random.default_rng(2)
    zero, tuned, mixed = draw.integers(0, 101, (3, 199))
    last = lambda rank: rank or 101
    mended, spoiled = cases(zero, tuned, mixed, most=500)
    assert sorted(mended) == [i for i in range(199) if last(tuned[i]) > last(zero[i]) and last(mixed[i]) < last(tuned[i])]
    assert sorted(spoiled) == [i for i in range(199) if last(tuned[i]) < last(zero[i]) and last(mixed[i]) > last(tuned[i])]
    size = [abs(1/last(mixed[i]) - 1/last(tuned[i])) for i in mended]
    assert len(cases(zero, tuned, mixed)[0]) == 2 and size[0] >= max(size) - .01


def test_sweep_ends_are_the_models_themselves():
    "No picture is opened: the pool holds the pixels. Both ends give the embeddings of the two models, bit for bit."
    start, draw = load_encoder(find_backbone('ViT-B/32')), torch.Generator().manual_seed(0)
    theta_1 = {key: value + .02*torch.randn(value.shape, generator=draw) for key, value in state_of(start).items()}
    pool = some_pool(start, draw)
    found = {alpha: (encoder, ranks) for alpha, encoder, ranks in sweep(start, theta_1, {'validation': pool})}
    assert list(found) == list(ALPHAS)
    for alpha, theta in ((0., state_of(start)), (1., theta_1)):
        assert all(same_bits(value, theta[key]) for key, value in state_of(found[alpha][0]).items())
    assert len({encoder.fingerprint for encoder, _ in found.values()}) == len(ALPHAS)
    assert all(len(ranks['validation']) == 13 for _, ranks in found.values())
    assert with_weights(start, theta_1).backbone.quick_gelu


def test_paper_recipe():
    assert (RECIPES['paper']['image_weight'], RECIPES['paper']['epochs'], RECIPES['paper']['rate']) == (.7, 50, 1e-5)


def test_adapt_searches_what_it_is_asked(tmp_path, monkeypatch):
    "The short curve has both ends and the chosen alpha for the test part, with the ranks of the whole one."
    from newsrepro.methods import wise_ft as module
    start, draw = load_encoder(find_backbone('ViT-B/32')), torch.Generator().manual_seed(0)
    tuned = with_weights(start, {key: value + .05*torch.randn(value.shape, generator=draw) for key, value in state_of(start).items()})
    monkeypatch.setattr(module, 'fine_tune', lambda *_: (tuned, []))
    pools = dict(validation=some_pool(start, draw), test=some_pool(start, draw))
    whole, short = (module.adapt(start, None, None, None, tmp_path, pools, whole_curve=flag) for flag in (True, False))
    assert short.alpha == whole.alpha and short.labels == whole.labels
    assert {alpha for alpha, ranks in short.curve.items() if 'test' in ranks} == {0., 1., whole.alpha}
    for part in pools:
        for run, ranks in short.ranks(part).items(): np.testing.assert_array_equal(ranks, whole.ranks(part)[run])
    before = {part: ranks[::-1].copy() for part, ranks in whole.curve[0.].items()}  # what is known is not searched again
    ends = module.adapt(start, None, None, None, tmp_path, pools, alphas=(), before=before)
    assert list(ends.curve) == [0., 1.]
    for part in pools:
        np.testing.assert_array_equal(ends.curve[0.][part], before[part])
        np.testing.assert_array_equal(ends.curve[1.][part], whole.curve[1.][part])
    marks = {alpha: adapted.labels[run] for adapted in (whole, ends) for run, alpha in (('zero_shot', 0.), ('fine_tuned', 1.))}
    assert ends.labels['wise_ft'] == marks[ends.alpha] and len(set(marks.values())) == 2
