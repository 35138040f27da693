"""Learning to match: files that `transformers` reads, its own losses, what may be swapped and masked, and
kills."""
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from tqdm import tqdm
from transformers import (BertTokenizer, ViltConfig, ViltForImageAndTextRetrieval, ViltForMaskedLM,
                          ViltImageProcessorPil, get_polynomial_decay_schedule_with_warmup)

import newsrepro.models.match as match_module
from newsrepro.core.base import InputError
from newsrepro.models.match import (IGNORED, ORIGINAL, MatchRecipe, NewsPairs, alignment_loss, draw_pictures,
                                    draw_texts, gradients, load_news_pairs, mask_words, matching_loss,
                                    pad_pictures, pad_texts, recipe_of, retrieval_loss, right_pictures,
                                    step_losses, train_matcher, trained_matcher, validate_matching, word_loss)
from newsrepro.models.single_stream import (HEADS, Matcher, PictureRule, encode_pairs, load_vilt,
                                            match_logits, new_vilt, rank_pairs, save_vilt)
from newsrepro.models.train import digest, rate_factor

CHILDREN = multiprocessing.get_context('forkserver')  # imports torch once for all of them
CHILDREN.set_forkserver_preload(['newsrepro.models.match', 'ot', 'pytest',
                                 'transformers.models.vilt.image_processing_pil_vilt',
                                 'transformers.models.bert.tokenization_bert'])
PIECES = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'red', 'green', 'blue', 'grey', 'left', 'right',
          '##ish', '##ness', 'a', 'square', 'small']
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
             vocab_size=len(PIECES),
             image_size=32, patch_size=8, max_position_embeddings=10)
TEXTS = ['a red square', 'greenishness left', 'small blueish square right a grey square left', 'grey']
SHAPES = [(60, 40), (32, 32), (30, 70), (64, 50)]


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp('words')/'vocab.txt'
    path.write_text('\n'.join(PIECES) + '\n')
    return path


def fresh(vocabulary, seed=0, spread=0., untrained=HEADS):
    "A small network that has learned nothing; with `spread`, none of its weights is nought."
    model = new_vilt(ViltConfig(**SIZES), seed).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters(): weight.add_(spread*torch.randn(weight.shape, generator=draw))
    return Matcher('toy', model, BertWordPieceTokenizer(str(vocabulary), lowercase=True), PictureRule(32, 8),
                   '', vocabulary, untrained)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    draw, folder, found = np.random.default_rng(0), tmp_path_factory.mktemp('pictures'), []
    for place, size in enumerate(SHAPES*3):
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        found.append(folder/f'{place}.png'); coarse.resize(size, Image.Resampling.BICUBIC).save(found[-1])
    return found


def batch_of_transformers(folder, paths):
    "Texts and pictures padded to the largest, as its own processors do it."
    words, pictures = BertTokenizer.from_pretrained(folder), ViltImageProcessorPil.from_pretrained(folder)
    told = words(TEXTS, padding=True, truncation=True, max_length=10, return_tensors='pt')
    shown = pictures([Image.open(path).convert('RGB') for path in paths], return_tensors='pt')
    assert not told['attention_mask'].all() and not shown['pixel_mask'].all()
    return {**told, **shown}


def test_transformers_reads_what_is_saved(vocabulary, paths, tmp_path):
    """Its own classes give the same logits for a padded batch, matching and words, and it misses no
    weight; so does `load_vilt`."""
    matcher = fresh(vocabulary, spread=.1, untrained=())
    folder = save_vilt(tmp_path/'saved', matcher)
    batch, pairs = batch_of_transformers(folder, paths[:4]), load_news_pairs(matcher, TEXTS, paths[:4])
    text, picture = pad_texts(matcher, pairs.ids), pad_pictures(matcher, pairs.pictures)
    x, mask = torch.cat([text[0], picture[0]], dim=1), torch.cat([text[1], picture[1]], dim=1)
    logits = {}
    for kind in (ViltForImageAndTextRetrieval, ViltForMaskedLM):
        model, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report['missing_keys'] and not report['mismatched_keys']
        with torch.no_grad(): logits[kind] = model.eval()(**batch).logits
    found = match_logits(matcher.model, x, mask)
    assert found.std() > .01
    torch.testing.assert_close(found, logits[ViltForImageAndTextRetrieval][:, 0], atol=1e-5, rtol=0)
    words = matcher.model.mlm_score(encode_pairs(matcher.model, x, mask)[:, :text[1].shape[1]])
    torch.testing.assert_close(words[text[1]], logits[ViltForMaskedLM][text[1]], atol=1e-5, rtol=0)
    again = load_vilt(str(folder))
    assert digest(*again.model.state_dict().values()) == digest(*matcher.model.state_dict().values())
    assert (again.untrained, again.rule, again.tokens(TEXTS)) == ((), matcher.rule, matcher.tokens(TEXTS))
    half = load_vilt(str(save_vilt(tmp_path/'half', matcher, half=True)))
    torch.testing.assert_close(match_logits(half.model, x, mask), found, atol=1e-2, rtol=0)
    size = lambda where: (where/'model.safetensors').stat().st_size
    assert size(tmp_path/'half') < .6*size(folder)


@pytest.mark.parametrize('untrained', [(), ('mlm_score',), ('rank_output',), HEADS])
def test_untrained_heads_stay_untrained(vocabulary, paths, tmp_path, untrained):
    "A folder does not make a trained head out of a random one."
    again = load_vilt(str(save_vilt(tmp_path/'saved', fresh(vocabulary, untrained=untrained))))
    assert set(again.untrained) == set(untrained)
    if 'rank_output' in untrained:
        with pytest.raises(InputError, match='no matching head'): rank_pairs(again, TEXTS, paths, k=1)


def test_losses_are_those_of_transformers(vocabulary, paths, tmp_path):
    "Masked words: its own loss; matching: the cross-entropy of its own logits. A padded batch."
    matcher = fresh(vocabulary, spread=.1)
    folder = save_vilt(tmp_path/'saved', replace(matcher, untrained=()))
    batch, pairs = batch_of_transformers(folder, paths[:4]), load_news_pairs(matcher, TEXTS, paths[:4])
    inputs, targets = mask_words(pairs.ids, matcher.words, .5, False, np.random.default_rng(0))
    length = batch['input_ids'].shape[1]
    fill = lambda rows, value: torch.tensor([[*row, *[value]*(length - len(row))] for row in rows])
    assert 3 < sum(piece != IGNORED for row in targets for piece in row)
    text, picture = pad_texts(matcher, inputs), pad_pictures(matcher, pairs.pictures)
    keeps = np.array([True, False, False, True])
    with torch.no_grad():
        masked = batch | {'input_ids': fill(inputs, 0), 'labels': fill(targets, IGNORED)}
        theirs = ViltForMaskedLM.from_pretrained(folder).eval()(**masked).loss
        logits = ViltForImageAndTextRetrieval.from_pretrained(folder).eval()(**batch).logits[:, 0]
        torch.testing.assert_close(word_loss(matcher, text, picture, targets), theirs, atol=1e-5, rtol=0)
        ours = matching_loss(matcher, pad_texts(matcher, pairs.ids), picture, keeps)
    byhand = np.mean([np.log1p(np.exp(-logit if keep else logit))
                      for logit, keep in zip(logits.double().tolist(), keeps)])
    assert ours.item() == pytest.approx(byhand, abs=1e-5)
    nothing = word_loss(matcher, text, picture, [[IGNORED]*len(row) for row in inputs])
    assert nothing.item() == 0


def test_retrieval_loss_is_a_slow_loop(vocabulary, paths):
    matcher = fresh(vocabulary, spread=.15)
    pairs = load_news_pairs(matcher, TEXTS, paths[:4])
    texts = [pairs.ids[place]
             for place in (0, 1, 2, 3, 0, 1)]  # two pictures of three texts, the right one first
    loss = retrieval_loss(matcher, pad_texts(matcher, texts), pad_pictures(matcher, pairs.pictures[:2]))
    slow = []
    for place in range(2):
        picture = pad_pictures(matcher, [pairs.pictures[place]])[0]
        alone = [torch.cat([pad_texts(matcher, [ids])[0], picture], dim=1)
                 for ids in texts[3*place:3*place + 3]]
        logits = np.array([match_logits(matcher.model, x).item() for x in alone])
        slow.append(-np.log(np.exp(logits[0])/np.exp(logits).sum()))
    assert np.ptp(slow) > 1e-3
    assert loss.item() == pytest.approx(np.mean(slow), abs=1e-5)


def test_alignment_loss(vocabulary):
    """The transport cost, by an exact solver; a wrong pair counts negative; start, end, class token and
    padding count nothing."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 11, 6, generator=draw)
    text, picture = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    text[1, 4:], picture[1, 4:] = False, False  # words 1-3 and 1-2; patches 6-10 and 6-8
    exact = []
    for place, (words, patches) in enumerate([((1, 4), (6, 11)), ((1, 3), (6, 9))]):
        rows, columns = (F.normalize(hidden[place, slice(*part)], dim=1) for part in (words, patches))
        cost = 1 - rows @ columns.T
        exact.append(ot.emd2([], [], cost.double().numpy()))
    one = lambda place, right: alignment_loss(*(part[place:place + 1] for part in (hidden, text, picture)),
                                              torch.tensor([right])).item()
    for place in range(2):
        assert one(place, True) == pytest.approx(exact[place], abs=.02)  # fifty steps of a proximal method
        assert one(place, False) == -one(place, True)
    for right in ([True, False], [False, True], [True, True]):
        signed = np.mean([one(place, value) for place, value in enumerate(right)])
        found = alignment_loss(hidden, text, picture, torch.tensor(right)).item()
        assert found == pytest.approx(signed, abs=1e-6)


def test_alignment_pulls_right_pairs_together(vocabulary, paths):
    """Its gradient lowers the cost of a right pair and raises that of a wrong one; with weight 0 it does
    not count."""
    matcher = fresh(vocabulary, spread=.1)
    pairs = load_news_pairs(matcher, TEXTS, paths[:4])
    text, picture = pad_texts(matcher, pairs.ids), pad_pictures(matcher, pairs.pictures)
    loss = lambda keeps, weight: matching_loss(matcher, text, picture, np.array(keeps), weight)
    plain, right, wrong = loss([True]*4, 0.), loss([True]*4, .5), loss([False]*4, .5) - loss([False]*4, 0.)
    assert right - plain > .05 and (right - plain).item() == pytest.approx(-wrong.item(), abs=1e-5)


def crossed():
    "Texts that occur with several pictures, pictures with several texts."
    pictures = tuple(torch.full((3, 8, 8), place, dtype=torch.uint8) for place in range(5))
    of = [('a', 0), ('a', 1), ('b', 1), ('c', 2), ('d', 3), ('c', 4), ('e', 0), ('a', 2)]
    return NewsPairs(tuple((2, ord(text), 3) for text, _ in of), tuple(place for _, place in of),
                     pictures), of


def test_a_swap_is_never_right():
    """Neither the picture of the text nor one that the same text has elsewhere; every other one comes as
    often as the next."""
    pairs, of = crossed()
    right = right_pictures(pairs)
    owned = {text: {place for other, place in of if other == text} for text, _ in of}
    assert right == [frozenset(owned[text]) for text, _ in of]
    rows = [*range(8)]*2000
    places, keeps = draw_pictures(pairs, right, rows, .3, np.random.default_rng(0))
    seen = [Counter() for _ in of]
    for row, place, keep in zip(rows, places, keeps):
        assert (place == of[row][1]) if keep else (place not in owned[of[row][0]])
        if not keep: seen[row][place] += 1
    assert abs(keeps.mean() - .7) < .02
    for row, (text, _) in enumerate(of):
        assert set(seen[row]) == set(range(5)) - owned[text]
        assert max(seen[row].values()) < 1.3*min(seen[row].values())
    for swap in (0., 1.):
        assert (draw_pictures(pairs, right, rows, swap, np.random.default_rng(0))[1] == (swap == 0)).all()


def test_a_wrong_text_is_never_right():
    pairs, of = crossed()
    right, draw = right_pictures(pairs), np.random.default_rng(0)
    for row, (_, place) in enumerate(of):
        found = draw_texts(pairs, right, row, 200, draw)
        wrong = {pairs.ids[other] for other in range(8) if place not in right[other]}
        assert set(found) == wrong and len(found) == 200


def test_duplicates_by_content(vocabulary, paths, tmp_path):
    "A copy of a picture under another name is the same picture, so it is never a swap."
    copy = shutil.copy(paths[0], tmp_path/'copy.png')
    pairs = load_news_pairs(fresh(vocabulary), ['red', 'a red', 'green', 'Red '],
                            [paths[0], copy, paths[1], paths[2]])
    assert pairs.picture_of == (0, 0, 1, 2) and len(pairs.pictures) == 3
    assert right_pictures(pairs) == [{0, 2}, {0}, {1}, {0, 2}]


def test_masks(vocabulary):
    """Of the chosen pieces 80 % are hidden, 10 % replaced, 10 % stay; start and end never; whole words all
    or none."""
    words = fresh(vocabulary).words
    row = fresh(vocabulary).tokens(['greenishness left redish a'])[0]
    pieces = '[CLS] green ##ish ##ness left red ##ish a [SEP]'.split()
    assert [words.id_to_token(piece) for piece in row] == pieces
    for whole in (False, True):
        inputs, targets = map(np.array, mask_words([row]*20000, words, .15, whole, np.random.default_rng(0)))
        chosen = targets != IGNORED
        assert not chosen[:, [0, -1]].any()
        assert (targets == row)[chosen].all()
        assert (inputs == row)[~chosen].all()
        np.testing.assert_allclose(chosen[:, 1:-1].mean(0), .15, atol=.01)
        was, now = targets[chosen], inputs[chosen]
        shares = np.array([(now == 4).mean(),
                           (now == was).mean()]) - .1/len(PIECES)  # a random piece may be these by chance
        np.testing.assert_allclose(shares, [.8, .1], atol=.01)
        others = Counter(now[(now != 4) & (now != was)].tolist())
        assert set(others) == set(range(len(PIECES))) - {4}
        together = (chosen[:, [1, 2, 5]] == chosen[:, [2, 3, 6]]).all(axis=1)
        assert together.all() if whole else not together.all()
        assert (chosen[:, 3] != chosen[:, 4]).any()
    every = mask_words([row], words, 1., False, np.random.default_rng(0))[1]
    assert (np.array(every) != IGNORED).sum() == len(row) - 2
    assert mask_words([row[:1] + row[-1:]], words, 1., True, np.random.default_rng(0))[1] == [[IGNORED]*2]


KILLED = MatchRecipe(60, batch_size=6, rate=3e-3, warmup=5, keep='loss', validate_every=7, whole_words=True,
                     alignment=.1)


def killed_child(vocabulary, paths, folder, result, where, at):
    """Train on from the folder's checkpoint; die at the `at`-th step or within the `at`-th writing of a
    checkpoint."""
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
        plain_step = torch.optim.AdamW.step; torch.optim.AdamW.step = lambda self: dying(plain_step, self)
    if where == 'write': plain_save = torch.save; torch.save = lambda *args: dying(plain_save, *args)
    matcher = fresh(vocabulary)
    pairs = load_news_pairs(matcher, [f'{a} {b}' for a in TEXTS[:3] for b in TEXTS], paths)
    valid = pairs.pick(range(0, 12, 2))
    matcher, history = train_matcher(matcher, pairs, KILLED, valid, folder, save_seconds=0., progress=False)
    losses = [(h['matching'], h['words'], h.get('val_loss')) for h in history]
    result.send((matcher.fingerprint, digest(*matcher.model.state_dict().values()), losses))


def run_child(vocabulary, paths, folder, where='', at=0):
    receive, send = CHILDREN.Pipe(duplex=False)
    child = CHILDREN.Process(target=killed_child, args=(vocabulary, paths, folder, send, where, at))
    child.start(), send.close()
    try: result = receive.recv()
    except EOFError: result = None
    child.join(60)
    return child.exitcode, result


def test_killed_ten_times_ends_as_undisturbed(vocabulary, paths, tmp_path):
    draw, folder = np.random.default_rng(0), tmp_path/'run'
    code, undisturbed = run_child(vocabulary, paths, None)
    assert code == 0 and len(undisturbed[2]) == 60 and undisturbed[0] == undisturbed[1]
    lengths = []
    for life in range(10):
        where = 'write' if life % 3 == 2 else 'step'
        code, result = run_child(vocabulary, paths, folder, where,
                                 int(draw.integers(*((2, 6) if where == 'write' else (2, 10)))))
        assert (code, result) == (-signal.SIGKILL, None)
        lengths += [len(torch.load(path, weights_only=True)['history'])
                    for path in folder.glob('checkpoint.pt')]
    assert lengths == sorted(lengths), f'each went on from the one before: {lengths}'
    assert len(set(lengths)) > 6 and lengths[-1] < 60, f'in steps of their own: {lengths}'
    assert run_child(vocabulary, paths, folder) == (0, undisturbed)
    print('steps in the checkpoint after each kill:', lengths)


def test_best_weights_are_kept(vocabulary, paths):
    """`keep='loss'` ends with the weights of the validation with the least loss, and they are validated to
    it again."""
    pairs = load_news_pairs(fresh(vocabulary), [f'{a} {b}' for a in TEXTS[:3] for b in TEXTS], paths)
    recipe = MatchRecipe(24, batch_size=6, rate=2e-2, warmup=2, keep='loss', validate_every=3,
                         schedule='constant')
    matcher, history = train_matcher(fresh(vocabulary), pairs, recipe, valid=pairs.pick(range(6)),
                                     progress=False)
    found = [record['val_loss'] for record in history if 'val_loss' in record]
    assert len(found) == 8 and found[-1] > min(found)
    kept = validate_matching(matcher, pairs.pick(range(6)), recipe)
    assert kept['val_loss'] == pytest.approx(min(found), abs=1e-6)


def test_steps_do_not_depend_on_the_past(vocabulary, paths):
    "A step's losses are those of its number and seed, not of torch's or numpy's random numbers."
    matcher = fresh(vocabulary)
    pairs = load_news_pairs(matcher, TEXTS, paths[:4])

    def losses(step, seed=0):
        recipe = MatchRecipe(9, seed=seed, mask=.5)
        right = right_pictures(pairs)
        found = step_losses(matcher, pairs, right, range(4), recipe, step)
        return {name: loss.item() for name, loss in found}
    first = losses(3)
    torch.rand(9), np.random.rand(9)
    assert losses(3) == first and losses(4) != first and losses(3, seed=1) != first


def test_which_heads_are_taught(vocabulary, paths):
    pairs = load_news_pairs(fresh(vocabulary), TEXTS, paths[:4])
    for more, left in ((dict(mask=0.), ('mlm_score',)), (dict(), ()),
                       (dict(mask=0., wrong_texts=2), ('mlm_score',))):
        start = fresh(vocabulary)
        before, head = digest(*start.model.state_dict().values()), start.model.rank_output.weight.clone()
        matcher, history = train_matcher(start, pairs, MatchRecipe(2, batch_size=4, **more), progress=False)
        assert matcher.untrained == left and matcher.fingerprint != before
        assert (matcher.model.rank_output.weight != head).any()
        assert ('words' in history[0]) == (not left)
        assert ('retrieval' in history[0]) == ('wrong_texts' in more)
        assert not any(weight.requires_grad for weight in matcher.model.parameters())
        assert not matcher.model.training


def test_trained_once(vocabulary, paths, tmp_path):
    "The second time from the disk; the start stays as it is; another recipe or other data train anew."
    pairs, start = load_news_pairs(fresh(vocabulary), TEXTS, paths[:4]), fresh(vocabulary)
    before, recipe = digest(*start.model.state_dict().values()), MatchRecipe(3, batch_size=4, mask=0.)
    first, history = trained_matcher(start, 'taught', pairs, None, recipe, tmp_path)
    assert digest(*start.model.state_dict().values()) == before
    assert (first.name, first.untrained, len(history)) == ('taught', ('mlm_score',), 3)
    times = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.glob('*/model.safetensors')}
    written = times()
    second, again = trained_matcher(start, 'taught', pairs, None, recipe, tmp_path)
    assert again == history and second.label == first.label and times() == written
    assert (rank_pairs(second, TEXTS, paths, k=3)[0] == rank_pairs(first, TEXTS, paths, k=3)[0]).all()
    trained_matcher(start, 'taught', pairs, None, replace(recipe, seed=1), tmp_path)
    trained_matcher(start, 'taught', pairs.pick([0, 1, 3, 2]), None, recipe, tmp_path)
    assert len(times()) == 3 and not list(tmp_path.glob('*/checkpoint.pt'))


def test_refusals(vocabulary, paths, tmp_path):
    matcher = fresh(vocabulary)
    pairs, recipe = load_news_pairs(matcher, TEXTS, paths[:4]), MatchRecipe(3, batch_size=4)
    go = lambda *given, **more: train_matcher(fresh(vocabulary), *given, progress=False, **more)
    crowded = NewsPairs(((2, 5, 3), (2, 6, 3), (2, 6, 3), (2, 7, 3), (2, 7, 3)), (0, 0, 1, 0, 2),
                        pairs.pictures[:3])  # all have the first
    assert len(go(crowded, replace(recipe, steps=1))[1]) == 1
    (tmp_path/'broken.png').write_bytes(paths[0].read_bytes()[:200])
    for message, call in {
        r'swap=1\.5: a share, at most 1': lambda: MatchRecipe(3, swap=1.5),
        'mask=-1': lambda: MatchRecipe(3, mask=-1),
        'mixed: of contrastive training': lambda: MatchRecipe(3, mixed=True),
        'there is nothing to learn from': lambda: MatchRecipe(3, mask=0., matching=0.),
        "keep='loss': wants validation pairs": lambda: go(pairs, replace(recipe, keep='loss')),
        'batch_size=5, but there are 4 pairs': lambda: go(pairs, replace(recipe, batch_size=5)),
        'a text has them all, none is wrong for it': lambda: go(pairs.pick([0]), recipe),
        'wrong_texts=2: a picture belongs to all texts': lambda: go(crowded, replace(recipe, wrong_texts=2)),
        '3 texts and 4 pictures': lambda: load_news_pairs(matcher, TEXTS[:3], paths[:4]),
        '0 texts and 0 pictures': lambda: load_news_pairs(matcher, [], []),
        'broken.png: not a usable picture':
            lambda: load_news_pairs(matcher, TEXTS[:1], [tmp_path/'broken.png']),
    }.items():
        with pytest.raises(InputError, match=message): call()
    go(pairs, recipe, folder=tmp_path/'run')
    for message, call in {
        r'recipe rate \(there 0\.0001, here 0\.1\)':
            lambda: go(pairs, replace(recipe, rate=.1), folder=tmp_path/'run'),
        'made with another data;': lambda: go(pairs.pick([1, 0, 2, 3]), recipe, folder=tmp_path/'run'),
        'made with another model;':
            lambda: train_matcher(fresh(vocabulary, seed=1), pairs, recipe, folder=tmp_path/'run',
                                  progress=False),
    }.items():
        with pytest.raises(InputError, match=f'checkpoint.pt: .*{message}'): call()
    with pytest.raises(FloatingPointError,
                       match='the loss is (nan|inf) at step .*try a lower rate than 1e.30'):
        go(pairs, replace(recipe, steps=9, rate=1e30, warmup=0, clip_norm=0.))


def test_the_originals_rates():
    "Rise and linear fall as `transformers` has them, as in the original; the rise a step earlier, never 0."
    recipe = recipe_of(ORIGINAL, 99, steps=60, warmup=7)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([weight], lr=1.)
    schedule = get_polynomial_decay_schedule_with_warmup(optimiser, 7, 60, lr_end=0, power=1)
    theirs = []
    for _ in range(60):
        theirs.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    ours = [rate_factor(step, recipe) for step in range(60)]
    assert ours[7:] == pytest.approx(theirs[7:]) and ours[:6] == pytest.approx(theirs[1:7])


def test_accumulated_steps_resume(vocabulary, paths, tmp_path):
    "Dropout, fewer patches, one objective, forward passes of five: stopped in the middle, the same weights."
    pairs = load_news_pairs(fresh(vocabulary), [f'{a} {b}' for a in TEXTS[:3] for b in TEXTS], paths)
    recipe = recipe_of(ORIGINAL, len(pairs), steps=6, warmup=1, chunk=5, most_patches=3, one_objective=True)
    go = lambda recipe, folder: train_matcher(fresh(vocabulary), pairs, recipe, folder=folder,
                                              save_seconds=0., progress=False)
    whole, history = go(recipe, None)
    assert all(('words' in record) != ('matching' in record) for record in history)
    plain = match_module.take_step

    def stopping(model, optimiser, recipe, step, gradients):
        if step == 3: raise KeyboardInterrupt
        return plain(model, optimiser, recipe, step, gradients)
    match_module.take_step = stopping
    try:
        with pytest.raises(KeyboardInterrupt): go(recipe, tmp_path)
    finally: match_module.take_step = plain
    assert go(recipe, tmp_path)[0].fingerprint == whole.fingerprint
    assert go(replace(recipe, dropout=0.), None)[0].fingerprint != whole.fingerprint


def test_no_validation_without_articles(vocabulary, paths):
    "Nothing held out, or an empty part: the curve is of training alone."
    pairs = load_news_pairs(fresh(vocabulary), TEXTS, paths[:4])
    for valid in (None, NewsPairs((), (), ())):
        _, history = train_matcher(fresh(vocabulary), pairs, MatchRecipe(2, batch_size=4), valid,
                                   progress=False)
        assert not any('val_loss' in record for record in history)


def test_half_precision_scales_the_loss(vocabulary, paths, monkeypatch):
    "Gradients are those of the plain loss, also where the first scale overflows."
    matcher = fresh(vocabulary)
    pairs = load_news_pairs(matcher, TEXTS, paths[:4])
    matcher.model.requires_grad_(True)

    def slopes(precision, scales):
        monkeypatch.setattr(match_module, 'LOSS_SCALES', {precision: scales})
        monkeypatch.setattr(match_module, 'lowered', lambda *_: nullcontext())
        matcher.model.zero_grad()
        gradients(replace(matcher, precision=precision), pairs, right_pictures(pairs), [0, 1, 2, 3],
                  recipe=MatchRecipe(1), step=0)
        return torch.cat([p.grad.flatten() for p in matcher.model.parameters() if p.grad is not None])
    plain = slopes('fp32', (1.,))
    torch.testing.assert_close(slopes('fp16', (3e38, 2.**9)), plain, atol=1e-6, rtol=1e-4)
    with pytest.raises(FloatingPointError, match='use precision=fp32'): slopes('fp16', (3e38,))
