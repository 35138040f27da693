"""Exact search and streamed dual softmax: equal to the dense formulas at size, on adversarial input, and
on any number of threads."""
import numpy as np
import pytest
import ranx
import torch

from newsrepro.core.base import InputError
from newsrepro.ranking import retrieve
from newsrepro.ranking.one_to_one import assign, dual_softmax, dual_softmax_top_k, dual_softmax_top_k_of, fuse
from newsrepro.ranking.retrieve import as_unit_rows, from_keys, ranked_lists, to_keys, top_k


def unit(n, dim, seed, centre=.3):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    x[:, 0] += centre*dim**.5
    return x/np.linalg.norm(x, axis=1, keepdims=True)


def same_ranking(places, dense, unit_of_cosine, tolerance=1e-6):
    """Each row lists distinct candidates, at every place the dense value that belongs there, up to
    `tolerance` of cosine."""
    best = -np.sort(-dense, axis=1)[:, :places.shape[1]]
    assert np.abs(np.take_along_axis(dense, places, 1) - best).max()*unit_of_cosine <= tolerance
    assert (np.diff(np.sort(places, axis=1), axis=1) > 0).all()


@pytest.mark.parametrize('centre',
                         [.3, 1.5])  # cosines about .1 and about .7: float32 is wrong by 2e-7 and by 1e-6
def test_five_thousand_by_five_thousand(centre):
    "Place by place the ranking of the dense formula in float64."
    q, c = unit(5000, 256, 0, centre), unit(5000, 256, 1, centre)
    cosines = q.astype(float) @ c.astype(float).T
    wanted = lambda dense: torch.from_numpy(dense).topk(100).indices.numpy()  # no two are equal
    for T in (.01, 1.): assert (dual_softmax_top_k(q, c, 100, T)[1] == wanted(dual_softmax(cosines, T))).all()
    assert (top_k(q, c, 100)[1] == wanted(cosines)).all()
    single = torch.topk(torch.from_numpy(q) @ torch.from_numpy(c).T, 100).indices.numpy()
    assert (single != wanted(cosines)).any()  # float32 alone is not enough


def test_near_duplicates_beyond_the_spare_places():
    """Fifty candidates that float32 cannot tell apart stand around the end of the lists; equal ones in the
    order of the pool."""
    q, c = unit(40, 32, 0), unit(300, 32, 1)
    c[100:150] = c[7]
    c[100:125, 3] += np.linspace(0, 3e-8, 25, dtype=np.float32)
    for T in (None, .01, 1.):
        cosines = q.astype(float) @ c.astype(float).T
        places = top_k(q, c, 20)[1] if T is None else dual_softmax_top_k(q, c, 20, T)[1]
        dense = cosines if T is None else dual_softmax(cosines, T)*T/2
        taken = np.take_along_axis(dense, places, 1)
        assert np.abs(taken + np.sort(-dense, axis=1)[:, :20]).max() < 1e-14
        same = (c[places[:, :-1]] == c[places[:, 1:]]).all(2)
        assert same.any() and (np.diff(places, axis=1)[same] > 0).all()


HARD = {  # rows, the first 60 of which ask for the others; whether all, some or none must be crowded
    'random': (lambda x: x, 'none'),
    'narrow': (lambda x: x + 5, 'none'),  # all cosines about .96
    'sparse': (lambda x: np.where(np.abs(x) > 1.5, x, 0), 'none'),
    'of any norm': (lambda x: x*10.**np.linspace(-30, 30, len(x))[:, None], 'none'),
    'of any scale within a row': (lambda x: x*10.**np.linspace(-35, 0, x.shape[1]), 'some'),
    'denormal': (lambda x: x*1e-40, 'some'),
    'near duplicates': (lambda x: x[:1] + np.linspace(0, 1e-6, len(x))[:, None]*x, 'some'),
    'near duplicates of a few': (lambda x: x[np.arange(len(x)) % 97] + 1e-7*x, 'some'),
    'duplicates': (lambda x: x[np.arange(len(x)) % 97], 'some'),
    'all equal': (lambda x: x[:1].repeat(len(x), 0), 'all'),
    'signs': (lambda x: np.sign(x[:, :4]), 'some'),  # cosines are multiples of 1/2
}


def assert_dense_ranking(places, dense, c):
    "At each place the value that belongs there, equal candidates in the order of the pool."
    taken = np.take_along_axis(dense, places, 1)
    assert np.abs(taken + np.sort(-dense, axis=1)[:, :places.shape[1]]).max() < 1e-14
    assert (np.diff(np.sort(places, axis=1), axis=1) > 0).all()
    same = (c[places[:, :-1]] == c[places[:, 1:]]).all(2)
    assert (np.diff(places, axis=1)[same] > 0).all()


@pytest.fixture
def crowded(monkeypatch):
    "Search with a first pass, however small the input; shares of crowded queries, one a search."
    shares, search = [], retrieve.rounded_search

    def counted(q, *rest):
        found = search(q, *rest)
        shares.append(1 - len(found[2])/len(q))
        return found
    monkeypatch.setattr(retrieve, 'rounding_pays', lambda *_: True)
    monkeypatch.setattr(retrieve, 'rounded_search', counted)
    return shares


@pytest.mark.parametrize('kind', HARD)
@pytest.mark.parametrize('k', [1, 20])
def test_first_pass_loses_nobody(kind, k, crowded):
    "Lists are those of the dense formula in float64, whatever the input; where many are near, all the same."
    make, which = HARD[kind]
    x = make(np.random.default_rng(0).normal(size=(960, 64))).astype(np.float32)
    q, c = x[:60], x[60:]
    unit_q, unit_c = as_unit_rows(q, 'q').numpy(), as_unit_rows(c, 'c').numpy()
    cosines = unit_q.astype(float) @ unit_c.astype(float).T
    assert_dense_ranking(top_k(q, c, k, query_block=31, candidate_block=256)[1], cosines, unit_c)
    assert which == 'some' or crowded == [which == 'all']
    for T in (.01, 1.):
        places = dual_softmax_top_k(q, c, k, T, query_block=31, candidate_block=256)[1]
        assert_dense_ranking(places, dual_softmax(cosines, T)*T/2, unit_c)


def test_first_pass_of_whole_pools_and_of_many_dimensions(crowded):
    q, c = unit(7, 3000, 0), unit(150, 3000, 1)
    for k in (1, 100, 147, 150):
        cosines = q.astype(float) @ c.astype(float).T
        assert_dense_ranking(top_k(q, c, k, candidate_block=64)[1], cosines, c)
    assert crowded == [0, 0, 0, 0]


@pytest.mark.parametrize('temperature', [1e-5, .003, .006, .01, .05, 1, 50, 1e4])
def test_any_temperature(temperature):
    q, c = unit(97, 24, 2), unit(509, 24, 3)
    scores, places = dual_softmax_top_k(q, c, 100, temperature, query_block=31, candidate_block=64)
    dense = dual_softmax(q.astype(float) @ c.astype(float).T, temperature)
    same_ranking(places, dense, temperature/2)
    assert np.abs(scores - np.take_along_axis(dense, places, 1)).max() < 1e-6*max(1, 2/temperature)


@pytest.mark.parametrize('scale', [1e-30, 1e-3, 1e3, 1e30])
def test_scale_of_the_vectors_does_not_matter(scale):
    q, c = unit(31, 24, 4), unit(211, 24, 5)
    assert (dual_softmax_top_k(q*np.float32(scale), c, 50, .05)[1]
            == dual_softmax_top_k(q, c, 50, .05)[1]).mean() > .999


def test_opposites_at_the_scale_of_clip():
    "Columns whose exponentials vanish in float32 although they rank: all queries point away from them."
    q = unit(1, 24, 6).repeat(50, 0) + 1e-3*unit(50, 24, 7)
    c = np.concatenate([unit(100, 24, 8), -unit(1, 24, 6), -q[:5]])
    unit_length = lambda x: (x/np.linalg.norm(x, axis=1, keepdims=True)).astype(float)
    for T in (.01, .0065, .004):
        dense = dual_softmax(unit_length(q) @ unit_length(c).T, T)
        same_ranking(dual_softmax_top_k(q, c, len(c), T)[1], dense, T/2)


def test_duplicates_stand_in_the_order_of_the_pool():
    # cosines are multiples of 1/2: exact ties
    corners = np.array(np.meshgrid(*[[-1, 1]]*4)).reshape(4, -1).T.astype(np.float32)
    c = np.concatenate([corners]*40)
    want = np.argsort(-(corners/2) @ (c/2).T, axis=1, kind='stable')
    for k in (1, 17, 100, len(c)):
        for block in (16, 48, 100, 640):
            assert (top_k(corners, c, k, query_block=5, candidate_block=block)[1] == want[:, :k]).all()
    same_ranking(dual_softmax_top_k(corners, c, 100, .1, candidate_block=48)[1],
                 dual_softmax((corners/2).astype(float) @ (c/2).astype(float).T, .1), .05)


def test_pools_that_defeat_the_filter():
    """Ever better and ever worse candidates, and one query whose pool is its mirror: the lists are still
    exact."""
    angle = np.linspace(0, 3, 3000)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    q = np.array([[1, 0], [np.cos(3), np.sin(3)]], dtype=np.float32)
    places = top_k(q, ring, 300, candidate_block=256)[1]
    assert np.abs(np.diff(places[0])).max() <= 3 and places[0].max() < 310 and places[1].min() > 2690
    same_ranking(places, q.astype(float) @ ring.astype(float).T, 1)


def test_threads_do_not_change_the_result():
    q, c, before = unit(311, 64, 9), unit(999, 64, 10), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(dual_softmax_top_k(q, c, 50, .01, query_block=64, candidate_block=256))
            assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)
    for scores, places in results[1:]:
        assert (places == results[0][1]).all() and np.allclose(scores, results[0][0], atol=1e-3)


def test_matrix_of_any_values():
    rng = np.random.default_rng(11)
    scores = rng.normal(size=(37, 53))*10.**rng.integers(-30, 30, (37, 53))
    scores[rng.random(scores.shape) < .2] = -np.inf
    scores[5], scores[:, 7] = -np.inf, -np.inf
    scores[9] = scores[8]
    for T in (.01, 1., 1e3):
        for block in (1, 100, 10**6):
            logs, places = dual_softmax_top_k_of(scores, 53, T, block=block)
            want = np.argsort(-dual_softmax(scores, T), axis=1, kind='stable')
            taken = np.take_along_axis(dual_softmax(scores, T), places, 1)
            assert (np.isneginf(taken) == np.isneginf(logs)).all()
            rises = np.diff(np.where(np.isneginf(taken), -1e300, taken), axis=1)
            rounding = 1e-6*np.abs(np.nan_to_num(taken[:, 1:], neginf=0)) + 1e-9
            assert (rises <= rounding).all()
            assert block > 1 or (places == want).mean() > .99


def test_memory_mapped_matrix(tmp_path):
    np.save(tmp_path/'scores.npy', np.random.default_rng(0).normal(size=(100, 80)))
    scores = np.load(tmp_path/'scores.npy', mmap_mode='r')
    assert (dual_softmax_top_k_of(scores, 10, .5, block=1000)[1]
            == np.argsort(-dual_softmax(scores, .5), axis=1)[:, :10]).all()


BAD = {
    'NaN': (lambda q, c: (np.where(np.arange(len(q))[:, None] == 2, np.nan, q), c, 5),
            'queries: NaN or infinity in row 2'),
    'infinity': (lambda q, c: (q, np.where(np.arange(len(c))[:, None] == 3, np.inf, c), 5),
                 'candidates: NaN or infinity in row 3'),
    'zero vector': (lambda q, c: (q, np.concatenate([c, 0*c[:1]]), 5), 'candidates: row 30 is a zero vector'),
    'dimensions': (lambda q, c: (q, c[:, :4], 5), 'queries have 8 dimensions, candidates 4'),
    'axes': (lambda q, c: (q[0], c, 5), r'queries: expected \(n, dim\)'),
    'empty pool': (lambda q, c: (q, c[:0], 5), 'the pool is empty'),
    'k too large': (lambda q, c: (q, c, 31), 'k=31: the pool holds 30 candidates'),
    'k of 0': (lambda q, c: (q, c, 0), 'k=0'),
}


@pytest.mark.parametrize('function', [top_k, dual_softmax_top_k])
@pytest.mark.parametrize('bad', BAD)
def test_bad_input_is_named(function, bad):
    make, words = BAD[bad]
    with pytest.raises(InputError, match=words): function(*make(unit(7, 8, 0), unit(30, 8, 1)))


@pytest.mark.parametrize('temperature', [0, -.5, float('nan'), float('inf'), 1e-320])
def test_bad_temperature_is_named(temperature):
    q, c = unit(7, 8, 0), unit(30, 8, 1)
    for call in (lambda: dual_softmax_top_k(q, c, 5, temperature),
                 lambda: dual_softmax_top_k_of(q @ c.T, 5, temperature),
                 lambda: dual_softmax(q @ c.T, temperature)):
        with pytest.raises(InputError, match='temperature=.*positive'): call()


def test_keys_order_every_float():
    values = np.concatenate([[-np.inf, -3e38, -1e-45, 0, 1e-45, 3e38, np.inf],
                             np.random.default_rng(0).normal(size=1000)]).astype(np.float32)
    places = torch.arange(len(values))
    keys = to_keys(torch.from_numpy(values), places)
    assert keys.argsort(descending=True).tolist() == np.argsort(-values, kind='stable').tolist()
    assert from_keys(keys)[0].tolist() == values.tolist() and from_keys(keys)[1].tolist() == places.tolist()


def test_lists_do_not_depend_on_the_pool_order():
    same, ids = np.ones((50, 3)), [f'i{i}' for i in range(50)]
    assert ranked_lists(['a'], same[:1], ids, same) == ranked_lists(['a'], same[:1], ids[::-1], same)


def test_assignment_against_brute_force():
    from itertools import permutations
    rng = np.random.default_rng(0)
    for n, m in ((4, 4), (3, 5), (5, 3)):
        Z = rng.normal(size=(n, m))
        chosen = assign(Z)
        total = sum(Z[i, j] for i, j in enumerate(chosen) if j >= 0)
        wide = Z if n <= m else Z.T
        assert np.isclose(total, max(sum(wide[i, j] for i, j in enumerate(p))
                                     for p in permutations(range(wide.shape[1]), wide.shape[0])))


def test_fusion_equals_ranx():
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=(6, 9)), rng.gamma(2, size=(6, 9))]
    runs = [ranx.Run({f'q{i}': {f'd{j}': float(x) for j, x in enumerate(row)}
                      for i, row in enumerate(matrix)}) for matrix in matrices]
    theirs = ranx.fuse(runs=runs, norm='zmuv', method='sum').to_dict()
    ours = fuse(matrices)
    for i in range(6):
        assert sorted(theirs[f'q{i}'], key=theirs[f'q{i}'].get,
                      reverse=True) == [f'd{j}' for j in np.argsort(-ours[i])]
