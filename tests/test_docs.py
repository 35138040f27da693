"""Notebooks render on a code host, and as a site: a page each, nothing broken, nothing from elsewhere."""
import json
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from newsrepro._modidx import d as exported

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))


# on a code host

PASSIVE = {'text/plain', 'text/html', 'text/markdown', 'text/latex', 'image/png', 'image/jpeg'}
LARGEST = 300_000  # characters of one output, as stored


def unfit(output: dict) -> list[str]:
    "What keeps an output from being shown where no script runs."
    data = {kind: ''.join(text) if isinstance(text, list) else text
            for kind, text in output.get('data', {}).items()}
    found = [f'{kind} needs a script' for kind in data.keys() - PASSIVE]
    if data and 'text/plain' not in data: found.append('no text beside it')
    if len(json.dumps(output)) > LARGEST: found.append('too large')
    if re.search(r'<(script|iframe|object|embed)\b|\b(src|href)="?(https?:)?//', data.get('text/html', '')):
        found.append('runs or loads something')
    return found


def test_what_is_unfit_is_noticed():
    assert unfit(dict(data={'text/html': ['<table>', '</table>'], 'text/plain': 'a'})) == []
    assert unfit(dict(data={'image/png': 'aa'})) == ['no text beside it']
    assert unfit(dict(data={'text/plain': 'a' * LARGEST})) == ['too large']
    assert unfit(dict(data={'text/plain': 'a', 'application/javascript': 'a'})) != []
    assert unfit(dict(data={'text/plain': 'a', 'text/html': '<script src="a.js">'})) != []
    assert unfit(dict(data={'text/plain': 'a', 'text/html': '<img src="//e.org/a.png">'})) != []


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_renders_on_a_code_host(path):
    notebook = json.loads(path.read_text(encoding='utf-8'))
    assert (notebook['nbformat'], notebook['nbformat_minor']) == (4, 5)
    nbformat.validate(notebook)
    found = {cell['id']: [fault for output in cell['outputs'] for fault in unfit(output)]
             for cell in notebook['cells'] if cell['cell_type'] == 'code'}
    assert {cell: faults for cell, faults in found.items() if faults} == {}


def test_the_version_to_cite_is_the_one_that_is_installed():
    from newsrepro import __version__
    assert f'note   = {{Version {__version__}}}' in (ROOT/'README.md').read_text(encoding='utf-8')
    assert f'\nversion: {__version__}\n' in (ROOT/'CITATION.cff').read_text(encoding='utf-8')


# as a site

# the build as CONTRIBUTING has it, in a process that can reach nobody
OFFLINE = '''
import socket, sys
def refuse(*_): raise OSError('the build of the documentation asked the network')
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))'''


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The built site."
    target = tmp_path_factory.mktemp('docs')
    done = subprocess.run([sys.executable, '-c', OFFLINE, '-W', '-q', '-c', 'docs', '-d', target/'trees',
                           '.', target/'site'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target/'site'


class Page(HTMLParser):
    "Links, places, words for pictures, and what a browser loads by itself."
    def __init__(self, path: Path):
        super().__init__()
        self.links, self.ids, self.loads, self.alts, self.text = [], set(), [], [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if 'id' in given: self.ids.add(given['id'])
        if tag == 'a' and 'href' in given: self.links.append(given['href'])
        if tag == 'img': self.alts.append(given.get('alt', ''))
        names = {'link': ['href'], 'object': ['data']}.get(tag, ['src', 'srcset', 'poster'])
        self.loads += [given[name] for name in names if given.get(name)]

    def handle_data(self, data): self.text.append(data)


@pytest.fixture(scope='module')
def pages(site):
    "Path -> parsed page."
    return {path: Page(path) for path in sorted(site.rglob('*.html'))}


def is_elsewhere(address: str) -> bool: return bool(urlsplit(address).netloc)


def test_each_notebook_has_a_page(site, pages):
    lacking = [path.stem for path in NOTEBOOKS
               if site/path.relative_to(ROOT).with_suffix('.html') not in pages]
    assert lacking == []
    other = ['CONTRIBUTING', 'CHANGELOG', 'benchmarks/README', 'benchmarks/results', 'index', 'search',
             'genindex']
    assert [name for name in other if site/f'{name}.html' not in pages] == []


def test_each_page_is_reached_from_the_first_under_its_own_title(site, pages):
    first = site/'nbs'/'index.html'
    reached = {(first.parent/urlsplit(link).path).resolve() for link in pages[first].links}
    assert [path.stem for path in NOTEBOOKS if path.stem != 'index'
            and (site/path.relative_to(ROOT).with_suffix('.html')).resolve() not in reached] == []
    title = {path: re.match(r'# (.*)', ''.join(json.loads(path.read_text())['cells'][0]['source']))[1]
             for path in NOTEBOOKS}
    shown = ''.join(pages[first].text)
    assert [path.stem for path, one in title.items() if one.replace('`', '') not in shown] == []


def test_no_link_within_the_site_is_broken(site, pages):
    broken = defaultdict(list)
    for path, page in pages.items():
        for link in {*page.links, *page.loads}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            known = pages.get(target)
            place = unquote(parts.fragment)
            if not target.exists() or (place and known and place not in known.ids):
                broken[path.relative_to(site).as_posix()].append(link)
    assert broken == {}


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert {load for page in pages.values() for load in page.loads if is_elsewhere(load)} == set()
    styles = ''.join(path.read_text(encoding='utf-8') for path in site.rglob('*.css'))
    assert re.findall(r'@import|url\(["\']?(?:https?:)?//', styles) == []
    scripts = ''.join(path.read_text(encoding='utf-8') for path in site.rglob('*.js')
                      if path.name != 'searchindex.js')
    assert re.findall(r'(?:src|href|fetch\(|importScripts\()\s*=?\s*["\'`](?:https?:)?//', scripts) == []


def test_each_public_function_and_class_has_its_reference(pages):
    ids = set().union(*(page.ids for page in pages.values()))
    public = [name for module, names in exported['syms'].items() for name in names
              if '._' not in name and name.count('.') == module.count('.') + 1 and module != 'newsrepro.cli']
    assert len(public) > 300
    assert sorted(set(public) - ids) == []


def test_comments_behind_parameters_stand_in_the_reference(site, pages):
    shown = ' '.join(''.join(pages[site/'nbs'/'ranking'/'02_metrics.html'].text).split())
    assert 'depth – places looked at; None: all of them' in shown
    assert 'metric – measure, as of measure' in shown  # the field of a dataclass


def test_names_in_prose_lead_to_their_reference(site, pages):
    first = site/'nbs'/'index.html'
    assert 'ranking/05_retrieve.html#newsrepro.ranking.retrieve.top_k' in pages[first].links
    assert 'ranking/02_metrics.html' in pages[first].links
    assert 'nbs/study/06a_study.html#newsrepro.study.study.settings' in pages[site/'CONTRIBUTING.html'].links


def test_each_picture_has_words_in_its_place(site, pages):
    alts = [alt for path, page in pages.items() if site/'nbs' in path.parents for alt in page.alts]
    assert len(alts) > 25
    assert [alt for alt in alts if len(alt) < 10 or re.search(r'_images|\.(png|jpe?g|svg)$', alt)] == []


def test_search_needs_no_server(site):
    "Its index is a script, which a page opened from the disk may load; a file fetched would not be."
    assert (site/'searchindex.js').read_text(encoding='utf-8').startswith('Search.setIndex(')
    assert 'searchindex.js' in (site/'search.html').read_text(encoding='utf-8')
