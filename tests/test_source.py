"""The notebooks are the source: cleaned, exported, tagged, and the README is theirs too."""
import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from newsrepro.study.registry import NOTEBOOKS as METHOD_NOTEBOOKS

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
METHODS = {notebook.name for notebook in METHOD_NOTEBOOKS}


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the sources, so that the guards write nothing into the working tree."
    target = tmp_path_factory.mktemp('sources')
    for name in ('nbs', 'newsrepro', 'settings.ini', 'README.md', '.ci'):
        source = ROOT/name
        if source.is_dir():
            shutil.copytree(source, target/name,
                            ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints',
                                                          '*.safetensors'))
        else: shutil.copy2(source, target/name)
    return target


def run(command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def differing(one: Path, other: Path, pattern: str) -> list[str]:
    names = {path.relative_to(root) for root in (one, other) for path in root.rglob(pattern)}
    return sorted(str(name) for name in names if not ((one/name).exists() and (other/name).exists()
                                                      and filecmp.cmp(one/name, other/name, shallow=False)))


def test_clean_leaves_no_diff(copy):
    run([BIN/'nbdev_clean'], copy)
    assert differing(ROOT/'nbs', copy/'nbs', '*.ipynb') == []


def test_export_leaves_no_diff(copy):
    run([BIN/'nbdev_export'], copy)
    assert differing(ROOT/'newsrepro', copy/'newsrepro', '*.py') == []


def test_readme_is_the_index_notebook(copy):
    run([sys.executable, copy/'.ci'/'readme.py', copy/'README.new.md'], copy)
    assert (copy/'README.new.md').read_text() == (ROOT/'README.md').read_text()


README = (ROOT/'README.md').read_text(encoding='utf-8').splitlines()
SETUP_LINES = {end: [line for line in README if re.search(f'^python3 -m venv .*{end}$', line)]
               for end in ('newsrepro reproduce', 'pytest')}


@pytest.mark.parametrize('end', SETUP_LINES)
def test_ci_and_the_container_run_the_readmes_lines(end):
    "CI reads the lines from the README; the container repeats their set-up to the letter."
    assert len(SETUP_LINES[end]) == 1
    assert f"readme_line '{end}'" in (ROOT/'.ci'/'run').read_text(encoding='utf-8')
    set_up, _, _ = SETUP_LINES[end][0].rpartition(' && ')
    assert f'RUN {set_up}' in (ROOT/'Dockerfile').read_text(encoding='utf-8').splitlines()


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_form(path):
    "Readable ids, exports of at most 45 lines, parameters never exported, a kernel by name."
    for cell in cells(path):
        source = ''.join(cell['source'])
        exported, tagged = re.search(r'^#\|\s*export', source,
                                     re.M), 'parameters' in cell['metadata'].get('tags', [])
        assert not re.fullmatch(r'[0-9a-f]{6,}', cell['id']), f'machine-made id {cell["id"]}'
        assert not (exported and tagged), 'the parameters cell is exported'
        assert not exported or len([line for line in source.splitlines()
                                    if line.strip()]) <= 45, f'export {cell["id"]} is too long'
    assert json.loads(path.read_text())['metadata']['kernelspec']['name'] == 'python3'
    assert path.stat().st_size < 400_000, 'heavy outputs'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if re.match(r'1\d_', p.name)], ids=lambda p: p.stem)
def test_method_notebook_declares_the_core_parameters(path):
    from newsrepro.study.registry import CORE, notebook_parameters
    parameters = notebook_parameters(path)
    assert set(CORE) <= set(parameters)
    assert [name for name, parameter in parameters.items() if not parameter.help] == []


def test_notebooks_run():
    "The method notebooks are run whole, from nothing, by `test_study`."
    run([BIN/'nbdev_test', '--skip_file_re', '|'.join([r'^[_.]', *METHODS]), '--n_workers', '2'], ROOT)
