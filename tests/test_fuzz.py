"""Readers under damaged input, as `benchmarks/fuzz.py` does it at length: a right value or `InputError`,
nothing else."""
import importlib.util
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from newsrepro.core.base import InputError

spec = importlib.util.spec_from_file_location('fuzz', Path(__file__).parents[1]/'benchmarks'/'fuzz.py')
fuzz = sys.modules['fuzz'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


@pytest.fixture
def alarm():
    def too_long(*_): raise fuzz.TooLong
    before = signal.signal(signal.SIGALRM, too_long)
    yield
    signal.signal(signal.SIGALRM, before)


def place_of(name: str, folder: Path) -> Path:
    "Where the reader's file goes, with what belongs beside it."
    path = folder/'place'/fuzz.READERS[name].file
    path.parent.mkdir(parents=True)
    fuzz.READERS[name].around(path.parent)
    return path


@pytest.mark.parametrize('name', fuzz.READERS)
@pytest.mark.filterwarnings('ignore')
def test_a_value_or_a_refusal(name, tmp_path, alarm):
    path, counts, other = place_of(name, tmp_path), Counter(), []
    for number in range(200 if fuzz.READERS[name].share > 5 else 100):
        kind, where = fuzz.outcome_of(fuzz.READERS[name], path, fuzz.input_of(name, number, seed=20))
        counts[kind] += 1
        if kind not in ('value', 'refused'): other.append((number, kind, where))
    assert not other
    assert counts['value'] >= len(fuzz.seeds_of(name)) - (name == 'set')  # the valid inputs are read


VALUES = {
    'run': {'a0': ('i0', 'i1', 'i2', 'i3', 'i4'), 'a1': ('i1', 'i2', 'i3', 'i4', 'i0'),
            'a2': ('i2', 'i3', 'i4', 'i0', 'i1')},
    'translations': {'Hund': 'dog', 'Katze': 'cat'},
    'set': ('seed', 7),
    'header': 120.,
}

@pytest.mark.parametrize('name', VALUES)
def test_what_is_whole_is_read_as_it_is(name, tmp_path):
    path = place_of(name, tmp_path)
    path.write_bytes(fuzz.input_of(name, 0, seed=0))
    assert fuzz.READERS[name].read(path) == VALUES[name]


def test_an_input_can_be_made_again():
    once = [fuzz.input_of('run', number, seed=3) for number in range(50)]
    fuzz.seeds_of.cache_clear()
    assert once == [fuzz.input_of('run', number, seed=3) for number in range(50)] and len(set(once)) > 40


@pytest.mark.parametrize('read, kind', [
    (lambda path: path.read_bytes()[10**9], 'IndexError'), (lambda path: path.stat(), 'wrong value'),
                                        (lambda path: signal.pause(), 'hangs'),
    (lambda path: (_ for _ in ()).throw(InputError('no\nsuch')), 'refused'), (lambda path: [], 'value')])
def test_each_outcome_is_told_apart(read, kind, tmp_path, alarm, monkeypatch):
    monkeypatch.setattr(fuzz, 'TIME', .2)
    def check(value): assert value == []
    assert fuzz.outcome_of(fuzz.Reader(lambda: [b''], read, check, 'x'), tmp_path/'x', b'')[0] == kind
