"""The console script as a user meets it: quick, quiet, one line for each mistake."""
import json
import resource
import shlex
import subprocess
import sys

import pytest

MAIN = [sys.executable, '-c', 'from newsrepro.cli import main; main()']
HEAVY = {'torch', 'transformers', 'open_clip', 'papermill', 'snakemake', 'matplotlib', 'sklearn'}


def newsrepro(*arguments, **options):
    return subprocess.run([*MAIN, *map(str, arguments)], capture_output=True, text=True, **options)


def cpu_seconds() -> float:
    "That ended children of this process have used, however busy the machine is."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A plain collection of 120 articles, and a run that finds each image at rank 2."
    root = tmp_path_factory.mktemp('cli')
    (root/'plain').mkdir()
    names = [f'i{i}' for i in range(120)]
    rows = ['article_id,title,image_id', *(f'a{i},Title {i},{name}' for i, name in enumerate(names))]
    (root/'plain'/'articles.csv').write_text('\n'.join(rows), encoding='utf-8')
    lines = []
    for i, name in enumerate(names):
        first = [names[i - 1], name]
        lines.append('\t'.join([f'a{i}', *first, *[other for other in names if other not in first][:98]]))
    (root/'run.tsv').write_text('\n'.join(lines), encoding='utf-8')
    return root


@pytest.mark.parametrize('command', ['--help', 'list', 'evaluate', 'check-data', 'fetch-images', 'fuse',
                                     'rematch', 'gallery', 'embed'])
def test_starts_without_heavy_imports(command, files):
    given = {'evaluate': [files/'run.tsv', files/'plain'], 'check-data': [files/'plain'],
             'fetch-images': [files/'plain'], 'fuse': ['--help'], 'rematch': ['--help'],
             'gallery': ['--help'], 'embed': ['--help']}
    code = ('import sys\nfrom newsrepro.cli import run\n'
            'assert run(sys.argv[1:]) == 0\n'
            f'print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)')
    began = cpu_seconds()
    words = [sys.executable, '-c', code, command, *map(str, given.get(command, []))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stderr.strip() == '[]'
    assert cpu_seconds() - began < 2*5  # 2 s on an idle machine


def test_json_is_one_object_and_nothing_else(files):
    run, plain = files/'run.tsv', files/'plain'
    for arguments in (['evaluate', run, plain], ['check-data', plain], ['list'], ['fetch-images', plain],
                      ['compare', run, run, plain]):
        done = newsrepro(*arguments, '--json')
        assert done.returncode == 0 and done.stderr == ''
        assert isinstance(json.loads(done.stdout), dict) and done.stdout.count('\n') == 1


def test_evaluate_follows_the_contract(files):
    found = json.loads(newsrepro('evaluate', files/'run.tsv', files/'plain', '--json').stdout)
    assert list(found) == ['n', 'found', 'MRR@100', 'R@1', 'R@5', 'R@10', 'R@20', 'R@50', 'R@100']
    assert (found['n'], found['found'], found['MRR@100'], found['R@1'], found['R@5']) == (120, 120, 1/2, 0, 1)


def test_several_runs_in_one_table(files, tmp_path):
    "Each run's numbers are those it has alone; one that cannot be read ends the command."
    other = tmp_path/'other.tsv'
    other.write_bytes((files/'run.tsv').read_bytes())
    alone = json.loads(newsrepro('evaluate', files/'run.tsv', files/'plain', '--json').stdout)
    found = json.loads(newsrepro('evaluate', files/'run.tsv', other, files/'plain', '--json').stdout)
    assert found == dict(runs=[dict(run=str(run)) | alone for run in (files/'run.tsv', other)])
    shown = newsrepro('evaluate', files/'run.tsv', other, files/'plain').stdout
    assert shown.count(f"{alone['MRR@100']:.5f}") >= 2 and shown.count('MRR@100') == 1
    done = newsrepro('evaluate', files/'run.tsv', tmp_path/'none.tsv', files/'plain')
    assert (done.returncode, done.stdout) == (2, '') and 'none.tsv' in done.stderr


def test_compare_follows_the_contract(files):
    found = json.loads(newsrepro('compare', files/'run.tsv', files/'run.tsv', files/'plain', '--json').stdout)
    assert set(found) == {'n', 'metric', 'a', 'b', 'difference', 'ci95', 'p_value'}
    assert (found['difference'], found['ci95'], found['p_value']) == (0, [0, 0], 1)


@pytest.mark.parametrize('arguments, said', [
    (['evalute', 'a', 'b'], 'evalute'),
    (['evaluate', 'a'], "'RUN...'"),
    (['evaluate', 'a', 'b', '--jsn'], '--jsn'),
    (['evaluate', '{files}/no.tsv', '{files}/plain'], 'no.tsv'),
    (['check-data', '{files}/nowhere'], 'nowhere'),
    (['check-data', '{files}/run.tsv'], 'run.tsv'),
    (['list', '--profile', 'papr'], 'paper'),
    (['fetch-images', '{files}/nowhere'], 'no such folder'),
    (['fetch-images', '{files}/run.tsv'], 'a file'),
    (['fetch-images', '{files}/plain', '--convert', 'gif'], '--convert gif: jpeg or png'),
    (['fetch-images', '{files}/plain', '--max-pixels', '1000000000'], '--max-pixels'),
    (['reproduce', '--jobs', 'two'], '--jobs'),
    (['reproduce', '--weights', '{files}/nowhere'], 'no such folder'),
    (['reproduce', '--set', '11_clip_sweep.sed=1'], 'seed'),
    (['reproduce', '--device', 'cuda:42'], 'cuda:42'),
])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, files):
    done = newsrepro(*(argument.format(files=files) for argument in arguments))
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1), done.stderr
    assert done.stderr.startswith('newsrepro: error: ') and said in done.stderr


def test_fetch_images_says_what_is_left(files):
    "Nothing to ask for is a success; a server that may come back is not."
    root = files/'web'
    root.mkdir()
    table = 'article_id,title,image_id,image_url\n1,Rain,a,http://127.0.0.1:9/a.jpg\n2,Snow,b,\n'
    (root/'articles.csv').write_text(table)
    done = newsrepro('fetch-images', root)
    assert (done.returncode, done.stderr) == (0, '')  # no bar in a pipe
    assert 'not on the public internet' in done.stdout
    done = newsrepro('fetch-images', root, '--allow-private', '--retries', 0, '--json')
    found = json.loads(done.stdout)
    assert (done.returncode, found['outcomes']) == (1, dict(no_url=1, connection=1))
    assert found['have'] + found['dropped'] + found['waiting'] == found['images']
    assert (root/'fetch-report.csv').read_text().count('\n') == 1 + 2


def test_a_closed_pipe_is_no_error():
    line = f'{shlex.join(MAIN)} list | head -c 1'
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stderr == ''


def test_a_pipe_gets_whole_lines():
    shown, listed = newsrepro('list').stdout, json.loads(newsrepro('list', '--json').stdout)
    assert '…' not in shown
    for notebook in listed['notebooks']:
        assert all(parameter['name'] in shown for parameter in notebook['parameters'])
