"The mini collections as files: determinism, layouts, sizes, faults."
from collections import Counter
from datetime import datetime
from hashlib import sha256
import csv
import json
import subprocess
import sys
from textwrap import dedent

import pytest
from PIL import Image

from newsrepro.core.base import InputError
from newsrepro.data.layouts import read_collection
from newsrepro.mini.collections import World, caption_texts, captioned, make_mini, news, thing_names
from newsrepro.mini.pictures import world_table

SMALL = World(portal=(60, 30), rss=(40, 30), rt=(40, 30), tw=(60, 30), captions=120)
SETS = ('RSS', 'RT', 'TW')


@pytest.fixture(scope='module')
def mini(tmp_path_factory): return make_mini(tmp_path_factory.mktemp('mini')/'one', workers=1, world=SMALL)


def digest(root):
    "Every file of `root` with the hash of its bytes."
    return {str(p.relative_to(root)): sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob('*'))
            if p.is_file()}


def rows(path, delimiter='\t', encoding='utf-8'):
    with open(path, encoding=encoding, newline='') as f: return list(csv.DictReader(f, delimiter=delimiter))


def test_same_bytes_with_several_workers(mini, tmp_path):
    assert digest(make_mini(tmp_path/'two', workers=2, world=SMALL)) == digest(mini)


def test_same_bytes_in_another_process(mini, tmp_path):
    code = dedent(f'''
        from newsrepro.mini.collections import *
        make_mini({str(tmp_path/"two")!r}, workers=1, world={SMALL!r})''')
    subprocess.run([sys.executable, '-c', code], check=True, env={'PYTHONHASHSEED': '7', 'PATH': ''},
                   cwd=tmp_path)
    assert digest(tmp_path/'two') == digest(mini)


def test_another_seed_gives_other_collections(mini, tmp_path):
    other = make_mini(tmp_path/'two', seed=1, workers=1, world=SMALL)
    assert not set(digest(other/'captions').values()) & set(digest(mini/'captions').values())


def test_made_once_and_remade_only_for_other_settings(mini, tmp_path):
    before = (mini/'mini.json').stat().st_mtime_ns
    assert make_mini(mini, workers=1, world=SMALL) == mini and (mini/'mini.json').stat().st_mtime_ns == before
    root = make_mini(tmp_path/'two', workers=1, world=World((4, 4), (4, 4), (4, 4), (4, 4), 4))
    make_mini(root, workers=1, world=World((4, 4), (4, 4), (4, 4), (4, 4), 6))
    assert len(list((root/'captions'/'images').iterdir())) == 6
    assert [p.name for p in tmp_path.iterdir()] == ['two']


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path/'thesis.tex').write_text('precious')
    with pytest.raises(InputError, match='holds other files'): make_mini(tmp_path, world=SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_default_sizes():
    world = World()
    # pools of at least 500 after missing and broken ones
    assert min(world.portal[1], world.rss[1], world.rt[1], world.tw[1]) >= 510
    # Zhang's 2000 pairs
    assert sum(world.tw)*.97 >= 1512 and sum(world.rt)*.97 >= 354 and sum(world.rss)*.97 >= 134
    assert world.captions >= 1000


@pytest.mark.parametrize('name, layout, datasets',
                         [('newsimages2021', 'newsimages2021', {'newsimages2021'}),
                          ('newsimages2022', 'newsimages2022', set(SETS)),
                          ('captions', 'plain', {'captions'})])
def test_layouts_are_read(mini, name, layout, datasets):
    collection = read_collection(mini/name)
    assert collection.layout == layout and set(collection.articles.dataset) == datasets
    assert len(collection.truth) == len(collection.articles)   # every article's image is known
    assert not set(collection.truth.values()) - set(collection.images.image_id)


def test_missing_broken_and_textless_are_few_but_there(mini):
    for name in ('newsimages2021', 'newsimages2022'):
        collection = read_collection(mini/name)
        status = collection.images.groupby(['dataset', 'split', 'status']).size().unstack(fill_value=0)
        assert (status[['missing', 'broken']] >= 2).all(axis=None) and (status['ok'] >= 24).all()
        assert ((collection.articles.title == '')
                & (collection.articles.text == '')).groupby(collection.articles.dataset).sum().min() >= 2


def test_training_is_earlier_than_test(mini):
    for name in ('newsimages2021', 'newsimages2022'):
        for _, articles in read_collection(mini/name).articles.groupby('dataset'):
            date = articles.date
            assert date.notna().all()
            assert date[articles.split == 'train'].max() <= date[articles.split == 'test'].min()


def test_2021_files_have_the_quirks_of_the_release(mini):
    root = mini/'newsimages2021'
    raw = (root/'MediaEvalNewsImagesBatch04articles.tsv').read_bytes()
    with pytest.raises(UnicodeDecodeError): raw.decode('utf-8')
    texts = rows(root/'MediaEvalNewsImagesBatch04articles.tsv', encoding='cp1252')
    truth = rows(root/'content2019-04-gt.tsv')
    given = {t['articleID'][6:10] + t['articleID'][1:6]: t['text'] for t in texts}
    assert given == {t['article']: t['text'] for t in truth}
    assert (root/'MediaEvalNewsImagesBatch04images.tsv').read_bytes().endswith(b'\r\n\t\t\r\n')
    assert [t['iid'] for t in truth] != sorted(t['iid'] for t in truth)


def test_bodies_have_paragraphs_and_tweets_do_not(mini):
    for path in (mini/'newsimages2021'/'content2019-01.tsv', mini/'newsimages2022'/'RSS'/'RSS_train.tsv',
                 mini/'newsimages2022'/'RT'/'RT_train.tsv'):
        texts = [r['text'] for r in rows(path) if r['text']]
        assert all(t.count('\n') >= 2 for t in texts) and sum(map(len, texts))/len(texts) > 500
    assert not any(r['text'] for r in rows(mini/'newsimages2022'/'TW'/'TW_train.tsv'))


def test_german_files_hold_no_english(mini):
    words = ' '.join(r['title']+' '+r['text']
                     for r in rows(mini/'newsimages2022'/'RT'/'RT_train.tsv')).split()
    assert not {'the', 'and', 'of', 'was', 'said'} & set(words) and {'der', 'und', 'ein'} < set(words)


def test_tweets_are_tweets(mini):
    text = ' '.join(r['title'] for r in rows(mini/'newsimages2022'/'TW'/'TW_train.tsv'))
    assert all(mark in text for mark in ('#', '@', 'https://t.example/'))
    assert any(ord(c) > 0x1f300 for c in text)


def test_pictures_vary_in_size_and_are_jpeg(mini):
    images = [Image.open(p) for p in (mini/'captions'/'images').iterdir()]
    assert {i.format for i in images} == {'JPEG'} and len({i.size for i in images}) > 10
    assert all(100 <= i.width <= 240 for i in images)


def test_captions_do_not_know_the_names_of_the_news(mini):
    names, words = world_table()['names'], set(' '.join(caption_texts(mini)).split())
    assert not words & {*names['place'], *names['last'], *names['male'], *names['female']}


def test_news_speak_of_what_no_picture_shows():
    stories = news(World(), 'RSS', (200, 50), seed=0)
    pictured = {n for s in stories for g in s.picture.groups for n in thing_names(g.thing, 'en')}
    assert not {s.event.slots['org'][0]
                for s in stories} & pictured and len({s.event.slots['person'] for s in stories}) > 30


def test_captions_are_partly_german_and_cover_the_world():
    corpus = list(captioned(World(captions=4000), seed=0))
    assert .22 < sum(lang == 'de' for _, lang, *_ in corpus)/4000 < .28
    things = Counter(g.thing for *_, p, _ in corpus for g in p.groups)
    assert set(things) == set(world_table()['objects']) and min(things.values()) >= 10


def test_marker_tells_the_settings(mini):
    marker = json.loads((mini/'mini.json').read_text())
    world = {k: tuple(v) if isinstance(v, list) else v for k, v in marker['world'].items()}
    assert marker['seed'] == 0 and World(**world) == SMALL


def test_recurring_pictures_are_near_duplicates(mini):
    stories = news(World(), 'RSS', (400, 520), seed=0)
    uses = Counter(s.picture for s in stories[400:])
    assert max(uses.values()) >= 2 and len({(s.picture, s.use) for s in stories}) == len(stories)
    assert isinstance(stories[0].date, datetime)
