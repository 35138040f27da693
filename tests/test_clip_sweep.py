"""Draws of Zhang et al.'s pairs, the spread over them, and the sweep where no test truth is known."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from newsrepro.core.base import InputError
from newsrepro.core.checkpoints import ZHANG_BACKBONES, find_backbone
from newsrepro.data.layouts import read_collection
from newsrepro.methods.clip_sweep import (COMPARISONS, agreement, draw_samples, places_among,
                                          spread, zero_shot)
from newsrepro.models.loader import load_encoder
from newsrepro.models.store import EmbeddingStore
from newsrepro.study.registry import published_table

NEWSREPRO = Path(sys.executable).with_name('newsrepro')
SETS = {'TW': 23, 'RSS': 13, 'RT': 17}  # training pairs


def write_set(root: Path, name: str, train: int, test: int, draw) -> None:
    "One set in the layout of 2022, pictures of noise, without the truth of its test part."
    pictures = root/name/'images'
    pictures.mkdir(parents=True)
    number = {'TW': 1, 'RSS': 2, 'RT': 3}[name]*10_000
    rows = [dict(article=number + i, aid=i, url='', img='', iid=f'{name}{i:030}', hashvalue='',
                 title=f'{name} story {i}', text='', imgFile=f'{name}{i:030}.png',
                 Date=f'2022-01-{1 + i % 28:02} 10:00:00') for i in range(train + test)]
    for row in rows:
        pixels = draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures/row['imgFile'])
    table = pd.DataFrame(rows)
    save = lambda frame, part: frame.to_csv(root/name/f'{name}_{part}.tsv', sep='\t', index=False)
    save(table[:train], 'train')
    save(table[train:].drop(columns=['img', 'iid', 'imgFile']), 'test_articles')
    save(table[train:][['img', 'iid', 'imgFile']], 'test_images')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp('newsimages2022'), np.random.default_rng(0)
    for name, train in SETS.items(): write_set(root, name, train, 7, draw)
    return root


@pytest.fixture(scope='module')
def usable(folder): return read_collection(folder).usable()[0]


def test_draws_come_from_the_training_parts(usable):
    "With the composition of Table 1, TW : RSS : RT = 1512 : 134 : 354, scaled to what there is."
    samples = draw_samples(usable, 20, 10, seed=3)
    training = set(usable.subset(None, 'train').articles.article_id)
    for sample in samples:
        assert set(sample.articles.article_id) <= training
        assert len(sample.images) == len(sample.articles) == 20
        assert set(sample.truth.values()) == set(sample.images.image_id)
        assert sample.articles.dataset.value_counts().to_dict() == {'TW': 15, 'RT': 4, 'RSS': 1}
    assert len({frozenset(sample.articles.article_id) for sample in samples}) == len(samples) == 10


def test_the_next_seed_goes_on_where_the_draws_stand(usable):
    ids = lambda samples: [sample.articles.article_id.tolist() for sample in samples]
    assert ids(draw_samples(usable, 20, 4, seed=1))[1:] == ids(draw_samples(usable, 20, 3, seed=2))


def test_all_pairs_are_one_draw(usable):
    "Of a single set all 13 pairs are taken, however often."
    (sample,) = draw_samples(usable.subset('RSS'), 2000, 10)
    assert len(sample.articles) == 13


def test_without_a_training_part_test_pairs_are_drawn(usable):
    known = usable.subset('RSS', 'train')
    only_test = known.restrict(known.articles.assign(split='test'))
    assert set(draw_samples(only_test, 9, 2)[0].articles.article_id) <= set(known.articles.article_id)
    with pytest.raises(InputError, match='0 usable pairs'): draw_samples(usable.subset('RSS', 'test'), 9, 2)


def test_what_parts_share_is_encoded_once(usable, tmp_path, monkeypatch):
    "Each part's lists are those of the part alone; the store is asked once for texts and once for images."
    from newsrepro.methods import clip_sweep
    encoder = load_encoder(find_backbone('RN50', 'mini'))
    parts = {str(number): sample for number, sample in enumerate(draw_samples(usable, 20, 3))}
    texts = {name: part.articles.title.tolist() for name, part in parts.items()}
    calls, real = [], clip_sweep.embed
    monkeypatch.setattr(clip_sweep, 'embed', lambda *given: calls.append(given[1]) or real(*given))
    together = zero_shot(texts, parts, encoder, EmbeddingStore(tmp_path/'together'))
    assert len(calls) == 2 and all(len(items) == len(set(items)) for items in calls)
    for name, part in parts.items():
        alone = zero_shot({'it': texts[name]}, {'it': part}, encoder, EmbeddingStore(tmp_path/name))['it']
        assert together[name] == alone and all(len(images) == 20 for images in alone.values())


def test_places_find_their_items():
    draw = np.random.default_rng(0)
    lists = [[f'text {number}' for number in draw.integers(0, 17, size)] for size in (5, 0, 23, 1)]
    items, places = places_among(lists)
    assert len(items) == len(set(items))
    assert [[items[place] for place in one] for one in places] == lists


def test_the_spread_is_the_prediction_interval_of_a_mean_and_one_more():
    "Solved for the bounds: there the new value's t statistic against the old ones is at the 2.5 % point."
    draw = np.random.default_rng(1)
    for n in (2, 3, 10):
        values = draw.normal(.4, .01, n)
        row = spread(values)
        for bound in (row['ci_low'], row['ci_high']):
            t = (bound - values.mean())/np.sqrt(values.var(ddof=1)*(1 + 1/n))
            assert stats.t.sf(abs(t), n - 1) == pytest.approx(.025)
        assert row['value'] == pytest.approx(values.mean())


def test_words_follow_the_order():
    nine = dict(zip(ZHANG_BACKBONES, range(9)))
    assert 'follows' in agreement(nine, nine)
    assert 'runs against' in agreement(nine, {name: -place for name, place in nine.items()})


def test_comparisons_are_the_papers():
    "The first of each pair is the better one in the published Table 2."
    published = {run: value for (_, _, run, _), value in published_table('zhang2022-table-2').items()}
    assert all(published[better] > published[worse] for better, worse, _ in COMPARISONS)
    assert {name for pair in COMPARISONS for name in pair[:2]} <= set(ZHANG_BACKBONES)


def test_without_test_truth(folder, tmp_path):
    "What needs no test truth is made, the runs for submission are written, the rest is named."
    out = tmp_path/'out'
    asked = {'11_clip_sweep': dict(backbones='RN50,ViT-B/32', pool_size=20),
             '12_fine_tune': dict(holdout=0, epochs=1)}
    only = [word for name in asked for word in ('--only', name)]
    given = [f'{name}.{key}={value}' for name, values in asked.items() for key, value in values.items()]
    words = [*only, *(word for one in given for word in ('--set', one))]
    command = [NEWSREPRO, 'reproduce', '--data', folder, '--out', out, *words]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {'NEWSREPRO_CACHE': str(tmp_path/'cache')})
    assert done.returncode == 0, done.stdout + done.stderr
    tables = {path.stem for path in (out/'tables').glob('*.csv')}
    assert tables == {'zhang2022-table-1', 'zhang2022-table-2', 'zhang2022-table-3', 'vu2022-table-1',
                      'zhang2022-extra-token-loss'}
    rows = list(csv.DictReader((out/'tables'/'zhang2022-table-2.csv').open(encoding='utf-8')))
    assert [(row['run'], row['n']) for row in rows] == [('RN50', '20'), ('ViT-B/32', '20')]
    for name in SETS:
        for run in (f'zhang2022/{name}-test-RN50', f'vu2022/{name}-clip_ft_T2'):
            assert len((out/'runs'/f'{run}.tsv').read_text().splitlines()) == 1 + 7, run
    cells = json.loads((out/'notebooks'/'12_fine_tune.ipynb').read_text())['cells']
    printed = ''.join(''.join(one.get('text', '')) for cell in cells for one in cell.get('outputs', []))
    for words in ('vu2022-table-2: left out', 'vu2022-extra-gain: left out', 'nothing held out'):
        assert words in printed
