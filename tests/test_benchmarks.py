"""What the table of ratios is made of: the ways find the same, the rules of growth, a tiny run."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from newsrepro.ranking.one_to_one import dual_softmax

BENCHMARKS = Path(__file__).resolve().parent.parent/'benchmarks'
sys.path.append(str(BENCHMARKS))
import all as together
import growth


def found(curve, n, folder):
    "What each way that is there finds."
    ways = growth.CURVES[curve].ways(n, folder, True)
    return {way: prepare()() for way, prepare in ways.items() if together.is_there(way)}


@pytest.mark.parametrize('curve', ['exact top 100', 'dual softmax, top 100'])
def test_lists_are_alike(curve, tmp_path):
    "To the rounding of float32: the value at each place is the same."
    values = growth.unit_rows(150, growth.DIM, 0).astype(float) @ growth.unit_rows(150, growth.DIM, 1).T
    if 'dual' in curve: values = dual_softmax(values, growth.TEMPERATURE)
    best = -np.sort(-values)[:, :100]
    lists = {way: x for way, x in found(curve, 150, tmp_path).items() if 'bare' not in way}
    assert len(lists) >= 2
    for places in lists.values():
        np.testing.assert_allclose(np.take_along_axis(values, places, 1), best, atol=1e-4)


def test_measures_are_alike(tmp_path):
    ours, theirs = found('evaluation of a run file', 150, tmp_path).values()
    assert ours == pytest.approx(theirs) and 0 < ours < 1


def test_vectors_are_alike(tmp_path):
    vectors = found('encoding, ViT-B/32', 3, tmp_path)
    np.testing.assert_allclose(vectors[growth.OURS], vectors['open_clip, plain loop'], atol=1e-5)


@torch.inference_mode()
def test_recall_is_alike(tmp_path):
    "Of random weights: ours, clip-benchmark's where it is there, and by open_clip's model alone."
    encoder, paths = growth.random_encoder(True), growth.some_pictures(tmp_path, 20)
    pixels = torch.stack([encoder.transform(Image.open(path).convert('RGB')) for path in paths])
    tokens = encoder.tokenize([f'picture {place} of a city after the rain' for place in range(20)])
    texts = encoder.model.encode_text(tokens, normalize=True)
    best = (texts @ encoder.model.encode_image(pixels, normalize=True).T).topk(10).indices
    recall = (best == torch.arange(20)[:, None]).any(1).float().mean().item()
    assert 0 < recall < 1
    for own in found('zero-shot retrieval, ViT-B/32', 20, tmp_path).values():
        assert own == pytest.approx(recall)


def test_both_ways_of_training_run(tmp_path):
    assert len(found('T×V, two epochs', 8, tmp_path)) == 2


def points(*values):
    return [dict(seconds=x, took=x + 1, megabytes=10*x) for x in values]


def test_what_would_not_fit_is_left_out_the_slowest_of_the_others_first():
    done = {'quick': points(1, 2), growth.OURS: points(1, 3), 'slow': points(1, 3), 'first': []}
    assert together.next_value(points(3), 'seconds') == 4*3
    assert together.next_value(points(4, 3), 'seconds') == 2*3
    assert together.next_value(points(1, 3), 'seconds') == 3*3
    whole = (3 + 2*2) + 2*(4 + 3*3)
    assert set(together.fits(done, list(done), whole)) == set(done)
    assert together.fits(done, list(done), whole - 1) == [growth.OURS, 'first', 'quick']
    assert together.fits(done, list(done), 12) == []
    assert together.fits(dict(first=[]), ['first'], -1) == ['first']
    done['slow'][-1]['megabytes'] = 2.**40
    assert 'slow' not in together.fits(done, list(done), whole)


def test_a_ratio_is_ours_to_the_other_at_the_same_size():
    one = lambda way, size, seconds: dict(curve='c', way=way, size=size, seconds=seconds, megabytes=0)
    rows = together.with_ratios([one(growth.OURS, 1, 3.), one('other', 1, 4.), one('other', 2, 9.)])
    assert rows[1]['ratio_seconds'] == 3/4 and rows[1]['ratio_megabytes'] is None
    assert 'ratio_seconds' not in rows[0] and 'ratio_seconds' not in rows[2]


def test_a_way_that_fails_ends_alone(monkeypatch, tmp_path):
    def fails(): raise ValueError('no such kernel')
    ways = lambda n, folder, tiny: {growth.OURS: lambda: list, 'bad': lambda: fails,
                                    'killed': lambda: lambda: os._exit(9), 'absent': lambda: list}
    monkeypatch.setitem(growth.CURVES, 'c', growth.Curve(ways, 'things', 1, 1))
    monkeypatch.setitem(growth.PEERS, 'absent', ('no_such_module', 'no-such-package'))
    done, remarks = together.grow('c', True, 60)
    assert [(one['way'], one['size']) for one in done] == [(growth.OURS, 1), (growth.OURS, 2)]
    assert remarks == ['absent: not installed: pip install no-such-package',
                       'c, bad, 1: ValueError: no such kernel',
                       'c, killed, 1: ended without a word, as where memory runs out']


def test_one_command_writes_page_figures_and_picture(tmp_path):
    curves = ['evaluation of a run file', 'exact top 100']
    subprocess.run([sys.executable, BENCHMARKS/'all.py', '--tiny', '--out', tmp_path, '--only', *curves],
                   check=True)
    figures = json.loads((tmp_path/'results.json').read_text())
    assert list(dict.fromkeys(one['curve'] for one in figures['points'])) == curves
    assert figures['remarks'] == []
    page, picture = ((tmp_path/name).read_text() for name in ('results.md', 'results.svg'))
    assert figures['machine']['processor'] in page and 'FAISS IndexFlatIP' in page
    assert picture.count('exact top 100: ') == 2
