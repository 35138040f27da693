"""The face of the package: the names a user needs, each from its own room, none of them loaded
before it is asked for."""
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import newsrepro


@pytest.mark.parametrize('name', newsrepro.__all__)
def test_a_name_of_the_face_is_documented_and_where_it_says(name):
    found = getattr(newsrepro, name)
    assert found.__module__.startswith('newsrepro.') and found.__doc__
    assert name in dir(newsrepro)


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="no attribute 'rnak'"): newsrepro.rnak


def test_importing_the_package_loads_none_of_its_rooms():
    look = dedent('''
        import sys, newsrepro
        heavy = lambda module: module in ('torch', 'pandas') or module.startswith('newsrepro.')
        print(*sorted(filter(heavy, sys.modules)))''')
    done = subprocess.run([sys.executable, '-c', look], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize('room', sorted(Path(newsrepro.__file__).parent.glob('*/__init__.py')),
                         ids=lambda path: path.parent.name)
def test_each_folder_says_what_it_holds(room):
    text = room.read_text(encoding='utf-8')
    assert text.startswith('"""') and len(text.splitlines()) == 1
