"""The dress rehearsal and the GPU benchmark: what they make is found and read, what they say is so."""
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from newsrepro.core.checkpoints import PAPER_BACKBONES, TRANSLATORS, VILT_MODELS, local_model
from newsrepro.data.layouts import read_collection
from newsrepro.study.needs import VILT_GFLOPS, Part, work_of
from newsrepro.study.registry import STUDY_FIGURES, STUDY_TABLES, notebook_parameters
from newsrepro.core.base import notebooks_dir


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1]/'benchmarks'/f'{name}.py')
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


rehearsal, gpu = benchmark('rehearsal'), benchmark('gpu')
FEW = rehearsal.Size((10, 8), (10, 8), (10, 8), (10, 8), 8, ())


@pytest.mark.parametrize('truth', [True, False])
def test_collections_are_in_the_official_layouts(truth, tmp_path):
    made = rehearsal.make_collections(tmp_path, FEW, truth)
    assert rehearsal.make_collections(tmp_path, FEW, truth) == made  # what is there is kept
    for layout, sets in (('newsimages2021', 1), ('newsimages2022', 3)):
        found = read_collection(made[layout])
        assert (found.layout, len(found.datasets)) == (layout, sets)
        assert rehearsal.MARK in found.name  # so in each row and under each table
        articles = found.articles.split.value_counts().to_dict()
        assert articles == dict(train=10*sets, test=8*sets)
        known = found.pairs.split.value_counts().to_dict()
        assert known == (dict(train=10*sets, test=8*sets) if truth else dict(train=10*sets))


def test_every_model_of_the_paper_profile_is_made():
    whole = rehearsal.wanted_models([], rehearsal.FULL.sets)
    assert {name for kind, name in whole if kind == 'clip'} == {b.name for b in PAPER_BACKBONES}
    assert {('vilt', VILT_MODELS['paper']), ('marian', TRANSLATORS['paper'])} <= set(whole)
    assert {kind for kind, _ in whole} <= rehearsal.MAKERS.keys()
    few = rehearsal.wanted_models([], rehearsal.SMALL.sets)
    assert {name for kind, name in few if kind == 'clip'} == {'RN50', 'ViT-B/32', 'ViT-H/14'}


def test_a_small_rehearsal_changes_epochs_articles_and_the_family_only():
    changed = {text.partition('=')[0].partition('.')[2] for text in rehearsal.SMALL.sets}
    assert changed == {'epochs', 'backbones'}


def test_a_model_lies_as_the_hub_keeps_it(tmp_path):
    with rehearsal.hub_folder(tmp_path, 'somebody/model') as folder: (folder/'config.json').write_text('{}')
    found = local_model('somebody/model', tmp_path)
    assert (found/'config.json').is_symlink() and (found/'config.json').read_text() == '{}'


def test_an_archive_is_read_as_openai_publishes_it(tmp_path):
    from newsrepro.models.weights import read_weights
    state = {'visual.conv1.weight': torch.arange(4.).half(), 'logit_scale': torch.tensor(2.).half()}
    rehearsal.as_torchscript(state, tmp_path/'model.pt')
    found = read_weights(tmp_path/'model.pt')
    assert {name: value.tolist() for name, value in found.items()} == {
        'visual.conv1.weight': [0, 1, 2, 3], 'logit_scale': 2}


@pytest.mark.large
def test_full_size_models_are_read(tmp_path):
    from newsrepro.models.single_stream import load_vilt, start_from_vit
    from newsrepro.text.language import TranslationMemory, find_translator
    rehearsal.make_vilt('dandelin/vilt-b32-mlm-itm', tmp_path, 8)
    rehearsal.make_vit('google/vit-base-patch32-384', tmp_path, 8)
    matcher = load_vilt('dandelin/vilt-b32-mlm-itm', tmp_path)
    assert matcher.untrained == ('rank_output',) and matcher.words.get_vocab_size() == 30522
    start_from_vit(matcher.model, 'google/vit-base-patch32-384', tmp_path)
    rehearsal.make_marian(TRANSLATORS['paper'], tmp_path, 8)
    memory = TranslationMemory(tmp_path/'translations.sqlite')
    translate = find_translator('profile', 'paper', memory, tmp_path)
    said = translate(['Die Brücke ist gesperrt.', 'In Köln regnet es seit Montag.'])
    assert all(said) and len(set(said)) == 2


def test_the_account_says_what_became_of_each_notebook(tmp_path):
    out = tmp_path/'report'
    texts = {'.state/results/14_txv.json': dict(seconds=12.5, peak_memory_mb=900),
             '.state/failed/10_vilt.json': dict(cell=dict(id='ranking'), error='InputError: no truth')}
    for name, value in texts.items():
        (out/name).parent.mkdir(parents=True, exist_ok=True)
        (out/name).write_text(json.dumps(value))
    for name in (f'tables/{STUDY_TABLES[0]}.csv', f'figures/{STUDY_FIGURES[0]}.png'):
        (out/name).parent.mkdir()
        (out/name).write_bytes(b'x'*1000)
    found = rehearsal.account(out, tmp_path, ['14_txv', '10_vilt', '11_clip_sweep'], 60.)
    assert [own['state'] for own in found['notebooks'].values()] == ['done', 'failed', 'not run']
    said = rehearsal.summary(found)
    assert '| 14_txv | done | 12.5 | 900 |' in said and 'cell ranking: InputError: no truth' in said
    assert f'1 of 12 tables; lacking: {STUDY_TABLES[1]}' in said and '1 of 5 figures' in said
    (out/'index.html').write_text('<html><body>results</body></html>')
    for _ in range(2): rehearsal.mark_report(out, said)  # once is enough
    assert (out/'index.html').read_text().count(rehearsal.SAID) == 1
    assert (out/'REHEARSAL.md').read_text().startswith(rehearsal.SAID)


def test_one_command_runs_both_years(tmp_path):
    args = rehearsal.options().parse_args(['--only', '14_txv', '--work', str(tmp_path)])
    line = rehearsal.command_of(args, [tmp_path/'2021', tmp_path/'2022'], ['14_txv.epochs=2'], tmp_path/'out')
    given = [line[place + 1] for place, word in enumerate(line) if word in ('--data', '--only', '--set')]
    assert given == [str(tmp_path/'2021'), str(tmp_path/'2022'), '14_txv', '14_txv.epochs=2']


def test_the_gpu_benchmark_runs_through(tmp_path):
    "With the mini models on the CPU: each part has its figures, and the bill is made from them."
    assert gpu.main(['--tiny', '--out', str(tmp_path/'gpu.json')]) == 0
    found = json.loads((tmp_path/'gpu.json').read_text())
    assert found['tiny'] and list(found['parts']) == [stage.name for stage in gpu.STAGES]
    assert not any('failed' in part for part in found['parts'].values())
    assert found['parts']['dual softmax, large']['rows'] == gpu.TINY.rows[1]
    assert all(rate > 0 for rate in found['gflops_per_second'].values())
    assert len(found['bill']) == 6 and all(own['hours'] > 0 for own in found['bill'].values())


def test_a_part_that_fails_or_takes_too_long_costs_no_other():
    bench = gpu.Bench('cpu', 'mini', gpu.TINY, Path(), {})
    def broken(bench): raise ValueError('no such kernel')
    run = lambda work, budget, left=60.: gpu.run_stage(gpu.Stage('part', work, budget), bench, left)
    assert run(lambda bench: dict(rate=2.), 5)['rate'] == 2.
    assert run(broken, 5)['failed'] == 'ValueError: no such kernel'
    assert run(lambda bench: time.sleep(5), .1)['skipped'] == 'more than 0 s'
    assert run(lambda bench: dict(rate=2.), 5, left=1.) == dict(skipped='1 s left')


def test_the_parts_fit_into_nine_minutes():
    left_for_imports = 30
    assert sum(stage.budget for stage in gpu.STAGES) <= gpu.WHOLE <= 9*60 - left_for_imports


def test_the_bill_is_work_over_rates():
    rates = dict.fromkeys(gpu.KINDS_OF_WORK, 3600.)  # 10^9 operations a second
    facts = gpu.OFFICIAL['newsimages2021']
    declared = notebook_parameters(notebooks_dir()/'10_vilt.ipynb')
    work = work_of('10_vilt', {name: p.default for name, p in declared.items()} | {'profile': 'paper'}, facts)
    assert facts['newsimages2021'] == Part(7530, 1915, 1915, 1915, 9445, 0)
    found = gpu.bill(rates)['10_vilt']
    assert found['hours'] == pytest.approx(work.gflops/3600**2)
    assert found['gigabytes'] == pytest.approx(work.megabytes/1000)
    assert gpu.operations(work, 'paper')['scoring'] == work.pairs*VILT_GFLOPS['paper']
    assert math.isnan(gpu.bill(rates | dict(scoring=math.nan))['10_vilt']['hours'])
    assert not math.isnan(gpu.bill(rates | dict(scoring=math.nan))['14_txv']['hours'])
