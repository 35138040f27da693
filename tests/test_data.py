"""Reading collections: the official files, every fault named in the notebook, and properties of the table
reader."""
import csv, json, os, shutil, subprocess, sys, tempfile, warnings
from pathlib import Path
from textwrap import dedent

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
import ftfy  # noqa: F401, registers the codec sloppy-windows-1252
from PIL import Image

from conftest import OFFICIAL, official
from newsrepro.core.base import InputError, atomic_path
from newsrepro.data.layouts import check_data, read_collection
from newsrepro.data.pictures import open_image
from newsrepro.data.splits import (ZHANG_SAMPLE, chronological_split, hold_out, random_split, sample_pairs,
                                   share_of_each)
from newsrepro.data.tables import parse_dates, read_table, repair_mojibake

# pytest undoes the module's own filter
pytestmark = pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
TEXTS, TRUTH = OFFICIAL/'MediaEvalNewsImagesBatch04articles.tsv', OFFICIAL/'content2019-04-gt.tsv'


def write(path, rows, encoding='utf-8', delimiter='\t', end='\n'):
    "`rows` is a list of lists, the header first."
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', encoding=encoding, newline='') as f:
        csv.writer(f, delimiter=delimiter, lineterminator=end).writerows(rows)
    return path


def picture(path, colour='red', size=(16, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path)
    return path


def raises(contains, f, *args):
    "`f` refuses with one line that contains each of `contains`."
    with pytest.raises(InputError) as e: f(*args)
    assert '\n' not in str(e.value)
    for o in contains: assert o in str(e.value)


# ---- tables ----

texts = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'))

@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(texts, texts)), st.sampled_from('\t,;'),
       st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16']))
def test_a_table_comes_back_as_it_was_written(tmp_path_factory, rows, delimiter, encoding):
    path = write(tmp_path_factory.mktemp('t')/'t.csv',
                 [['n', 'a', 'b'], *[[i, *row] for i, row in enumerate(rows)]], encoding, delimiter, '\r\n')
    table, notes = read_table(path)
    assert table[['a', 'b']].values.tolist() == [list(row) for row in rows] and notes == []

@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp('t')/'t.tsv'
    path.write_bytes(raw)
    try: read_table(path)
    except InputError as e: assert str(path) in str(e) and '\n' not in str(e)

@pytest.mark.parametrize('end',
                         ['“', '”', '’', '…', '…“', '.“', '!“', '“ –', '“…', '»', '«', '– ', '€', ' €', '°'])
def test_good_prose_is_never_altered(end):
    "Umlauts before closing quotes look a little like mojibake."
    for text in ('Das ist Spa' + o + end for o in 'äöüéèáàâêîôûíóúñçøåæa'):
        assert repair_mojibake(text) == text

@pytest.mark.parametrize('text', ['it’s', '“so”', 'a – b', 'a — b', 'wait…', 'Türkiye', 'naïve résumé', '5 £',
                                  '41 °C', 'Cañon', '澳門每日時報'])
def test_real_mojibake_is_undone(text):
    assert repair_mojibake(text.encode('utf-8').decode('sloppy-windows-1252')) == text

def test_twice_damaged_text_is_repaired_and_counted(tmp_path):
    table, notes = read_table(write(tmp_path/'a.csv',
                                    [['article_id', 'title'], ['1', 'donâ€™t'], ['2', 'FarÃƒÂ³'],
                                     ['3', 'fine – “so” it is']], delimiter=','))
    assert table.title.tolist() == ['don’t', 'Faró', 'fine – “so” it is']
    assert notes == ["a.csv: mojibake repaired in column 'title' (rows: 2)"]

def test_lines_of_two_encodings(tmp_path):
    (tmp_path/'a.tsv').write_bytes('id\ttext\n1\tgrün\n'.encode() + '2\t„schön“\n'.encode('cp1252'))
    table, notes = read_table(tmp_path/'a.tsv')
    assert table.text.tolist() == ['grün', '„schön“']
    assert notes == ['a.tsv: read as Windows-1252, as it is not UTF-8 (lines: 1)']

def test_blank_rows_short_rows_and_unnamed_columns(tmp_path):
    (tmp_path/'a.tsv').write_text('# article\ttitle\t\r\n1\ta\r\n\t\t\r\n2\tb\t\r\n\r\n', newline='')
    table, notes = read_table(tmp_path/'a.tsv')
    assert table.to_dict('index') == {2: dict(article='1', title='a'), 4: dict(article='2', title='b')}
    assert notes == ['a.tsv: blank rows dropped: 1']

@pytest.mark.parametrize('raw, contains', [
    (b'a\tb\n1\t\x81\n', ['line 2', '0x81']), (b'a\tb\n1\t2\t3\n', ['line 2', '3 fields']),
                                           (b'a\ta\n', ["'a' occurs twice"]),
    (b'a\tb\n1\t"x\ny\n', ['line 2', 'quote']), (b'\x89PNG\0\0', ['not a text table']),
                                           (b'\xff\xfea', ['UTF-16'])])
def test_tables_that_are_refused(tmp_path, raw, contains):
    (tmp_path/'a.tsv').write_bytes(raw)
    raises([str(tmp_path/'a.tsv'), *contains], read_table, tmp_path/'a.tsv')

def test_files_that_cannot_be_read(tmp_path):
    raises(['absent.tsv', 'No such file'], read_table, tmp_path/'absent.tsv')
    raises(['Is a directory'], read_table, tmp_path)

@pytest.fixture
def nobody():
    "Give up root's right to read everything, for as long as the test lasts."
    if os.geteuid(): return (yield)
    for name in ('utf-8-sig', 'utf-16', 'cp1252', 'idna'):
        ''.encode(name)  # loaded now: Python itself may lie where nobody may read
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)

@pytest.fixture
def closed(tmp_path):
    "A folder that others may enter, with a table in it."
    below = [o for o in tmp_path.parents if Path(tempfile.gettempdir()) in o.parents]
    for o in (tmp_path, *below): o.chmod(0o755)
    return write(tmp_path/'a.tsv', [['article_id', 'title'], ['1', 'a']])

@pytest.mark.parametrize('what', ['table', 'folder', 'pictures'])
def test_without_permission(closed, what, request):
    picture(closed.parent/'images'/'x.jpg')
    place = dict(table=closed, folder=closed.parent, pictures=closed.parent/'images')[what]
    mode = place.stat().st_mode
    place.chmod(0)
    request.addfinalizer(lambda: place.chmod(mode))
    request.getfixturevalue('nobody')
    raises([f'{place}: cannot be read: Permission denied'], read_collection, closed.parent)

def test_parquet(tmp_path):
    pd.DataFrame(dict(article_id=[1, 2], title=['a', None], image_id=[7, None],
                      date=pd.to_datetime(['2022-04-03 10:00', None]))).to_parquet(tmp_path/'a.parquet')
    table, _ = read_table(tmp_path/'a.parquet')
    assert table.values.tolist() == [['1', 'a', '7', '2022-04-03 10:00:00'], ['2', '', '', '']]
    (tmp_path/'a.parquet').write_bytes(b'PAR1')
    raises(['a.parquet', 'not a Parquet file'], read_table, tmp_path/'a.parquet')

def test_parquet_without_an_engine(tmp_path, monkeypatch):
    def no_engine(*_): raise ImportError
    monkeypatch.setattr(pd, 'read_parquet', no_engine)
    (tmp_path/'a.parquet').touch()
    raises(['a.parquet', 'pip install pyarrow'], read_table, tmp_path/'a.parquet')

def test_atomic_path_of_a_folder_and_where_it_cannot_be_written(tmp_path):
    with atomic_path(tmp_path/'out') as p: (p).mkdir(); (p/'a').touch()
    assert os.listdir(tmp_path) == ['out']
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path/'run.tsv') as p:
        p.write_text('half')
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ['out']
    (tmp_path/'file').touch()
    raises(['cannot be written'], atomic_path(tmp_path/'file'/'a.tsv').__enter__)

def test_dates():
    dates = parse_dates(pd.Series(['2019-04-30', '30.04.2019', '20190430', '04/30/2019', 'x', '']))
    assert dates.dtype == 'datetime64[ns]' and (dates[:4] == '2019-04-30').all() and dates[4:].isna().all()


# ---- the official release of 2021 ----

@pytest.fixture(scope='module')
def news2021(): return read_collection(OFFICIAL)

@official
def test_official_test_texts_equal_those_of_the_truth(news2021):
    truth, _ = read_table(TRUTH)
    assert len(truth) == 1915
    test = news2021.articles.query("split == 'test'").set_index('article_id').loc[truth.article]
    assert test.title.tolist() == truth.title.tolist() and test.text.tolist() == truth.text.tolist()
    assert test.image_id.tolist() == truth.iid.tolist()
    assert news2021.subset(split='test').truth == dict(zip(truth.article, truth.iid))

@official
def test_latin_1_would_not_do():
    truth = {row.url: row.text for row in read_table(TRUTH)[0].itertuples()}
    equal = {}
    for encoding in ('cp1252', 'latin-1'):
        with TEXTS.open(encoding=encoding, newline='') as f:
            equal[encoding] = sum(row['text'] == truth[row['url']]
                                  for row in csv.DictReader(f, delimiter='\t'))
    assert equal == {'cp1252': 1915, 'latin-1': 1234}

@official
def test_check_data_of_the_official_release():
    code = dedent(f'''
        import json
        from newsrepro.data.layouts import check_data
        print(json.dumps(check_data({str(OFFICIAL)!r})))''')
    said = json.loads(subprocess.run([sys.executable, '-c', code], capture_output=True, check=True).stdout)
    assert said['layout'] == 'newsimages2021'
    for split, n in dict(train=7530, test=1915).items():
        assert (said['splits'][split]['articles'], said['splits'][split]['with_image'],
                said['splits'][split]['missing_image']) == (n, 0, n)
    assert any('Windows-1252' in o for o in said['problems'])

@official
def test_the_pool_is_not_in_the_order_of_publication(news2021):
    test = news2021.subset(split='test')
    ids = test.images.image_id.astype(int).reset_index(drop=True)
    assert abs(ids.corr(pd.Series(range(len(ids))))) < .05
    published = pd.read_csv(OFFICIAL/'MediaEvalNewsImagesBatch04images.tsv', sep='\t', dtype=str).iid.dropna()
    assert set(test.images.image_id) == set(published)

@official
def test_nothing_of_2021_is_usable_without_pictures_yet_the_denominator_stays(news2021):
    rest, dropped = news2021.subset(split='test').usable()
    assert len(rest.articles) == len(rest.images) == 0 and len(rest.truth) == 1915
    assert dropped == {'articles: image missing': 1915, 'images: missing': 1915}


# ---- official layouts, small ----

LINKED = 'article aid url img iid hashvalue title text imgFile Date'.split()

def official_set(root, name, n=4, text='Körper', en=False):
    "Two training and two test pairs of the set `name`, as 2022 and 2023 lay them out."
    row = lambda i: [f'a{i}', i, 'u', 'v', f'i{i}', 'h', f'Titel {i}', text, f'i{i}.jpg',
                     f'2022-0{i+1}-01 10:00:00', *[f'title {i}', 'body'] * en]
    columns = LINKED + ['titleEN', 'textEN'] * en
    def take(file, rows, *names):
        write(root/name/f'{name}_{file}.tsv',
              [list(names), *[[dict(zip(columns, row(i)))[c] for c in names] for i in rows]])
    take('train', (0, 1), *columns)
    take('test_articles', (2, 3), *[c for c in columns if c not in ('img', 'iid', 'imgFile')])
    take('test_images', (3, 2), 'img', 'iid', 'imgFile')
    take('test_truth', (2, 3), *columns)
    for i in range(n): picture(root/name/'images'/f'i{i}.jpg', ('red', 'blue', 'green', 'white')[i])
    return root

@pytest.fixture
def news2022(tmp_path):
    for name in ('RSS', 'RT', 'TW'): official_set(tmp_path/'n', name)
    return tmp_path/'n'

def test_2022(news2022):
    c = read_collection(news2022)
    assert (c.layout, c.datasets, c.name) == ('newsimages2022', ['RSS', 'RT', 'TW'], 'n')
    assert c.subset('RT', 'test').truth == {'a2': 'i2', 'a3': 'i3'}
    assert c.subset('RT', 'train').truth == {'a0': 'i0', 'a1': 'i1'}
    assert (c.images.status == 'ok').all() and c.articles.date.notna().all()
    assert dict(zip(c.articles.dataset, c.articles.lang)) == dict(RSS='en', RT='de', TW='en')
    raises(['article ids repeat between RSS, RT, TW'], lambda: c.truth)
    counts = check_data(news2022)['splits']['test']
    assert counts['with_image'] == 6 and counts['datasets']['TW']['with_image'] == 2

def test_2022_flat_with_the_columns_in_another_order(news2022):
    for path in news2022.glob('*/*.tsv'): shutil.move(path, news2022)
    shutil.move(news2022/'RT'/'images', news2022)
    for path in news2022.glob('*.tsv'):
        table = pd.read_csv(path, sep='\t', dtype=str)
        table[sorted(table)].assign(more='x').to_csv(path, sep='\t', index=False)
    for name in ('RSS', 'RT', 'TW'): shutil.rmtree(news2022/name)
    c = read_collection(news2022)
    assert c.datasets == ['RSS', 'RT', 'TW'] and (c.images.status == 'ok').all() and len(c.pairs) == 12

def test_2022_without_truth(news2022):
    for path in news2022.glob('*/*truth.tsv'): path.unlink()
    c = read_collection(news2022).subset('TW', 'test')
    assert c.truth == {} and len(c.articles) == len(c.images) == 2 and c.usable()[1] == {}
    assert check_data(news2022)['splits']['test']['with_image'] == 6

def test_2022_with_truth_only(news2022):
    for path in news2022.glob('*/*test_[ai]*.tsv'): path.unlink()
    assert read_collection(news2022).subset('RSS', 'test').truth == {'a2': 'i2', 'a3': 'i3'}

def test_2023(tmp_path):
    official_set(tmp_path, 'GDELT-P1', text='Angela Merkel;Berlin'), official_set(tmp_path, 'RT', en=True)
    path = tmp_path/'RT'/'RT_train.tsv'
    path.write_text('# ' + path.read_text())
    c = read_collection(tmp_path)
    assert c.layout == 'newsimages2023'
    gdelt, rt = c.subset('GDELT-P1', 'train').articles.iloc[0], c.subset('RT', 'train').articles.iloc[0]
    assert (gdelt.text, gdelt.tags, gdelt.lang) == ('', 'Angela Merkel;Berlin', 'en')
    assert (rt.text, rt.tags, rt.title_en, rt.text_en) == ('Körper', '', 'title 0', 'body')

def test_official_files_that_are_refused(news2022):
    train = news2022/'RT'/'RT_train.tsv'
    text = train.read_text()
    train.write_text(text + text.splitlines()[1] + '\n')
    raises([f'{train} line 4: article id a0 was given before, at {train} line 2'], read_collection, news2022)
    train.write_text(text.replace('a1\t', '\t'))
    raises([f'{train} line 3: no article id'], read_collection, news2022)
    train.write_text(text.replace('article', 'story'))
    raises(['RT_train.tsv: no column article'], read_collection, news2022)
    train.write_text(text.replace('i1\t', 'i0\t'))
    raises([f'{train} line 3: image id i0 was given before'], read_collection, news2022)
    train.write_text(text)
    images = news2022/'RT'/'RT_test_images.tsv'
    images.write_text(images.read_text() + images.read_text().splitlines()[1] + '\n')
    raises([f'{images} line 4: image id i3 was given before, at {images} line 2'], read_collection, news2022)
    shutil.rmtree(news2022/'RT')
    write(news2022/'more.tsv', [LINKED])
    raises(['more.tsv: of which set?'], read_collection, news2022)

# ---- as people have them ----

def same_content(one, other):
    "Equal but for what the sets and tables are called."
    return one.fingerprint == other.fingerprint

def checks_alike(root, expected):
    "`check_data` counts the same as for the plain official folder."
    assert check_data(root)['splits'] == check_data(expected)['splits']

@pytest.fixture
def in_hands(news2022, tmp_path):
    "A copy of the collection that may be changed, and the one that it came from."
    return Path(shutil.copytree(news2022, tmp_path/'mine')), news2022

def tables_into(folder, to):
    "Move the tables of a folder."
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob('*.tsv')): shutil.move(path, to)

@pytest.mark.parametrize('names', [('train_images', 'test_images'), ('images/train', 'images/test'),
                                   ('TrainImages', 'TestImages'),
    ('training-img', 'testing-img'), ('{}_train_pictures', '{}_test_pictures'),
                                   ('train/images', 'test/images')], ids=lambda o: o[0])
def test_a_picture_folder_for_each_part(in_hands, names):
    root, before = in_hands
    for name in ('RSS', 'RT', 'TW'):
        shutil.move(root/name/'images', root/name/'all')
        for i in range(4):
            target = root/name/names[i > 1].format(name)
            target.mkdir(parents=True, exist_ok=True)
            shutil.move(root/name/'all'/f'i{i}.jpg', target)
        (root/name/'all').rmdir()
    c = read_collection(root)
    assert same_content(c, read_collection(before)) and (c.images.status == 'ok').all()
    wanted = {(Path(folder.format(name)).name, part) for name in ('RSS', 'RT', 'TW')
              for folder, part in zip(names, ('train', 'test'))}
    assert {(Path(path).parent.name, part) for path, part in zip(c.images.path, c.images.split)} == wanted
    checks_alike(root, before)

@pytest.mark.parametrize('name', ['images', 'img', 'imgs', 'Pictures', 'newsimages', 'RT_images', 'photos',
                                  'whatever'])
def test_other_names_of_the_picture_folder(in_hands, name):
    root, before = in_hands
    (root/'RT'/'images').rename(root/'RT'/name)
    assert same_content(read_collection(root), read_collection(before))

def test_picture_folders_beside_the_sets(in_hands):
    root, before = in_hands
    for name in ('RSS', 'RT', 'TW'): shutil.move(root/name/'images', root/f'{name}_images')
    assert same_content(read_collection(root), read_collection(before))

def test_a_part_without_its_pictures_is_missing_and_never_the_other_parts(in_hands):
    root, _ = in_hands
    (root/'RT'/'images').rename(root/'RT'/'train_images')
    status = read_collection(root).images.groupby(['dataset', 'split']).status.first()
    assert (status['RT', 'train'], status['RT', 'test'], status['TW', 'test']) == ('ok', 'missing', 'ok')

def test_two_folders_that_could_be_meant_are_refused(in_hands):
    root, _ = in_hands
    (root/'TW'/'images').rename(root/'TW'/'new')
    picture(root/'TW'/'old'/'i0.jpg')
    raises(['TW: pictures lie in new, old; put them into one folder called images'], read_collection, root)

@pytest.mark.parametrize('where', ['tables', 'data/tables'])
def test_tables_deeper(in_hands, where):
    root, before = in_hands
    for name in ('RSS', 'RT', 'TW'): tables_into(root/name, root/name/where)
    assert same_content(read_collection(root), read_collection(before))
    checks_alike(root, before)

@pytest.mark.parametrize('layout', ['official', 'plain'])
def test_an_archive_that_brings_its_own_folder(news2022, plain, tmp_path, layout):
    before = news2022 if layout == 'official' else plain
    (tmp_path/'unpacked').mkdir()
    shutil.copytree(before, tmp_path/'unpacked'/'NewsImages22', symlinks=True)
    assert read_collection(tmp_path/'unpacked').articles.equals(read_collection(before).articles)
    checks_alike(tmp_path/'unpacked', before)

@pytest.mark.parametrize('name, said', [('TW', 'twitter'), ('TW', 'TWITTER'), ('TW', 'Tweets'),
                                        ('RT', 'Reuters'), ('RT', 'rt_de'), ('RSS', 'rss_feeds'),
                                        ('RSS', 'NewsImages22-RSS'), ('TW', 'NewsImages22-TW-v1.1')])
def test_names_of_sets(in_hands, name, said):
    root, before = in_hands
    for path in sorted((root/name).glob('*.tsv')):
        path.rename(path.with_name(path.name.removeprefix(f'{name}_')))
    (root/name).rename(root/said)
    assert same_content(read_collection(root), read_collection(before))

@pytest.mark.parametrize('form', ['NewsImages22-{}-{}.tsv', '{}{}.TSV', 'mediaeval2022_{}_{}_v2.tsv'])
def test_names_of_tables(in_hands, form):
    root, before = in_hands
    for name in ('RSS', 'RT', 'TW'):
        for path in sorted((root/name).glob('*.tsv')):
            path.rename(path.with_name(form.format(name, path.stem.removeprefix(f'{name}_'))))
        shutil.move(root/name, root/f'set{name}')
    assert same_content(read_collection(root), read_collection(before))

def test_a_set_given_alone(in_hands):
    root, before = in_hands
    for path in sorted((root/'TW').glob('*.tsv')): path.rename(path.with_name(path.name.removeprefix('TW_')))
    (root/'TW').rename(root/'twitter')
    c = read_collection(root/'twitter')
    assert (c.layout, c.datasets) == ('newsimages2022', ['TW'])
    assert c.fingerprint == read_collection(before).subset('TW').fingerprint

def test_what_systems_leave_behind(in_hands):
    root, before = in_hands
    for name in ('RSS', 'RT', 'TW'):
        for path in [*(root/name).glob('*.tsv'), *(root/name/'images').glob('*.jpg')]:
            path.with_name(f'._{path.name}').write_bytes(b'\0\5\26\7')
            shade = root/'__MACOSX'/path.relative_to(root)
            shade.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, shade)
        (root/name/'images'/'.DS_Store').touch(), (root/name/'images'/'Thumbs.db').touch()
    assert same_content(read_collection(root), read_collection(before))
    assert all(o['files'] == 5 and o['no_picture'] == 1
               for o in check_data(root)['folders'].values())  # Thumbs.db is seen

@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_byte_order_marks_and_line_ends_of_windows(in_hands, encoding):
    root, before = in_hands
    for path in root.rglob('*.tsv'): path.write_bytes(path.read_text().replace('\n', '\r\n').encode(encoding))
    assert same_content(read_collection(root), read_collection(before))

def test_upper_case_extensions(in_hands):
    root, before = in_hands
    for path in [*root.rglob('*.tsv'), *root.rglob('*.jpg')]:
        path.rename(path.with_suffix(path.suffix.upper()))
    assert same_content(read_collection(root), read_collection(before))

def test_an_article_id_in_both_parts_is_kept_apart(news2022):
    train = news2022/'RT'/'RT_train.tsv'
    train.write_text(train.read_text().replace('a1', 'a2'))  # the test has an a2, too
    c = read_collection(news2022)
    assert c.subset('RT', 'train').truth == {'a0': 'i0', 'train:a2': 'i1'}
    assert c.subset('RT', 'test').truth == {'a2': 'i2', 'a3': 'i3'}
    assert len(c.subset('RT').truth) == 4 and c.usable()[1] == {}
    said = 'RT: article ids in training and in test: 1 (a2), kept apart: in training they begin with train:'
    assert said in c.problems and said in check_data(news2022)['problems']
    part = c.restrict(c.articles[c.articles.article_id == 'a2'].query("dataset == 'RT'"))
    assert part.truth == {'a2': 'i2'}

@pytest.mark.parametrize('alike', [True, False])
def test_an_image_id_in_both_parts(news2022, alike):
    "One picture keeps its name; two pictures get two."
    root = news2022/'RT'
    (root/'images').rename(root/'test_images')
    train = root/'RT_train.tsv'
    train.write_text(train.read_text().replace('i1', 'i2'))
    picture(root/'train_images'/'i0.jpg')
    if alike: shutil.copy(root/'test_images'/'i2.jpg', root/'train_images')
    else: picture(root/'train_images'/'i2.jpg', 'black')
    c = read_collection(news2022)
    assert c.subset('RT', 'train').truth == {'a0': 'i0', 'a1': 'i2' if alike else 'train:i2'}
    assert c.usable()[1] == {}
    paths = c.subset('RT').images.set_index(['split', 'image_id']).path
    assert 'train_images' in paths['train', 'i2' if alike else 'train:i2']
    assert 'test_images' in paths['test', 'i2']

def test_a_plain_table_may_have_an_id_in_both_parts(tmp_path):
    write(tmp_path/'t.tsv',
          [['article_id', 'title', 'image_id', 'split'], ['1', 'a', 'x', 'train'], ['1', 'b', 'y', 'test']])
    for folder, name in (('train_images', 'x'), ('test_images', 'y')): picture(tmp_path/folder/f'{name}.jpg')
    c = read_collection(tmp_path)
    assert c.truth == {'train:1': 'x', '1': 'y'} and (c.images.status == 'ok').all()

def test_case_of_file_names(tmp_path):
    "Hashed ids may differ in case alone: then only the exact name is the file of an id."
    write(tmp_path/'t.tsv', [['article_id', 'title', 'image_id', 'imgFile'],
                             *[[i, 'a', o, ''] for i, o in enumerate('aBcCdD')], ['9', 'a', 'z', 'E.JPG']])
    for name in ('A.jpg', 'b.PNG', 'C.jpg', 'd.jpg', 'D.jpg', 'e.jpg'):
        picture(tmp_path/'images'/name, 'blue' if name.isupper() else 'red')
    images = read_collection(tmp_path).images.set_index('image_id')
    files = {i: Path(o).name for i, o in images.path.items()}
    assert files == dict(a='A.jpg', B='b.PNG', c='', C='C.jpg', d='d.jpg', D='D.jpg', z='e.jpg')
    assert images.status['c'] == 'missing'
    picture(tmp_path/'images'/'a.png')  # now two files differ in case alone, and one of them is it
    assert Path(read_collection(tmp_path).images.set_index('image_id').path['a']).name == 'a.png'
    write(tmp_path/'t.tsv', [['article_id', 'title', 'image_id'], ['1', 'a', 'Ab']])
    for name in ('AB.jpg', 'ab.jpg'): picture(tmp_path/'images'/name)
    assert read_collection(tmp_path).images.status.tolist() == ['missing']

def test_half_a_collection_is_refused(tmp_path):
    write(tmp_path/'texts.tsv', [['articleID', 'title', 'text'], ['1', 'a', 'b']])
    raises([str(tmp_path), 'only articles found'], read_collection, tmp_path)

def test_2025(tmp_path):
    rows = [[i, 'u', f'donâ€™t {i}', 'tag;tag', f'I{i}', 'v'] for i in range(1, 9)]
    write(tmp_path/'newsarticles.csv', [['article_id', 'article_url', 'article_title', 'article_tags',
                                         'image_id', 'image_url'], *rows], 'utf-8-sig', ',')
    for i in (1, 2, 3, 4, 5, 7): picture(tmp_path/'newsimages'/f'I{i}.jpg')
    c = read_collection(tmp_path, n_test=2)
    assert (c.layout, c.datasets) == ('newsimages2025', ['GDELT-P1-2025'])
    assert c.subset(split='test').truth == {'5': 'I5', '7': 'I7'}
    assert (c.articles.title[0], c.articles.text[0], c.articles.tags[0]) == ('don’t 1', '', 'tag;tag')
    assert c.usable()[1] == {'articles: image missing': 2, 'images: missing': 2}
    halved = read_collection(tmp_path)
    assert len(halved.subset(split='test').articles) == 3  # half of six
    assert 'the last 3 articles' in halved.problems[-1] and '1500 were wanted' in halved.problems[-1]


# ---- the plain layout, and what can be wrong with pictures ----

@pytest.fixture
def plain(tmp_path):
    names = ['fine', 'other', 'absent', 'half', 'page', 'empty', 'bomb', 'folder', 'link', '../../secret',
             str(tmp_path/'secret.jpg'), 'loop']
    root = tmp_path/'data'
    write(root/'news.csv',
          [['article_id', 'title', 'image_id', 'date'],
           *[[i, f'title {i}', o, f'2022-01-{i+1:02}'] for i, o in enumerate(names)]], delimiter=',')
    images = root/'images'
    whole = picture(images/'fine.jpg').read_bytes()
    picture(images/'other.PNG', 'blue')
    picture(tmp_path/'secret.jpg')
    (images/'half.jpg').write_bytes(whole[:-100])
    (images/'page.jpg').write_text('<!doctype html><title>404</title>')
    (images/'empty.jpg').touch()
    Image.new('1', (12_000, 12_000)).save(images/'bomb.png')
    (images/'folder.jpg').mkdir()
    (images/'link.jpg').symlink_to(tmp_path/'secret.jpg')
    (images/'loop.jpg').symlink_to('loop.jpg')
    return root

def test_every_fault_of_a_picture_is_named_and_counted(plain):
    c = read_collection(plain)
    status = dict(zip(c.images.image_id.map(lambda i: Path(i).stem if '/' not in i else i), c.images.status))
    assert status == dict(fine='ok', other='ok', absent='missing', half='broken', page='broken',
                          empty='broken', bomb='oversized', folder='broken', link='outside',
        loop='missing') | {'../../secret': 'outside', str(plain.parent/'secret.jpg'): 'outside'}
    rest, dropped = c.usable()
    assert rest.articles.article_id.tolist() == ['0', '1'] and len(rest.truth) == 12
    assert dropped == {f'{what}{o}': n for what in ('articles: image ', 'images: ')
                       for o, n in dict(broken=4, missing=2, outside=3, oversized=1).items()}
    splits = check_data(plain)['splits']  # the later one of two usable pictures is the test
    for split, counts in dict(train=[1, 2, 4, 1, 0, 3], test=[1, 0, 0, 0, 0, 0]).items():
        assert [splits[split][f'{o}_image']
                for o in ('with', 'missing', 'broken', 'oversized', 'extreme', 'outside')] == counts
    for why in ('an empty file: 1 (empty)', 'not a file: 1 (folder)',
                'not a picture, or of a format that is not read here: 1 (page)'):
        assert f'images broken, why: {why}' in c.problems
    assert sum(o.startswith('images broken, why: ') and o.endswith(': 1 (half)')
               for o in c.problems) == 1  # in Pillow's words
    assert open_image(c.images.set_index('image_id').path['other']).getpixel((0, 0)) == (0, 0, 255)

def test_links_to_a_folder_of_pictures_are_fine(plain, tmp_path):
    shutil.move(plain/'images', tmp_path/'store')
    (plain/'images').symlink_to(tmp_path/'store')
    assert (read_collection(plain).images.status == 'ok').sum() == 2

@pytest.mark.parametrize('file', ['half.jpg', 'page.jpg', 'bomb.png', 'absent.jpg'])
def test_open_image_refuses(plain, file):
    raises([file, 'not a usable picture'], open_image, plain/'images'/file)

@pytest.mark.parametrize('mode', ['L', 'P', 'CMYK', '1'])
def test_pictures_of_any_mode(tmp_path, mode):
    path = tmp_path/('a.jpg' if mode in ('L', 'CMYK') else 'a.png')
    Image.new(mode, (4, 4)).save(path)
    assert open_image(path).mode == 'RGB'

@pytest.mark.parametrize('place', ['', 'images', 'photos'])
def test_where_pictures_may_lie(tmp_path, place):
    write(tmp_path/'t.tsv', [['article_id', 'title', 'image_id'], ['1', 'a', 'x']])
    picture(tmp_path/place/'x.webp')
    assert read_collection(tmp_path).images.status.tolist() == ['ok']

def test_plain_columns(tmp_path):
    write(tmp_path/'t.tsv', [['split', 'dataset', 'lang', 'text', 'title', 'article_id', 'image_id', 'date'],
        ['test', 'A', 'fr', 'x', 'a', '1', 'p', '2022-01-01'], ['', '', '', ' ', '', '2', 'p', 'never']])
    c = read_collection(tmp_path)
    found = c.articles[['split', 'dataset', 'lang']].values.tolist()
    assert found == [['test', 'A', 'fr'], ['train', 't', '']]
    assert not any('split' in o for o in c.problems)  # the table has its own
    assert 'dates not understood: 1' in c.problems and c.usable()[1]['articles: no text'] == 1

def test_plain_tables_that_are_refused(tmp_path):
    raises(['no known layout', 'found no table'], read_collection, tmp_path)
    raises([str(tmp_path/'absent'), 'no such folder'], read_collection, tmp_path/'absent')
    write(tmp_path/'t.csv', [['id', 'headline']], delimiter=',')
    raises(['no known layout', 'article_id, title (plain)', 't.csv (id, headline)'], read_collection,
           tmp_path)
    raises(['t.csv', 'a file; give the folder'], read_collection, tmp_path/'t.csv')
    write(tmp_path/'t.csv', [['article_id', 'title', 'split'], ['1', 'a', 'val']], delimiter=',')
    raises(["t.csv line 2: split is 'val'"], read_collection, tmp_path)
    write(tmp_path/'t.csv', [['article_id', 'title'], ['1', 'a'], ['1', 'b']], delimiter=',')
    raises(['t.csv line 3: article id 1 was given before', 't.csv line 2'], read_collection, tmp_path)
    write(tmp_path/'u.csv', [['article_id', 'title']], delimiter=',')
    raises(['several tables of articles: t.csv, u.csv'], read_collection, tmp_path)
    (tmp_path/'u.csv').unlink(), (tmp_path/'newsarticles.csv').mkdir()
    raises(['newsarticles.csv: cannot be read: Is a directory'], read_collection, tmp_path)

def test_a_table_without_rows_is_refused(tmp_path):
    write(tmp_path/'t.tsv', [['article_id', 'title', 'image_id']])
    raises(['t.tsv: no rows'], read_collection, tmp_path)

@pytest.mark.parametrize('change', ['pixel', 'text', 'truth', 'missing'])
def test_the_fingerprint_knows_content_and_not_place(plain, tmp_path, change):
    before = read_collection(plain).fingerprint
    moved = shutil.move(plain, tmp_path/'elsewhere')
    assert read_collection(moved).fingerprint == before
    table, image = moved/'news.csv', moved/'images'/'other.PNG'
    if change == 'pixel':
        with Image.open(image) as o: o.putpixel((3, 3), (0, 0, 254)); o.save(image)
    if change == 'text': table.write_text(table.read_text().replace('title 3', 'title 3.'))
    if change == 'truth': table.write_text(table.read_text().replace('title 0,fine', 'title 0,other'))
    if change == 'missing': image.unlink()
    assert read_collection(moved).fingerprint != before


# ---- splits ----

def many(root, name, n):
    rows = [[i, i, '', '', f'{i}', '', f'title {i}', 'text', f'{i}.png', f'2022-01-{i%28+1:02}']
            for i in range(n)]
    write(root/name/f'{name}_train.tsv', [LINKED, *rows])
    picture(root/name/'images'/'0.png', size=(1, 1))
    for i in range(1, n): shutil.copy(root/name/'images'/'0.png', root/name/'images'/f'{i}.png')
    return root

def test_sample_has_its_composition_and_exactly_its_images(tmp_path):
    for name, n in dict(TW=80, RSS=12, RT=30).items(): many(tmp_path, name, n)
    c = read_collection(tmp_path)
    assert sum(ZHANG_SAMPLE.values()) == 2000
    part = sample_pairs(c, 40, seed=1)
    assert part.articles.dataset.value_counts().to_dict() == dict(TW=30, RT=7, RSS=3)
    assert len(part.truth) == 40 and part.images.image_id.is_unique
    assert sorted(part.truth.values()) == sorted(part.images.image_id)
    assert part.fingerprint == sample_pairs(c, 40, seed=1).fingerprint
    assert part.fingerprint != sample_pairs(c, 40, seed=2).fingerprint
    small = sample_pairs(c)
    assert 'TW 80' in small.problems[-1] and '2000 were wanted' in small.problems[-1]
    assert 0 < len(small.truth) == sum(small.articles.dataset.value_counts().to_dict().values()) <= 122
    together = sample_pairs(c.subset('RT'))
    assert 'drawn from all sets together' in together.problems[-1] and len(together.truth) == 30
    assert len(sample_pairs(c, 10, composition=None).truth) == 10

def test_a_sample_is_of_the_training_part(news2022):
    part = sample_pairs(read_collection(news2022), 6, dict(RSS=1, RT=1, TW=1))
    assert set(part.articles.split) == {'train'} and len(part.truth) == 6
    assert 'from the training part' in part.problems[-1]
    test = read_collection(news2022).subset(split='test')
    part = sample_pairs(test, 6, dict(RSS=1, RT=1, TW=1))
    assert set(part.articles.split) == {'test'} and len(part.truth) == 6
    assert 'no training part' in part.problems[-1]

def test_a_share_of_each_set():
    # training parts of 2022, as Table 1.B of Galanopoulos & Mezaris implies
    sizes = dict(RSS=400, RT=1925, TW=4410)
    articles = pd.DataFrame([(o, str(i)) for o, n in sizes.items() for i in range(n)],
                            columns=['dataset', 'article_id'])
    learn, held = share_of_each(articles, .8, seed=1)
    assert held.dataset.value_counts().to_dict() == dict(TW=882, RT=385, RSS=80)
    assert len(learn) + len(held) == len(articles)
    shuffled = articles.sample(frac=1, random_state=0)
    assert set(share_of_each(shuffled, .8, seed=1)[1].index) == set(held.index)
    assert set(share_of_each(articles, .8, seed=2)[1].index) != set(held.index)
    doubled = articles.set_axis([0]*len(articles))  # whatever the index is
    assert share_of_each(doubled, .8, seed=1)[1].values.tolist() == held.values.tolist()

def test_sample_of_nothing(tmp_path):
    write(tmp_path/'t.tsv', [['article_id', 'title', 'image_id'], ['1', 'a', 'x']])
    part = sample_pairs(read_collection(tmp_path))
    assert len(part.articles) == len(part.images) == 0 and '0 of 0' in part.problems[-1]

@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(1, 5)), min_size=1, max_size=30).filter(any),
       st.floats(.05, .95))
def test_chronological_split_holds_out_what_is_newest(days, fraction):
    articles = pd.DataFrame(dict(article_id=[str(i) for i in range(len(days))],
                                 date=pd.to_datetime([d and f'2022-01-0{d}' for d in days])))
    if 0 < sum(d is None for d in days) > round(fraction * len(days)) < len(days):
        raises(['have no date', 'split at random'], chronological_split, articles, fraction)
        return
    old, new = chronological_split(articles, fraction)
    assert new.date.notna().all() and len(old) == round(fraction * len(days))
    assert sorted([*old.article_id, *new.article_id]) == sorted(articles.article_id)
    if old.date.notna().any() and len(new): assert old.date.max() <= new.date.min()
    ties = pd.concat([old, new])
    assert all(rows.article_id.astype(int).is_monotonic_increasing
               for _, rows in ties.groupby('date', dropna=False))

def test_splits_that_are_refused():
    articles = pd.DataFrame(dict(dataset='A', article_id=['1'], date=pd.to_datetime([None])))
    two = pd.concat([articles]*2)
    raises(['2 of 2 articles have no date'], chronological_split, two, .5)
    for split in (random_split, chronological_split, share_of_each):
        for fraction in (2, 0, -.1, float('nan')):
            raises([f'fraction {fraction}: must lie above 0'], split, two, fraction)
    raises(['share 1 to hold out'], hold_out, two, 'random', 1)
    raises(["split 'newest': use chronological or random"], hold_out, two, 'newest')

@pytest.mark.parametrize('split', ['chronological', 'random'])
@pytest.mark.parametrize('dates', ['all', 'some', 'none'])
def test_nothing_is_held_out_where_nothing_is_asked_for(split, dates, recwarn):
    articles = pd.DataFrame(dict(dataset='A', article_id=list('abcd'),
                                 date=pd.date_range('2022-01-01', periods=4)))
    articles['date'] = articles.date.where(articles.index < dict(all=4, some=2, none=0)[dates])
    learn, held = hold_out(articles, split, 0)
    assert learn.equals(articles) and len(held) == 0 and list(held) == list(articles) and not recwarn.list

def test_missing_dates_are_never_passed_over_in_silence():
    articles = pd.DataFrame(dict(dataset='A', article_id=list('abcd'),
                                 date=pd.to_datetime([None, '2022-02-01', None, '2022-01-01'])))
    with pytest.warns(UserWarning, match='A: 2 of 4 articles have no date: they count as the oldest'):
        learn, held = hold_out(articles, share=.5)
    assert held.article_id.tolist() == ['d', 'b']
    with warnings.catch_warnings():  # what is refused is not also said to be done
        warnings.simplefilter('error')
        raises(['2 of 4 articles have no date'], hold_out, articles, 'chronological', .75)
    with pytest.warns(UserWarning,
                      match='4 of 4 articles have no date: the order of the table stands for time'):
        assert hold_out(articles.assign(date=pd.NaT), share=.25)[1].article_id.tolist() == ['d']


def test_a_parquet_table_whose_text_is_no_utf8_is_refused(tmp_path):
    "pyarrow decodes text when it is looked at, not when it is read; found by fuzzing."
    import pyarrow as pa
    from pyarrow import parquet
    text = pa.Array.from_buffers(pa.string(), 2, [None, pa.py_buffer(b'\0\0\0\0\4\0\0\0\7\0\0\0'),
                                                  pa.py_buffer(b'RainNo\xcb')])
    parquet.write_table(pa.table({'article_id': ['1', '2'], 'title': text}), tmp_path/'a.parquet')
    raises([str(tmp_path/'a.parquet'), 'no UTF-8'], read_table, tmp_path/'a.parquet')
