"""Fine-tuned models reload as what they are, are trained once, and survive a kill."""
import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image

from newsrepro.methods import fine_tune as module
from newsrepro.core.checkpoints import MissingCheckpoint, find_backbone
from newsrepro.core.base import InputError
from newsrepro.models.loader import load_encoder
from newsrepro.methods.fine_tune import (CONFIG, RECIPES, WEIGHTS, checkpoint_config, fine_tune, gain,
                                         hold_out, load_fine_tuned, make_recipe, model_key, news_texts,
                                         save_fine_tuned)
from newsrepro.models.train import PUBMEDCLIP, prune

ENTRY = find_backbone('ViT-B/32', 'mini')
MAKE = '''
import torch
from newsrepro.core.checkpoints import find_backbone
from newsrepro.models.loader import load_encoder
from newsrepro.methods.fine_tune import fine_tune
from newsrepro.models.train import Pairs, Recipe
torch.set_num_threads(1)
draw = torch.Generator().manual_seed(0)
start = load_encoder(find_backbone('ViT-B/32', 'mini'))
def pairs(n, side):
    tokens, ids = torch.zeros(n, 77, dtype=torch.int64), tuple(map(str, range(n)))
    tokens[:, 0], tokens[:, 1:5], tokens[:, 5] = 1598, torch.randint(1, 1500, (n, 4), generator=draw), 1599
    return Pairs(torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=draw), tokens, ids, ids)
learn, valid = pairs(40, 63), pairs(12, 56)
recipe = Recipe(steps=30, batch_size=8, rate=1e-3, warmup=2, keep='loss', validate_every=5)
'''


@pytest.fixture(scope='module')
def toy():
    "Start, pairs to learn from, pairs to validate on, recipe: all seeded, no file read but the mini checkpoint."
    threads, names = torch.get_num_threads(), {}
    exec(MAKE, names)
    yield names['start'], names['learn'], names['valid'], names['recipe']
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def undisturbed(toy, tmp_path_factory):
    root = tmp_path_factory.mktemp('undisturbed')
    return root, *fine_tune(*toy, root)


def images(model, pixels): return model.eval().encode_image(pixels).detach()


def test_reloads_under_its_activation(toy, tmp_path):
    "open_clip #771: the same weights under the architecture's plain name run with GELU, silently."
    start, *_ = toy
    file, pixels = save_fine_tuned(tmp_path, start.model, ENTRY), torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    right = images(copy.deepcopy(start.model), pixels)
    plain = open_clip.create_model(ENTRY.model, pretrained=str(file))
    assert not torch.allclose(images(plain, pixels), right, atol=1e-3), 'the trap is gone: is this test still needed?'
    assert torch.equal(images(load_fine_tuned(tmp_path, ENTRY).model, pixels), right)
    assert torch.equal(images(load_encoder(ENTRY, tmp_path).model, pixels), right)
    torch.testing.assert_close(images(open_clip.create_model(f'local-dir:{file.parent}'), pixels), right, atol=1e-5, rtol=0)  # their activation rounds otherwise


def test_reloads_with_its_preprocessing(toy, tmp_path, monkeypatch):
    "open_clip #1068: a file is preprocessed by default, not as the checkpoint was trained."
    published = {'mini': dict(mean=(.5, .4, .3), std=(.2, .2, .2), interpolation='bilinear', resize_mode='squash')}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ENTRY.model, published)
    file = save_fine_tuned(tmp_path, toy[0].model, ENTRY)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 110, 3), dtype=np.uint8))
    ours = load_fine_tuned(tmp_path, ENTRY).transform(picture)
    from_file = open_clip.create_model_and_transforms(ENTRY.model, pretrained=str(file))[2](picture)
    assert not torch.allclose(from_file, ours, atol=1e-2)
    monkeypatch.delitem(open_clip.pretrained._PRETRAINED, ENTRY.model)
    assert torch.equal(open_clip.create_model_and_transforms(f'local-dir:{file.parent}')[2](picture), ours)
    with pytest.raises(InputError, match='preprocess_cfg mean'): load_fine_tuned(tmp_path, ENTRY)


@pytest.mark.parametrize('name', ['ViT-B/32', 'RN50', 'ViT-H/14'])
def test_published_activation_is_written(name):
    backbone = find_backbone(name, 'paper')
    config = checkpoint_config(backbone)
    assert config['model_cfg']['quick_gelu'] == (name != 'ViT-H/14')
    assert config['preprocess_cfg']['size'] == backbone.px


def test_refuses_to_reload_something_else(toy, tmp_path):
    with pytest.raises(MissingCheckpoint, match='no such file'): load_fine_tuned(tmp_path, ENTRY)
    file = save_fine_tuned(tmp_path, toy[0].model, ENTRY)
    with pytest.raises(InputError, match='quick_gelu is True'): load_fine_tuned(tmp_path, replace(ENTRY, quick_gelu=False))
    (file.parent/CONFIG).write_text('{')
    with pytest.raises(InputError, match='damaged'): load_fine_tuned(tmp_path, ENTRY)
    save_fine_tuned(tmp_path, toy[0].model, ENTRY)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=WEIGHTS): load_fine_tuned(tmp_path, ENTRY)


def test_trained_once(toy, undisturbed, monkeypatch):
    root, tuned, history = undisturbed
    monkeypatch.setattr(module, 'train', lambda *_, **__: pytest.fail('trained again'))
    again, told = fine_tune(*toy, root)
    assert again.fingerprint == tuned.fingerprint and told == history
    kept = sorted(path.name for path in next(root.iterdir()).rglob('*') if path.is_file())
    assert kept == sorted(['history.json', CONFIG, WEIGHTS]), 'the optimiser state of a finished run is dropped'


def test_start_is_left_alone(toy, undisturbed):
    fresh = load_encoder(ENTRY)
    assert all(torch.equal(value, fresh.model.state_dict()[key]) for key, value in toy[0].model.state_dict().items())
    assert any(not torch.equal(value, fresh.model.state_dict()[key]) for key, value in undisturbed[1].model.state_dict().items())


def test_killed_run_goes_on(toy, undisturbed, tmp_path):
    "Killed as soon as a checkpoint is there; what then goes on ends with the weights of the run that was let be."
    run = subprocess.Popen([sys.executable, '-c', MAKE + f'fine_tune(start, learn, valid, recipe, {str(tmp_path)!r}, save_seconds=0)'],
                           env=os.environ | {'OMP_NUM_THREADS': '1'})
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob('*/checkpoint.pt')) and run.poll() is None and time.monotonic() < until: time.sleep(.005)
    finally: run.send_signal(signal.SIGKILL); run.wait()
    unfinished = not list(tmp_path.glob('*/history.json'))
    tuned, history = fine_tune(*toy, tmp_path)
    assert unfinished and [path.name for path in tmp_path.iterdir()] == [model_key(*toy)]
    assert tuned.fingerprint == undisturbed[1].fingerprint
    assert [record['loss'] for record in history] == [record['loss'] for record in undisturbed[2]]


def test_key_knows_the_training_code(toy, tmp_path, monkeypatch):
    before = model_key(*toy)
    (tmp_path/'train.py').write_text('another')
    monkeypatch.setattr(module, 'PACKAGE', tmp_path)
    assert model_key(*toy) != before


def test_prune_keeps_what_was_used_last(tmp_path):
    for age, name in enumerate('abcd'):
        (tmp_path/name/'in').mkdir(parents=True)
        (tmp_path/name/'in'/'w').write_bytes(bytes(10))
        os.utime(tmp_path/name, (100 - age, 100 - age))
    prune(tmp_path, 25, spare=tmp_path/'d')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a', 'd']


def test_chronological_hold_out_is_the_newest():
    draw = np.random.default_rng(0)
    dates = pd.Timestamp('2022-01-01') + pd.to_timedelta(draw.permutation(53), 'D')
    articles = pd.DataFrame(dict(dataset='RT', article_id=[str(i) for i in range(53)], date=dates))
    for split, seed in (('chronological', 0), ('random', 0), ('random', 1)):
        old, new = hold_out(articles, split, .2, seed)
        assert len(new) == 53 - round(.8*53) and set(old.article_id) | set(new.article_id) == set(articles.article_id)
        assert (old.date.max() < new.date.min()) == (split == 'chronological')


def test_tweets_and_news_are_cleaned_each_in_their_way():
    articles = pd.DataFrame(dict(title=['The Floods ❤️'], text=[''], lang=['en']))
    assert news_texts(articles, 'title', steps='emoji-tags') == ['The Floods <red_heart>']
    assert news_texts(articles, 'title', steps='lower,stop-words,stem')[0].startswith('flood')
    with pytest.raises(InputError, match='cleaning step'): news_texts(articles, 'title', steps='wash')


def test_paper_recipe_is_pubmedclips():
    recipe = make_recipe(RECIPES['paper'], 1540)
    assert (recipe.steps, recipe.rate, recipe.optimiser, recipe.keep) == (50*24, 1e-5, 'adam', 'loss')
    assert (recipe.weight_decay, recipe.betas) == (5e-4, (.9, .999))
    assert set(RECIPES['paper']) == set(PUBMEDCLIP) | {'epochs'}


def test_gain_is_paired():
    "Ranks that improve by a little everywhere: the models' own intervals overlap, that of the difference is above 0."
    before = np.random.default_rng(0).integers(2, 30, 50)
    one = gain(before - 1, before, 'MRR@100', seed=0)
    assert one['n'] == 50 and 0 < one['ci_low'] < one['value'] < one['ci_high']
    assert one['value'] == pytest.approx(np.mean(1/(before - 1) - 1/before))
    assert gain(before, before - 1, 'MRR@100')['ci_high'] < 0
