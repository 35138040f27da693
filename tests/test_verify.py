"""`newsrepro verify` on the reference, on changed copies, on what is no report; plans before any work."""
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from newsrepro.core.base import reference_dir

NEWSREPRO = Path(sys.executable).with_name('newsrepro')
TABLE = 'vu2022-table-1.csv'


def newsrepro(*arguments, **environment):
    words = [NEWSREPRO, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment)


def verified(*arguments) -> tuple[int, dict]:
    done = newsrepro('verify', *arguments, '--json')
    assert done.stderr == '' and done.stdout.count('\n') == 1, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture
def report(tmp_path):
    "A copy of the reference."
    shutil.copytree(reference_dir()/'tables', tmp_path/'report'/'tables')
    shutil.copy(reference_dir()/'manifest.json', tmp_path/'report')
    return tmp_path/'report'


def change(report: Path, alter) -> None:
    "Rewrite one table with its rows altered."
    path = report/'tables'/TABLE
    with path.open(encoding='utf-8', newline='') as file: rows = list(csv.DictReader(file))
    head = list(rows[0])
    rows = alter(rows)
    with path.open('w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, head, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def moved(rows, index, **columns):
    rows[index] |= {name: str(float(rows[index][name]) + by) for name, by in columns.items()}
    return rows


def test_the_reference_is_identical_to_itself(report):
    code, found = verified(report)
    paths = list((report/'tables').glob('*.csv'))
    rows = [row for path in paths for row in csv.DictReader(path.open(encoding='utf-8', newline=''))]
    numbers = sum(bool(row[name]) for row in rows for name in ('value', 'ci_low', 'ci_high', 'n'))
    assert code == 0 and found['identical'] == numbers > 6000
    assert found['close'] == found['differs'] == found['missing'] == 0
    assert set(found['tables']) == {path.stem for path in paths} and found['worst'] == found['not_run'] == []


def test_a_value_outside_its_interval_differs(report):
    def by_002_beyond(rows):
        rows[3]['value'] = str(float(rows[3]['ci_high']) + .02)
        return rows
    change(report, by_002_beyond)
    code, found = verified(report)
    assert code == 1 and found['differs'] == 1 and found['missing'] == found['close'] == 0
    worst = found['worst'][0]
    assert worst['table'] == TABLE[:-4] and worst['row'].startswith('RSS train zero_shot_T1 R@10')
    assert worst['value'] > worst['reference']
    assert found['tables'][TABLE[:-4]]['differs'] == 1


def test_a_value_inside_its_interval_is_close(report):
    change(report, lambda rows: moved(rows, 3, value=.001))
    code, found = verified(report)
    assert (code, found['close'], found['differs']) == (0, 1, 0)


@pytest.mark.parametrize('alter, said', [
    (lambda rows: rows[:2] + rows[3:], 'RSS train zero_shot_T1 R@5 (only in the reference)'),
    (lambda rows: [*rows, rows[0] | {'metric': 'R@3'}], 'RSS train zero_shot_T1 R@3 (not in the reference)'),
    (lambda rows: [rows[0] | {'n': '999'}, *rows[1:]], 'RSS train zero_shot_T1 MRR n'),
])
def test_what_one_side_lacks_is_named(report, alter, said):
    change(report, alter)
    code, found = verified(report)
    assert code == 1 and found['missing'] + found['differs'] == 1
    assert found['worst'][0]['row'] == said
    assert said in newsrepro('verify', report).stdout


def test_a_lost_table_is_missing_and_a_notebook_that_was_not_run_is_not(report):
    (report/'tables'/TABLE).unlink()
    code, found = verified(report)
    assert code == 1 and found['missing'] == 1
    manifest = json.loads((report/'manifest.json').read_text())
    for table in (report/'tables').glob('vu2022-*.csv'): table.unlink()
    del manifest['notebooks']['12_fine_tune']
    (report/'manifest.json').write_text(json.dumps(manifest))
    code, found = verified(report)
    names = {'vu2022-table-1', 'vu2022-table-2', 'vu2022-extra-gain', 'vu2022-extra-parts'}
    assert code == 0 and set(found['not_run']) == names


def test_another_seed_is_said(report):
    change(report, lambda rows: [row | {'seed': '1'} for row in rows])
    code, found = verified(report)
    assert code == 0 and found['settings'] == {TABLE[:-4]: {'seed': ['1', '0']}}
    assert f'{TABLE[:-4]}: made with seed 1, the reference with 0' in newsrepro('verify', report).stdout


def test_against_another_report(report, tmp_path):
    shutil.copytree(report, tmp_path/'other')
    change(report, lambda rows: moved(rows, 0, value=1))
    assert verified(report, '--against', tmp_path/'other')[0] == 1 and verified(tmp_path/'other')[0] == 0


HEAD = b'dataset,split,run,metric,value,ci_low,ci_high,n\n'


@pytest.mark.parametrize('content', [b'', b'a,b\n1,2\n', b'\xff\xfe\x00garbage',
                                     HEAD + b'RT,test,clip,R@1,x,,,1\n', HEAD + b'"RT,test\n'])
def test_garbage_is_refused_in_one_line(report, content):
    (report/'tables'/TABLE).write_bytes(content)
    done = newsrepro('verify', report)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1) and TABLE in done.stderr


@pytest.mark.parametrize('arguments', [['{tmp}/nowhere'], ['{tmp}'], ['{tmp}/file'],
                                       ['{report}', '--against', '{tmp}'], ['--profile', 'papr']])
def test_what_is_no_report_is_refused(report, tmp_path, arguments):
    (tmp_path/'file').write_text('')
    done = newsrepro('verify', *(a.format(tmp=tmp_path, report=report) for a in arguments))
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1), done.stderr


def test_the_reference_is_never_written(tmp_path):
    done = newsrepro('reproduce', '--out', reference_dir())
    assert done.returncode == 2 and 'no run overwrites' in done.stderr


# -- what a run needs, before it starts

def test_all_missing_checkpoints_are_named_at_once(folder, tmp_path):
    (tmp_path/'empty').mkdir()
    began = time.perf_counter()
    done = newsrepro('reproduce', '--profile', 'paper', '--weights', tmp_path/'empty', '--data', folder,
                     '--out', tmp_path/'out', HF_HOME=str(tmp_path/'hub'), HF_HUB_OFFLINE='1')
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert time.perf_counter() - began < 2*10
    for name in ('RN50', 'RN101', 'RN50x4', 'RN50x16', 'RN50x64', 'ViT-B/32', 'ViT-B/16', 'ViT-L/14',
                 'ViT-L/14@336px', 'ViT-H/14', 'dandelin/vilt-b32-mlm-itm', 'Helsinki-NLP/opus-mt-de-en'):
        assert f' {name} (' in done.stderr, done.stderr
    assert done.stderr.count('--weights') == 1 and not (tmp_path/'out').exists()


def test_a_dry_run_of_the_mini_study_counts_and_writes_nothing(tmp_path):
    done = newsrepro('reproduce', '--dry-run', '--json', '--out', tmp_path/'out')
    plan = json.loads(done.stdout)
    assert done.returncode == 0 and done.stdout.count('\n') == 1 and not (tmp_path/'out').exists()
    assert [one['state'] for one in plan['notebooks']] == ['never run']*6 and plan['estimates'] is True
    assert 60 < plan['seconds'] < 3600 and plan['to_fetch_megabytes'] == 0
    assert {model['place'] for model in plan['models']} == {'package'}
    assert len(plan['models']) == 10 + 1 + 1  # CLIP, ViLT, translator
    assert all(one['work']['images'] > 0 and one['seconds'] > 1 for one in plan['notebooks'])
    shown = newsrepro('reproduce', '--dry-run', '--out', tmp_path/'out')
    assert shown.returncode == 0
    for said in ('estimated, not measured', 'pairs to score'): assert said in shown.stdout


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A plain collection: training pairs and a test part of which the images are not known."
    from PIL import Image
    folder = tmp_path_factory.mktemp('plain')
    (folder/'images').mkdir()
    rows = ['article_id,title,image_id,split']
    for i in range(30):
        Image.new('RGB', (8, 8), (i*8, 0, 0)).save(folder/'images'/f'i{i}.png')
        rows.append(f'{i},Title {i},i{i},train' if i < 20 else f'{i},Title {i},,test')
    (folder/'articles.csv').write_text('\n'.join(rows))
    return folder


def test_a_notebook_whose_data_are_not_there_is_skipped_with_a_reason(folder, tmp_path):
    planned = ['reproduce', '--dry-run', '--data', folder, '--out', tmp_path/'out']
    done = newsrepro(*planned, '--json', '--only', '11_clip_sweep', '--only', '12_fine_tune')
    assert done.returncode == 2 and done.stdout == ''  # asked for by name, it is refused
    done = newsrepro(*planned, '--only', '12_fine_tune')
    assert done.returncode == 2 and '12_fine_tune: it needs' in done.stderr
    assert '0 images, 10 articles' in done.stderr
    done = newsrepro(*planned)
    assert done.returncode == 2 and 'no notebook can run: 10_vilt needs' in done.stderr


@pytest.mark.parametrize('given, said', [
    ('11_clip_sweep.batch_size=0', 'in [1, inf)'),
    ('11_clip_sweep.batch_size=-1', 'in [1, inf)'),
    ('11_clip_sweep.workers=-1', 'in [0, inf)'),
    ('11_clip_sweep.pool_size=-3', 'in [2, inf)'),
    ('11_clip_sweep.selection=all', 'one of title'),
    ('11_clip_sweep.backbones=RN50,RN50', 'each once'),
    ('11_clip_sweep.backbones=RN49', "backbone 'RN49'"),
    ('11_clip_sweep.translator=missing.csv', 'no such file'),
    ('10_vilt.sizes=0.5,2', 'in (0, 1)'),
    ('10_vilt.depths=5,x', 'in [1, inf)'),
    ('10_vilt.example=nope', 'no test article'),
    ('12_fine_tune.holdout=1.0', 'in [0, 1)'),
    ('12_fine_tune.holdout=nan', 'in [0, 1)'),
    ('12_fine_tune.cleaning=polish', 'polish'),
    ('13_wise_ft.seeds=0', 'in [1, inf)'),
    ('13_wise_ft.option_sets=XX', 'XX is no set'),
    ('14_txv.batch_size=1', 'in [2, inf)'),
    ('14_txv.backbone=ViT-B/32', 'two different ones'),
    ('14_txv.extra_image=timm:x', 'both or neither'),
    ('15_dual_softmax.seed=-1', 'in [0, inf)'),
])
def test_a_parameter_out_of_range_is_refused_in_the_plan(given, said, tmp_path):
    done = newsrepro('reproduce', '--set', given, '--out', tmp_path/'out')
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1), done.stderr
    assert said in done.stderr, done.stderr
    assert not (tmp_path/'out').exists()


def test_an_article_of_2021_and_a_set_of_2022_go_together(tmp_path):
    "Each notebook is held against the collection of its own paper."
    from newsrepro.data.layouts import read_collection
    from newsrepro.study.study import mini_root
    pairs = read_collection(mini_root()/'newsimages2021').pairs
    article = pairs.article_id[pairs.split == 'test'].iloc[-1]
    done = newsrepro('reproduce', '--dry-run', '--json', '--out', tmp_path/'out',
                     '--set', f'10_vilt.example={article}', '--set', '13_wise_ft.option_sets=RSS')
    assert done.returncode == 0, done.stderr
    states = {row['name']: row['state'] for row in json.loads(done.stdout)['notebooks']}
    assert states['10_vilt'] == states['13_wise_ft'] == 'never run'
