"""Collections made together with what is true of them: nothing is lost or misread, and every account
balances."""
import csv
import io
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from unicodedata import normalize

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from newsrepro.core.base import InputError
from newsrepro.data.layouts import check_data, read_collection

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
TITLES = ['Flood in the valley', '"Nobody leaves', '"We can do it" says Merkel', 'He said "no"',
          'Grüße aus Köln – „schön“', 'a, b; c',
          'two\nlines', 'a\ttab', '""', 'NA', '<script>alert(1)</script>', '5" screen', "it's", 'null',
          '100 %', '\\N']
IDS = ['NA', '007', '1e5', 'bbc.co.uk-1', '2022.11.05_x', 'caf\u00e9', 'nan', '-1', 'x' * 80, 'True', '1.0',
       'A b']
PICTURES = ('ok.png', 'ok.jpg', 'ok.webp', 'missing', 'broken', 'page', 'extreme')
STATUS = {'missing': 'missing', 'broken': 'broken', 'page': 'broken', 'extreme': 'extreme'}


def encoded(kind: str) -> bytes:
    image, buffer = Image.new('RGB', (60_000, 1) if kind == 'extreme' else (9, 7), 'red'), io.BytesIO()
    image.save(buffer, {'ok.jpg': 'JPEG', 'ok.webp': 'WEBP'}.get(kind, 'PNG'))
    whole = buffer.getvalue()
    return {'broken': whole[:40], 'page': b'<html>404</html>'}.get(kind, whole)


FILES = {kind: encoded(kind) for kind in PICTURES}


def suffix(kind: str) -> str: return Path(kind).suffix or '.png'


def write_pictures(folder: Path, pictures: dict[str, str], form: str, strays: int) -> int:
    """Pictures by id, names in a form of Unicode, and files that belong to no article; returns how many
    files there are."""
    folder.mkdir(parents=True)
    for image, kind in pictures.items():
        if kind != 'missing': (folder/f'{normalize(form, image)}{suffix(kind)}').write_bytes(FILES[kind])
    for i in range(strays): (folder/f'stray{i}.jpg').write_bytes(FILES['ok.jpg'])
    if strays: (folder/'readme.txt').write_text('x')
    return sum(1 for _ in folder.iterdir())


def write_table(path: Path, rows: list[dict], blanks: int, encoding: str, end: str) -> None:
    "A table as its suffix says; `.plain.tsv` is written without any quoting."
    if path.suffix == '.parquet':
        pd.DataFrame(rows, index=[f'r{7*i}' for i in range(len(rows))]).to_parquet(path)
        return
    buffer, head = io.StringIO(newline=''), list(rows[0])
    delimiter = {'.tsv': '\t', '.csv': ','}[path.suffix]
    if path.name.endswith('.plain.tsv'):
        for line in [head, *[list(row.values()) for row in rows]]: buffer.write('\t'.join(line) + end)
    else:
        writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end)
        writer.writerow(head)
        writer.writerows(row.values() for row in rows)
    buffer.write((delimiter*(len(head) - 1) + end)*blanks)
    path.write_bytes(buffer.getvalue().encode(encoding))


@st.composite
def collections(draw):
    n = draw(st.integers(1, 8))
    fields = lambda values: draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
    ids = draw(st.permutations(IDS))[:n]
    return dict(ids=ids, titles=fields(TITLES), kinds=fields(PICTURES), splits=fields(['train', 'test']),
                table=draw(st.sampled_from(['a.csv', 'a.tsv', 'a.plain.tsv', 'a.parquet'])),
                encoding=draw(st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16'])),
                end=draw(st.sampled_from(['\n', '\r\n'])), form=draw(st.sampled_from(['NFC', 'NFD'])),
                blanks=draw(st.integers(0, 2)), strays=draw(st.integers(0, 2)), split=draw(st.booleans()))


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as made: yield Path(made)


def balanced(accounts: dict) -> bool:
    "Rows and files are what became of them."
    tables = all(t['rows'] == sum(n for name, n in t.items() if name != 'rows')
                 for t in accounts['tables'].values())
    folders = all(f['files'] == sum(n for name, n in f.items() if name != 'files')
                  for f in accounts['folders'].values())
    return tables and folders


def needs_quotes(made: dict) -> bool:
    "Whether a title cannot be written without quotes, or is wholly in quotes, which a reader takes off."
    return any(set(title) & set('\t\n') or title == '""' for title in made['titles'])


@QUICK
@given(made=collections())
def test_a_plain_collection_is_read_as_it_was_made(folder, made):
    if made['table'] == 'a.plain.tsv' and needs_quotes(made): made['table'] = 'a.tsv'
    shutil.rmtree(folder, ignore_errors=True)
    images = [f'i-{one}' for one in made['ids']]
    files = write_pictures(folder/'images', dict(zip(images, made['kinds'])), made['form'], made['strays'])
    rows = [dict(article_id=a, title=t, image_id=i) | (dict(split=s) if made['split'] else {})
            for a, t, i, s in zip(made['ids'], made['titles'], images, made['splits'])]
    write_table(folder/made['table'], rows, made['blanks'], made['encoding'], made['end'])
    try: c = read_collection(folder)
    except InputError as refused:  # a lone quote may be meant otherwise; then the line is named
        assert made['table'] == 'a.plain.tsv' and ' line ' in str(refused)
        assert any(t.startswith('"') for t in made['titles'])
        return
    assert dict(zip(c.articles.article_id, c.articles.title)) == dict(zip(made['ids'], made['titles']))
    assert dict(zip(c.articles.article_id, c.articles.image_id)) == dict(zip(made['ids'], images))
    status = dict(zip(images, (STATUS.get(kind, 'ok') for kind in made['kinds'])))
    assert dict(zip(c.images.image_id, c.images.status)) == status
    if made['split']:
        assert dict(zip(c.articles.article_id, c.articles.split)) == dict(zip(made['ids'], made['splits']))
    else: assert any('split' in problem for problem in c.problems)
    found = check_data(folder)
    counts = Counter(status.values())
    for name in ('missing', 'broken', 'extreme'):
        assert sum(split[f'{name}_image'] for split in found['splits'].values()) == counts[name]
    assert sum(split['articles'] for split in found['splits'].values()) == len(rows)
    table, = found['tables'].values()
    pictures, = found['folders'].values()
    blanks = 0 if made['table'] == 'a.parquet' else made['blanks']
    assert (table['rows'], table['blank'], table['articles']) == (len(rows) + blanks, blanks, len(rows))
    assert pictures['files'] == files and pictures['in_pool'] == len(rows) - counts['missing']
    assert balanced(found)


@QUICK
@given(made=collections(), truth=st.booleans())
def test_an_official_collection_is_read_as_it_was_made(folder, made, truth):
    "Two sets in the layout of 2022: training pairs, test texts, test images, and perhaps the truth."
    shutil.rmtree(folder, ignore_errors=True)
    images = [f'i-{one}' for one in made['ids']]
    for name in ('RSS', 'RT'):
        write_pictures(folder/name/'images', dict(zip(images, made['kinds'])) | {'test-image': 'ok.png'},
                       made['form'], made['strays'])
        write = lambda file, rows: write_table(folder/name/file, rows, made['blanks'], made['encoding'],
                                               made['end'])
        write('train.tsv', [dict(article=a, iid=i, title=t, text='')
                            for a, i, t in zip(made['ids'], images, made['titles'])])
        write('test_articles.tsv', [dict(articleID='test-article', title='"A" and B', text='x')])
        write('test_images.tsv', [dict(iid='test-image', img='https://news.example/1.jpg')])
        if truth:
            write('gt.tsv', [dict(article='test-article', iid='test-image', title='"A" and B', text='x')])
    c = read_collection(folder)
    assert c.layout == 'newsimages2022' and c.datasets == ['RSS', 'RT']
    for name in c.datasets:
        train, test = (c.subset(name, split) for split in ('train', 'test'))
        titles = dict(zip(made['ids'], made['titles']))
        assert dict(zip(train.articles.article_id, train.articles.title)) == titles
        assert train.truth == dict(zip(made['ids'], images))
        assert test.articles.title.tolist() == ['"A" and B']
        assert test.truth == ({'test-article': 'test-image'} if truth else {})
    found = check_data(folder)
    assert balanced(found) and len(found['tables']) == 2*(3 + truth)
    assert sum(t.get('articles', 0) for t in found['tables'].values()) == 2*(len(images) + 1)
