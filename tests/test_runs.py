"Run files: round trips, damaged input, and the official 2021 truth where it is at hand."
import csv
import errno
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import OFFICIAL, official
from newsrepro.core.checkpoints import PAPER_BACKBONES
from newsrepro.cli import run as command
from newsrepro.core.base import InputError
from newsrepro.ranking.metrics import MEASURES
from newsrepro.data.names import deobfuscate, obfuscate
from newsrepro.ranking.runs import (ScoredList, compare_files, evaluate_files, fuse_lists, read_run,
                                    read_scored_run, read_scores, read_truth, write_run, write_scores)
from newsrepro.study.study import run_file

steady = settings(deadline=None, derandomize=True)


@steady
@given(st.integers(0, 10**9 - 1).map('{:09}'.format))
def test_obfuscation_and_back(article):
    assert deobfuscate(obfuscate(article)) == article


ids = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=12)

@steady
@given(run=st.dictionaries(ids, st.lists(ids, min_size=1, max_size=8, unique=True), min_size=1, max_size=8),
       header=st.booleans())
def test_a_run_that_can_be_written_is_read_back(tmp_path_factory, run, header):
    path = tmp_path_factory.mktemp('run') / 'run.tsv'
    try: write_run(path, run, header=header)
    except InputError as e:
        assert str(path) in str(e) and '\n' not in str(e) and not path.exists()
    else:
        assert read_run(path, shortest=1) == {a: tuple(images) for a, images in run.items()}


scores = st.floats(-1e9, 1e9) | st.sampled_from([math.nan, math.inf, -math.inf])
scored = st.lists(st.tuples(ids, scores), min_size=1, max_size=8, unique_by=lambda one: one[0])

@steady
@given(run=st.dictionaries(ids, scored, min_size=1, max_size=8),
       top=st.integers(1, 9), digits=st.integers(1, 9))
def test_scores_are_read_back_to_their_digits(tmp_path_factory, run, top, digits):
    "Any id, line breaks of Unicode among them; what is no finite number is none"
    path = tmp_path_factory.mktemp('scores') / 'run.jsonl'
    lists = {article: ScoredList(*zip(*own)) for article, own in run.items()}
    write_scores(path, lists, 'cosine', top, digits)
    found, ranked_by = read_scores(path)
    assert (found, ranked_by) == ({article: images[:top] for article, images in lists.items()}, 'cosine')
    for article, images in lists.items():
        for ours, score in zip(found[article].scores, images.scores[:top]):
            if not math.isfinite(score): assert math.isnan(ours)
            else: assert ours == pytest.approx(score, rel=10**(1 - digits)/2*1.001, abs=1e-320)


def test_scores_of_another_run_are_refused(tmp_path):
    best = {'a': ScoredList('ij', [.5, .25]), 'b': ScoredList('ji', [.5, .25])}
    write_scores(tmp_path/'run.jsonl', best, 'cosine', top=1)
    for lists in (best, {'a': 'ij'}):
        write_run(tmp_path/'run.tsv', lists)
        assert read_scored_run(tmp_path/'run.tsv')[0]['a'] == ['i', 'j']
    for lists in ({'a': 'ji'}, {'b': 'ij', 'a': 'ij'}):
        write_run(tmp_path/'run.tsv', lists)
        with pytest.raises(InputError, match=r'run\.jsonl: of another run than .*; remove it'):
            read_scored_run(tmp_path/'run.tsv')


def test_a_run_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / 'deeper' / 'run.tsv'
    write_run(path, {'a': ['i', 'j']})
    before = path.read_bytes()
    for bad in ({'a': ['\ud800']}, {'a': ['i', 'i']}):
        with pytest.raises(ValueError): write_run(path, bad)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ['run.tsv']


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path/'run.tsv'
    write_run(path, {'a': ['i', 'j']})
    before = path.read_bytes()
    def half(self, text, **_):
        self.write_bytes(text.encode()[:3])
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', half)
    with pytest.raises(OSError, match='No space left'): write_run(path, {'a': ['j', 'i']})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['run.tsv']


pieces = st.sampled_from([b'a', b'i', b'\t', b'\n', b'\r', b'"', b'\0', b'\xff', b'\xef\xbb\xbf',
                          b'articleID', b'\xc3\xa9', b' '])

@steady
@given(st.lists(pieces | st.binary(max_size=3), max_size=40).map(b''.join))
def test_damaged_files_are_refused_in_one_line(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp('run') / 'run.tsv'
    path.write_bytes(raw)
    try: run = read_run(path, shortest=1)
    except InputError as e: assert str(path) in str(e) and len(str(e).splitlines()) == 1
    else: assert run and all(a and images and all(images) for a, images in run.items())
    try: read_scores(path)
    except InputError as e: assert str(path) in str(e) and len(str(e).splitlines()) == 1
    else: assert False, 'no bytes of these are scores'


@pytest.mark.parametrize('metric',
                         ['MAP', 'R@0', 'R@x', 'mrr@100', 'R@101', 'R@1000', 'R', '', 'R@1 ', 'nDCG@10'])
def test_an_unknown_metric_is_usage_not_a_failure(tmp_path, capsys, metric):
    (tmp_path/'gt.csv').write_text('article_id,image_id\na,i\nb,j\n')
    write_run(tmp_path/'run.tsv', {'a': ['i', 'j'], 'b': ['i', 'j']})
    files = [str(tmp_path/name) for name in ('run.tsv', 'run.tsv', 'gt.csv')]
    assert command(['compare', *files, '--metric', metric]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('newsrepro: error: ') and err.count('\n') == 1
    assert 'MRR, MRR@K and R@K' in err or 'K is 1 to 100' in err
    assert command(['compare', *files, '--metric', 'R@100', '--json']) == 0


def test_evaluation_starts_fast(tmp_path):
    "Nothing slow to import on the way to an evaluation"
    (tmp_path / 'gt.csv').write_text('article_id,image_id\na,i\nb,j\n')
    write_run(tmp_path / 'run.tsv', {'a': ['i', 'j']})
    script = dedent('''
        import sys
        from newsrepro.ranking.runs import evaluate_files
        assert evaluate_files(*sys.argv[1:])["R@1"] == 1/2
        assert not {"torch", "scipy", "transformers", "open_clip", "matplotlib"} & set(sys.modules)''')
    subprocess.run([sys.executable, '-c', script, tmp_path / 'run.tsv', tmp_path / 'gt.csv'], check=True)


def by_the_official_rules(run: Path, truth: Path) -> dict:
    "The organisers' rules on files, restated without a line of the package"
    with truth.open(encoding='utf-8', newline='') as f:
        right = {r[0]: r[4] for r in csv.reader(f, delimiter='\t') if r[0].isdigit()}
    positions = []
    with run.open(encoding='utf-8', newline='') as f:
        for name, *images in csv.reader(f, delimiter='\t'):
            if not name.isdigit(): continue   # a header
            image = right[name[6:10] + name[1:6]]
            if image in images[:100]: positions.append(1 + images.index(image))
    scores = {'n': len(right), 'found': len(positions), 'MRR@100': sum(1 / p for p in positions) / len(right)}
    return scores | {f'R@{k}': sum(p <= k for p in positions) / len(right) for k in (1, 5, 10, 20, 50, 100)}


@pytest.fixture(scope='module')
def truth():
    return read_truth(OFFICIAL / 'content2019-04-gt.tsv')


def random_run(truth, seed: int, found: float, missing: float, width: int = 100) -> dict:
    "Lists of random images, in random order of articles, with the right image somewhere in a share of them"
    rng, pool = random.Random(seed), sorted(truth.pool)
    run = {}
    for article in rng.sample(sorted(truth.image_of), len(truth.image_of)):
        if rng.random() < missing: continue
        images = [i for i in rng.sample(pool, width + 1) if i != truth.image_of[article]][:width]
        if rng.random() < found:
            images[min(int(rng.expovariate(1 / 12)), width - 1)] = truth.image_of[article]
        run[article] = images
    return run


@official
@pytest.mark.parametrize('seed, found, missing, width',
                         [(1, 1, 0, 100), (2, .5, 0, 100), (3, .7, .3, 100), (4, .05, .9, 150)])
def test_official_release(tmp_path, truth, seed, found, missing, width):
    run = random_run(truth, seed, found, missing, width)
    write_run(tmp_path / 'run.tsv', run, obfuscated=True)
    scores = evaluate_files(tmp_path / 'run.tsv', OFFICIAL / 'content2019-04-gt.tsv')
    assert list(scores) == ['n', 'found', *MEASURES] and scores['n'] == 1915
    assert scores == pytest.approx(by_the_official_rules(tmp_path / 'run.tsv',
                                                         OFFICIAL / 'content2019-04-gt.tsv'), abs=1e-12)


@official
def test_official_articles_go_by_any_of_their_names(tmp_path, truth):
    run = random_run(truth, 5, .5, .1)
    url_of = {article: name for name, article in truth.alias.items() if name.startswith('http')}
    write_run(tmp_path / 'real.tsv', run)
    write_run(tmp_path / 'obfuscated.tsv', run, obfuscated=True)
    write_run(tmp_path / 'url.tsv', {url_of[a]: images for a, images in run.items()}, header=False)
    scores = [evaluate_files(tmp_path / f'{name}.tsv', OFFICIAL / 'content2019-04-gt.tsv')
              for name in ('real', 'obfuscated', 'url')]
    assert scores[0] == scores[1] == scores[2]
    assert evaluate_files(tmp_path / 'url.tsv',
                          OFFICIAL) == scores[0]   # the collection's folder is a truth too


@official
def test_official_pool_and_test_articles(truth):
    with (OFFICIAL / 'MediaEvalNewsImagesBatch04articles.tsv').open(encoding='cp1252', newline='') as f:
        public = {r[0] for r in csv.reader(f, delimiter='\t') if r and r[0].isdigit()}
    assert public == {obfuscate(a) for a in truth.image_of}
    assert {truth.article(a) for a in public} == set(truth.image_of)


@official
def test_official_comparison(tmp_path):
    truth = OFFICIAL / 'content2019-04-gt.tsv'
    good, bad = (random_run(read_truth(truth), 6, found, 0) for found in (.6, .5))
    write_run(tmp_path / 'good.tsv', good); write_run(tmp_path / 'bad.tsv', bad)
    result = compare_files(tmp_path / 'good.tsv', tmp_path / 'bad.tsv', truth)
    assert list(result) == ['n', 'metric', 'a', 'b', 'difference', 'ci95', 'p_value']
    assert result['difference'] == pytest.approx(result['a'] - result['b'])
    assert result['ci95'][0] < result['difference'] < result['ci95'][1]
    back = compare_files(tmp_path / 'bad.tsv', tmp_path / 'good.tsv', truth)
    assert back['difference'] == -result['difference'] and back['p_value'] == result['p_value'] < .01


def test_run_files_of_all_backbones_are_distinct():
    """No two names of a backbone that a user can give share a file, and none reads as a data set and
    another backbone."""
    import open_clip
    names = [*(b.name for b in PAPER_BACKBONES),
             *(f'{model}:{tag}' for model, tag in open_clip.list_pretrained())]
    files = [run_file('EU', name).lower() for name in names]
    assert len(set(files)) == len(files) > 100
    endings = {name.split('-', i)[-1] for name in names for i in range(1, name.count('-') + 1)}
    assert not endings & set(names)


@steady
@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_data_sets_have_files_of_their_own(names):
    """Names that differ in more than capitals differ in their files; a file lies in the folder, under a
    name any disk takes."""
    a, b = (run_file(name, 'ViT-B/32') for name in names)
    assert a.lower() != b.lower() or names[0].lower() == names[1].lower()
    for name in (a, b):
        assert re.fullmatch(r'[\w.+-]+', name) and not name.startswith('.') and len(name.encode()) < 200


def test_fusion_is_that_of_ranx():
    "Image by image; ranx breaks ties otherwise, so sums are held against each other."
    from ranx import Run, fuse
    rng = random.Random(0)
    names = [f'i{n}' for n in range(31)]
    runs = [{f'a{n}': rng.sample(names, rng.randint(1, 29)) for n in range(7)} for _ in range(3)]
    scores = lambda images: {image: -rank for rank, image in enumerate(images)}
    scored = [Run({article: scores(images) for article, images in run.items()}) for run in runs]
    sums = fuse(scored, method='rrf', params=dict(k=60)).to_dict()
    for article, images in fuse_lists(runs).items():
        own = sums[article]
        assert sorted(images) == sorted(own)
        values = [own[image] for image in images]
        assert values == pytest.approx(sorted(own.values(), reverse=True), rel=1e-12)


def test_fusion_of_files_by_the_command(tmp_path, capsys):
    for name, first, second in (('a', 'xyz', 'zyx'), ('b', 'yxz', 'zxy'), ('c', 'yzx', 'zxy')):
        write_run(tmp_path/f'{name}.tsv', {'1': first, '2': second})
    files = [str(tmp_path/f'{name}.tsv') for name in 'abc']
    assert command(['fuse', *files, '--out', str(tmp_path/'out.tsv'), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['articles'] == 2
    # article 1: y 1/62 + 1/61 + 1/61, x 1/61 + 1/62 + 1/63
    assert read_run(tmp_path/'out.tsv', shortest=3) == {'1': tuple('yxz'), '2': tuple('zxy')}
    assert command(['fuse', files[0], '--out', str(tmp_path/'out.tsv')]) == 2
    assert command(['fuse', *files, '--out', files[1]]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and 'two or more' in told[0] and 'one of the runs' in told[1]
