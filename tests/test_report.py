"""The page of a study: its numbers, what it refuses to run, and that it asks nobody for anything."""
import base64
import csv
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from newsrepro.study.registry import NOTEBOOKS, Notebook, published_table
from newsrepro.study.report import laid_out, read_results, write_report

TRICK = '<img src=x onerror=alert(1)></script>'
COLUMNS = ('dataset', 'split', 'run', 'metric', 'value', 'ci_low', 'ci_high', 'n', 'published', 'difference')


class Page(HTMLParser):
    "What a browser would load and show of a page."
    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loaded, self.pictures, self.tags = [], [], [], [], Counter()
        self.cells, self.open = [], ''
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags[tag] += 1
        self.ids += [attrs['id']] if 'id' in attrs else []
        self.links += [attrs['href']] if tag == 'a' else []
        loads = ('src', 'srcset', 'poster', 'data') if tag != 'link' else ('href',)
        self.loaded += [attrs[name] for name in loads if name in attrs]
        if tag == 'img': self.pictures.append(attrs)
        assert not [name for name in attrs if name.startswith('on') and tag != 'form']
        self.open = tag

    def handle_data(self, text):
        if self.open in ('td', 'th') and text.strip(): self.cells.append(text.strip())


def write_table(out: Path, name: str, rows) -> None:
    (out/'tables').mkdir(parents=True, exist_ok=True)
    with (out/'tables'/f'{name}.csv').open('w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def write_notebook(out: Path, name: str) -> None:
    title = [f'# {TRICK}\n', '\n', '[x](javascript:alert(1))']
    cells = [dict(cell_type='markdown', id='title', source=title),
             dict(cell_type='code', id='run', source=f'print("{TRICK}")', outputs=[
                 dict(output_type='stream', name='stdout', text=[TRICK]),
                 dict(output_type='stream', name='stderr', text=['100%|####|']),
                 dict(output_type='execute_result', data={'text/html': [f'<table><tr><td>{TRICK}7</table>']}),
                 dict(output_type='display_data', data={'image/png': 'iVBORw0KGgo=\n'})])]
    (out/'notebooks').mkdir(exist_ok=True)
    (out/'notebooks'/f'{name}.ipynb').write_text(json.dumps(dict(cells=cells)))


@pytest.fixture
def study():
    return (Notebook('12_toy', 'vu2022', TRICK, ('vu2022-table-2', 'vu2022-extra-toy')),)


@pytest.fixture
def report(tmp_path, study):
    "A report whose every text is an attack."
    row = dict(dataset='RSS', split='test', run='clip_ft_T2', metric='MRR@100', value='0.4',
               ci_low='0.38', ci_high='0.45', n='1500')
    write_table(tmp_path, 'vu2022-table-2', [row | dict(published='0.42345'), row | dict(run=TRICK)])
    write_table(tmp_path, 'vu2022-extra-toy', [row | dict(dataset=TRICK, metric=TRICK)])
    paragraphs = [f'**vu2022-table-2.** Of {TRICK}', '| a |\n| --- |\n| 1 |', f'† {TRICK}',
                  f'Profile x · {TRICK}', '    x\n']
    (tmp_path/'tables'/'vu2022-table-2.md').write_text('\n\n'.join(paragraphs))
    write_notebook(tmp_path, '12_toy')
    claim = dict(claim=TRICK, verdict=TRICK, sentence=TRICK, supports=TRICK, contradicts=TRICK)
    files = {f'runs/vu2022/RSS-{name}.tsv': '' for name in ('clip_ft_T2', '"><b>')}
    entry = dict(command=f'newsrepro reproduce --set 12_toy.word={TRICK}', began='2026-01-02T03', seconds=1,
                 peak_memory_mb=2, commit='abc', parameters={}, departures=[], claims=[claim], files=files)
    manifest = dict(profile='paper', data=TRICK, commit='abc', notebooks={'12_toy': entry})
    (tmp_path/'manifest.json').write_text(json.dumps(manifest))
    write_report(tmp_path, study)
    return tmp_path


def test_nothing_in_a_report_is_markup(report):
    pages = [report/'index.html', report/'notebooks'/'12_toy.html']
    for path in pages:
        page = Page(path)
        text = path.read_text(encoding='utf-8')
        assert '<img src=x' not in text and '&lt;img src=x onerror=alert(1)&gt;' in text
        assert text.count('</script>') == page.tags['script']
        assert not [link for link in page.links if link.startswith('javascript:')]


def test_pages_load_nothing_and_say_every_picture(report):
    for path in [report/'index.html', report/'notebooks'/'12_toy.html']:
        page = Page(path)
        assert all(what.startswith('data:image/') for what in page.loaded)
        assert page.pictures and all(picture.get('alt') for picture in page.pictures)
        assert len(page.ids) == len(set(page.ids))
        targets = [link for link in page.links if link.startswith('#')]
        assert {link[1:] for link in targets} <= set(page.ids)
        assert not [link for link in page.links if re.match(r'[a-z]+:|//', link)]


def test_the_drawing_is_text_too(report):
    text = (report/'index.html').read_text(encoding='utf-8')
    drawn = [base64.b64decode(found).decode() for found in re.findall(r'image/svg\+xml;base64,([^"]+)', text)]
    assert len(drawn) == 2 and '<img' not in drawn[0]  # light and dark of the one set
    assert not re.search(r'(href|src)="(?!#)', drawn[0])


def test_ours_and_the_published_stand_side_by_side(report):
    cells = Page(report/'index.html').cells
    at = cells.index('0.4000')
    published = published_table('vu2022-table-2')['RSS', 'test', 'clip_ft_T2', 'MRR@100']
    assert f'{published:.4f}' in cells[at:at + 3]
    text = (report/'index.html').read_text(encoding='utf-8')
    assert 'title="agrees: the published value lies within the interval">✓' in text


def test_a_notebooks_page_shows_what_it_printed_and_no_progress(report):
    page = report/'notebooks'/'12_toy.html'
    assert '7' in Page(page).cells and '####' not in page.read_text()


def test_a_second_writing_changes_nothing(report, study):
    before = {path: path.stat().st_mtime_ns for path in report.rglob('*.html')}
    write_report(report, study)
    assert len(before) == 2 and {path: path.stat().st_mtime_ns for path in report.rglob('*.html')} == before


@pytest.mark.parametrize('lacking', ['manifest.json', 'notebooks/12_toy.ipynb', 'tables/vu2022-table-2.csv',
                                     'tables/vu2022-table-2.md'])
def test_a_report_that_lacks_something_has_a_page(report, study, lacking):
    (report/lacking).unlink()
    for page in report.rglob('*.html'): page.unlink()
    assert Page(write_report(report, study)).ids


REFERENCE = Path(__file__).resolve().parent.parent/'reports'/'reference'/'tables'


@pytest.mark.parametrize('name', [table for notebook in NOTEBOOKS for table in notebook.tables])
def test_every_number_of_the_shipped_tables_is_laid_out_once(name):
    rows = read_results(REFERENCE/f'{name}.csv')
    found = laid_out(rows, name)
    cells = [cell for lines in found['groups'].values() for line in lines for cell in line['cells'].values()]
    assert len([cell for cell in cells if cell]) == len(rows)
    published = [cell['published'] for cell in cells if cell and cell['published']]
    keys = {(row['dataset'], row['split'], row['run'], row['metric']) for row in rows}
    assert len(published) == len(keys & published_table(name).keys())
