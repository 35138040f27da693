"""A photo desk's own folder: odd names, every format, broken files, no split, two languages."""
import csv
import json
import re
import shlex
from inspect import signature
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from newsrepro.cli import rematch as command
from newsrepro.cli import run
from newsrepro.core.base import InputError
from newsrepro.core.checkpoints import find_backbone
from newsrepro.data.collection import has_text
from newsrepro.data.layouts import read_collection
from newsrepro.data.pictures import is_rotated, open_image
from newsrepro.models.loader import load_encoder
from newsrepro.models.store import EmbeddingStore, embed
from newsrepro.ranking.metrics import tie_order
from newsrepro.ranking.runs import evaluate_files, read_run
from newsrepro.rematching import any_table, read_articles, rematch, training_articles
from newsrepro.study.study import mini_root

TRICK = '</script><img src=x onerror=alert(1)> The weather in the city this week'
FORMATS = ('jpg', 'PNG', 'webp', 'cmyk', 'exif', 'gif')
ODD = ('plain', 'two words', 'Zürich, groß', "it's; 100 %", '"quoted"', '#hash & more', 'ein.punkt')


def save(image: Image.Image, folder: Path, name: str, kind: str) -> Path:
    "Write a picture in one of `FORMATS`; 'exif' lies on its side and says so."
    target = folder/f'{name}.{dict(cmyk="jpeg", exif="JPG").get(kind, kind)}'
    if kind == 'cmyk': image.convert('CMYK').save(target, 'JPEG', quality=95)
    elif kind == 'gif':
        image.save(target, save_all=True, append_images=[Image.new('RGB', image.size, 'blue')])
    elif kind == 'exif':
        exif = Image.Exif()
        exif[0x0112] = 6
        image.rotate(90, expand=True).save(target, exif=exif, quality=95)
    else: image.save(target)
    return target


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
    "A cache of its own, with the mini collections of the usual one."
    root = mini_root()
    folder = tmp_path_factory.mktemp('cache')
    (folder/root.name).symlink_to(root)
    patch = pytest.MonkeyPatch()
    patch.setenv('NEWSREPRO_CACHE', str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope='session')
def desk(tmp_path_factory, cache):
    "Fifty articles, English and German, and 200 pictures, of which two cannot be read."
    root = tmp_path_factory.mktemp('desk')
    source, _ = read_collection(mini_root()/'newsimages2022').usable()
    known = source.articles[source.articles.image_id != '']
    articles = pd.concat([known[known.dataset == name][:25] for name in ('RSS', 'RT')])
    keys = articles[['dataset', 'image_id']].apply(tuple, axis=1).tolist()
    path_of = dict(zip(source.images[['dataset', 'image_id']].apply(tuple, axis=1), source.images.path))
    others = [key for key in path_of if key not in set(keys)]
    names = {}
    for i, key in enumerate([*keys, *others][:198]):
        folder = root/'pictures'/('', 'Außen aufnahmen', 'a/b')[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        image = open_image(path_of[key])
        if i % 5 == 1: image = image.resize((37, 211))
        names[key] = save(image, folder, f'{i} {ODD[i % 7]}', FORMATS[i % 6])
    (root/'pictures'/'broken, ü.jpg').write_text('<html>')
    whole = (root/'pictures'/'0 plain.jpg').read_bytes()
    (root/'pictures'/'a'/'truncated.jpg').write_bytes(whole[:len(whole)//2])
    (root/'pictures'/'notes.txt').write_text('from the archive')
    table = articles.assign(article_id=[f'n{i}' for i in range(50)], iid=[names[key].name for key in keys])
    table.loc[table.article_id == 'n0', 'title'] = TRICK
    table[['article_id', 'title']].to_csv(root/'articles.csv', index=False)
    table[['article_id', 'title', 'text', 'iid']].to_csv(root/'known.tsv', index=False, sep='\t')
    return root


def lists_of(out: Path) -> dict[str, list[str]]:
    "The file of each image, best first, by article."
    lines = map(json.loads, (out/'run.jsonl').read_text(encoding='utf-8').splitlines())
    return {line['article_id']: [image['file'] for image in line['images']] for line in lines}


@pytest.fixture(scope='session')
def done(desk, tmp_path_factory):
    "The usual call, with a page."
    out = tmp_path_factory.mktemp('out')
    found = rematch(desk/'known.tsv', desk/'pictures', out, html=True, device='cpu')
    return found | dict(folder=out)


def test_the_unreadable_are_named(done):
    assert (done['articles'], done['pictures']) == (50, 198)
    assert {(one['what'], one['name']) for one in done['left_out']} == {
        ('picture', 'broken, ü.jpg'), ('picture', 'a/truncated.jpg'), ('file', 'notes.txt')}
    with (done['folder']/'left-out.csv').open(encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    assert rows == done['left_out']
    assert 'truncated' in next(row['reason'] for row in rows if 'truncated' in row['name'])


def test_languages_are_detected_and_german_is_translated(done):
    assert done['languages'] == {'de': 25, 'en': 25} and done['to_translate'] == 25
    assert done['translator'].startswith('mini-marian-de-en')


def test_a_list_is_the_brute_force_one(desk, cache, tmp_path):
    "Made from pictures that were turned and saved, by a product and a sort in numpy."
    rematch(desk/'articles.csv', desk/'pictures', tmp_path/'out', translator='none', top=198, device='cpu')
    pool = any_table(tmp_path/'out'/'images.csv')
    titles = any_table(desk/'articles.csv').title.str.strip().tolist()
    twins = []
    for number, name in enumerate(pool.file):
        image = ImageOps.exif_transpose(Image.open(desk/'pictures'/name))
        twins.append(str(tmp_path/f'{number}.png'))
        image.convert('RGB').save(twins[-1])
    encoder = load_encoder(find_backbone('ViT-L/14', 'mini'))
    store = EmbeddingStore(tmp_path/'store')
    texts, images = embed(encoder, titles, 'text', store), embed(encoder, twins, 'image', store)
    order = tie_order(pool.image_id.tolist())
    cosines = (texts.astype(float) @ images.astype(float).T)[:, order]
    places = np.argsort(-cosines.round(12), axis=1, kind='stable')
    expected = pool.image_id.to_numpy()[order][places].tolist()
    run = read_run(tmp_path/'out'/'run.tsv', depth=198)
    assert [list(images) for images in run.values()] == expected
    first = json.loads((tmp_path/'out'/'run.jsonl').read_text(encoding='utf-8').splitlines()[0])
    assert first['images'][0]['score'] == pytest.approx(cosines.max(1)[0], abs=1e-5)


def test_a_picture_and_its_twin_on_its_side_score_alike(desk, tmp_path):
    image = open_image(desk/'pictures'/'0 plain.jpg').resize((90, 50))
    (tmp_path/'two').mkdir()
    image.save(tmp_path/'two'/'upright.png')
    exif = Image.Exif()
    exif[0x0112] = 8
    image.rotate(-90, expand=True).save(tmp_path/'two'/'camera.png', exif=exif)
    assert is_rotated(tmp_path/'two'/'camera.png') and not is_rotated(tmp_path/'two'/'upright.png')
    for method in ('clip', 'vilt-rerank'):
        rematch(desk/'articles.csv', tmp_path/'two', tmp_path/'out', method, translator='none', html=True)
        for line in map(json.loads, (tmp_path/'out'/'run.jsonl').open(encoding='utf-8')):
            one, other = (image['score'] for image in line['images'])
            assert one == pytest.approx(other, abs=1e-5)
    sizes = {Image.open(thumb).size for thumb in (tmp_path/'out'/'thumbs').iterdir()}
    assert sizes == {(90, 50)}


def test_the_evaluator_reads_the_run(desk, done):
    found = evaluate_files(done['folder']/'run.tsv', done['folder']/'truth.csv', done['folder']/'images.csv')
    for one in done['metrics']:
        assert one['value'] == pytest.approx(found[one['metric']]) and one['n'] == 50
        assert one['ci_low'] <= one['value'] <= one['ci_high']
    chance = sum(1/k for k in range(1, 101))/198
    assert found['MRR@100'] > 3*chance  # the drawn pictures are what the shipped checkpoint knows


def test_truth_by_a_file_of_its_own(desk, tmp_path):
    found = rematch(desk/'articles.csv', desk/'pictures', tmp_path/'out', truth=desk/'known.tsv')
    own = rematch(desk/'known.tsv', desk/'pictures', tmp_path/'other', selection='title')
    assert found['metrics'] == own['metrics'] != []


def test_the_second_call_encodes_nothing(desk, done, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr('newsrepro.models.store.encode', lambda *given: asked.append(given))
    monkeypatch.setattr('newsrepro.text.language.translate_batches', lambda *given: asked.append(given))
    again = rematch(desk/'known.tsv', desk/'pictures', tmp_path/'out', device='cpu')
    assert asked == [] and again['metrics'] == done['metrics']
    assert (tmp_path/'out'/'run.tsv').read_bytes() == (done['folder']/'run.tsv').read_bytes()


@pytest.mark.parametrize('method', ['one-to-one', 'dual-softmax', 'fusion', 'vilt-rerank'])
def test_unique_heads(desk, method, tmp_path):
    out = tmp_path/'out'
    rematch(desk/'articles.csv', desk/'pictures', out, method, unique=method != 'one-to-one')
    heads = [images[0] for images in lists_of(out).values()]
    assert len(set(heads)) == len(heads) == 50
    assert all(len(images) == len(set(images)) == 100 for images in lists_of(out).values())


def test_fusion_adds_reciprocal_ranks(desk, tmp_path):
    lists = {}
    for name in ('RN50', 'ViT-B/16'):
        rematch(desk/'articles.csv', desk/'pictures', tmp_path/'one', backbone=[name], top=198, device='cpu')
        lists[name] = lists_of(tmp_path/'one')
    rematch(desk/'articles.csv', desk/'pictures', tmp_path/'both', 'fusion', list(lists))
    for line in map(json.loads, (tmp_path/'both'/'run.jsonl').open(encoding='utf-8')):
        own = [one[line['article_id']] for one in lists.values()]
        for image in line['images']:
            by_hand = sum(1/(60 + ranked.index(image['file']) + 1) for ranked in own)
            assert image['score'] == pytest.approx(by_hand, rel=1e-5)
        scores = [image['score'] for image in line['images']]
        assert scores == sorted(scores, reverse=True)


def test_vilt_orders_the_best_only(desk, tmp_path):
    for method in ('clip', 'vilt-rerank'):
        rematch(desk/'articles.csv', desk/'pictures', tmp_path/method, method=method, depth=7, device='cpu')
    changed = 0
    for article, before in lists_of(tmp_path/'clip').items():
        after = lists_of(tmp_path/'vilt-rerank')[article]
        assert sorted(before[:7]) == sorted(after[:7]) and before[7:] == after[7:]
        changed += before[:7] != after[:7]
    assert changed > 25
    line = json.loads((tmp_path/'vilt-rerank'/'run.jsonl').open(encoding='utf-8').readline())
    assert [image['score'] is None for image in line['images']] == [False]*7 + [True]*93


def test_txv_learns_from_given_pairs_once(desk, tmp_path, monkeypatch):
    root = mini_root()/'newsimages2022'
    given = dict(method='txv', train=root, translator='none', backbone=['RN50', 'RN101'], device='cpu')
    first = rematch(desk/'known.tsv', desk/'pictures', tmp_path/'one', **given)
    assert first['checkpoints'][0].startswith('T×V') and first['metrics'][0]['n'] == 50
    learn, choose = training_articles(root, read_articles(desk/'known.tsv'))
    titles = set(any_table(desk/'known.tsv').title)
    assert not titles & {*learn.title, *choose.title} and set(learn.split) == {'train'}
    monkeypatch.setattr('newsrepro.methods.txv.train_txv', None)
    monkeypatch.setattr('newsrepro.models.store.encode', None)
    rematch(desk/'known.tsv', desk/'pictures', tmp_path/'two', **given)
    assert (tmp_path/'one'/'run.tsv').read_bytes() == (tmp_path/'two'/'run.tsv').read_bytes()


def test_txv_learns_from_all_pairs_where_no_split_is_given(desk, tmp_path):
    "In the layout of 2025 the last articles would be the test: here all are given but those to be matched."
    (tmp_path/'newsimages').mkdir()
    rows = [dict(article_id=i, article_url='', article_title=f'Title {i}', image_id=f'i{i}')
            for i in range(40)]
    for i in range(40): Image.new('RGB', (20, 20), (i, 9, 9)).save(tmp_path/'newsimages'/f'i{i}.jpg')
    pd.DataFrame(rows).to_csv(tmp_path/'newsarticles.csv', index=False)
    learn, choose = training_articles(tmp_path, pd.DataFrame(dict(title=['title 3', 'TITLE  7'])))
    assert {*learn.title, *choose.title} == {f'Title {i}' for i in range(40)} - {'Title 3', 'Title 7'}


def test_a_table_translates(desk, tmp_path):
    "The German title ranks as its translation does."
    (tmp_path/'t.csv').write_text('text,translation\nDer Bus ist rot,The bus is red\n')
    (tmp_path/'a.jsonl').write_text('{"id": 1, "title": "Der Bus ist rot", "lang": "de"}\n'
                                    '{"id": 2, "title": "The bus is red", "lang": "en"}\n')
    found = rematch(tmp_path/'a.jsonl', desk/'pictures', tmp_path/'out', translator=str(tmp_path/'t.csv'))
    one, two = lists_of(tmp_path/'out').values()
    assert one == two and found['to_translate'] == 1


def test_the_page_shows_markup_as_text(desk, done):
    page = (done['folder']/'index.html').read_text(encoding='utf-8')
    assert '<img src=x' not in page and page.count('</script>') == 2
    data = json.loads(re.search('id="data">(.*?)</script>', page, re.S)[1])
    assert data['articles'][0]['title'] == TRICK
    assert {one['thumb'] for one in data['pictures']} == {
        f'thumbs/{file.name}' for file in (done['folder']/'thumbs').iterdir()}
    assert not re.search(r'https?:|//[a-z]', re.sub('(?s)<script type.*?</script>', '', page))
    assert "loading: 'lazy'" in page
    for one in data['articles']: assert one['truth'] >= 0


def test_a_submission_holds_one_picture_an_article(desk, tmp_path):
    rematch(desk/'articles.csv', desk/'pictures', tmp_path/'out', unique=True, submission=tmp_path/'sent')
    files = sorted(file.name for file in (tmp_path/'sent').iterdir())
    assert files == sorted([f'n{i}.png' for i in range(50)] + ['submission.csv'])
    assert {Image.open(tmp_path/'sent'/f'n{i}.png').size for i in range(50)} == {(460, 260)}
    assert any_table(tmp_path/'sent'/'submission.csv').image_id.nunique() == 50


def test_a_rerun_takes_its_own_away_and_nothing_else(desk, tmp_path):
    out = tmp_path/'out'
    rematch(desk/'known.tsv', desk/'pictures', out, html=True)
    (out/'mine.txt').write_text('kept')
    rematch(desk/'articles.csv', desk/'pictures', out)
    assert {file.name for file in out.iterdir()} == {'mine.txt', 'run.tsv', 'run.jsonl', 'images.csv',
                                                     'left-out.csv', 'settings.json'}


def test_a_call_that_fails_loses_nothing_of_the_one_before(desk, tmp_path, monkeypatch):
    rematch(desk/'known.tsv', desk/'pictures', tmp_path/'out')
    before = {file.name: file.read_bytes() for file in (tmp_path/'out').iterdir()}
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr('newsrepro.rematching.match', interrupted)
    with pytest.raises(KeyboardInterrupt): rematch(desk/'articles.csv', desk/'pictures', tmp_path/'out')
    assert {file.name: file.read_bytes() for file in (tmp_path/'out').iterdir()} == before


def test_a_collection_by_itself(tmp_path):
    root = mini_root()/'newsimages2022'
    found = rematch(root, root, tmp_path/'out', dataset='TW', split='test', backbone=['RN50'])
    part = read_collection(root).subset('TW', 'test')
    readable, titled = part.images.status == 'ok', has_text(part.articles)
    assert (found['articles'], found['pictures']) == (titled.sum(), readable.sum())
    assert len(found['left_out']) == (~titled).sum() + (~readable).sum()
    assert found['metrics'][0]['n'] == (part.articles.image_id[titled] != '').sum()


def test_a_folder_with_nothing_but_a_table(desk, tmp_path):
    (tmp_path/'texts').mkdir()
    (tmp_path/'texts'/'t.csv').write_text('article_id,title\n1,A bus\n2,A train\n')
    assert rematch(tmp_path/'texts', desk/'pictures', tmp_path/'out')['articles'] == 2
    with pytest.raises(InputError, match='texts: no pictures in it'):
        rematch(tmp_path/'texts', tmp_path/'texts', tmp_path/'other')


def test_a_dry_run_writes_nothing(desk, tmp_path, capsys):
    words = [f'{desk}/articles.csv', f'{desk}/pictures', '--out', f'{tmp_path}/out']
    assert run(['rematch', *words, '--dry-run', '--method', 'vilt-rerank']) == 0
    said = capsys.readouterr().out
    assert 'mini-vilt: package' in said and 'nothing was written' in said
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_object(desk, tmp_path, capsys):
    words = [f'{desk}/articles.csv', f'{desk}/pictures', '--out', f'{tmp_path}/out']
    assert run(['rematch', *words, '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['articles'] == 50 and 'trained on generated pictures' in found['mini']
    stored = json.loads((tmp_path/'out'/'settings.json').read_text(encoding='utf-8'))
    assert shlex.split(stored['command'])[1:] == ['rematch', *words]
    assert found.items() <= stored.items()


def test_the_command_has_the_defaults_of_the_function():
    options = {name: one.default for name, one in signature(command).parameters.items() if name != 'as_json'}
    assert options == {name: one.default for name, one in signature(rematch).parameters.items()}


@pytest.fixture(scope='session')
def wrong(desk):
    "Tables and folders that cannot be used."
    (desk/'no-title.csv').write_text('id,text\n1,Rain\n')
    (desk/'no-id.csv').write_text('title,text\nRain,\n')
    (desk/'twice.csv').write_text('id,title\n1,Rain\n2,Snow\n1,Hail\n')
    (desk/'blank.csv').write_text('id,title\n1, \n')
    (desk/'empty.csv').write_text('id,title\n')
    (desk/'bad.jsonl').write_text('{"id": 1}\nnothing\n')
    (desk/'pool.csv').write_text('image_id,path\n1,gone/with.jpg\n')
    (desk/'none').mkdir()
    (desk/'other').mkdir()
    (desk/'other'/'mine.txt').write_text('not to be lost')
    return desk


@pytest.mark.parametrize('arguments, said', [
    (['{d}/no.csv', '{d}/pictures'], 'no.csv: no such file'),
    (['{d}/no-title.csv', '{d}/pictures'], 'no column title'),
    (['{d}/no-id.csv', '{d}/pictures'], 'no column article_id'),
    (['{d}/twice.csv', '{d}/pictures'], "line 4: article id '1' stands on line 2"),
    (['{d}/blank.csv', '{d}/pictures'], 'no article has a title'),
    (['{d}/empty.csv', '{d}/pictures'], 'empty.csv: no rows'),
    (['{d}/bad.jsonl', '{d}/pictures'], 'bad.jsonl line 2: no JSON object'),
    (['{d}/articles.csv', '{d}/none'], 'none: no pictures in it'),
    (['{d}/articles.csv', '{d}/nowhere'], 'nowhere: no such file or folder'),
    (['{d}/articles.csv', '{d}/pool.csv'], 'can be read; the first: gone/with.jpg, no such file'),
    (['{d}/articles.csv', '{d}/no-title.csv'], 'no column image_id'),
    (['{d}/articles.csv', '{d}/pictures', '--method', 'clap'], '--method clap: use one of clip'),
    (['{d}/articles.csv', '{d}/pictures', '--backbone', 'RN51'], 'RN51'),
    (['{d}/articles.csv', '{d}/pictures', '--backbone', 'timm:resnet50'], 'one space is needed'),
    (['{d}/articles.csv', '{d}/pictures', '--method', 'fusion', '--backbone', 'RN50'], 'two --backbone'),
    (['{d}/articles.csv', '{d}/pictures', '--method', 'txv'], '--train DIR'),
    (['{d}/articles.csv', '{d}/pictures', '--method', 'txv', '--train', '{d}/nowhere'], 'no such folder'),
    (['{d}/articles.csv', '{d}/pictures', '--top', '0'], '--top 0: 1 or more'),
    (['{d}/articles.csv', '{d}/pictures', '--profile', 'papr'], 'use one of mini, paper'),
    (['{d}/articles.csv', '{d}/pictures', '--weights', '{d}/nowhere'], 'no such folder'),
    (['{d}/articles.csv', '{d}/pictures', '--translator', 'nobody'], 'nobody'),
    (['{d}/articles.csv', '{d}/pictures', '--truth', '{d}/pool.csv'], 'pool.csv'),
    (['{d}/articles.csv', '{d}/pictures', '--submission', '{d}/other'], 'did not write'),
])
def test_a_mistake_is_one_line(arguments, said, wrong, tmp_path, capsys):
    words = [word.format(d=wrong) for word in arguments]
    assert run(['rematch', *words, '--out', str(tmp_path/'out')]) == 2
    told = capsys.readouterr()
    assert told.out == '' and told.err.count('\n') == 1 and said in told.err
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('out, said', [('other', 'did not write'), ('articles.csv', 'a file'),
                                       ('pictures/out', 'among the pictures')])
def test_what_is_not_ours_is_not_touched(out, said, wrong):
    with pytest.raises(InputError, match=said): rematch(wrong/'articles.csv', wrong/'pictures', wrong/out)
    assert [file.name for file in (wrong/'other').iterdir()] == ['mine.txt']


def test_fewer_pictures_than_articles(desk, tmp_path):
    (tmp_path/'one').mkdir()
    Image.new('RGB', (40, 40)).save(tmp_path/'one'/'a.png')
    with pytest.raises(InputError, match='50 articles and 1 pictures'):
        rematch(desk/'articles.csv', tmp_path/'one', tmp_path/'out', unique=True)
    assert rematch(desk/'articles.csv', tmp_path/'one', tmp_path/'out')['pictures'] == 1


def test_a_picture_on_its_side_is_another_one_for_the_store(cache, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.effect_noise((60, 40), 90).convert('RGB').save(tmp_path/'a.png', exif=exif)
    encoder, store = load_encoder(find_backbone('RN50', 'mini')), EmbeddingStore(tmp_path/'store')
    picture = [str(tmp_path/'a.png')]
    lying = embed(encoder, picture, 'image', store)
    assert not np.allclose(lying, embed(encoder, picture, 'image', store, turned=True))
    assert np.array_equal(lying, embed(encoder, picture, 'image', store))
