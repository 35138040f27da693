"""The notebooks are the source: cleaned, exported, tagged, and the README is theirs too."""
import ast
import filecmp
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize
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
    same = lambda name: ((one/name).exists() and (other/name).exists()
                         and filecmp.cmp(one/name, other/name, shallow=False))
    return sorted(str(name) for name in names if not same(name))


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
        exported = re.search(r'^#\|\s*export', source, re.M)
        tagged = 'parameters' in cell['metadata'].get('tags', [])
        assert not re.fullmatch(r'[0-9a-f]{6,}', cell['id']), f'machine-made id {cell["id"]}'
        assert not (exported and tagged), 'the parameters cell is exported'
        lines = [line for line in source.splitlines() if line.strip()]
        assert not exported or len(lines) <= 45, f'export {cell["id"]} is too long'
    assert json.loads(path.read_text())['metadata']['kernelspec']['name'] == 'python3'
    assert path.stat().st_size < 400_000, 'heavy outputs'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_tell_nothing_of_the_machine_that_made_them(path):
    "No temporary folder, no home, no code for colours of a terminal."
    shown = json.dumps([cell['outputs'] for cell in cells(path) if cell['cell_type'] == 'code'])
    assert re.findall(r'/(?:tmp|home|root|Users|private|var/folders)/[\w.-]+|\\u001b\[[\d;]*m', shown) == []


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem in METHODS], ids=lambda p: p.stem)
def test_method_notebook_declares_the_core_parameters(path):
    from newsrepro.study.registry import CORE, notebook_parameters
    parameters = notebook_parameters(path)
    assert set(CORE) <= set(parameters)
    assert [name for name, parameter in parameters.items() if not parameter.help] == []


def assigned(tree: ast.Module) -> set[str]:
    "Names that a cell sets beside what it defines within functions, classes and comprehensions."
    scopes = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
              ast.GeneratorExp)
    found, open_nodes = set(), list(tree.body)
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef): found.add(node.name)
        if isinstance(node, scopes): continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): found.add(node.id)
        if isinstance(node, ast.alias): found.add(node.asname or node.name.split('.')[0])
        open_nodes += ast.iter_child_nodes(node)
    return found


def test_assigned_names_are_found():
    source = 'import a.b\nfrom c import d as e\nfor f, g in h: i = [j for j in k]\ndef l(m): n = 1'
    assert assigned(ast.parse(source)) == set('aefgil')


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem in METHODS], ids=lambda p: p.stem)
def test_no_cell_changes_a_parameter(path):
    code = [cell for cell in cells(path) if cell['cell_type'] == 'code']
    trees = {cell['id']: ast.parse(''.join(cell['source'])) for cell in code}
    declared = next(cell['id'] for cell in code if 'parameters' in cell['metadata'].get('tags', []))
    parameters = assigned(trees.pop(declared))
    assert {'profile', 'seed'} <= parameters
    assert {id: sorted(assigned(tree) & parameters) for id, tree in trees.items()
            if assigned(tree) & parameters} == {}


def test_notebooks_run():
    "The method notebooks are run whole, from nothing, by `test_study`."
    run([BIN/'nbdev_test', '--skip_file_re', '|'.join([r'^[_.]', *METHODS]), '--n_workers', '2'], ROOT)


# the house style

def exporting_cells():
    "Lines of each exporting cell, blank ones and directives not counted."
    for path in NOTEBOOKS:
        for cell in cells(path):
            source = ''.join(cell['source'])
            lines = [line for line in source.splitlines() if line.strip() and not line.startswith('#|')]
            if re.search(r'^#\|\s*export', source, re.M): yield f'{path.stem} {cell["id"]}', len(lines)


def test_exports_are_small():
    "Nine of ten exporting cells have at most twenty lines."
    sizes = sorted(size for _, size in exporting_cells())
    assert sizes[len(sizes)*9//10] <= 20


def code_lines():
    "Every line of code in the notebooks, and every line of the tests, the benchmarks and CI."
    for path in NOTEBOOKS:
        for cell in cells(path):
            if cell['cell_type'] == 'code':
                for line in ''.join(cell['source']).splitlines(): yield f'{path.stem} {cell["id"]}', line
    for path in (*ROOT.glob('tests/*.py'), *ROOT.glob('benchmarks/*.py'), *ROOT.glob('docs/*.py'),
                 *ROOT.glob('.ci/*')):
        if path.is_file():
            for line in path.read_text(encoding='utf-8').splitlines(): yield path.name, line


def test_no_line_is_longer_than_110():
    lines = list(code_lines())
    assert {'test_source.py', 'fuzz.py', 'conf.py', 'run'} <= {place for place, _ in lines}
    assert [(place, line) for place, line in lines if len(line) > 110] == []


def public_parameters(tree: ast.AST):
    "Parameters of public functions and methods, and fields of public dataclasses, each with its lines."
    outer = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    classes = [node for node in outer if isinstance(node, ast.ClassDef) and node.name[0] != '_']
    inner = [node for kind in classes for node in kind.body]
    for node in outer + inner:
        name = getattr(node, 'name', '_')
        if isinstance(node, ast.FunctionDef) and not name.startswith('_'):
            arguments = node.args
            rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
            for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest]:
                if argument.arg not in ('self', 'cls'): yield f'{name}.{argument.arg}', argument
        decorators = [ast.unparse(decorator) for decorator in getattr(node, 'decorator_list', ())]
        if isinstance(node, ast.ClassDef) and name[0] != '_' and any('dataclass' in d for d in decorators):
            for field in node.body:
                if isinstance(field, ast.AnnAssign): yield f'{name}.{field.target.id}', field


# the options of the commands say in their help what they mean
MODULES = [path for path in sorted((ROOT/'newsrepro').rglob('*.py'))
           if path.name not in ('_modidx.py', 'cli.py')]


@pytest.mark.parametrize('path', MODULES, ids=lambda path: f'{path.parent.name}.{path.stem}')
def test_every_public_parameter_is_commented(path):
    source = path.read_text(encoding='utf-8')
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    bare = [name for name, node in public_parameters(ast.parse(source))
            if not commented & set(range(node.lineno, node.end_lineno + 1))]
    assert bare == []


def unsafe_calls(source: str) -> list[str]:
    "Calls that could run what a file says."
    banned = {'pickle.load', 'pickle.loads', 'torch.jit.load', 'joblib.load', 'pd.read_pickle', 'eval',
              'exec'}
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call): continue
        name, given = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
        pickled = name == 'np.load' and given.get('allow_pickle') != 'False'
        whole = name in ('torch.load', 'load_state_dict') and given.get('weights_only') != 'True'
        if name in banned or pickled or whole: found.append(ast.unparse(node))
    return found


def test_unsafe_calls_are_found():
    source = 'torch.load(p)\nnp.load(p)\npickle.load(f)\ntorch.load(p, weights_only=True)\nx.load(p)'
    assert unsafe_calls(source) == ['torch.load(p)', 'np.load(p)', 'pickle.load(f)']


@pytest.mark.parametrize('path', MODULES, ids=lambda path: f'{path.parent.name}.{path.stem}')
def test_checkpoints_are_read_as_data(path):
    assert unsafe_calls(path.read_text(encoding='utf-8')) == []


LINUX_ALONE = re.compile(r'\bos\.(?:sched_\w+|eventfd\w*|memfd_create|pidfd_open|copy_file_range|splice|'
                         r'unshare|posix_f\w+|getrandom|\w+xattr)\b|/proc/|/dev/shm')


@pytest.mark.parametrize('path', MODULES, ids=lambda path: f'{path.parent.name}.{path.stem}')
def test_nothing_is_called_that_linux_alone_has(path):
    "Who works on a Mac has the same Python, but less of `os`."
    assert LINUX_ALONE.findall('os.sched_getaffinity(0)')
    assert LINUX_ALONE.findall(path.read_text(encoding='utf-8')) == []
