"""What the code imports is what `settings.ini` asks for: the README's first line installs `requirements`
and nothing else."""
import ast
import json
import re
import sys
from configparser import ConfigParser
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from newsrepro.study.registry import NOTEBOOKS

ROOT = Path(__file__).resolve().parent.parent
METHODS = {notebook.name for notebook in NOTEBOOKS}
# used without an import of ours: who needs it
BEHIND = {
    'jupyterlab': 'the README opens the notebooks with it',
    'ipykernel': 'the kernel that papermill starts',
    'snakemake': '`newsrepro reproduce` starts it as a program',
    'pyarrow': 'pandas reads Parquet with it',
    'sentencepiece': "Marian's tokenizer in transformers",
    'sacremoses': "Marian's tokenizer in transformers",
}
BEHIND_TESTS = {'nbdev': 'exports and tests the notebooks', 'ruff': 'checks what nobody uses',
                'pytest-xdist': 'runs the tests side by side',
                'execnb': 'nbdev runs notebooks with it, and newer ones break it'}
BEHIND_DOCS = {'sphinx': 'builds the documentation', 'myst-nb': 'lets it read notebooks', 'furo': 'its looks'}


def canonical(name: str) -> str: return re.sub(r'[-_.]+', '-', name).lower()


def required(settings: Path = ROOT/'settings.ini') -> dict[str, set[str]]:
    "Distributions by group: `run` for `requirements`, the extras by name."
    config = ConfigParser(delimiters=['='])
    config.read(settings, encoding='utf-8')
    groups = {'run': 'requirements'} | {key.removesuffix('_requirements'): key for key in config['DEFAULT']
                                        if key.endswith('_requirements')}
    return {group: {canonical(re.match(r'[\w.-]+', word)[0]) for word in config['DEFAULT'][key].split()}
            for group, key in groups.items()}


def sources(path: Path) -> list[str]:
    if path.suffix == '.py': return [path.read_text(encoding='utf-8')]
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [re.sub(r'(?m)^(\s*)[%!].*$', r'\1pass', ''.join(cell['source'])) for cell in cells
            if cell['cell_type'] == 'code']


providers = cache(packages_distributions)


OWN = {'newsrepro', *(path.stem for folder in ('tests', 'benchmarks') for path in (ROOT/folder).glob('*.py'))}


@cache
def imported(path: Path) -> set[str]:
    "Distributions that a module or notebook imports, wherever the import stands."
    named = set()
    for node in (node for source in sources(path) for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import): named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level: named.add(node.module)
    tops = {name.split('.')[0] for name in named} - set(sys.stdlib_module_names) - OWN
    return {canonical(providers().get(top, [top])[0]) for top in tops}


def needs(paths) -> set[str]: return set().union(*(imported(path) for path in paths))


def needed() -> dict[str, set[str]]:
    "As `required`, read from the code."
    notebooks = sorted((ROOT/'nbs').rglob('*.ipynb'))
    run = needs([*(ROOT/'newsrepro').rglob('*.py'),
                 *(path for path in notebooks if path.stem in METHODS)]) | BEHIND.keys()
    # imported where they are there
    extras = dict(features={'sentence-transformers'}, fast={'numba'}, ray={'ray'})
    optional = set().union(*extras.values())
    develop = needs([*notebooks, *(ROOT/'tests').glob('*.py'), *(ROOT/'benchmarks').glob('*.py'),
                     *(ROOT/'.ci').glob('*.py')]) | BEHIND_TESTS.keys()
    docs = needs((ROOT/'docs').glob('*.py')) | BEHIND_DOCS.keys()
    beside = {'clip-benchmark'}  # nothing but `benchmarks/growth.py` runs it, and only where it is there
    return dict(run=run - optional, dev=develop - run - optional - beside, docs=docs - run,
                benchmarks=beside & develop, **{extra: names & run for extra, names in extras.items()})


@pytest.mark.parametrize('group', ['run', 'dev', 'docs', 'benchmarks', 'features', 'fast', 'ray'])
def test_requirements_are_what_is_imported(group):
    "Nothing is missing for a stranger, and nothing is asked for in vain."
    assert sorted(required()[group]) == sorted(needed()[group])


@pytest.mark.parametrize('taken_out', sorted(required()['run']))
def test_the_guard_notices_a_requirement_taken_out(taken_out, tmp_path):
    text = (ROOT/'settings.ini').read_text(encoding='utf-8')
    line = next(line for line in text.splitlines() if line.startswith('requirements ='))
    left = [word for word in line.split() if canonical(re.match(r'[\w.-]*', word)[0]) != taken_out]
    (tmp_path/'settings.ini').write_text(text.replace(line, ' '.join(left)), encoding='utf-8')
    assert needed()['run'] - required(tmp_path/'settings.ini')['run'] == {taken_out}


def test_the_tested_set_lies_within_the_bounds():
    "`constraints.txt` pins every requirement, to a version that `settings.ini` allows."
    from packaging.requirements import Requirement
    pinned = dict(line.split('==')
                  for line in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines()
                  if '==' in line)
    pinned = {canonical(name): version for name, version in pinned.items()}
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    asked = [Requirement(word) for key in ('requirements', 'dev_requirements', 'docs_requirements')
             for word in config['DEFAULT'][key].split()]
    assert len(asked) > 50
    allowed = lambda one: one.specifier.contains(pinned.get(canonical(one.name), '0'))
    assert [str(one) for one in asked if not allowed(one)] == []
