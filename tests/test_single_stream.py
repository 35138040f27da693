"""ViLT as `transformers` publishes it: same word pieces, pictures and scores; kills, ties, damage."""
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
import weakref
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr
from tqdm import tqdm
from transformers import (BertTokenizer, ViltConfig, ViltForImageAndTextRetrieval, ViltForMaskedLM,
                          ViltImageProcessorPil, ViTConfig,
                          ViTForImageClassification)
from transformers.image_utils import ChannelDimension
from transformers.models.vilt.image_processing_pil_vilt import get_resize_output_image_size

import newsrepro.models.single_stream as stream
from newsrepro.core.base import InputError
from newsrepro.ranking.metrics import tie_order
from newsrepro.ranking.runs import write_run
from newsrepro.models.single_stream import (Effort, Journal, PictureRule, encode_pairs, load_picture,
                                            load_vilt, matched_lists, quantised, rank_pairs, save_vilt,
                                            start_from_vit, untaught)

CHILDREN = multiprocessing.get_context('forkserver')  # imports torch once for all of them
CHILDREN.set_forkserver_preload(['newsrepro.models.single_stream', 'newsrepro.ranking.runs', 'hypothesis',
                                 'pytest', 'scipy.stats',
                                 'transformers.models.vilt.image_processing_pil_vilt',
                                 'transformers.models.bert.tokenization_bert'])
LETTERS = 'abcdefghijklmnopqrstuvwxyz'
WORDS = ['the', 'river', 'flood', 'bridge', 'new', 'cologne', 'dog', 'minister', 'election', '##ing',
         'rain', '.', ',', '!', '1', '2', 'ß', '東']
SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=200,
             image_size=64, patch_size=16, max_position_embeddings=20)
SENTENCES = ['Flood', 'The new bridge, Cologne!', 'RAIN raining rivers: the minister fled 12 dogs',
             'the river floods the new bridge. ' * 9]
SHAPES = [(90, 60), (60, 95), (70, 70), (40, 150)]


def vocabulary(size):
    """A file of `size` lines in the order of BERT's: unused places, the special pieces at 100, then
    characters and words."""
    special = {0: '[PAD]', 100: '[UNK]', 101: '[CLS]', 102: '[SEP]', 103: '[MASK]'}
    known = [*LETTERS, *(f'##{c}' for c in LETTERS), *WORDS]
    lines = [special.get(place, f'[unused{place}]') for place in range(104)] + known
    return '\n'.join(lines + [f'filler{place}' for place in range(size - len(lines))]) + '\n'


def write_vilt(folder, kind=ViltForImageAndTextRetrieval, as_bin=False, seed=0, **sizes):
    """What `transformers` itself writes for a network all of whose weights are random (its own start
    leaves positions at nought)."""
    torch.manual_seed(seed)
    config = ViltConfig(**sizes)
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight)*(.02 if config.hidden_size == 768 else .1))
    model.save_pretrained(folder)
    if as_bin:
        (folder/'model.safetensors').unlink()
        torch.save(model.state_dict(), folder/'pytorch_model.bin')
    (folder/'vocab.txt').write_text(vocabulary(config.vocab_size), encoding='utf-8')
    size = config.image_size if as_bin else {'shortest_edge': config.image_size}  # older files and newer ones
    rule = dict(do_normalize=True, do_resize=True,
                image_mean=[.5]*3, image_std=[.5]*3, resample=3, size=size, size_divisor=config.patch_size)
    (folder/'preprocessor_config.json').write_text(json.dumps(rule))
    return folder


def in_hub(cache, name, **how):
    "The same in the layout of the hub's cache; returns the snapshot."
    folder = cache/('models--' + name.replace('/', '--'))
    snapshot = folder/'snapshots'/('a'*40)
    snapshot.mkdir(parents=True)
    write_vilt(snapshot, **how)
    (folder/'blobs').mkdir(); (folder/'refs').mkdir()
    (folder/'refs'/'main').write_text('a'*40)
    for path in list(snapshot.iterdir()):
        path.rename(folder/'blobs'/path.name); path.symlink_to(f'../../blobs/{path.name}')
    return snapshot


def write_pictures(folder, shapes, seed=0):
    "Smooth noise of (width, height)."
    draw, paths = np.random.default_rng(seed), []
    folder.mkdir(exist_ok=True)
    for place, size in enumerate(shapes):
        coarse = Image.fromarray(draw.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        paths.append(folder/f'{place}.png'); coarse.resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return write_vilt(tmp_path_factory.mktemp('small')/'vilt', **SMALL)


@pytest.fixture
def cut_off(tmp_path, monkeypatch):
    "No network, and an empty cache in the home."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'nothing'))
    monkeypatch.setattr('socket.socket.connect', lambda *_: pytest.fail('asked the network'))


def weights_of(c, words=True):
    "Parameters of a ViLT with a head for matching or for words, by hand."
    wide, grid = c.hidden_size, (c.image_size//c.patch_size)**2
    texts = (c.vocab_size + c.max_position_embeddings + 2)*wide + 2*wide
    embeddings = texts + 3*c.patch_size**2*wide + wide + wide + (grid + 1)*wide + 2*wide
    layer = 4*(wide*wide + wide) + 2*wide*c.intermediate_size + c.intermediate_size + wide + 2*2*wide
    network = embeddings + c.num_hidden_layers*layer + 2*wide + wide*wide + wide
    return network + (wide*wide + wide + 2*wide + c.vocab_size if words
                      else wide + 1)  # the words' matrix is that of the embeddings


def scored_by_transformers(folder, texts, paths, length):
    "One pair at a time, as its documentation has it."
    words, pictures = BertTokenizer.from_pretrained(folder), ViltImageProcessorPil.from_pretrained(folder)
    model = ViltForImageAndTextRetrieval.from_pretrained(folder).eval()
    scores = np.empty((len(texts), len(paths)))
    with torch.inference_mode():
        for row, text in enumerate(texts):
            told = words(text, truncation=True, max_length=length, return_tensors='pt')
            for column, path in enumerate(paths):
                pixels = pictures(Image.open(path).convert('RGB'), return_tensors='pt')
                scores[row, column] = model(**told, **pixels).logits[0, 0]
    return scores


def in_order_of_pool(found):
    "(texts, pool) scores out of lists of the whole pool."
    scores, places = found
    return np.take_along_axis(scores, places.argsort(1), axis=1)


SIZES = {'small': (SMALL, SENTENCES, SHAPES),
         'ViLT-B/32': ({}, SENTENCES[1:], [(480, 320), (300, 300), (200, 560)])}


@pytest.mark.parametrize('size', SIZES)
def test_scores_are_those_of_transformers(size, tmp_path, cut_off):
    """Loaded from the hub's cache without a network; every pair gets what it gets alone through
    `transformers`."""
    sizes, texts, shapes = SIZES[size]
    snapshot = in_hub(tmp_path/'hub', 'dandelin/vilt-b32-finetuned-coco', as_bin=size == 'small', **sizes)
    matcher, paths = load_vilt('dandelin/vilt-b32-finetuned-coco',
                               tmp_path/'hub'), write_pictures(tmp_path/'pictures', shapes)
    config = ViltConfig(**sizes)
    assert matcher.untrained == ('mlm_score',) and matcher.name == 'vilt-b32-finetuned-coco'
    assert matcher.rule == PictureRule(config.image_size, config.patch_size)
    assert sum(p.numel() for name, p in matcher.model.named_parameters()
               if not name.startswith('mlm')) == weights_of(config, words=False)
    lengths = [len(row) for row in matcher.tokens(texts)]
    assert len(set(lengths)) == len(texts) and max(lengths) == config.max_position_embeddings
    theirs = scored_by_transformers(snapshot, texts, paths, config.max_position_embeddings)
    ours = in_order_of_pool(rank_pairs(matcher, texts, paths, k=len(paths), effort=Effort(batch_size=2)))
    assert theirs.std() > 1e-2
    assert theirs.std(0).min() > 1e-3 and theirs.std(1).min() > 1e-3  # text and picture both count
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('size', SIZES)
def test_checkpoint_without_matching_head(size, tmp_path, cut_off):
    """`vilt-b32-mlm-itm` as published: the words' head is whole, the matching head lacks, and nothing is
    scored with it."""
    sizes, texts, shapes = SIZES[size]
    in_hub(tmp_path/'hub', 'dandelin/vilt-b32-mlm-itm', kind=ViltForMaskedLM, **sizes)
    matcher = load_vilt('dandelin/vilt-b32-mlm-itm', tmp_path/'hub')
    assert matcher.untrained == ('rank_output',)
    assert sum(p.numel() for name, p in matcher.model.named_parameters()
               if not name.startswith('rank')) == weights_of(ViltConfig(**sizes))
    with pytest.raises(InputError, match='vilt-b32-mlm-itm: the checkpoint has no matching head'):
        rank_pairs(matcher, texts, write_pictures(tmp_path/'pictures', shapes), k=1)


def test_head_of_two_logits(small, tmp_path):
    "A matching head of the pre-training, no and yes, scores by their difference."
    folder = shutil.copytree(small, tmp_path/'two')
    state = ViltForImageAndTextRetrieval.from_pretrained(small).state_dict()
    weight, bias = state.pop('rank_output.weight'), state.pop('rank_output.bias')
    state['itm_score.fc.weight'] = torch.cat([torch.ones_like(weight), weight + 1])
    state['itm_score.fc.bias'] = torch.cat([torch.full_like(bias, 3), bias + 3])
    (folder/'model.safetensors').unlink(); torch.save(state, folder/'pytorch_model.bin')
    found, wanted = (load_vilt(str(place)) for place in (folder, small))
    assert found.untrained == ('mlm_score',)
    torch.testing.assert_close(found.model.rank_output.weight, wanted.model.rank_output.weight, atol=1e-6,
                               rtol=0)
    torch.testing.assert_close(found.model.rank_output.bias, wanted.model.rank_output.bias, atol=1e-6, rtol=0)


@settings(max_examples=200, deadline=None)
@given(st.text(st.one_of(st.characters(exclude_categories=['Cs']),
                         st.sampled_from('aeioursdng .,!ÄßéЖ東\u0301\u200b')), max_size=60),
       st.sampled_from(['', '[SEP]', ' [MASK]ing', '##ing']))
def test_word_pieces_are_those_of_transformers(small, text, more):
    matcher, words = cached(small)
    assert matcher.tokens([text + more]) == [words(text + more, truncation=True, max_length=20)['input_ids']]


@cache
def cached(folder): return load_vilt(str(folder)), BertTokenizer.from_pretrained(folder)


def test_size_rule_is_that_of_transformers():
    "Height and width of every picture up to an aspect where theirs has no patch left."
    rule, blank = PictureRule(), np.zeros((1, 1, 3), np.uint8)
    different = []
    for height in [*range(1, 60), *range(60, 800, 7), 1080, 3000]:
        for width in [*range(1, 60, 3), *range(60, 1500, 11), 1920, 4000]:
            theirs = get_resize_output_image_size(np.broadcast_to(blank, (height, width, 3)), 384,
                                                  rule.longer, 32, ChannelDimension.LAST)
            if rule.size(height, width) != tuple(max(32, side) for side in theirs):
                different.append((height, width, theirs))
    assert not different, different[:5]


def test_pixels_are_those_of_transformers(tmp_path):
    """The model's input, for small and large pictures, wide and tall, grey and transparent ones; the last
    on white, where theirs would be black."""
    theirs, rule = ViltImageProcessorPil(size={'shortest_edge': 96}, size_divisor=16), PictureRule(96, 16)
    matcher = stream.Matcher('', stream.Vilt(ViltConfig(**SMALL)), None, rule, '', tmp_path)
    draw = np.random.default_rng(0)
    sizes = [(200, 100), (33, 57), (96, 96), (97, 95), (31, 300), (500, 90), (20, 19)]
    for place, (width, height) in enumerate(sizes):
        for mode in ('RGB', 'L', 'RGBA'):
            path = tmp_path/f'{place}-{mode}.png'
            Image.fromarray(draw.integers(0, 256, (height, width, 4), dtype=np.uint8),
                            'RGBA').convert(mode).save(path)
            shown = Image.open(path).convert('RGBA')
            shown = Image.alpha_composite(Image.new('RGBA', shown.size, 'white'), shown)
            wanted = theirs(shown.convert('RGB'), return_tensors='pt')
            assert wanted['pixel_mask'].all()
            torch.testing.assert_close(matcher.picture(load_picture(path, rule)[None]),
                                       wanted['pixel_values'], atol=1e-5, rtol=0)


KILLED = Effort(devices=('cpu',), batch_size=2, chunk=4, workers=1)  # 70 units


def crowd(folder):
    "Ids and texts, ids and pictures: 30 x 40."
    texts = [' '.join(random.Random(place).choices(WORDS[:9], k=1 + place % 7)) for place in range(30)]
    paths = write_pictures(folder, [(64, 64), (90, 60), (60, 90), (130, 60)]*10, seed=7)
    return [f't{place}' for place in range(30)], texts, [f'p{place}' for place in range(40)], paths


def killed_child(model, work, run, how, at):
    """Score on from the journal; die at the `at`-th statement of SQL or forward pass, or go slowly until
    the parent ends it."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default is a semaphore of the system, which a kill leaves behind
    log, calls = os.open(work/'log', os.O_WRONLY | os.O_APPEND | os.O_CREAT), iter(range(1, 100000))
    plain_score, plain_add, plain_connect = stream.score_pairs, Journal.add, stream.sqlite3.connect
    note = lambda kind, scores: os.write(log,
                                         f'{kind} {hashlib.sha256(scores.tobytes()).hexdigest()}\n'.encode())

    def dying(*_):
        if how != 'clock' and next(calls) == at: os.kill(os.getpid(), signal.SIGKILL)

    def connect(*given, **more):
        db = plain_connect(*given, **more)
        db.set_trace_callback(dying)
        return db

    def score(*given):
        if how == 'forward': dying()
        if how == 'clock': time.sleep(.01)
        found = plain_score(*given)
        note('scored', found)
        return found

    def add(self, number, scores):
        plain_add(self, number, scores)
        note('kept', scores)
    stream.score_pairs, Journal.add = score, add
    if how == 'statement': stream.sqlite3.connect = connect
    write_run(run, matched_lists(load_vilt(str(model)), *crowd(work/'pictures'), k=25, folder=work/'journals',
                                 effort=KILLED))


def run_child(model, work, run, how='', at=0, after=0.):
    "Exit code, and what was logged: `kept` or `scored`, and the digest of a unit's scores."
    before = len(logged(work))
    child = CHILDREN.Process(target=killed_child, args=(model, work, run, how, at))
    child.start()
    if how == 'clock':
        while len(logged(work)) < before + at and child.exitcode is None: time.sleep(.001)
        time.sleep(after)
        child.kill()
    child.join(60)
    return child.exitcode, logged(work)[before:]


def logged(work):
    return [line.split() for line in (work/'log').read_text().splitlines()] if (work/'log').exists() else []


def test_killed_ten_times_ends_as_undisturbed(small, tmp_path):
    """At statements of SQL, within transactions too, at forward passes and at moments of the clock; no
    unit that was kept is scored again."""
    for name in ('whole', 'killed'): (tmp_path/name).mkdir()
    code, lines = run_child(small, tmp_path/'whole', tmp_path/'whole'/'run.csv')
    units = [digest for kind, digest in lines if kind == 'kept']
    assert code == 0 and len(units) == len(set(units)) > 60
    draw, work, kept, lives = random.Random(0), tmp_path/'killed', [], []
    for life in range(10):
        how = ('statement', 'forward', 'clock')[life % 3]
        at = draw.randrange(*{'statement': (9, 30), 'forward': (1, 9), 'clock': (1, 12)}[how])
        code, lines = run_child(small, work, work/'run.csv', how, at, draw.random()/50)
        assert code == -signal.SIGKILL and not (work/'run.csv').exists()
        lives.append(lines)
    code, lines = run_child(small, work, work/'run.csv')
    assert code == 0 and (work/'run.csv').read_bytes() == (tmp_path/'whole'/'run.csv').read_bytes()
    for lines in [*lives, lines]:
        assert not set(kept) & {digest for kind, digest in lines if kind == 'scored'}
        kept += [digest for kind, digest in lines if kind == 'kept']
    assert len(kept) == len(set(kept))
    assert len(units) - 10 <= len(kept) <= len(units)  # a kill may fall between keeping and noting it
    assert sum(any(kind == 'kept' for kind, _ in lines)
               for lines in lives) >= 7, 'each life went on from the one before'
    assert [path.suffix for path in (work/'journals').iterdir()] == ['.sqlite']
    assert len((work/'run.csv').read_text().splitlines()) == 31
    print('units kept in each life:', [sum(kind == 'kept' for kind, _ in lines) for lines in lives], 'of',
          len(units))


def test_finished_search_scores_nothing(small, tmp_path, monkeypatch):
    "From the journal of a finished call come the same lists; another call has another journal."
    matcher, (ids, texts, names, paths) = load_vilt(str(small)), crowd(tmp_path/'pictures')
    search = lambda matcher, texts, k: matched_lists(matcher, ids, texts, names, paths, k,
                                                     folder=tmp_path/'journals', effort=KILLED)
    first = search(matcher, texts, 5)
    monkeypatch.setattr(stream, 'score_pairs', lambda *_: pytest.fail('scored again'))
    assert search(matcher, texts, 5) == first
    for other in ((matcher, texts, 6), (replace(matcher, precision='bf16'), texts, 5),
                  (matcher, texts[::-1], 5)):
        with pytest.raises(pytest.fail.Exception, match='scored again'): search(*other)


def test_damaged_journal(small, tmp_path):
    (tmp_path/'x.sqlite').write_bytes(b'no data base, but long enough to be taken for one' * 40)
    with pytest.raises(InputError, match='x.sqlite: no journal of scores .* delete it'):
        rank_pairs(load_vilt(str(small)), SENTENCES, write_pictures(tmp_path/'pictures', SHAPES), k=1,
                   journal=tmp_path/'x.sqlite')


def test_only_what_is_wanted(small, tmp_path, monkeypatch):
    "Re-ranking: each text's own candidates in the order of all pairs' scores, and not a pair more is scored."
    matcher, paths = load_vilt(str(small)), write_pictures(tmp_path/'pictures', SHAPES*4)
    whole = in_order_of_pool(rank_pairs(matcher, SENTENCES, paths, k=16))
    wanted = np.stack([np.random.default_rng(row).permutation(16)[:6] for row in range(4)])
    count, plain = [], stream.score_pairs
    monkeypatch.setattr(stream, 'score_pairs', lambda *given: count.append(len(given[1])) or plain(*given))
    scores, places = rank_pairs(matcher, SENTENCES, paths, k=6, wanted=wanted,
                                effort=Effort(chunk=5, batch_size=4))
    assert sum(count) == 24
    for row in range(4):
        assert places[row].tolist() == sorted(wanted[row], key=lambda place: -whole[row, place])
        np.testing.assert_allclose(scores[row], whole[row, places[row]], atol=1e-5, rtol=0)
    names, told = [f'p{place}' for place in range(16)], [f't{row}' for row in range(4)]
    proposed = {text: [names[place] for place in own] for text, own in zip(told, wanted)}
    listed = {text: [names[place] for place in row] for text, row in zip(told, places)}
    assert matched_lists(matcher, told, SENTENCES, names, paths, proposed=proposed) == listed


@pytest.mark.parametrize('chunk, batch_size', [(256, 16), (3, 2), (1, 1)])
def test_ties_do_not_depend_on_storage(small, tmp_path, chunk, batch_size):
    "With equal scores the lists have the order of `tie_order`, in whatever order pictures are stored."
    matcher = load_vilt(str(small))
    torch.nn.init.zeros_(matcher.model.rank_output.weight)
    names, paths = [f'p{place}' for place in range(12)], write_pictures(tmp_path/'pictures', SHAPES*3)
    first, effort = [names[place] for place in tie_order(names)], Effort(chunk=chunk, batch_size=batch_size)
    for seed in range(3):
        order = random.Random(seed).sample(range(12), 12)
        stored = [names[place] for place in order], [paths[place] for place in order]
        found = matched_lists(matcher, ['a', 'b'], SENTENCES[:2], *stored, k=7, effort=effort)
        assert found == {'a': first[:7], 'b': first[:7]}
        proposed = {text: random.Random(text).sample(names, 6) for text in 'ab'}
        found = matched_lists(matcher, ['a', 'b'], SENTENCES[:2], *stored, k=4, proposed=proposed,
                              effort=effort)
        assert found == {text: sorted(proposed[text], key=first.index)[:4] for text in 'ab'}


def test_effort_changes_no_score(small, tmp_path):
    "Batches, chunks and several workers at once: the same up to rounding."
    matcher, paths = load_vilt(str(small)), write_pictures(tmp_path/'pictures', SHAPES*5)
    whole = in_order_of_pool(rank_pairs(matcher, SENTENCES, paths, k=20))
    for effort in (Effort(batch_size=1), Effort(chunk=1, batch_size=7),
                   Effort(devices=('cpu',)*3, chunk=6, batch_size=5, workers=3)):
        found = in_order_of_pool(rank_pairs(matcher, SENTENCES, paths, k=20, effort=effort))
        np.testing.assert_allclose(found, whole, atol=1e-5, rtol=0)


def test_memory_is_bounded(small, tmp_path, monkeypatch):
    "However large the pool: pictures of the chunk at hand and of the next are alive, and patches of one."
    alive, most = {'pictures': 0, 'patches': 0}, {'pictures': 0, 'patches': 0}
    lock = threading.Lock()

    def watch(kind, tensor):
        def gone():
            with lock: alive[kind] -= 1
        with lock: alive[kind] += 1; most[kind] = max(most[kind], alive[kind])
        weakref.finalize(tensor, gone)
        return tensor
    load, embed = stream.load_picture, stream.embed_pictures
    monkeypatch.setattr(stream, 'load_picture', lambda *given: watch('pictures', load(*given)))
    monkeypatch.setattr(stream, 'embed_pictures',
                        lambda *given: [watch('patches', patches) for patches in embed(*given)])
    paths = write_pictures(tmp_path/'pictures', SHAPES*20)
    rank_pairs(load_vilt(str(small)), SENTENCES[:1], paths, k=3, effort=Effort(chunk=4, workers=1))
    # the next chunk is begun while the last one is let go
    assert 4 <= most['pictures'] <= 3*4 and most['patches'] <= 2*4, most
    assert alive == {'pictures': 0, 'patches': 0}


def test_int8_and_bfloat16_are_near(small, tmp_path):
    matcher, paths = load_vilt(str(small)), write_pictures(tmp_path/'pictures', SHAPES*6)
    kinds = matcher, quantised(matcher), replace(matcher, precision='bf16')
    exact, eighth, half = (in_order_of_pool(rank_pairs(kind, SENTENCES, paths, k=24)) for kind in kinds)
    assert (exact != eighth).any() and (exact != half).any() and half.dtype == np.float32
    assert min(spearmanr(exact[row], eighth[row]).statistic for row in range(4)) > .95
    assert min(spearmanr(exact[row], half[row]).statistic for row in range(4)) > .95
    assert np.abs(half - exact).max() < .02
    assert quantised(matcher).name.endswith('-int8')
    layer = matcher.model.vilt.encoder.layer[0]  # of the matcher itself, which stays as it was
    assert layer.output.dense.weight.dtype == torch.float32


def change_weights(change):
    def damage(folder):
        state = ViltForImageAndTextRetrieval.from_pretrained(folder).state_dict()
        change(state); (folder/'model.safetensors').unlink(); torch.save(state, folder/'pytorch_model.bin')
    return damage


KEY = 'vilt.encoder.layer.1.output.dense.weight'
DAMAGES = {
    'NaN': (change_weights(lambda state: state[KEY].view(-1)[3].fill_(float('nan'))),
            f'pytorch_model.bin: {KEY} holds NaN'),
    'infinity': (change_weights(lambda state: state['rank_output.bias'].fill_(float('inf'))),
                 'rank_output.bias holds NaN or infinity'),
    'a gap': (change_weights(lambda state: state.pop(KEY)), f'{KEY} has shape none, config.json makes it'),
    'half a head': (change_weights(lambda state: state.pop('rank_output.bias')),
                    'rank_output.bias has shape none'),
    'a layer more': (change_weights(lambda state: state.update({KEY.replace('1', '7'): torch.ones(2)})),
                     'layer.7.*makes it none'),
    'no vocabulary': (lambda folder: (folder/'vocab.txt').unlink(),
                      'no vocab.txt; the folder of .* holds config.json, vocab.txt and'),
    'large vocabulary': (lambda folder: (folder/'vocab.txt').write_text(vocabulary(250), encoding='utf-8'),
                         '250 word pieces, .* 200'),
    'no config': (lambda folder: (folder/'config.json').unlink(), 'no config.json'),
    'broken config': (lambda folder: (folder/'config.json').write_text('{"a"'), 'config.json: damaged'),
    'another model': (lambda folder: (folder/'config.json').write_text('{"model_type": "bert"}'),
                      'a bert model; a ViLT model is wanted'),
    'no weights': (lambda folder: (folder/'model.safetensors').unlink(),
                   'no model.safetensors or pytorch_model.bin'),
    'cut off': (lambda folder: os.truncate(folder/'model.safetensors', 5000),
                'model.safetensors: corrupt or no checkpoint'),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_damaged_checkpoint(small, tmp_path, name):
    damage, message = DAMAGES[name]
    folder = shutil.copytree(small, tmp_path/'damaged')
    damage(folder)
    with pytest.raises(InputError, match=message): load_vilt(str(folder))


def test_refusals(small, tmp_path):
    matcher, paths = load_vilt(str(small)), write_pictures(tmp_path/'pictures', SHAPES)
    more = SENTENCES[:2]
    for message, call in {
        'k=5: the pool holds 4': lambda: rank_pairs(matcher, more, paths, k=5),
        'k=0': lambda: rank_pairs(matcher, more, paths, k=0),
        'the pool is empty': lambda: rank_pairs(matcher, more, [], k=1),
        'no texts to score': lambda: rank_pairs(matcher, [], paths, k=1),
        'k=3: the pool holds 2':
            lambda: rank_pairs(matcher, more, paths, k=3, wanted=np.array([[0, 1], [2, 3]])),
        'place 4 of a pool of 4': lambda: rank_pairs(matcher, more, paths, k=1, wanted=np.array([[0], [4]])),
        'place -1 of a pool of 4':
            lambda: rank_pairs(matcher, more, paths, k=1, wanted=np.array([[0], [-1]])),
        'one row for each of 2 texts': lambda: rank_pairs(matcher, more, paths, k=1, wanted=np.array([[0]])),
        'batch_size=-1': lambda: rank_pairs(matcher, more, paths, k=1, effort=Effort(batch_size=-1)),
        'chunk=0': lambda: rank_pairs(matcher, more, paths, k=1, effort=Effort(chunk=0)),
        'no matching head': lambda: rank_pairs(untaught(matcher), more, paths, k=1),
    }.items():
        with pytest.raises(InputError, match=message): call()


PROPOSALS = {"'b': 0 candidates, 'a' has 2": {'a': ['w', 'x']}, "'a': 0 candidates": {'a': [], 'b': []},
             "'b': 1 candidates, 'a' has 2": {'a': ['w', 'x'], 'b': ['w']},
             "'v', proposed for 'b', is not in the pool": {'a': ['w', 'x'], 'b': ['w', 'v']},
             'candidates of text 1: a place occurs twice': {'a': ['w', 'x'], 'b': ['y', 'y']}}


@pytest.mark.parametrize('message', PROPOSALS)
def test_refused_proposals(small, tmp_path, message):
    paths = write_pictures(tmp_path/'pictures', SHAPES)
    with pytest.raises(InputError, match=message):
        matched_lists(load_vilt(str(small)), ['a', 'b'], SENTENCES[:2], list('wxyz'), paths,
                      proposed=PROPOSALS[message])


@pytest.mark.parametrize('chunk', [1, 2, 256])
def test_broken_picture_is_named(small, tmp_path, chunk):
    matcher, paths = load_vilt(str(small)), write_pictures(tmp_path/'pictures', SHAPES)
    os.truncate(paths[2], paths[2].stat().st_size//2)
    search = lambda: rank_pairs(matcher, SENTENCES, paths, k=1, effort=Effort(chunk=chunk))
    with pytest.raises(InputError, match=r'2\.png: not a usable picture'): search()
    paths[2].unlink()
    with pytest.raises(InputError, match=r'2\.png'): search()


def test_start_from_an_imagenet_vit(small, tmp_path):
    "Layers, patches and positions of `transformers`' own ViT; words and the pooling stay."
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
                 image_size=64, patch_size=16)
    vit, matcher = ViTForImageClassification(ViTConfig(**sizes)), load_vilt(str(small))
    vit.save_pretrained(tmp_path/'vit')
    words = matcher.model.vilt.embeddings.text_embeddings.word_embeddings.weight.clone()
    start_from_vit(matcher.model, str(tmp_path/'vit'))
    own, theirs = matcher.model.vilt, vit.vit
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = theirs.embeddings(pixels)
        torch.testing.assert_close(matcher.model.embed_image(pixels)
                                   - own.embeddings.token_type_embeddings.weight[1], x, atol=1e-5, rtol=0)
        torch.testing.assert_close(encode_pairs(matcher.model, x), theirs(pixels).last_hidden_state,
                                   atol=1e-5, rtol=0)
    assert (own.embeddings.text_embeddings.word_embeddings.weight == words).all()
    ViTForImageClassification(ViTConfig(**sizes
                                        | dict(num_hidden_layers=2))).save_pretrained(tmp_path/'shallow')
    with pytest.raises(InputError, match='encoder.layer.2.* has shape none'):
        start_from_vit(matcher.model, str(tmp_path/'shallow'))


class Trap:
    "Whoever unpickles it as it is makes a folder."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


class Callback:
    "Of a library that is not to be imported."
    def __init__(self): self.best = .5


INVERSE = {'vilt.embeddings.position_embeddings': 'pos_embed', 'vilt.embeddings.cls_token': 'cls_token',
           'vilt.embeddings.patch_embeddings.projection': 'patch_embed.proj', 'encoder.layer': 'blocks',
           'layernorm_before': 'norm1', 'layernorm_after': 'norm2', 'attention.output.dense': 'attn.proj',
           'intermediate.dense': 'mlp.fc1', 'output.dense': 'mlp.fc2', 'vilt.layernorm.': 'vilt.norm.'}


def as_published(state, seed=0):
    "The retrieval network of `transformers` under the names of the original, its two heads drawn."
    draw = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=draw)*.1
    wide, size = state['rank_output.weight'].shape[1], SMALL['vocab_size']
    shapes = {'dense.weight': (wide, wide), 'dense.bias': (wide,), 'LayerNorm.weight': (wide,),
              'LayerNorm.bias': (wide,)}
    found = {f'mlm_score.transform.{key}': random(*shape) for key, shape in shapes.items()}
    found |= {'mlm_score.decoder.weight': random(size, wide), 'mlm_score.bias': random(size)}
    for part in ('weight', 'bias'):
        yes = state[f'rank_output.{part}']
        no = random(*yes.shape)
        found[f'itm_score.fc.{part}'] = torch.cat([no, no + yes])
    for key, value in state.items():
        if not key.startswith('vilt.'): continue
        for old, new in INVERSE.items(): key = key.replace(old, new)
        key = key.replace('vilt.embeddings.', '').replace('vilt.pooler', 'pooler')
        key = key.replace('vilt.', 'transformer.')
        if key in ('pos_embed', 'cls_token') or key.startswith('patch_embed'): key = f'transformer.{key}'
        if '.attention.attention.' in key:
            name, part = key.split('.attention.attention.')
            joint = f'{name}.attn.qkv.{part.rpartition(".")[2]}'
            found[joint] = torch.cat([found[joint], value]) if joint in found else value
        else: found[key] = value
    return found


def test_the_originals_file(tmp_path, cut_off):
    "Scores and words from the names of the authors' code; what else the file holds is never run."
    folder = write_vilt(tmp_path/'vilt', **SMALL)
    state = as_published(load_vilt(str(folder)).model.state_dict() | dict(
        ViltForImageAndTextRetrieval.from_pretrained(folder).state_dict()))
    torch.save(dict(state_dict=state, epoch=3, callbacks={Callback: Callback()}), folder/'vilt_200k.ckpt')
    matcher, paths = load_vilt('vilt_200k.ckpt', folder), write_pictures(tmp_path/'pictures', SHAPES)
    assert (matcher.untrained, matcher.name, len(matcher.fingerprint)) == ((), 'vilt_200k', 64)
    assert not matcher.model.tied
    lengths = matcher.model.config.max_position_embeddings
    expected = scored_by_transformers(folder, SENTENCES, paths, lengths)
    np.testing.assert_allclose(in_order_of_pool(rank_pairs(matcher, SENTENCES, paths, k=4)), expected,
                               atol=2e-5)
    hidden = torch.randn(5, SMALL['hidden_size'], generator=torch.Generator().manual_seed(1))
    inside = torch.nn.functional.gelu(hidden @ state['mlm_score.transform.dense.weight'].T
                                      + state['mlm_score.transform.dense.bias'])
    scale, shift = (state[f'mlm_score.transform.LayerNorm.{part}'] for part in ('weight', 'bias'))
    inside = torch.nn.functional.layer_norm(inside, inside.shape[1:], scale, shift, 1e-12)
    logits = inside @ state['mlm_score.decoder.weight'].T + state['mlm_score.bias']
    torch.testing.assert_close(matcher.model.mlm_score(hidden), logits, atol=1e-5, rtol=0)
    again = load_vilt(str(save_vilt(tmp_path/'again', matcher)))
    torch.testing.assert_close(again.model.mlm_score(hidden), logits, atol=1e-5, rtol=0)
    torch.save(dict(state_dict=state, callbacks=Trap(tmp_path/'sprung')), folder/'trap.ckpt')
    with pytest.raises(InputError, match='trap.ckpt: corrupt or no checkpoint'):
        load_vilt('trap.ckpt', folder)
    assert not (tmp_path/'sprung').exists()
    os.truncate(folder/'vilt_200k.ckpt', 3000)
    with pytest.raises(InputError, match='vilt_200k.ckpt: corrupt or no checkpoint'):
        load_vilt('vilt_200k.ckpt', folder)
    with pytest.raises(InputError, match='nobody.ckpt: no such file'): load_vilt('nobody.ckpt', folder)


def test_start_from_timms_own_file(small, tmp_path):
    "The layers of timm's ViT, from the file as timm writes it, compute what timm computes."
    torch.manual_seed(0)
    vit = timm.create_model('vit_base_patch32_384', img_size=64, patch_size=16, embed_dim=32, depth=3,
                            num_heads=4, mlp_ratio=2).eval()
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm): module.eps = 1e-12  # as `transformers` has it
    torch.save(vit.state_dict(), tmp_path/'jx_vit_base_p32_384-830016f5.pth')
    model = load_vilt(str(small)).model
    start_from_vit(model, 'jx_vit_base_p32_384-830016f5.pth', tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = model.embed_image(pixels) - model.vilt.embeddings.token_type_embeddings.weight[1]
        torch.testing.assert_close(encode_pairs(model, x), vit.forward_features(pixels), atol=1e-3, rtol=0)


def test_less_memory_than_thought(small, tmp_path, monkeypatch, capsys):
    "Half the batch until it fits, said once for each halving; the scores are the same."
    matcher, paths = load_vilt(str(small)), write_pictures(tmp_path/'pictures', SHAPES*3)
    plain = stream.score_pairs
    effort = Effort(devices=('cpu',), batch_size=16)
    whole = in_order_of_pool(rank_pairs(matcher, SENTENCES, paths, k=12, effort=effort))
    room = 4

    def scarce(*given):
        if given[-1] > room: raise torch.OutOfMemoryError
        return plain(*given)
    monkeypatch.setattr(stream, 'score_pairs', scarce)
    halved = in_order_of_pool(rank_pairs(matcher, SENTENCES, paths, k=12, effort=effort))
    np.testing.assert_allclose(halved, whole, atol=1e-5)
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in told if 'memory' in line] == ['8', '4']
    room = 0
    with pytest.raises(InputError, match='out of memory with a single row'):
        rank_pairs(matcher, SENTENCES, paths, k=1, effort=effort)
