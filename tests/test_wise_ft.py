"""The interpolation is the formula; alpha, Table 4, cases and paired tests against slow definitions."""
from dataclasses import replace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch

from newsrepro.core.base import InputError
from newsrepro.core.checkpoints import find_backbone
from newsrepro.data.layouts import read_collection
from newsrepro.methods.fine_tune import DecodedPool, save_fine_tuned
from newsrepro.methods.wise_ft import (ALPHAS, ENDS, READS, RECIPES, Adapted,
                                       against_ends, cases, choose_alpha, end_rows, interpolate,
                                       part_set, rank_changes, read_set, retold, soup, state_of, store_bytes,
                                       sweep, with_weights)
from newsrepro.ranking.metrics import holm, measure
from newsrepro.models.loader import build_model, load_encoder
from newsrepro.models.train import PUBMEDCLIP
from newsrepro.ranking.pool import Pool
from newsrepro.study.study import mini_root


def same_bits(one, other):
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and one.numpy().tobytes() == other.numpy().tobytes()


def some_pool(start, draw):
    ids = tuple(map(str, range(13)))
    pixels = torch.randint(0, 256, (13, 3, 64, 64), dtype=torch.uint8, generator=draw)
    tokens = start.tokenize([f'text {i}' for i in ids])
    return DecodedPool(Pool.of(ids, ids, dict(zip(ids, ids))), tokens, pixels)


def moved(start, draw, size):
    "Weights a little away from those of `start`."
    noise = lambda value: size*torch.randn(value.shape, generator=draw)
    return {key: value + noise(value) for key, value in state_of(start).items()}


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
    state = build_model(find_backbone('RN50', 'mini')).state_dict()
    theta_0 = {key: value.clone() for key, value in state.items()}
    theta_1 = {key: value + 7 for key, value in theta_0.items()}
    counters = [key for key, value in theta_0.items() if not value.is_floating_point()]
    assert counters
    for alpha, nearer in ((0, theta_0), (.3, theta_0), (.7, theta_1), (1, theta_1)):
        mixed = interpolate(theta_0, theta_1, alpha)
        for key, value in mixed.items():
            if key in counters: assert torch.equal(value, nearer[key]) and value.dtype == torch.int64
            else: assert torch.allclose(value, theta_0[key] + 7*alpha, atol=1e-5)
    assert all(torch.equal(soup([theta_0, theta_1])[key], theta_0[key]) for key in counters)


@pytest.mark.parametrize('change, message', [
    (lambda theta: theta.pop('ln_final.weight'),
     'ln_final.weight: float32 .* in one model, absent in the other'),
    (lambda theta: theta.update(extra=torch.ones(1)), 'extra: absent in one model'),
    (lambda theta: theta.update({'visual.proj': torch.ones(3, 5)}),
     r'visual.proj: .* float32 \(3, 5\) in the other'),
    (lambda theta: theta.update({'logit_scale': torch.tensor(1, dtype=torch.int64)}),
     'logit_scale: float32 .* int64')])
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
    for key, value in soup(iter(thetas)).items():
        assert torch.allclose(value, torch.stack([theta[key] for theta in thetas]).mean(0))
    half = interpolate(*thetas[:2], .5)
    assert all(torch.allclose(value, half[key]) for key, value in soup(thetas[:2]).items())


def test_alpha_is_chosen_by_r1_then_mrr_then_small():
    draw = np.random.default_rng(0)
    for _ in range(50):
        ranks = {alpha: draw.integers(0, 4, 11) for alpha in ALPHAS}
        keys = {alpha: (measure(own, 'R@1').mean(), measure(own, 'MRR@100').mean())
                for alpha, own in ranks.items()}
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
    places = [tuple(map(last, three)) for three in zip(zero, tuned, mixed)]
    assert sorted(mended) == [i for i, (z, t, m) in enumerate(places) if t > z and m < t]
    assert sorted(spoiled) == [i for i, (z, t, m) in enumerate(places) if t < z and m > t]
    size = [abs(1/last(mixed[i]) - 1/last(tuned[i])) for i in mended]
    assert len(cases(zero, tuned, mixed)[0]) == 2 and size[0] >= max(size) - .01


def test_sweep_ends_are_the_models_themselves():
    "No picture is opened: the pool holds the pixels. Both ends are the two models, bit for bit."
    start, draw = load_encoder(find_backbone('ViT-B/32')), torch.Generator().manual_seed(0)
    theta_1 = moved(start, draw, .02)
    pool = some_pool(start, draw)
    found = {alpha: (encoder, ranks) for alpha, encoder, ranks in sweep(start, theta_1, {'validation': pool})}
    assert list(found) == list(ALPHAS)
    for alpha, theta in ((0., state_of(start)), (1., theta_1)):
        assert all(same_bits(value, theta[key]) for key, value in state_of(found[alpha][0]).items())
    assert len({encoder.fingerprint for encoder, _ in found.values()}) == len(ALPHAS)
    assert all(len(ranks['validation']) == 13 for _, ranks in found.values())
    assert with_weights(start, theta_1).backbone.quick_gelu


def test_paper_recipe():
    "PubMedCLIP's code with its two halves alike; `article` is the same without what only the code does."
    paper, article = RECIPES['paper'], RECIPES['article']
    assert (paper['image_weight'], paper['epochs'], paper['rate'], paper['batch_size']) == (.5, 50, 1e-5, 64)
    differ = {name for name in paper if paper[name] != article.get(name)}
    assert differ == {'decay_all', 'logit_factor', 'mean_std'}
    assert dict(article) == dict(PUBMEDCLIP) | dict(epochs=50)
    assert READS['paper'] == (0, True) and READS.keys() == RECIPES.keys()


def test_adapt_searches_what_it_is_asked(tmp_path, monkeypatch):
    "The short curve has both ends and the chosen alpha for the test part, with the ranks of the whole one."
    from newsrepro.methods import wise_ft as module
    start, draw = load_encoder(find_backbone('ViT-B/32')), torch.Generator().manual_seed(0)
    tuned = with_weights(start, moved(start, draw, .05))
    tuned = replace(tuned, path=save_fine_tuned(tmp_path, tuned.model, tuned.backbone))
    monkeypatch.setattr(module, 'fine_tune', lambda *_: (tuned, []))
    pools = dict(validation=some_pool(start, draw), test=some_pool(start, draw))
    whole, short = (module.adapt(start, None, None, None, tmp_path, pools, whole_curve=flag)
                    for flag in (True, False))
    assert short.alpha == whole.alpha and short.labels == whole.labels
    assert {alpha for alpha, ranks in short.curve.items() if 'test' in ranks} == {0., 1., whole.alpha}
    for part in pools:
        for run, ranks in short.ranks(part).items():
            np.testing.assert_array_equal(ranks, whole.ranks(part)[run])
    # what is known is not searched again
    before = {part: ranks[::-1].copy() for part, ranks in whole.curve[0.].items()}
    ends = module.adapt(start, None, None, None, tmp_path, pools, alphas=(), before=before)
    assert list(ends.curve) == [0., 1.]
    for part in pools:
        np.testing.assert_array_equal(ends.curve[0.][part], before[part])
        np.testing.assert_array_equal(ends.curve[1.][part], whole.curve[1.][part])
    marks = {alpha: adapted.labels[run] for adapted in (whole, ends)
             for run, alpha in (('zero_shot', 0.), ('fine_tuned', 1.))}
    assert ends.labels['wise_ft'] == marks[ends.alpha] and len(set(marks.values())) == 2
    assert all(same_bits(value, tuned.model.state_dict()[key]) for key, value in whole.theta_1.items())
    whole.weights.unlink()
    with pytest.raises(InputError, match='deleted since it was trained'): whole.theta_1


def adapted_of(zero, tuned, mixed, alpha=.5):
    curve = {0.: dict(test=zero), 1.: dict(test=tuned)}
    if 0 < alpha < 1: curve[alpha] = dict(test=mixed)
    return Adapted(None, [], None, alpha, curve, dict(zero_shot='a', fine_tuned='b', wise_ft='c'))


def test_both_ends_are_tested_together():
    draw = np.random.default_rng(0)
    good, middling, bad = (draw.integers(low, low + 3, 199) for low in (1, 2, 40))
    runs = {'clear': adapted_of(bad, middling, good), 'worse': adapted_of(bad, good, middling)}
    table = pd.DataFrame(end_rows({name: [one]*2 for name, one in runs.items()}, 'test'))
    found = table[table.metric == 'p'].value.to_numpy()[:4]
    np.testing.assert_allclose(table[table.metric == 'p (Holm)'].value.to_numpy()[:4], holm(found))
    clear = table.query("run == 'wise_ft - fine_tuned' and dataset == 'clear'")
    first = clear[clear.metric == 'MRR@100'].iloc[0]
    assert first.value == pytest.approx((1/good - 1/middling).mean()) and first.n == 199


def test_over_seeds_an_article_counts_once():
    "The same training three times is no more certain than once."
    draw = np.random.default_rng(1)
    one = adapted_of(*draw.integers(0, 9, (3, 97)))
    once, thrice = (against_ends([one]*count, 'test') for count in (1, 3))
    for end in ENDS: assert once[end] == pytest.approx(thrice[end])
    rows = pd.DataFrame(end_rows({'A': [one]*3}, 'test')).query("run.str.endswith('scatter of seeds')")
    assert rows.n.tolist() == [3]*len(ENDS) and rows.ci_low.isna().all()  # no scatter, no interval


def test_store_holds_all_models_twice():
    start = load_encoder(find_backbone('ViT-B/32'))
    size = sum(value.numel()*value.element_size() for value in state_of(start).values())
    assert store_bytes(start, 18, least=0) == 36*size


@pytest.fixture(scope='module')
def few():
    "Twelve articles of one set in training, nine in the test part, whose truth is not known."
    usable, _ = read_collection(mini_root()/'newsimages2022').usable()
    part = usable.subset('RSS', None)
    articles = part.articles.groupby('split').head(12).query("split == 'train' or image_id != ''")
    blind = articles.assign(image_id=articles.image_id.where(articles.split == 'train', ''))
    wanted = set(articles.image_id)
    return replace(part, articles=blind.reset_index(drop=True),
                   images=part.images[part.images.image_id.isin(wanted)].reset_index(drop=True),
                   pairs=part.pairs[(part.pairs.split == 'train') & part.pairs.image_id.isin(wanted)])


def test_without_test_truth_the_test_part_is_searched_and_not_measured(few):
    from newsrepro.methods.fine_tune import search
    start = load_encoder(find_backbone('ViT-B/32'))
    news = read_set(few, 'RSS', lambda articles: articles.title.tolist(), start.backbone, 5, True)
    held = part_set(news, share=.25)
    assert list(held.pools) == ['validation'] and len(held.pools['validation'].pool.truth) == 3
    lists = search(start, news.test)
    assert set(lists) == set(few.articles.query("split == 'test'").article_id)
    assert all(map(len, lists.values()))
    # training reads five characters and whole pictures; search and validation's pool read all and the centre
    assert max(map(len, held.pairs.text_ids)) == 5
    assert len(held.pairs.aspects) == 9 and held.valid.aspects is None
    validated = held.pools['validation'].pool.truth
    text_of = dict(zip(few.articles.article_id, few.articles.title))
    assert set(held.valid.text_ids) == {text_of[article][:5] for article in validated}
    shouted = retold(news, [text.upper() for text in news.pool.texts], ['X']*len(news.test.tokens))
    assert part_set(shouted, share=.25).pairs.text_ids == tuple(text.upper() for text in held.pairs.text_ids)
    assert torch.equal(shouted.pairs.pixels, news.pairs.pixels)
