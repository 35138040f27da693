"""`newsrepro reproduce` on a study of toys: what is refused, skipped, resumed, kept."""
import html
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from PIL import Image

from newsrepro.core.base import PACKAGE, InputError
from newsrepro.data.layouts import find_layout, read_collection
from newsrepro.study.plan import Request, identity_of, make_plan, write_plan
from newsrepro.study.registry import Notebook, notebook_parameters
from newsrepro.study.reproduce import plan_from_config
from newsrepro.study.study import mini_root

CORE = '''profile: str = 'mini'  # which checkpoints
data: str = 'mini'  # which collection
device: str = 'auto'  # where to compute
seed: int = 0  # seed of every draw
out_dir: str = ''  # where results go
weights: str = ''  # folder of checkpoints
'''
WRITE = '''from pathlib import Path
(Path(out_dir)/'tables').mkdir(exist_ok=True)
_ = (Path(out_dir)/'tables'/'{0}.csv').write_text(f'value\\n{{{1}}}\\n')'''
SLEEP = 'import time; time.sleep(pause)'
SOURCES = {
    '1_square': (CORE + 'side: int = 3  # length of the side', WRITE.format('square', 'side**2')),
    '2_double': (CORE + 'factor: float = 2.0  # by which\npause: float = 0.3  # seconds', SLEEP, SLEEP,
                 WRITE.format('double', 'factor*seed')),
    '3_broken': (CORE + 'zero: int = 0  # what to divide by', 'x = 1\n' + WRITE.format('early', 'x'),
                 'x/zero', WRITE.format('broken', 'x')),
    '4_reader': (CORE, WRITE.format('reader', '1')),
    '5_killed': (CORE, 'import os; os._exit(9)'),
}
STUDY = (Notebook('1_square', 'toy', 'A square', ('square',)),
         Notebook('2_double', 'toy', 'Its double', ('double',), after=('1_square',)),
         Notebook('3_broken', 'toy', 'A failure', ('broken',)),
         Notebook('4_reader', 'toy', 'Reads it', ('reader',), after=('3_broken',)),
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
    for name, sources in SOURCES.items(): write_notebook(folder/f'{name}.ipynb', sources)
    return folder


def write_notebook(path: Path, sources) -> None:
    "A notebook of code cells, the first of them tagged `parameters`."
    cells = [dict(cell_type='code', id=f'cell-{i}', metadata={} if i else {'tags': ['parameters']},
                  execution_count=None, outputs=[], source=source) for i, source in enumerate(sources)]
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    path.write_text(json.dumps(dict(cells=cells, nbformat=4, nbformat_minor=5, metadata=kernel)))


@pytest.fixture(scope='module')
def command(toys):
    return partial(driver, STUDY, toys)


def driver(study, folder, *arguments):
    return [sys.executable, '-c', DRIVER, repr(study), str(folder), *map(str, arguments)]


RUN = dict(capture_output=True, text=True, timeout=300)  # a net, not a measure


@pytest.fixture(scope='module')
def newsrepro(command):
    return lambda *arguments, **options: subprocess.run(command(*arguments), **RUN | options)


def cpu_seconds() -> float:
    "That ended children of this process have used, however busy the machine is."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


GOOD = ['--only', '2_double', '--set', '1_square.side=7', '--set', '2_double.seed=5']


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    return tmp_path_factory.mktemp('home')


@pytest.fixture(scope='module')
def study(newsrepro, home):
    "A finished report of the two notebooks that work, made in an empty directory with an empty home."
    out = home.with_name('study')/'report {x}'  # a name that shells and format strings would trip over
    tools = ('XDG_', 'JUPYTER', 'IPYTHON', 'HF_', 'MPL')
    env = {name: value for name, value in os.environ.items() if not name.startswith(tools)}
    env |= {'HOME': str(home), 'NEWSREPRO_CACHE': str(home.with_name('cache'))}
    done = newsrepro('reproduce', *GOOD, '--out', out, env=env, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def tables(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out/'tables').iterdir())}


def states(newsrepro, out: Path) -> dict[str, str]:
    listed = json.loads(newsrepro('list', '--out', out, '--json').stdout)
    return {row['name']: row['state'] for row in listed['notebooks']}


def test_parameters_arrive(study):
    assert tables(study) == {'square.csv': b'value\n49\n', 'double.csv': b'value\n10.0\n'}


def test_report_has_what_the_design_says(study):
    manifest = json.loads((study/'manifest.json').read_text())
    entry = manifest['notebooks']['1_square']
    assert manifest['profile'] == manifest['data'] == 'mini'
    assert manifest['seeds'] == {'1_square': 0, '2_double': 5}
    assert {'seconds', 'peak_memory_mb', 'commit', 'libraries', 'parameters', 'files'} <= set(entry)
    assert entry['peak_memory_mb'] > 10
    made = {path.name for path in study.iterdir()}
    assert made == {'index.html', 'manifest.json', 'notebooks', 'tables', '.state'}
    assert 'newsrepro reproduce --only 1_square --set 1_square.side=7' in (study/'index.html').read_text()


def test_home_stays_empty(study, home):
    assert list(home.rglob('*')) == []


def test_a_second_run_does_nothing_and_is_quick(newsrepro, study):
    seen = [path for path in study.rglob('*') if path.is_file() and '.state' not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in seen}
    began = cpu_seconds()
    done = newsrepro('reproduce', *GOOD, '--out', study)
    assert done.returncode == 0 and done.stdout.count('up to date') == 2
    assert cpu_seconds() - began < 10
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_force_gives_the_same_bytes(newsrepro, study):
    before, notebook = tables(study), study/'notebooks'/'1_square.ipynb'
    stamp = notebook.stat().st_mtime_ns
    square = ['--only', '1_square', '--set', '1_square.side=7']
    again = newsrepro('reproduce', *square, '--out', study, '--force')
    assert again.returncode == 0
    assert tables(study) == before and notebook.stat().st_mtime_ns != stamp
    assert states(newsrepro, study)['2_double'] == 'stale: 1_square was run again'


def test_a_failure_leaves_the_others_and_shows_its_cell(newsrepro, study):
    before = tables(study)
    more = ['--only', '4_reader', '--only', '5_killed']
    done = newsrepro('reproduce', *GOOD, *more, '--out', study, '--jobs', 2)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    for part in ('3_broken', 'cell-2', 'x/zero', 'ZeroDivisionError: division by zero',
                 '4_reader  not run: it reads the results of 3_broken',
                 '5_killed failed in cell', 'cell-1', 'os._exit(9)', 'Kernel died'):
        assert part in said, said
    assert tables(study) == before
    assert set(json.loads((study/'manifest.json').read_text())['notebooks']) == {'1_square', '2_double'}
    assert states(newsrepro, study) == {
        '1_square': 'up to date', '2_double': 'up to date', '3_broken': 'failed', '4_reader': 'never run',
        '5_killed': 'failed'}
    # what it had written is not lost
    kept = study/'.state'/'failed'/'3_broken'
    assert f'3_broken had written 1 file before, kept in {kept}' in said, said
    assert (kept/'tables'/'early.csv').read_bytes() == b'value\n1\n'
    # mended, it runs
    mended = ['--only', '3_broken', '--set', '3_broken.zero=1']
    assert newsrepro('reproduce', *mended, '--out', study).returncode == 0
    assert states(newsrepro, study)['3_broken'] == 'up to date' and not kept.exists()


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
    assert not (tmp_path/'report'/'tables').exists()
    assert not (tmp_path/'report'/'.state'/'plan.json').exists()


def below(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes, within: float = 10) -> bool:
    deadline = time.time() + within
    running = lambda p: p.is_running() and p.status() != psutil.STATUS_ZOMBIE
    while any(running(p) for p in processes):
        if time.time() > deadline: return False
        time.sleep(.1)
    return True


def wait_for(condition, within: float = 300) -> None:
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
    shown = [path for kind in ('tables', 'notebooks') for path in (out/kind).iterdir()]
    assert {path.suffix for path in shown} == {'.csv', '.ipynb', '.html'}


def test_an_interrupted_run_stops_its_children(command, newsrepro, tmp_path):
    out = tmp_path/'report'
    words = command('reproduce', '--only', '2_double', '--set', '2_double.pause=60.0', '--out', out)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (out/'.state'/'running'/'2_double.json').exists())
    # another command on the same report is refused meanwhile
    second = newsrepro('reproduce', '--only', '1_square', '--out', out)
    assert second.returncode == 2 and 'at work there' in second.stderr and second.stderr.count('\n') == 1
    children = below(process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.count('\n') == 1 and 'interrupted' in said
    assert children and gone(children, within=3)


def test_the_workflow_ends_in_the_files_of_the_command(study, toys):
    "Snakemake alone, on a plan that leaves nothing to run, then on one whose notebook fails."
    page, manifest = study/'index.html', study/'manifest.json'
    before = page.read_bytes(), manifest.read_bytes()
    request = Request(only=['2_double', '3_broken'], sets=GOOD[3::2], out=study)
    plan = make_plan(request, STUDY, toys)
    for stale, code in ((), 0), (('3_broken',), 1):
        state = write_plan(plan, dict.fromkeys(stale, 'forced'), notebooks=STUDY)
        for path in (page, manifest): path.unlink()
        words = ['-s', PACKAGE/'Snakefile', '--config', f'state={state}', '--cores', 1, '--keep-going',
                 '--rerun-triggers', 'mtime']
        done = subprocess.run([sys.executable, '-m', 'snakemake', *map(str, words)], **RUN, cwd=study.parent)
        assert done.returncode == code, done.stderr
        ran = [line for line in done.stderr.splitlines() if line.endswith('rule report:')]
        assert len(ran) == 1 - code, done.stderr
        if not code: assert (page.read_bytes(), manifest.read_bytes()) == before
    assert set(json.loads(manifest.read_text())['notebooks']) >= {'1_square', '2_double'}
    assert page.is_file() and (study/'.state'/'failed'/'3_broken.json').is_file()


# a queue that starts jobs in the background: a job is known by the path of its script
QUEUE = {'submit': """setsid sh -c 'bash "$0"; echo $? > "$0.code"' "$1" > "$1.said" 2>&1 &
echo $! > "$1.pid"
echo "$1"
""", 'status': """if ! [ -e "$1.code" ]; then echo running
elif grep -qx 0 "$1.code"; then echo success
else echo failed; fi
""", 'cancel': """for job in "$@"; do kill -- -"$(cat "$job.pid")"; done
"""}


@pytest.fixture
def queue(tmp_path):
    "The environment in which `cluster-generic` submits to `QUEUE`."
    pytest.importorskip('snakemake_executor_plugin_cluster_generic', reason='pip install newsrepro[cluster]')
    (profile := tmp_path/'profile').mkdir()
    for name, script in QUEUE.items():
        (profile/name).write_text(f'#!/bin/sh\n{script}')
        (profile/name).chmod(0o755)
    commands = ''.join(f'cluster-generic-{name}-cmd: {profile/name}\n' for name in QUEUE)
    (profile/'config.yaml').write_text(f'{commands}seconds-between-status-checks: 1\n')
    return os.environ | {'SNAKEMAKE_PROFILE': str(profile)}


def test_a_job_of_a_queue_is_killed_and_made_again(queue, toys, tmp_path):
    out, alone = tmp_path/'report', (Notebook('2_double', 'toy', 'Double', ('double',)),)
    words = ['reproduce', '--set', '2_double.seed=5', '--set', '2_double.pause=3.0', '--out', out]
    words = driver(alone, toys, *words, '--executor', 'cluster-generic')
    process = subprocess.Popen(words, env=queue, stdout=subprocess.PIPE, text=True)
    wait_for((out/'.state'/'running'/'2_double.json').exists)
    job, = (one for one in psutil.process_iter(['cmdline'])  # a zombie has none
            if (one.info['cmdline'] or [''])[-1] == 'settings/2_double.json'
            and one.cwd().startswith(str(out)))
    job.kill()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and '2_double ended without a word' in said, said
    assert json.loads((out/'manifest.json').read_text())['notebooks'] == {}
    done = subprocess.run(words, **RUN, env=queue)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables(out) == {'double.csv': b'value\n10.0\n'}  # as without a queue


@pytest.mark.parametrize('name', ['out #2', 'out: b', 'a folder with [c] in it', '{"x": 1}', "it's",
                                  'münchen'])
def test_any_path_will_do_and_is_shown_as_it_is(newsrepro, tmp_path, name):
    done = newsrepro('reproduce', '--only', '1_square', '--out', tmp_path/name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path/name/'tables'/'square.csv').is_file()
    assert f'report: {tmp_path/name}/index.html' in done.stdout


def test_a_log_tells_when_each_notebook_starts_and_ends(newsrepro, tmp_path):
    said = newsrepro('reproduce', *GOOD, '--out', tmp_path/'report').stdout.splitlines()
    for mark in '▶✓':
        names = [line.split()[1] for line in said if line.startswith(mark)]
        assert names == ['1_square', '2_double']


def test_a_terminal_without_the_marks_ends_no_study(newsrepro, tmp_path):
    env = os.environ | {'PYTHONIOENCODING': 'cp1252'}
    done = newsrepro('reproduce', *GOOD, '--out', tmp_path/'report', env=env, encoding='cp1252')
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables(tmp_path/'report') == {'square.csv': b'value\n49\n', 'double.csv': b'value\n10.0\n'}


MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$0" && echo mounted && exec sleep infinity'


@contextmanager
def small_disk(folder: Path):
    """Mount a disk of one megabyte, in a namespace of its own, where who is not root may mount, too.

    Yields the words that run a command there and the disk as seen from here; None without namespaces."""
    user = ['--user']*(os.geteuid() != 0)
    words = ['unshare', *user, *('--map-root-user' for _ in user), '--mount', 'sh', '-c', MOUNT, folder]
    try: holder = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        yield None
        return
    enter = ['nsenter', f'--target={holder.pid}', *user, *('--preserve-credentials' for _ in user), '--mount']
    mounted = holder.stdout.readline() == b'mounted\n'
    try: yield (enter, Path(f'/proc/{holder.pid}/root{folder}')) if mounted else None
    finally: holder.kill()


# free pages of 4 KiB -> bytes that a file may have: settings have more, a notebook, the page
LARGEST = {1: 500, 4: 3000, 8: 6000}


@pytest.fixture(params=['full disk', 'limit'])
def without_room(request, tmp_path, command):
    """Runs the command where too little can be written: to a full disk, or to any file.

    The latter is a limit of the kernel for all that is started; it stands in where no disk can be mounted."""
    folder = tmp_path/'disk'
    folder.mkdir()
    def run(words, **more): return subprocess.run(words, capture_output=True, text=True, timeout=300, **more)
    def limited(pages: int | None, *arguments):
        limits = LARGEST.get(pages, resource.RLIM_INFINITY), resource.RLIM_INFINITY
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        return run(command(*arguments), preexec_fn=limit)
    with small_disk(folder) as disk:
        if request.param == 'limit' or disk is None:
            yield limited, folder, 'File too large'
            return
        enter, seen = disk
        def filled(pages: int | None, *arguments):
            (seen/'filler').write_bytes(b'x'*(2**20 - 4096*pages) if pages else b'')
            return run([*enter, *command(*arguments)])
        yield filled, seen, 'No space left'


@pytest.mark.parametrize('pages', [1, 4, 8])
def test_where_no_room_is_left_a_line_says_so_and_the_rerun_is_right(without_room, tmp_path, pages):
    "Too little for the settings, for the notebook, for what comes last."
    run, seen, reason = without_room
    words = ['reproduce', '--only', '1_square', '--set', '1_square.side=7', '--out', tmp_path/'disk'/'report']
    done = run(pages, *words)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and 'Traceback' not in said and reason in said, said
    if pages == 4: assert 'make room, and the same command goes on' in said, said
    done = run(None, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tables(seen/'report') == {'square.csv': b'value\n49\n'}, done.stdout + done.stderr


def test_a_user_without_a_name_and_a_home(newsrepro, tmp_path):
    "As containers and clusters have them: the user's id has no entry, here and in all that is started."
    (tmp_path/'site').mkdir()
    nobody = "def nobody(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')"
    (tmp_path/'site'/'sitecustomize.py').write_text(f'import pwd\n{nobody}\npwd.getpwuid = nobody\n')
    names = ('HOME', 'USER', 'LOGNAME', 'LNAME', 'USERNAME')
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {'PYTHONPATH': os.pathsep.join([str(tmp_path/'site'), env.get('PYTHONPATH', '')])}
    done = newsrepro('reproduce', '--only', '1_square', '--out', tmp_path/'report', env=env)
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
        ours = {name: parameter.help for name, parameter in notebook_parameters(path).items()}
        assert {name: parameter['help'] for name, parameter in theirs.items()} == ours


def test_the_registry_makes_a_plan(tmp_path):
    plan = make_plan(Request(out=tmp_path/'report'))
    assert plan
    for i, job in enumerate(plan): assert set(job.after) <= {earlier.name for earlier in plan[:i]}


# -- collections of two years

def official(root: Path, folder: str) -> Path:
    "A small collection: in the layout of 2022 where `folder` is a set's, in that of 2021 where it is ''."
    (root/folder/'images').mkdir(parents=True)
    for part, ids in (('train', range(20)), ('test', range(20, 25))):
        rows = ['article\ttitle\tiid', *(f'{i}\tTitle {i}\tp{i}' for i in ids)]
        (root/folder/f'{part}.tsv').write_text('\n'.join(rows))
        for i in ids: Image.new('RGB', (8, 8), (i*8, 0, 0)).save(root/folder/'images'/f'p{i}.png')
    return root


YEARS = (Notebook('1_old', 'liang2021', 'Of 2021', ('old',)),
         Notebook('2_new', 'vu2022', 'Of 2022', ('new',)),
         Notebook('3_reader', 'vu2022', 'Reads it', ('reader',), after=('2_new',)))


@pytest.fixture(scope='module')
def years(tmp_path_factory):
    "Notebooks of two years, each of which writes the folder it was run on; and the collections."
    root = tmp_path_factory.mktemp('years')
    for notebook in YEARS:
        source = WRITE.format(*notebook.tables, 'Path(data).name')
        write_notebook(root/f'{notebook.name}.ipynb', (CORE, source))
    official(root/"news of 2021, it's", '')
    for name in ('d22', 'other22'): official(root/name, 'RSS')
    (root/'plain'/'images').mkdir(parents=True)
    (root/'plain'/'articles.csv').write_text('article_id,title,image_id\n1,Rain,a\n')
    return root


D21 = "news of 2021, it's"


@pytest.fixture(scope='module')
def on_years(years):
    "The command, in the folder that holds the collections."
    return lambda *words: subprocess.run(driver(YEARS, years, 'reproduce', *words), cwd=years, **RUN)


def data(*folders) -> list: return [word for folder in folders for word in ('--data', folder)]


@pytest.fixture(scope='module')
def two_years(on_years, years, tmp_path_factory):
    "A report made from both collections, one of them named by a relative path and twice."
    out = tmp_path_factory.mktemp('two')/'report'
    done = on_years(*data('d22', years/D21, years/'d22'), '--out', out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


BOTH = {'old.csv': f'value\n{D21}\n'.encode(), 'new.csv': b'value\nd22\n', 'reader.csv': b'value\nd22\n'}


def test_each_notebook_takes_its_papers_year(on_years, years, two_years):
    assert tables(two_years) == BOTH
    manifest = json.loads((two_years/'manifest.json').read_text())
    assert set(manifest['data']) == {str(years/D21), str(years/'d22')}
    assert manifest['notebooks']['1_old']['parameters']['data'] == str(years/D21)
    page = html.unescape((two_years/'index.html').read_text())
    assert f'{years/D21} · {years/"d22"}' in page
    listed = subprocess.run(driver(YEARS, years, 'list', '--out', two_years, '--json'), **RUN)
    found = [row['data'] for row in json.loads(listed.stdout)['notebooks']]
    assert found == [str(years/D21)] + [str(years/'d22')]*2


def test_the_order_of_the_folders_does_not_matter(on_years, years, two_years):
    done = on_years(*data(D21, 'd22'), '--out', two_years)
    assert done.returncode == 0 and done.stdout.count('up to date') == 3, done.stdout


def test_a_plan_says_which_notebook_takes_which(on_years, years, tmp_path):
    done = on_years(*data(D21, 'd22'), '--out', tmp_path/'out', '--dry-run', '--json')
    assert [one['data'] for one in json.loads(done.stdout)['notebooks']] == [
        f'{D21} (newsimages2021)', 'd22 (newsimages2022)', 'd22 (newsimages2022)']


def test_a_command_can_be_pasted_anywhere(years, two_years, tmp_path):
    "Through a shell, in another folder: it finds the same data, so that nothing is left to do."
    for name, entry in json.loads((two_years/'manifest.json').read_text())['notebooks'].items():
        program, rest = entry['command'].split(' ', 1)
        assert program == 'newsrepro'
        line = f"{shlex.join(driver(YEARS, years))} {rest} --out {shlex.quote(str(two_years))}"
        done = subprocess.run(line, shell=True, cwd=tmp_path, **RUN)
        assert done.returncode == 0 and f'{name}  up to date' in done.stdout, done.stdout + done.stderr


def test_one_year_alone_skips_the_other_and_leaves_its_results(on_years, years, two_years):
    before = {path: path.stat().st_mtime_ns for path in two_years.rglob('*') if '.state' not in path.parts}
    done = on_years(*data('d22'), '--out', two_years)
    said = [line for line in done.stdout.splitlines() if line.startswith('1_old')]
    assert done.returncode == 0, done.stdout + done.stderr
    lacks = 'data in the layout of newsimages2021 (--data DIR); given: newsimages2022'
    assert said == [f'1_old: skipped; it needs {lacks}']
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # run again, the others' results are new, and the page still has the old one
    assert on_years(*data('d22'), '--out', two_years, '--force').returncode == 0
    assert tables(two_years) == BOTH
    manifest = json.loads((two_years/'manifest.json').read_text())
    assert set(manifest['notebooks']) == {'1_old', '2_new', '3_reader'}
    assert '<td>news of 2021</td>' in (two_years/'index.html').read_text()  # its comma begins another cell


def test_one_year_alone_with_nothing_there(on_years, tmp_path):
    done = on_years(*data('d22'), '--out', tmp_path/'out')
    assert done.returncode == 0 and '1_old: skipped' in done.stdout
    assert set(tables(tmp_path/'out')) == {'new.csv', 'reader.csv'}


@pytest.mark.parametrize('words, said', [
    (data('other22'), 'name another folder with --out'),
    (data('mini'), 'name another folder with --out'),
    (data('d22', 'other22'), 'both are newsimages2022; give one of them'),
    (data('mini', 'd22'), '--data mini: the generated collections are of all layouts; give them alone'),
    (data('d22', 'plain'), 'plain; beside another folder it would have to be newsimages2021 or'),
    (['--only', '1_old', *data('d22')], '1_old: it needs data in the layout of newsimages2021'),
])
def test_what_would_mix_collections_is_refused(on_years, two_years, words, said):
    done = on_years(*words, '--out', two_years)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1), done.stdout + done.stderr
    assert said in done.stderr and tables(two_years) == BOTH


def test_a_collection_of_no_papers_year_is_for_all(years):
    plan = make_plan(Request(data=[str(years/'plain')], out=years/'out'), YEARS, years)
    assert [(job.lacks, job.parameters['data']) for job in plan] == [('', str(years/'plain'))]*3


def test_a_moved_collection_is_the_same(on_years, years, tmp_path):
    where = official(tmp_path/'here', 'RSS')
    assert on_years(*data(where), '--only', '2_new', '--out', tmp_path/'out').returncode == 0
    where.rename(tmp_path/'there')
    done = on_years(*data(tmp_path/'there'), '--only', '2_new', '--out', tmp_path/'out')
    assert done.returncode == 0 and tables(tmp_path/'out') == {'new.csv': b'value\nthere\n'}


def test_the_workflow_takes_several_collections(years, tmp_path):
    "The real notebooks, planned as on a cluster: each job's settings name its own folder."
    folders = ','.join(str(years/name) for name in ('d22', 'other22'))
    with pytest.raises(InputError, match='both are newsimages2022'):
        plan_from_config(dict(data=folders, out=str(tmp_path/'no')))
    both = [str(years/D21), str(years/'d22')]
    state, _ = plan_from_config(dict(data=both, out=str(tmp_path/'out'), only='10_vilt,11_clip_sweep'))
    settings = {path.stem: json.loads(path.read_text()) for path in (state/'settings').iterdir()}
    own = {name: job['parameters']['data'] for name, job in settings.items()}
    assert own == {'10_vilt': str(years/D21), '11_clip_sweep': str(years/'d22')}
    alone, lock = plan_from_config(dict(data=str(years/'d22'), out=str(tmp_path/'alone'), device='cuda'))
    rules = json.loads((alone/'plan.json').read_text())['rules']
    assert '10_vilt' not in rules
    assert rules['12_fine_tune']['resources'].keys() == {'mem_mb', 'runtime', 'gpu'}
    with pytest.raises(InputError, match='at work there'): plan_from_config(dict(out=str(alone.parent)))


def test_the_layout_is_found_as_it_is_read():
    for name in ('newsimages2021', 'newsimages2022', 'captions'):
        assert find_layout(mini_root()/name) == read_collection(mini_root()/name).layout
