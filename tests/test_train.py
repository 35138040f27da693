"""Training against slow references, killed and resumed, and spread over two processes."""
import multiprocessing
import os
import signal
import socket
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from open_clip.loss import ClipLoss
from open_clip.transformer import PatchDropout
from tqdm import tqdm

import newsrepro.models.train as training
from newsrepro.core.checkpoints import find_backbone
from newsrepro.core.base import InputError
from newsrepro.models.loader import build_model
from newsrepro.core.threads import at_once
from newsrepro.models.encoding import encode_short
from newsrepro.models.train import (PUBMEDCLIP, PUBMEDCLIP_CODE, Pairs, Recipe, backward, batch_stream,
                                    contrastive_loss, cut, decay_groups, digest, draw_boxes, join_processes,
                                    load_pairs, normaliser, set_modes, train, twins)

B32 = find_backbone('ViT-B/32', 'mini')
NORMALISE = normaliser(B32)
CHILDREN = multiprocessing.get_context('forkserver')  # imports torch once for all of them
CHILDREN.set_forkserver_preload(['newsrepro.models.train'])


def some_pairs(n=24, side=72):
    "Noise with a few twins in it."
    draw = torch.Generator().manual_seed(1)
    tokens = torch.zeros(n, 77, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1:4], tokens[:, 4] = 1598, torch.randint(1, 1500, (n, 3), generator=draw), 1599
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=draw)
    return Pairs(pixels, tokens, (0, 0, *range(2, n)), (*range(n - 1), 3))


def fresh(dtype=torch.float32, dropout=0.):
    torch.manual_seed(0)
    model = build_model(B32).to(dtype)
    if dropout: model.visual.patch_dropout = PatchDropout(dropout)
    return model


def weights(model): return digest(*model.state_dict().values())


def test_a_short_text_leaves_the_model_as_it_is_for_other_threads():
    "One model embeds a long text while it is in the middle of a short one, and both are what they are alone."
    model, tokens = fresh().eval(), some_pairs(3).tokens
    tokens[2, 4:70], tokens[2, 70] = 7, 1599
    alone, between = model.encode_text(tokens, normalize=True), []

    def other_thread(*_):
        if between: return
        between.append(True)
        between.extend([model.encode_text(tokens[2:], normalize=True), encode_short(model, tokens[2:])])

    model.ln_final.register_forward_pre_hook(other_thread)
    torch.testing.assert_close(encode_short(model, tokens[:2]), alone[:2], atol=1e-5, rtol=0)
    for found in between[1:]: torch.testing.assert_close(found, alone[2:], atol=1e-5, rtol=0)
    assert 'positional_embedding' in dict(model.named_parameters())


def test_models_that_draw_are_not_trained_side_by_side():
    assert (at_once(fresh()), at_once(fresh(dropout=.1))) == (torch.get_num_threads(), 1)


@pytest.mark.parametrize('n', [2, 7, 64])
def test_loss_is_open_clips(n):
    draw = torch.Generator().manual_seed(n)
    image, text = (F.normalize(torch.randn(n, 31, generator=draw), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(4.6).exp().requires_grad_()
    ours, theirs = contrastive_loss(image, text, scale), ClipLoss()(image, text, scale)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    gradients = lambda loss: torch.autograd.grad(loss, (image, text, scale))
    for a, b in zip(gradients(ours), gradients(theirs)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_weighted_loss_with_twins_is_the_plain_sum():
    draw = np.random.default_rng(0)
    image, text = (x/np.linalg.norm(x, axis=1, keepdims=True) for x in draw.normal(size=(2, 11, 5)))
    texts, images = [0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 2], [0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 10]

    def half(a, b):
        "Mean over rows of -log softmax of the own entry among itself and true negatives."
        negative = lambda i, j: texts[i] != texts[j] and images[i] != images[j]
        total = lambda i: sum(np.exp(7*a[i] @ b[j]) for j in range(11) if i == j or negative(i, j))
        return np.mean([-np.log(np.exp(7*a[i] @ b[i])/total(i)) for i in range(11)])
    known = twins(texts) | twins(images)
    loss = contrastive_loss(torch.tensor(image), torch.tensor(text), torch.tensor(7.), .7, known)
    assert loss.item() == pytest.approx(.7*half(image, text) + .3*half(text, image), abs=1e-9)


@pytest.mark.parametrize('chunk', [5, 7, 23])
def test_chunks_give_the_gradients_of_the_whole_batch(chunk):
    pairs, model = some_pairs(), fresh()
    gradients = []
    for size in (0, chunk):
        recipe = Recipe(1, batch_size=24, image_weight=.7, augment='crop', chunk=size)
        set_modes(model, recipe), model.zero_grad()
        loss = backward(model, next(batch_stream(pairs, recipe, 64)), recipe, NORMALISE)
        gradients.append((loss, [p.grad.clone() for p in model.parameters()]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], abs=1e-5)
    for a, b in zip(gradients[0][1], gradients[1][1]): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


KILLED = Recipe(60, batch_size=8, rate=1e-3, warmup=5, augment='crop', keep='loss', validate_every=5,
                chunk=4)


def killed_child(folder, result, where, at):
    "Train on from the folder's checkpoint; die at the `at`-th step or within the `at`-th writing."
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default is a semaphore of the system, which a kill leaves behind
    calls = iter(range(1, 1000))

    def dying(function, *args, **more):
        if next(calls) < at: return function(*args, **more)
        if where == 'write':
            args[1].write(b'half a checkpoint')
            args[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if where == 'step':
        plain_step = torch.optim.AdamW.step
        torch.optim.AdamW.step = lambda self: dying(plain_step, self)
    if where == 'write':
        plain_save = torch.save
        torch.save = lambda *args: dying(plain_save, *args)
    model = fresh(dropout=.5)
    history = train(model, some_pairs(), KILLED, NORMALISE, progress=False, valid=some_pairs(9),
                    folder=folder, save_seconds=0.)
    result.send((weights(model), [(h['loss'], h.get('val_loss')) for h in history]))


def run_child(folder, where='', at=0):
    receive, send = CHILDREN.Pipe(duplex=False)
    child = CHILDREN.Process(target=killed_child, args=(folder, send, where, at))
    child.start(), send.close()
    try: result = receive.recv()
    except EOFError: result = None
    child.join(60)
    return child.exitcode, result


def test_killed_ten_times_ends_as_undisturbed(tmp_path):
    draw = np.random.default_rng(0)
    code, undisturbed = run_child(None)
    assert code == 0 and len(undisturbed[1]) == 60
    lengths = []
    for k in range(10):
        where = 'write' if k % 3 == 2 else 'step'
        code, result = run_child(tmp_path, where, int(draw.integers(2, 6 if where == 'write' else 10)))
        assert (code, result) == (-signal.SIGKILL, None)
        lengths += [len(torch.load(path, weights_only=True)['history'])
                    for path in tmp_path.glob('checkpoint.pt')]
        # at most the half-written one of the last kill
        assert len([p for p in tmp_path.iterdir() if p.name != 'checkpoint.pt']) <= 1
    # each went on from the one before
    assert lengths == sorted(lengths) and len(set(lengths)) > 6 and lengths[-1] < 60, lengths
    assert run_child(tmp_path) == (0, undisturbed)
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint.pt']
    print('steps in the checkpoint after each kill:', lengths)


def rank_child(rank, port, result):
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                       MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo')
    assert join_processes('cpu') == 'cpu' and training.this_process() == (rank, 2)
    model = fresh(torch.float64)
    if rank: torch.nn.init.zeros_(model.visual.proj)  # the first process' weights count
    with pytest.raises(InputError, match='must be a multiple of the 2 processes'):
        train(model, some_pairs(), Recipe(1, batch_size=7), NORMALISE, progress=False)
    history = train(model, some_pairs(), SPREAD, NORMALISE, progress=False, valid=some_pairs(9))
    result.send((rank, history, {key: value.numpy() for key, value in model.state_dict().items()}))


SPREAD = Recipe(6, batch_size=12, rate=1e-3, warmup=2, image_weight=.7, augment='crop', chunk=3,
                validate_every=2)


def test_two_processes_are_one_with_the_double_batch():
    "In double precision, as Adam makes whole steps of rounding errors where a gradient is nought."
    with socket.socket() as probe: probe.bind(('127.0.0.1', 0)); port = probe.getsockname()[1]
    pipes = [CHILDREN.Pipe(duplex=False) for _ in range(2)]
    children = [CHILDREN.Process(target=rank_child, args=(rank, port, send))
                for rank, (_, send) in enumerate(pipes)]
    for child in children: child.start()
    for _, send in pipes: send.close()
    try: results = sorted((receive.recv() for receive, _ in pipes), key=lambda r: r[0])
    finally: [child.join(60) or child.kill() for child in children]
    one = fresh(torch.float64)
    history = train(one, some_pairs(), SPREAD, NORMALISE, progress=False, valid=some_pairs(9))
    before = fresh(torch.float64).state_dict()
    assert not all(torch.equal(value, before[key]) for key, value in one.state_dict().items())
    for _, spread, state in results:
        for key, value in one.state_dict().items():
            np.testing.assert_allclose(state[key], value.numpy(), atol=1e-6, rtol=0, err_msg=key)
        for a, b in zip(history, spread):
            assert a['loss'] == pytest.approx(b['loss'], abs=1e-6) and a.get('val_r1') == b.get('val_r1')
    for key in one.state_dict(): np.testing.assert_array_equal(results[0][2][key], results[1][2][key])


def test_checkpoint_of_another_start_is_refused(tmp_path):
    def go(model, recipe=Recipe(2, batch_size=8), pairs=some_pairs()):
        train(model, pairs, recipe, NORMALISE, progress=False, folder=tmp_path)
    go(fresh())
    recipe, larger = Recipe(2, batch_size=8), build_model(find_backbone('ViT-L/14', 'mini'))
    refused = [('model;', (build_model(B32),)),
               (r'recipe rate \(there 0.001, here 0.1\);', (fresh(), replace(recipe, rate=.1))),
               ('data;', (fresh(), recipe, some_pairs(23))),
               ('data;', (fresh(), recipe, replace(some_pairs(), aspects=np.ones(24)))),
               ('data, model, architecture;', (larger, recipe, some_pairs(side=64)))]
    for what, arguments in refused:
        with pytest.raises(InputError, match=f'checkpoint.pt: made with another {what}'): go(*arguments)


def test_saving_costs_a_twentieth_at_most(tmp_path, monkeypatch):
    saves = []
    clock = [0.]
    monkeypatch.setattr(training.time, 'perf_counter', lambda: clock[0])
    optimise = training.optimise
    save = training.save_checkpoint

    def slow_step(*args):
        clock[0] += 1
        return optimise(*args)

    def slow_save(*args):
        clock[0] += .5
        saves.append(len(args[3]))
        save(*args)

    monkeypatch.setattr(training, 'optimise', slow_step)
    monkeypatch.setattr(training, 'save_checkpoint', slow_save)
    train(fresh(), some_pairs(), Recipe(30, batch_size=8), NORMALISE, progress=False, folder=tmp_path,
          save_seconds=2.)
    assert saves == [2, 12, 22, 30]  # 0.5 s each, so 9.5 s apart and a last one


def test_pubmedclips_code_differs_from_its_article_in_three_things():
    assert {name for name in PUBMEDCLIP_CODE if PUBMEDCLIP_CODE[name] != PUBMEDCLIP.get(name)} == {
        'decay_all', 'logit_factor', 'mean_std'}
    assert PUBMEDCLIP_CODE['logit_factor'] == pytest.approx(np.exp(.01)/np.exp(.07))
    assert PUBMEDCLIP_CODE['image_weight'] == .5
    decaying = decay_groups(fresh(), 5e-4, decay_all=True)
    assert sum(len(group['params']) for group in decaying) == len(list(fresh().parameters()))
    assert {group['weight_decay'] for group in decaying} == {5e-4}


@pytest.mark.parametrize('size', [(90, 270), (270, 90), (131, 97)])
def test_a_box_of_a_pressed_picture_is_that_box_of_the_picture(tmp_path, size):
    "A gradient, so that a cut shows from where in the picture it comes."
    width, height = size
    across, down = np.meshgrid(np.arange(width)/width, np.arange(height)/height)
    picture = np.stack([across, down, 0*down], axis=2)*255
    Image.fromarray(picture.round().astype(np.uint8)).save(tmp_path/'ramp.png')
    pairs = load_pairs(B32, ['a text'], [tmp_path/'ramp.png'], side=256, whole=True)
    assert pairs.aspects == pytest.approx([width/height])
    for step in range(20):
        boxes = draw_boxes(1, 256, Recipe(1, augment='crop', least_window=.08), step, pairs.aspects)
        top, left, high, wide, mirrored = boxes[0]
        middle = np.array([left + wide/2, top + high/2])/256*255
        found = cut(pairs.pixels, boxes, 64)[0, :2].float().mean((1, 2)).numpy()
        np.testing.assert_allclose(found, middle, atol=3)
        uncut = high < 256 and wide < 256
        assert not uncut or 3/4 - .1 < wide*width/(high*height) < 4/3 + .1
