"""`newsrepro reproduce` on a study of toys: what is refused, skipped, resumed, kept."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from newsrepro.core.base import PACKAGE
from newsrepro.study.registry import Notebook, notebook_parameters
from newsrepro.study.plan import Request, identity_of, make_plan

CORE = '''profile: str = 'mini'  # which checkpoints
data: str = 'mini'  # which collection
device: str = 'auto'  # where to compute
seed: int = 0  # seed of every draw
out_dir: str = ''  # where results go
weights: str = ''  # folder of checkpoints
'''
WRITE = '''from pathlib import Path
(Path(out_dir)/'tables').mkdir()
_ = (Path(out_dir)/'tables'/'{0}.csv').write_text(f'value\\n{{{1}}}\\n')'''
SLEEP = 'import time; time.sleep(.3)'
SOURCES = {
    '1_square': (CORE + 'side: int = 3  # length of the side', WRITE.format('square', 'side**2')),
    '2_double': (CORE + 'factor: float = 2.0  # by which', SLEEP, SLEEP, WRITE.format('double', 'factor*seed')),
    '3_broken': (CORE + 'zero: int = 0  # what to divide by', 'x = 1', 'x/zero', WRITE.format('broken', 'x')),
    '4_reader': (CORE, WRITE.format('reader', '1')),
    '5_killed': (CORE, 'import os; os._exit(9)'),
}
STUDY = (Notebook('1_square', 'toy', 'A square', ('square',)), Notebook('2_double', 'toy', 'Its double', ('double',), after=('1_square',)),
         Notebook('3_broken', 'toy', 'A failure', ('broken',)), Notebook('4_reader', 'toy', 'Reads it', ('reader',), after=('3_broken',)),
         Notebook('5_killed', 'toy', 'Its kernel dies', ()))
# the real command, on the toys
DRIVER = '''import sys
from functools import partial
from pathlib import Path
from newsrepro import cli
from newsrepro.study import plan, reproduce
from newsrepro.study.registry import Notebook
study, folder = eval(sys.argv.pop(1)), Path(sys.argv.pop(1))
for module, name in ((reproduce, 'reproduce'), (plan, 'overview')):
    setattr(module, name, partial(getattr(module, name), notebooks=study, folder=folder))
cli.main()'''


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toys')
    for name, sources in SOURCES.items():
        cells = [dict(cell_type='code', id=f'cell-{i}', metadata={} if i else {'tags': ['parameters']}, execution_count=None, outputs=[], source=source)
                 for i, source in enumerate(sources)]
        (folder/f'{name}.ipynb').write_text(json.dumps(dict(cells=cells, nbformat=4, nbformat_minor=5, metadata=dict(
            kernelspec=dict(display_name='python3', language='python', name='python3')))))
    return folder


@pytest.fixture(scope='module')
def command(toys):
    return lambda *arguments: [sys.executable, '-c', DRIVER, repr(STUDY), str(toys), *map(str, arguments)]


@pytest.fixture(scope='module')
def newsrepro(command):
    return lambda *arguments, **options: subprocess.run(command(*arguments), **{'capture_output': True, 'text': True, 'timeout': 100} | options)


GOOD = ['--only', '2_double', '--set', '1_square.side=7', '--set', '2_double.seed=5']


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('home')


@pytest.fixture(scope='module')
def study(newsrepro, home):
    "A finished report of the two notebooks that work, made in an empty directory with an empty home."
    out = home.with_name('study')/'report {x}'  # a name that shells and format strings would trip over
    env = {name: value for name, value in os.environ.items() if not name.startswith(('XDG_', 'JUPYTER', 'IPYTHON', 'HF_', 'MPL'))}
    env |= {'HOME': str(home), 'NEWSREPRO_CACHE': str(home.with_name('cache'))}
    done = newsrepro('reproduce', *GOOD, '--out', out, env=env, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def tables(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out/'tables').iterdir())}


def states(newsrepro, out: Path) -> dict[str, str]:
    return {n['name']: n['state'] for n in json.loads(newsrepro('list', '--out', out, '--json').stdout)['notebooks']}


def test_parameters_arrive(study):
    assert tables(study) == {'square.csv': b'value\n49\n', 'double.csv': b'value\n10.0\n'}


def test_report_has_what_the_design_says(study):
    manifest = json.loads((study/'manifest.json').read_text())
    entry = manifest['notebooks']['1_square']
    assert manifest['profile'] == manifest['data'] == 'mini' and manifest['seeds'] == {'1_square': 0, '2_double': 5}
    assert {'seconds', 'peak_memory_mb', 'commit', 'libraries', 'parameters', 'files'} <= set(entry) and entry['peak_memory_mb'] > 10
    assert {path.name for path in study.iterdir()} == {'index.html', 'manifest.json', 'notebooks', 'tables', '.state'}
    assert 'newsrepro reproduce --only 1_square --set 1_square.side=7' in (study/'index.html').read_text()


def test_home_stays_empty(study, home):
    assert list(home.rglob('*')) == []


def test_a_second_run_does_nothing_and_is_quick(newsrepro, study):
    before = {path: path.stat().st_mtime_ns for path in study.rglob('*') if path.is_file() and '.state' not in path.parts}
    began = time.perf_counter()
    done = newsrepro('reproduce', *GOOD, '--out', study)
    assert done.returncode == 0 and done.stdout.count('up to date') == 2
    assert time.perf_counter() - began < 10
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_force_gives_the_same_bytes(newsrepro, study):
    before, notebook = tables(study), study/'notebooks'/'1_square.ipynb'
    stamp = notebook.stat().st_mtime_ns
    assert newsrepro('reproduce', '--only', '1_square', '--set', '1_square.side=7', '--out', study, '--force').returncode == 0
    assert tables(study) == before and notebook.stat().st_mtime_ns != stamp
    assert states(newsrepro, study)['2_double'] == 'stale: 1_square was run again'


def test_a_failure_leaves_the_others_and_shows_its_cell(newsrepro, study):
    before = tables(study)
    done = newsrepro('reproduce', *GOOD, '--only', '4_reader', '--only', '5_killed', '--out', study, '--jobs', 2)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    for part in ('3_broken', 'cell-2', 'x/zero', 'ZeroDivisionError: division by zero', '4_reader  not run: it reads the results of 3_broken',
                 '5_killed failed in cell', 'cell-1', 'os._exit(9)', 'Kernel died'):
        assert part in said, said
    assert tables(study) == before and set(json.loads((study/'manifest.json').read_text())['notebooks']) == {'1_square', '2_double'}
    assert states(newsrepro, study) == {'1_square': 'up to date', '2_double': 'up to date', '3_broken': 'failed', '4_reader': 'never run', '5_killed': 'failed'}
    # mended, it runs
    assert newsrepro('reproduce', '--only', '3_broken', '--set', '3_broken.zero=1', '--out', study).returncode == 0
    assert states(newsrepro, study)['3_broken'] == 'up to date'


@pytest.mark.parametrize('arguments, said', [
    (['--only', '2_duble'], 'did you mean 2_double?'),
    (['--set', '2_double.facto=1'], 'did you mean factor'),
    (['--set', '2_double.factor=much'], 'factor is float, for instance 2.0'),
    (['--only', '1_square', '--set', '2_double.factor=1'], 'not among the notebooks to run'),
    (['--set', '2_double.out_dir=x'], '--out'),
    (['--profile', 'big'], 'there are mini, paper'),
    (['--data', '{tmp}'], 'no known layout'),
    (['--data', '{tmp}/file'], 'not a folder'),
    (['--out', '{tmp}/file'], 'not a folder'),
    (['--out', '{tmp}/file/report'], 'cannot be written'),
    (['--out', '{tmp}'], 'holds files that are no report'),
])
def test_a_wrong_request_is_refused_before_anything_runs(newsrepro, tmp_path, arguments, said):
    (tmp_path/'file').write_text('')
    out = [] if '--out' in arguments else ['--out', tmp_path/'report']
    done = newsrepro('reproduce', *(a.format(tmp=tmp_path) for a in arguments), *out)
    assert (done.returncode, done.stderr.count('\n')) == (2, 1), done.stderr
    assert done.stderr.startswith('newsrepro: error: ') and said in done.stderr
    assert not (tmp_path/'report'/'tables').exists() and not (tmp_path/'report'/'.state'/'plan.json').exists()


def below(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes, within: float = 10) -> bool:
    deadline = time.time() + within
    running = lambda p: p.is_running() and p.status() != psutil.STATUS_ZOMBIE
    while any(running(p) for p in processes):
        if time.time() > deadline: return False
        time.sleep(.1)
    return True


def wait_for(condition, within: float = 40) -> None:
    deadline = time.time() + within
    while not condition():
        assert time.time() < deadline
        time.sleep(.05)


def test_resumes_after_kill_9_at_any_moment(command, newsrepro, study, tmp_path):
    out, chance, left = tmp_path/'report', random.Random(), []
    moments = chance.uniform(0, 3), chance.uniform(2, 5), chance.uniform(3, 8)  # seconds
    arguments = command('reproduce', *GOOD, '--out', out)
    for moment in moments:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        if process.poll() is None: left += below(process)
        process.kill(); process.wait()
    done = newsrepro('reproduce', *GOOD, '--out', out)  # at once: orphans may still be about
    assert done.returncode == 0, f'killed after {moments}\n{done.stdout}{done.stderr}'
    assert tables(out) == {'square.csv': b'value\n49\n', 'double.csv': b'value\n10.0\n'}
    assert gone(left)
    assert set(states(newsrepro, out).values()) == {'up to date', 'never run'}
    assert not [path for path in out.rglob('*') if path.is_file() and path.parent in (out/'tables', out/'notebooks') and path.suffix not in ('.csv', '.ipynb')]


def test_an_interrupted_run_stops_its_children(command, newsrepro, tmp_path):
    out = tmp_path/'report'
    process = subprocess.Popen(command('reproduce', '--only', '2_double', '--out', out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (out/'.state'/'running'/'1_square.json').exists())
    # another command on the same report is refused meanwhile
    second = newsrepro('reproduce', '--only', '1_square', '--out', out)
    assert second.returncode == 2 and 'at work there' in second.stderr and second.stderr.count('\n') == 1
    children = below(process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.count('\n') == 1 and 'interrupted' in said
    assert children and gone(children, within=3)


def test_the_workflow_runs_without_the_command(study):
    "As on a cluster: Snakemake alone plans the job whose marker is gone, and no other."
    (study/'.state'/'plan.json').write_text(json.dumps(dict(notebooks={'1_square': [], '2_double': ['1_square']}, threads=1)))
    (study/'.state'/'done'/'2_double').unlink()
    done = subprocess.run([sys.executable, '-m', 'snakemake', '-n', '-s', str(PACKAGE/'Snakefile'), '--config', f'state={study}/.state',
                           '--cores', '1', '--rerun-triggers', 'mtime'], capture_output=True, text=True, cwd=study.parent)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if 'output: done/' in line] == ['done/2_double']


@pytest.mark.parametrize('name', ['out #2', 'out: b', 'a folder with [c] in it', '{"x": 1}', "it's", 'münchen'])
def test_any_path_will_do_and_is_shown_as_it_is(newsrepro, tmp_path, name):
    done = newsrepro('reproduce', '--only', '1_square', '--out', tmp_path/name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path/name/'tables'/'square.csv').is_file() and f'report: {tmp_path/name}/index.html' in done.stdout


def test_a_log_tells_when_each_notebook_starts_and_ends(newsrepro, tmp_path):
    said = newsrepro('reproduce', *GOOD, '--out', tmp_path/'report').stdout.splitlines()
    began, ended = [line.split()[1] for line in said if line.startswith('▶')], [line.split()[1] for line in said if line.startswith('✓')]
    assert began == ended == ['1_square', '2_double']


def test_a_terminal_without_the_marks_ends_no_study(newsrepro, tmp_path):
    env = os.environ | {'PYTHONIOENCODING': 'cp1252'}
    done = newsrepro('reproduce', *GOOD, '--out', tmp_path/'report', env=env, encoding='cp1252')
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables(tmp_path/'report') == {'square.csv': b'value\n49\n', 'double.csv': b'value\n10.0\n'}


@pytest.fixture
def small_disk(tmp_path):
    "A disk of one megabyte."
    folder = tmp_path/'disk'
    folder.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], capture_output=True).returncode: pytest.skip('no leave to mount a small disk')
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)


@pytest.mark.parametrize('pages', [1, 4, 8])
def test_a_full_disk_is_said_in_a_line_and_the_rerun_is_right(newsrepro, small_disk, pages):
    "So many pages of 4 KiB are free: too few for the settings, for the notebook, for the table."
    filler, out = small_disk/'filler', small_disk/'report'
    filler.write_bytes(b'x'*(2**20 - 4096*pages))
    done = newsrepro('reproduce', '--only', '1_square', '--set', '1_square.side=7', '--out', out)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and 'Traceback' not in said and 'o space' in said, said
    filler.unlink()
    done = newsrepro('reproduce', '--only', '1_square', '--set', '1_square.side=7', '--out', out)
    assert done.returncode == 0 and tables(out) == {'square.csv': b'value\n49\n'}, done.stdout + done.stderr


def test_a_user_without_a_name_and_a_home(newsrepro, tmp_path):
    "As containers and clusters have them: the user's id has no entry, in this process and in all that it starts."
    (tmp_path/'site').mkdir()
    (tmp_path/'site'/'sitecustomize.py').write_text("import pwd\ndef nobody(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\npwd.getpwuid = nobody\n")
    env = {name: value for name, value in os.environ.items() if name not in ('HOME', 'USER', 'LOGNAME', 'LNAME', 'USERNAME')}
    done = newsrepro('reproduce', '--only', '1_square', '--out', tmp_path/'report', env=env | {'PYTHONPATH': str(tmp_path/'site')})
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_change_makes_stale(toys, tmp_path):
    notebook = tmp_path/'n.ipynb'
    notebook.write_text((toys/'1_square.ipynb').read_text())
    before = identity_of(notebook, {'side': 3})
    assert identity_of(notebook, {'side': 3}) == before
    cells = json.loads(notebook.read_text())
    cells['cells'][1]['outputs'] = [dict(output_type='stream', name='stdout', text='x')]
    notebook.write_text(json.dumps(cells))
    assert identity_of(notebook, {'side': 3}) == before  # outputs are no source
    cells['cells'][1]['source'] += ' '
    notebook.write_text(json.dumps(cells))
    after = identity_of(notebook, {'side': 4})
    assert {name for name in before if before[name] != after[name]} == {'code', 'parameters'}


def test_parameters_are_those_that_papermill_finds(toys):
    import papermill
    from newsrepro.core.base import notebooks_dir
    from newsrepro.study.registry import NOTEBOOKS
    for path in [toys/'2_double.ipynb', *(notebooks_dir()/f'{n.name}.ipynb' for n in NOTEBOOKS)]:
        theirs = papermill.inspect_notebook(path)
        assert {name: p['help'] for name, p in theirs.items()} == {name: p.help for name, p in notebook_parameters(path).items()}


def test_the_registry_makes_a_plan(tmp_path):
    plan = make_plan(Request(out=tmp_path/'report'))
    assert plan and all(set(job.after) <= {earlier.name for earlier in plan[:i]} for i, job in enumerate(plan))
