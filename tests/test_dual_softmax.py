"""Ranks, broken pairings and the choice of a temperature."""
import numpy as np
import pytest

from newsrepro.core.base import InputError
from newsrepro.methods.dual_softmax import (CORRECTIONS, TEMPERATURES, Case, choose_temperature, marked,
                                            with_distractors, without_images)
from newsrepro.ranking.metrics import clear_sign, holm, rank_of_truth
from newsrepro.ranking.one_to_one import best_columns, dual_softmax, hubness, query_bank_norm, sinkhorn
from newsrepro.ranking.pool import Pool, column_ranks, ranks_by_score, scored_lists


def make_case(n=60, m=60, noise=1.5, seed=0, hubs=2.):
    "True pairs on the diagonal, noise everywhere, and some images that are near everything."
    rng = np.random.default_rng(seed)
    scores = .1*(np.eye(n, m)*4 + noise*rng.normal(size=(n, m)) + hubs*rng.gamma(.5, size=m))
    ids = [f'i{j}' for j in range(m)]
    pool = Pool([f'a{i}' for i in range(n)], ids, np.arange(m), {f'a{i}': f'i{i}' for i in range(min(n, m))})
    bank = .1*(noise*rng.normal(size=(40, m)) + (scores.mean(0) - scores.mean())*10)
    return Case(pool, scores, bank)


def test_ranks_equal_those_of_the_lists():
    case = make_case(20, 33)
    scores = np.round(case.scores, 1)  # many ties
    lists = scored_lists(case.pool, scores, 33)
    assert (ranks_by_score(case.pool, scores) == rank_of_truth(lists, case.pool.truth)).all()


def test_an_article_that_does_not_ask_counts():
    pool = Pool(['a'], ['x', 'y'], np.arange(2), dict(a='y', b='x', c='gone'))
    assert ranks_by_score(pool, np.array([[.2, .1]])).tolist() == [2, 0, 0]
    assert column_ranks(np.zeros((2, 3)), np.array([2, -1])).tolist() == [3, 0]


def test_corrections_help_against_hubs_and_lower_hubness():
    case = make_case()
    quality = lambda scores: (1/ranks_by_score(case.pool, scores)).mean()
    plain = quality(case.scores)
    for name in ('dual softmax', 'inverted softmax', 'Sinkhorn', 'CSLS', 'assignment'):
        assert quality(CORRECTIONS[name](case.scores, .05, case.bank)) > plain, name
    skew = lambda scores: hubness(best_columns(scores, 10), 60)
    assert skew(CORRECTIONS['Sinkhorn'](case.scores, .05, case.bank)) < skew(case.scores)


def test_query_bank_sees_one_article_at_a_time():
    case = make_case()
    whole = query_bank_norm(case.scores, case.bank, .05)
    alone = [query_bank_norm(row[None], case.bank, .05) for row in case.scores]
    assert np.allclose(whole, np.concatenate(alone))
    assert not np.allclose(dual_softmax(case.scores, .05)[:1], dual_softmax(case.scores[:1], .05))


def test_one_iteration_of_sinkhorn_is_dual_softmax():
    for n, m in ((30, 30), (20, 50), (50, 20)):
        z = make_case(n, m).scores
        for T in (.01, .1, 1.): assert np.allclose(2*sinkhorn(z, T, 1), dual_softmax(z, T) + np.log(n/m))


def test_sinkhorn_reaches_its_shares():
    for n, m in ((30, 30), (20, 50)):
        P = np.exp(sinkhorn(make_case(n, m).scores, .3, 300))
        assert np.allclose(P.sum(1), 1, atol=1e-6) and np.allclose(P.sum(0), n/m, atol=1e-6)


def test_distractors_leave_the_truth_and_lower_ranks():
    case = make_case()
    rng = np.random.default_rng(1)
    more = with_distractors(case, .3*rng.normal(size=(60, 100)), np.zeros((40, 100)))
    assert more.pool.truth == case.pool.truth
    assert more.scores.shape == (60, 160) and more.bank.shape == (40, 160)
    ranks = lambda case: ranks_by_score(case.pool, case.scores, 10**6)
    assert (ranks(more) >= ranks(case)).all()


@pytest.mark.parametrize('share', [0, .2, .5])
def test_missing_images(share):
    case, fewer = make_case(), without_images(make_case(), share, seed=3)
    assert len(fewer.pool.images) == 60 - round(60*share) == len(fewer.pool.truth)
    assert len(fewer.pool.articles) == 60
    ranks = dict(zip(case.pool.truth, ranks_by_score(case.pool, case.scores)))
    after = dict(zip(fewer.pool.truth, ranks_by_score(fewer.pool, fewer.scores)))
    assert all(0 < after[article] <= ranks[article] for article in after)
    assert without_images(make_case(), share, seed=3).pool.images == fewer.pool.images


def test_temperature_is_chosen_by_quality():
    cases = [make_case(seed=seed) for seed in range(3)]
    chosen = choose_temperature(cases, 'dual softmax')
    found = lambda case, T: ranks_by_score(case.pool, dual_softmax(case.scores, T))
    value = lambda T: np.mean([(1/found(case, T)).mean() for case in cases])
    assert value(chosen) == max(map(value, TEMPERATURES))
    # no difference: the one that corrects least
    assert choose_temperature(cases, 'plain') == max(TEMPERATURES)
    with pytest.raises(InputError, match='no pool'): choose_temperature([], 'plain')


def test_transductive_is_marked():
    assert [name for name in CORRECTIONS if marked(name) == name] == ['plain', 'QB-Norm']


def test_holm_against_its_definition():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7):
        p = rng.random(n)**3
        # reject at level a: step down while the k-th smallest is at most a/(n - k)
        for level in (.01, .05, .2, .5):
            rejected, order = set(), np.argsort(p)
            for k, i in enumerate(order):
                if p[i] > level/(n - k): break
                rejected.add(i)
            assert rejected == {i for i, x in enumerate(holm(p)) if x <= level}
    assert holm([]) == []


def test_a_sign_needs_interval_and_p():
    assert clear_sign(.01, .02, .04) == 1 and clear_sign(-.02, -.01, .04) == -1
    assert clear_sign(-.02, -.0, .077) == clear_sign(-.02, .01, .01) == clear_sign(.01, .02, .05) == 0
