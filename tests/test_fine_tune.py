"""Fine-tuned models reload as what they are, are trained once, and survive a kill."""
import copy
import os
import shutil
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
from newsrepro.models import train as train_module
from newsrepro.core.base import InputError
from newsrepro.core.checkpoints import MissingCheckpoint, find_backbone
from newsrepro.data.layouts import read_collection
from newsrepro.models.loader import load_encoder
from newsrepro.data.splits import hold_out
from newsrepro.methods.fine_tune import (CONFIG, RECIPES, WEIGHTS, checkpoint_config, fine_tune,
                                         load_fine_tuned, load_pool, make_recipe, model_key, news_texts,
                                         part_of_pool, pool_pairs, save_fine_tuned, search, what_is_kept)
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
    tokens[:, 0], tokens[:, 5] = 1598, 1599
    tokens[:, 1:5] = torch.randint(1, 1500, (n, 4), generator=draw)
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=draw)
    return Pairs(pixels, tokens, ids, ids)
learn, valid = pairs(40, 72), pairs(12, 64)
recipe = Recipe(steps=30, batch_size=8, rate=1e-3, warmup=2, keep='loss', validate_every=5)
'''


@pytest.fixture(scope='module')
def toy():
    "Start, pairs to learn from, to validate on, recipe: all seeded, no file read but the mini checkpoint."
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
    file = save_fine_tuned(tmp_path, start.model, ENTRY)
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    right = images(copy.deepcopy(start.model), pixels)
    plain = open_clip.create_model(ENTRY.model, pretrained=str(file))
    assert not torch.allclose(images(plain, pixels), right, atol=1e-3), 'the trap is gone'
    assert torch.equal(images(load_fine_tuned(tmp_path, ENTRY).model, pixels), right)
    assert torch.equal(images(load_encoder(ENTRY, tmp_path).model, pixels), right)
    theirs = images(open_clip.create_model(f'local-dir:{file.parent}'), pixels)
    torch.testing.assert_close(theirs, right, atol=1e-5, rtol=0)  # their activation rounds otherwise


def test_reloads_with_its_preprocessing(toy, tmp_path, monkeypatch):
    "open_clip #1068: a file is preprocessed by default, not as the checkpoint was trained."
    published = dict(mean=(.5, .4, .3), std=(.2, .2, .2), interpolation='bilinear', resize_mode='squash')
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ENTRY.model, {'mini': published})
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
    with pytest.raises(InputError, match='quick_gelu is True'):
        load_fine_tuned(tmp_path, replace(ENTRY, quick_gelu=False))
    (file.parent/CONFIG).write_text('{')
    with pytest.raises(InputError, match='damaged'): load_fine_tuned(tmp_path, ENTRY)
    save_fine_tuned(tmp_path, toy[0].model, ENTRY)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=WEIGHTS): load_fine_tuned(tmp_path, ENTRY)


def test_trained_once(toy, undisturbed, monkeypatch):
    root, tuned, history = undisturbed
    monkeypatch.setattr(module, 'train', lambda *_, **__: pytest.fail('trained again'))
    again, curve = fine_tune(*toy, root)
    assert again.fingerprint == tuned.fingerprint and curve == history
    kept = sorted(path.name for path in root.glob('[!.]*/**/*') if path.is_file())
    assert kept == sorted(['history.json', CONFIG, WEIGHTS]), 'the optimiser state of a finished run'


def test_start_is_left_alone(toy, undisturbed):
    fresh = load_encoder(ENTRY)
    changed = lambda encoder: [key for key, value in encoder.model.state_dict().items()
                               if not torch.equal(value, fresh.model.state_dict()[key])]
    assert changed(toy[0]) == [] != changed(undisturbed[1])


def test_killed_run_goes_on(toy, undisturbed, tmp_path):
    "Killed as soon as a checkpoint is there; what goes on ends with the weights of the run let be."
    code = MAKE + f'fine_tune(start, learn, valid, recipe, {str(tmp_path)!r}, save_seconds=0)'
    run = subprocess.Popen([sys.executable, '-c', code], env=os.environ | {'OMP_NUM_THREADS': '1'})
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob('*/checkpoint.pt')) and run.poll() is None and time.monotonic() < until:
            time.sleep(.005)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    unfinished = not list(tmp_path.glob('*/history.json'))
    tuned, history = fine_tune(*toy, tmp_path)
    assert unfinished and [path.name for path in tmp_path.glob('[!.]*')] == [model_key(*toy)]
    assert tuned.fingerprint == undisturbed[1].fingerprint
    assert [record['loss'] for record in history] == [record['loss'] for record in undisturbed[2]]


def test_key_knows_the_training_code(toy, tmp_path, monkeypatch):
    before, copy = model_key(*toy), tmp_path/'package'
    shutil.copytree(train_module.PACKAGE/'models', copy/'models')
    monkeypatch.setattr(train_module, 'PACKAGE', copy)
    assert model_key(*toy) == before
    for name in ('train', 'encoding'):
        (copy/'models'/f'{name}.py').write_text('another')
        assert model_key(*toy) != before
        before = model_key(*toy)


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
        assert len(new) == 53 - round(.8*53)
        assert {*old.article_id, *new.article_id} == {*articles.article_id}
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


@pytest.mark.parametrize('profile', RECIPES)
def test_pictures_are_learned_as_they_are_searched(profile):
    "Vu et al., section 3: resized and normalised; no crop, no mirror."
    assert make_recipe(RECIPES[profile], 100).augment == 'none'


def test_nothing_held_out():
    "All articles are trained on, the last weights are kept, and the record says so."
    articles = pd.DataFrame(dict(dataset='RT', article_id=list('abc'), date=pd.NaT))
    for split in ('chronological', 'random'):
        old, new = hold_out(articles, split, 0)
        assert old.article_id.tolist() == list('abc') and new.empty
    recipe = make_recipe(RECIPES['paper'], 3, keep='last')
    history = [dict(step=0, loss=2.), dict(step=1, loss=1.)]
    assert what_is_kept(history, recipe) == (1, 'the last of 2 steps, nothing held out')


def test_undated_articles_are_no_silent_order_of_time():
    articles = pd.DataFrame(dict(dataset='RT', article_id=list('abcde'), date=pd.NaT))
    with pytest.warns(UserWarning, match='RT: 5 of 5 articles have no date'): old, new = hold_out(articles)
    assert new.article_id.tolist() == ['e']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Seven articles with six pictures, two of which are one; the truth of the last is not known."
    root = tmp_path_factory.mktemp('news')
    (root/'images').mkdir()
    draw = np.random.default_rng(0)
    for name in 'abcdf':
        pixels = draw.integers(0, 256, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root/'images'/f'{name}.png')
    (root/'images'/'e.png').write_bytes((root/'images'/'d.png').read_bytes())
    lines = [f'{number},Story {number},{image},test' for number, image in enumerate('fedcba')]
    rows = ['article_id,title,image_id,split', *lines, '6,Story 6,,test']
    (root/'articles.csv').write_text('\n'.join(rows))
    return read_collection(root)


def test_pairs_out_of_a_pool_are_the_articles_own(toy, folder):
    "Whatever the order of articles, images and ties; equal pictures under two names count as one."
    pool = load_pool(folder, folder.articles.title.tolist(), ENTRY)
    chosen = ['3', '1', '2', '0']
    pairs = pool_pairs(pool, chosen)
    place = {image: row for row, image in enumerate(folder.images.image_id)}
    for row, article in enumerate(chosen):
        image = folder.articles.image_id[int(article)]
        assert torch.equal(pairs.pixels[row], pool.pixels[place[image]])
        assert pairs.text_ids[row] == f'Story {article}'
    assert pairs.image_ids[1] == pairs.image_ids[2] and len(set(pairs.image_ids)) == 3
    with pytest.raises(InputError, match=r"known image to learn from \['6'\]"): pool_pairs(pool, ['0', '6'])
    with pytest.raises(InputError, match='no article'): pool_pairs(pool, [])


def test_a_part_of_a_pool_is_the_part_decoded_anew(toy, folder):
    part = folder.restrict(folder.articles[folder.articles.article_id.isin(list('0245'))])
    cut = part_of_pool(load_pool(folder, folder.articles.title.tolist(), ENTRY), part, ENTRY)
    anew = load_pool(part, part.articles.title.tolist(), ENTRY)
    assert torch.equal(cut.pixels, anew.pixels) and torch.equal(cut.tokens, anew.tokens)
    assert (cut.texts, cut.image_ids) == (anew.texts, anew.image_ids)
    assert search(toy[0], cut) == search(toy[0], anew)


def test_a_pool_without_truth_is_searched(toy, folder):
    blind = replace(folder, articles=folder.articles.assign(image_id=''), pairs=folder.pairs.head(0))
    lists = search(toy[0], load_pool(blind, blind.articles.title.tolist(), ENTRY))
    with_truth = load_pool(folder, folder.articles.title.tolist(), ENTRY)
    assert lists == search(toy[0], with_truth) and len(lists) == 7
