"""The mini study as a newcomer runs it: complete, repeatable to the byte, and the same command on a folder
of one's own."""
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from newsrepro.study.claims import VERDICTS
from newsrepro.study.registry import NOTEBOOKS, published_table
from newsrepro.study.study import mini_root

NEWSREPRO = Path(sys.executable).with_name('newsrepro')


def newsrepro(*arguments, **environment):
    return subprocess.run([NEWSREPRO, *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | environment)


def contents(out: Path, *kinds: str) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for kind in kinds
            for path in sorted((out/kind).rglob('*')) if path.is_file()}


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "The mini study, made here, or the one that CI made by the README's line."
    if given := os.environ.get('NEWSREPRO_STUDY'): return Path(given)
    out = tmp_path_factory.mktemp('study')/'mini'
    done = newsrepro('reproduce', '--out', out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_everything_promised_is_there(study):
    for notebook in NOTEBOOKS:
        for table in notebook.tables:
            for kind in ('csv', 'md', 'tex'):
                assert (study/'tables'/f'{table}.{kind}').stat().st_size
        for figure in notebook.figures:
            assert (study/'figures'/f'{figure}.png').read_bytes().startswith(b'\x89PNG')
        assert (study/'notebooks'/f'{notebook.name}.ipynb').exists()
    assert len(list((study/'runs'/'zhang2022').glob('TW+RSS+RT-*.tsv'))) == 9
    assert (study/'index.html').exists()
    manifest = json.loads((study/'manifest.json').read_text())
    assert manifest['profile'] == manifest['data'] == 'mini'
    assert manifest['seeds']['11_clip_sweep'] == 0
    assert manifest['commit'] and manifest['libraries']['torch']
    entry = manifest['notebooks']['11_clip_sweep']
    assert len(entry['checkpoints']) == 9 and len(entry['data']['fingerprint']) == 64
    assert entry['seconds'] > 0 and entry['peak_memory_mb'] > 0


def rows(study, table): return list(csv.DictReader((study/'tables'/f'{table}.csv').open(encoding='utf-8')))


def test_tables_say_what_made_them_and_claim_nothing(study):
    for row in rows(study, 'zhang2022-table-2'):
        assert (row['profile'], row['seed']) == ('mini', '0') and row['data'].startswith('newsimages2022:')
        assert row['checkpoint'].startswith('mini-') and row['commit']
        assert row['published'] == row['difference'] == ''
    text = (study/'tables'/'zhang2022-table-2.md').read_text()
    assert "not the paper's" in text
    assert all(f'{value:.4f}' in text for value in published_table('zhang2022-table-2').values())


def test_the_sweep_says_something(study):
    "No measure saturated, and the strongest backbone further from the weakest than its interval is wide."
    mrr = {row['run']: {key: float(row[key]) for key in ('value', 'ci_low', 'ci_high')}
           for row in rows(study, 'zhang2022-table-2')}
    best = max(mrr.values(), key=lambda m: m['value'])
    worst = min(mrr.values(), key=lambda m: m['value'])
    assert best['value'] - worst['value'] > best['ci_high'] - best['ci_low']
    assert best['ci_low'] > worst['ci_high']
    for row in rows(study, 'zhang2022-extra-official-test'):
        if row['metric'] == 'MRR@100': assert .05 < float(row['value']) < .6, row
        assert 0 < float(row['value']) < 1, row


def test_every_claim_has_a_verdict(study):
    "In the manifest, with what was asked beforehand, and in the notebook that was run."
    manifest = json.loads((study/'manifest.json').read_text())
    for notebook in NOTEBOOKS:
        claims = manifest['notebooks'][notebook.name]['claims']
        shown = (study/'notebooks'/f'{notebook.name}.ipynb').read_text(encoding='utf-8')
        assert claims and all(own['claim'] and own['supports'] and own['contradicts'] for own in claims)
        assert {own['verdict'] for own in claims} <= set(VERDICTS)
        assert all(json.dumps(own['claim'], ensure_ascii=False)[1:-1] in shown for own in claims)


def test_second_run_is_quick_and_changes_nothing(study):
    before, start = contents(study, 'tables', 'runs', 'figures', 'notebooks'), time.perf_counter()
    done = newsrepro('reproduce', '--out', study)
    assert done.returncode == 0 and contents(study, 'tables', 'runs', 'figures', 'notebooks') == before
    print(f'second run: {time.perf_counter() - start:.1f} s')


def test_from_nothing_again_byte_for_byte(study, tmp_path):
    """Collections generated, texts translated, models trained and embeddings computed anew: the same
    tables and runs."""
    some = [notebook for notebook in NOTEBOOKS if notebook.name in ('12_fine_tune', '14_txv')]
    done = newsrepro('reproduce', '--out', tmp_path/'again',
                     *(word for notebook in some for word in ('--only', notebook.name)),
                     NEWSREPRO_CACHE=str(tmp_path/'cache'))
    assert done.returncode == 0, done.stdout + done.stderr
    first, again = contents(study, 'tables', 'runs'), contents(tmp_path/'again', 'tables', 'runs')
    promised = {f'tables/{table}.csv' for notebook in some for table in notebook.tables}
    assert len(promised) >= 5 and promised <= again.keys() <= first.keys()
    assert [name for name in again if again[name] != first[name]] == []


def test_a_folder_in_the_layout_of_2025(tmp_path):
    """Own pictures and headlines; one picture is gone, one is broken, and the tables say which checkpoints
    ranked them."""
    captions = mini_root()/'captions'
    table = list(csv.DictReader((captions/'captions.csv').open(encoding='utf-8')))
    chosen = list({row['image_id']: row for row in table}.values())[:260]
    folder = tmp_path/'my news'
    (folder/'newsimages').mkdir(parents=True)
    with (folder/'newsarticles.csv').open('w', encoding='utf-8-sig', newline='') as file:
        writer = csv.writer(file)
        writer.writerow('article_id article_url article_title article_tags image_id image_url'.split())
        for i, row in enumerate(chosen):
            writer.writerow([i, f'https://news.example/{i}', row['title'], 'a;b', row['image_id'],
                             f'https://news.example/{i}.jpg'])
            if i != 3: shutil.copy(captions/'images'/f"{row['image_id']}.jpg", folder/'newsimages')
    (folder/'newsimages'/f"{chosen[5]['image_id']}.jpg").write_bytes(b'<html>404</html>')
    out = tmp_path/'out'
    done = newsrepro('reproduce', '--data', folder, '--out', out, '--only', '11_clip_sweep', '--set',
                     '11_clip_sweep.backbones=RN50,ViT-B/32')
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(out, 'zhang2022-table-2')
    assert [row['run'] for row in found] == ['RN50', 'ViT-B/32']
    left = 260 - 2  # half of them are made the test part; the draws are from the other half
    assert {row['n'] for row in found} == {str(left - left//2)}
    assert all(row['checkpoint'].startswith('mini-') for row in found)
    dropped = json.loads((out/'manifest.json').read_text())['notebooks']['11_clip_sweep']['dropped']
    assert dropped['images: missing'] == 1 and dropped['images: broken'] == 1


def test_absent_checkpoints_are_refused_before_any_work(tmp_path):
    done = newsrepro('reproduce', '--profile', 'paper', '--only', '11_clip_sweep', '--out', tmp_path/'paper',
                     HF_HOME=str(tmp_path/'hub'), HF_HUB_OFFLINE='1')
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    for part in ('checkpoints not found: RN50 (', 'RN50.pt', str(tmp_path/'hub'), '--weights'):
        assert part in done.stderr, done.stderr
    assert not (tmp_path/'paper'/'tables').exists()
