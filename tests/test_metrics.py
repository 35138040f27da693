"The measures against a plain restatement of the official rules and against `ranx`, on random runs."
from itertools import permutations

import numpy as np
import pytest
import ranx
from hypothesis import given, settings
from hypothesis import strategies as st

from newsrepro.core.base import InputError
from newsrepro.ranking.metrics import (MEASURES, compare_seeds, difference_over_seeds, holm, measure,
                                       mrr_bounds, rank_of_truth, summarise, tie_order)
from newsrepro.ranking.pool import Pool, ranks_by_score, scored_lists

steady = settings(deadline=None, derandomize=True)


def official(retrieved: dict, truth: dict) -> dict:
    """The organisers' rules, sentence by sentence: first right id among the first 100, sums over the
    found, divided by all"""
    positions = []
    for article, image in truth.items():
        for position, candidate in enumerate(retrieved.get(article, [])[:100], start=1):
            if candidate == image:
                positions.append(position)
                break
    scores = {'MRR@100': sum(1 / p for p in positions) / len(truth)}
    return scores | {f'R@{k}': sum(p <= k for p in positions) / len(truth) for k in (1, 5, 10, 20, 50, 100)}


@st.composite
def runs(draw):
    "A truth over a pool with images of no article, and lists: missing, empty, short, full or longer than 100"
    n_articles, n_images = draw(st.integers(1, 12)), draw(st.integers(12, 130))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pool = [f'i{j}' for j in range(n_images)]
    truth = {f'a{j}': pool[j] for j in rng.permutation(n_articles)}
    lengths = draw(st.lists(st.none() | st.integers(0, n_images), min_size=n_articles, max_size=n_articles))
    retrieved = {a: rng.permutation(pool)[:k].tolist() for a, k in zip(truth, lengths) if k is not None}
    return retrieved, truth


@steady
@given(runs())
def test_measures_are_the_official_ones(run):
    scores, expected = summarise(rank_of_truth(*run)), official(*run)
    assert list(scores) == list(MEASURES)
    assert scores == pytest.approx(expected, abs=1e-12)


@steady
@given(runs())
def test_rank_depth_and_cut_off_agree(run):
    deep = rank_of_truth(*run, depth=None)
    for k in (1, 10, 100):
        cut = rank_of_truth(*run, depth=k)
        assert np.array_equal(cut, np.where(deep <= k, deep, 0))
        assert np.array_equal(measure(cut, f'MRR@{k}'), measure(deep, f'MRR@{k}'))


@steady
@given(st.lists(st.text(), unique=True, min_size=1), st.randoms())
def test_tie_order_is_a_permutation_that_forgets_the_stored_order(ids, random):
    assert sorted(tie_order(ids)) == list(range(len(ids)))
    shuffled = random.sample(ids, len(ids))
    assert [ids[j] for j in tie_order(ids)] == [shuffled[j] for j in tie_order(shuffled)]


@settings(steady, max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_equal_scores_favour_no_image(seed, levels):
    """Coarse scores that know nothing: renaming the images moves the mean to chance, and no stored place
    is better off"""
    rng = np.random.default_rng(seed)
    n = 211
    scores = rng.integers(0, levels, (n, n))
    names = [f'{x:x}' for x in rng.permutation(10**6)[:n]]
    pool = Pool.of(range(n), names, dict(enumerate(names)))
    ranks = ranks_by_score(pool, scores[:, pool.order], depth=n)
    # ranks of a blind scorer are uniform over 1..n; five standard errors of their mean
    for part in (ranks, ranks[:n // 2], ranks[n // 2:]):
        assert abs(part.mean() - (n + 1) / 2) < 5 * n / (12 * len(part))**.5


@pytest.mark.parametrize('seed', range(5))
def test_ranx_agrees(seed):
    """Runs with ties, missing articles and short lists; ranx sorts by score, so it gets the place in the
    list as one"""
    rng = np.random.default_rng(seed)
    n, m = 37, 131
    images, articles = [f'i{j}' for j in range(m)], [f'a{j}' for j in range(n)]
    truth = {a: images[j] for a, j in zip(articles, rng.permutation(m))}
    scores = rng.integers(0, 9, (n, m)).astype(float)
    scores[np.arange(n), [images.index(i) for i in truth.values()]] += rng.integers(0, 4, n)
    pool = Pool.of(articles, images, truth)
    lists = scored_lists(pool, scores[:, pool.order], m)
    lengths = rng.choice([0, 1, 7, 99, 100, m], n)
    retrieved = {a: lists[a][:k] for a, k in zip(articles, lengths) if k}
    assert len(retrieved) < n and any(len(x) < 100 for x in retrieved.values())

    qrels = ranx.Qrels({a: {i: 1} for a, i in truth.items()})
    run = ranx.Run({a: {i: 1 / place for place, i in enumerate(x, start=1)} for a, x in retrieved.items()})
    ks = (1, 5, 10, 20, 50, 100)
    names = ['mrr@100', *(f'{kind}@{k}' for kind in ('recall', 'hit_rate') for k in ks)]
    theirs = ranx.evaluate(qrels, run, names,
                           make_comparable=True)   # adds the missing articles, as not found

    ours = summarise(rank_of_truth(retrieved, truth))
    assert 0 < ours['R@1'] < ours['R@100'] < 1
    assert ours['MRR@100'] == pytest.approx(theirs['mrr@100'])
    for k in ks:
        assert ours[f'R@{k}'] == pytest.approx(theirs[f'recall@{k}'])
        assert ours[f'R@{k}'] == pytest.approx(theirs[f'hit_rate@{k}'])


@steady
@given(st.text(max_size=8) | st.from_regex(r'(MRR|R|map|NDCG)(@-?\d{1,4})?', fullmatch=True))
def test_a_name_is_a_measure_or_refused(name):
    "The grammar, restated: MRR, or one of MRR and R with @ and a whole number from 1."
    kind, at, k = name.partition('@')
    right = name == 'MRR' or kind in ('MRR', 'R') and at and k.isascii() and k.isdigit() and k[0] != '0'
    try: values = measure([1, 3, 0], name)
    except InputError as e: assert not right and 'MRR, MRR@K and R@K' in str(e) and '\n' not in str(e)
    else: assert right and values[2] == 0 and values[0] == 1


def test_holm_rejects_what_the_procedure_rejects():
    "Against the procedure as Holm states it: go up from the smallest while p is below level/(tests left)."
    for p in permutations((.004, .012, .03, .2)):
        for level in (.01, .02, .05, .1, .3):
            rejected, left = set(), len(p)
            for value in sorted(p):
                if value*left >= level: break
                rejected.add(value)
                left -= 1
            assert {value for value, corrected in zip(p, holm(p)) if corrected < level} == rejected


@pytest.mark.parametrize('seed', range(5))
def test_reciprocal_ranks_lie_within_their_bounds(seed):
    "Which are reached: by ranks at the depths themselves, and right behind the depths before."
    ranks = np.random.default_rng(seed).integers(0, 200, 97)
    value = lambda name, own: measure(own, name).mean()
    low, high = mrr_bounds({k: value(f'R@{k}', ranks) for k in (1, 5, 10, 50, 100)})
    assert low <= value('MRR@100', ranks) <= value('MRR', ranks) <= high
    depths = np.array([1, 5, 10, 50, 100, 0])
    ends = np.searchsorted(depths[:5], np.where(ranks == 0, 1000, ranks))
    assert value('MRR', depths[ends]) == pytest.approx(low, abs=1e-12)
    assert value('MRR', np.array([1, 2, 6, 11, 51, 101])[ends]) == pytest.approx(high, abs=1e-12)


# several seeds a side

def variance_parts(side: list[list[float]]) -> tuple[float, float]:
    "Mean squares of seeds and of what is peculiar to a seed at an article, as in a textbook's two-way table."
    seeds, n = len(side), len(side[0])
    mean = sum(map(sum, side))/(seeds*n)
    of_seed = [sum(row)/n for row in side]
    of_article = [sum(row[i] for row in side)/seeds for i in range(n)]
    between = n*sum((one - mean)**2 for one in of_seed)/(seeds - 1)
    within = sum((side[s][i] - of_seed[s] - of_article[i] + mean)**2
                 for s in range(seeds) for i in range(n))/((seeds - 1)*(n - 1))
    return between, within


@steady
@given(st.integers(2, 4), st.integers(2, 4), st.integers(3, 30), st.integers(0, 2**32))
def test_interval_over_seeds_against_mean_squares(seeds_a, seeds_b, n, seed):
    from scipy.stats import t
    rng = np.random.default_rng(seed)
    sides = [rng.random((seeds, n)) + rng.normal(0, .2, (seeds, 1)) for seeds in (seeds_a, seeds_b)]
    gaps = [a - b for a, b in zip(*(side.mean(axis=0).tolist() for side in sides))]
    mean = sum(gaps)/n
    articles = sum((gap - mean)**2 for gap in gaps)/(n - 1)/n
    parts, between, within = [(articles, n - 1)], 0, 0
    for side in sides:
        squares = [square/side.size for square in variance_parts(side.tolist())]
        between, within = between + squares[0], within + squares[1]
        parts += [(squares[0], len(side) - 1), (squares[1], (len(side) - 1)*(n - 1))]
    variance = max(articles + between - within, articles, between)
    freedom = variance**2/sum(part**2/free for part, free in parts)
    difference, (low, high), p_value = difference_over_seeds(*sides)
    assert difference == pytest.approx(mean)
    assert high - difference == pytest.approx(difference - low) == pytest.approx(
        t.ppf(.975, freedom)*variance**.5)
    assert p_value == pytest.approx(2*t.sf(abs(mean)/variance**.5, freedom))
    assert (p_value < .05) == (not low <= 0 <= high)


def test_order_of_seeds_and_articles_does_not_matter_and_sides_mirror():
    rng = np.random.default_rng(11)
    a, b = rng.integers(0, 100, (3, 40)), rng.integers(0, 100, (2, 40))
    found, order = compare_seeds(a, b), rng.permutation(40)
    turned, back = compare_seeds(a[::-1, order], b[:, order]), compare_seeds(b, a)
    assert turned.ci95 == pytest.approx(found.ci95) and turned.p_value == pytest.approx(found.p_value)
    assert back.ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]))
    assert back.p_value == pytest.approx(found.p_value) and back.a_sd == found.b_sd
