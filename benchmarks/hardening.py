"""How the study takes what machines do to it: `kill -9` at random moments, a full disk, a folder that cannot
be written, two commands on one folder, a clock set back, too little memory, files cut or with a flipped bit.

After each disturbance the same work is done once more, undisturbed, and must end with the bytes of a run that
was never disturbed; the disturbed run may end well or refuse in a line. Every draw comes from `--seed`.

    python benchmarks/hardening.py                              # 100 kills and 100 other disturbances
    python benchmarks/hardening.py --only kill --work training  # one kind, one work
    python benchmarks/hardening.py --trials 1000 --json found.json
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

os.environ |= {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}
FORK = multiprocessing.get_context('fork')  # what is imported here, no trial waits for
PATIENCE = 180  # seconds after which a run counts as stuck
LONGEST = 100  # lines on stderr that an error may have
REASONS = 'no space|disk is full|memory|permission|read-?only'  # one of them in the last of these lines


# the work: each leaves its results as bytes in the file `result` of its folder

def pictures(folder: Path, count: int, seed: int) -> list[str]:
    "Noise, as PNG."
    import numpy as np
    from PIL import Image
    folder.mkdir(parents=True, exist_ok=True)
    draw, paths = np.random.default_rng(seed), []
    for n in range(count):
        paths.append(str(folder/f'{n}.png'))
        Image.fromarray(draw.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def embedding(folder: Path, given: dict) -> bytes:
    "Pictures through the mini ViT-B/32 into a store of small shards."
    from newsrepro.core.checkpoints import find_backbone
    from newsrepro.models.loader import load_encoder
    from newsrepro.models.store import EmbeddingStore, embed
    encoder = load_encoder(find_backbone('ViT-B/32', 'mini'))
    store = EmbeddingStore(folder/'store', shard_size=8)
    return embed(encoder, given['pictures'], 'image', store, batch_size=8, workers=1).tobytes()


def sharding(folder: Path, given: dict) -> bytes:
    "The same pictures as a pool of three shards, saved every four pictures."
    from newsrepro.embedding import blocks, embed, pool_files, read_ids
    embed(given['place']/'pictures', folder/'pool', backbone='ViT-B/32', shards=3, portion=4)
    shards = [(read_ids(path), list(blocks(path))) for path in pool_files(folder/'pool')]
    return b''.join('\n'.join(ids).encode() + rows.tobytes() for ids, parts in shards for rows, _ in parts)


def training(folder: Path, given: dict) -> bytes:
    "A fine-tuning of the mini ViT-B/32 with a checkpoint after each step."
    import torch
    from newsrepro.core.checkpoints import find_backbone
    from newsrepro.methods.fine_tune import fine_tune
    from newsrepro.models.loader import load_encoder
    from newsrepro.models.train import Pairs, Recipe
    draw = torch.Generator().manual_seed(0)
    def pairs(n: int) -> Pairs:
        tokens, ids = torch.zeros(n, 77, dtype=torch.int64), tuple(map(str, range(n)))
        tokens[:, 0], tokens[:, 5] = 1598, 1599
        tokens[:, 1:5] = torch.randint(1, 1500, (n, 4), generator=draw)
        pixels = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=draw)
        return Pairs(pixels, tokens, ids, ids)
    recipe = Recipe(steps=16, batch_size=8, rate=1e-3, warmup=2, keep='loss', validate_every=4)
    start = load_encoder(find_backbone('ViT-B/32', 'mini'))
    tuned, history = fine_tune(start, pairs(32), pairs(8), recipe, folder/'trained', save_seconds=0)
    losses = [(record['loss'], record.get('val_loss')) for record in history]
    return json.dumps([tuned.fingerprint, losses]).encode()


def scoring(folder: Path, given: dict) -> bytes:
    "Every pair scored by the mini ViLT with a journal, a run file, its measures."
    from newsrepro.models.single_stream import Effort, load_vilt, rank_pairs
    from newsrepro.ranking.runs import evaluate_files, write_run
    paths = given['pictures'][:16]
    texts = [f'picture number {n} of many' for n in range(6)]
    effort = Effort(devices=('cpu',), batch_size=4, chunk=4, workers=1)
    scores, places = rank_pairs(load_vilt('mini-vilt'), texts, paths, k=5, journal=folder/'journal.sqlite',
                                effort=effort)
    write_run(folder/'run.tsv', {f'a{n}': [f'i{place}' for place in row] for n, row in enumerate(places)})
    truth, pool = folder/'truth.csv', [f'i{n}' for n in range(len(paths))]
    truth.write_text('article_id,image_id\n' + ''.join(f'a{n},i{n}\n' for n in range(len(texts))))
    measures = evaluate_files(folder/'run.tsv', truth, pool, allow_short=True)
    return scores.tobytes() + (folder/'run.tsv').read_bytes() + json.dumps(measures).encode()


def fetch(folder: Path, given: dict) -> bytes:
    "Images from a server on this machine: files, and what the report says of each."
    from newsrepro.data.fetch import fetch_images, read_report
    from newsrepro.data.fetch_settings import FetchSettings
    place = folder/'collection'
    place.mkdir(exist_ok=True)
    table = ''.join(f'{n},T,i{n},{given["server"]}/{n}.jpg\n' for n in range(60))
    (place/'articles.csv').write_text('article_id,title,image_id,image_url\n' + table)
    fetch_images(place, FetchSettings(allow_private=True, placeholder_urls=60))
    files = [(path.name, path.read_bytes().hex()) for path in sorted((place/'images').iterdir())]
    rows = sorted((key, [row[name] for name in ('url', 'bytes', 'sha256', 'file')])
                  for key, row in read_report(place).items())
    return json.dumps([files, rows]).encode()


NOTEBOOK = [
    ("profile: str = 'mini'  # which checkpoints\ndata: str = 'mini'  # which collection\n"
     "device: str = 'auto'  # where to compute\nseed: int = 0  # of every draw\n"
     "out_dir: str = ''  # where results go\nweights: str = ''  # folder of checkpoints\n"),
    "from pathlib import Path\nout = Path(out_dir)\n(out/'tables').mkdir(exist_ok=True)\n"
    "import time\nfor part in range(10):\n    time.sleep(.05)\n"
    "    _ = (out/f'part-{part}.txt').write_text(str(part)*20_000)\n",
    "total = sum(len((out/f'part-{part}.txt').read_text()) for part in range(10))\n"
    "_ = (out/'tables'/'total.csv').write_text(f'value\\n{total}\\n')\n"]
COMMAND = '''import sys
from functools import partial
from pathlib import Path
from newsrepro import cli
from newsrepro.study import reproduce
from newsrepro.study.registry import Notebook
study = Notebook('1_total', 'toy', 'A total', ('total',)),
reproduce.reproduce = partial(reproduce.reproduce, notebooks=study, folder=Path(sys.argv.pop(1)))
cli.main()'''


def reproduce(folder: Path, given: dict) -> bytes:
    "The command `newsrepro reproduce` on a study of one notebook, in a process of its own."
    place = given['notebooks']
    words = [sys.executable, '-c', COMMAND, str(place), 'reproduce', '--out', str(folder/'report')]
    # no new session: who kills the group kills the command
    done = subprocess.run(words, stdout=subprocess.DEVNULL)
    if done.returncode: os._exit(done.returncode)  # it has said why
    made = [path for path in sorted((folder/'report').rglob('*')) if path.suffix in ('.csv', '.txt')]
    shown = [path for path in made if '.state' not in path.parts]
    return json.dumps([(path.name, path.read_text()) for path in shown]).encode()


def write_notebook(path: Path) -> None:
    "A notebook of code cells, the first of them tagged `parameters`."
    cells = [dict(cell_type='code', id=f'cell-{n}', metadata={} if n else {'tags': ['parameters']},
                  execution_count=None, outputs=[], source=source) for n, source in enumerate(NOTEBOOK)]
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, nbformat=4, nbformat_minor=5, metadata=kernel)))


WORK = {job.__name__: job for job in (embedding, sharding, training, scoring, fetch, reproduce)}


# a run in a process of its own

def child(job, folder: Path, given: dict, before) -> None:
    "What the process does: the work, told as the command line tells it."
    os.setsid()
    errors = os.open(folder.with_name(f'{folder.name}.err'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(errors, 2)
    from newsrepro.core.base import InputError
    if torch := sys.modules.get('torch'): torch.set_num_threads(1)
    try:
        before()
        found = job(folder, given)
        folder.with_name(f'{folder.name}.result').write_bytes(found)
        code = 0
    except (InputError, OSError) as error: code = print(f'error: {error}', file=sys.stderr) or 2
    except BaseException: code = traceback.print_exc() or 1
    sys.stderr.flush()
    os._exit(code)


def start(name: str, folder: Path, given: dict, before=lambda: None):
    "Begin the work in `folder`."
    folder.mkdir(parents=True, exist_ok=True)
    result = folder.with_name(f'{folder.name}.result')
    result.unlink(missing_ok=True)
    result.touch()
    result.chmod(0o666)  # nobody else could make it there
    process = FORK.Process(target=child, args=(WORK[name], folder, given, before))
    process.start()
    return process


def ended(process) -> int | None:
    "Its exit code; None where it is stuck, which ends it."
    process.join(PATIENCE)
    if process.exitcode is not None: return process.exitcode
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def said(folder: Path) -> list[str]:
    "Lines of what a run said on stderr."
    path = folder.with_name(f'{folder.name}.err')
    return path.read_text(errors='replace').splitlines() if path.exists() else []


def result_of(folder: Path) -> str:
    "Digest of what the last run found; empty where it found nothing."
    path = folder.with_name(f'{folder.name}.result')
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() and path.stat().st_size else ''


def descendants(pid: int) -> list:
    "Processes that a run has started."
    import psutil
    try: return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess: return []


# disturbances: each leaves a folder in which the work is done again

class Skip(Exception):
    "This machine cannot do it."


def wait(process, seconds: float) -> bool:
    "Whether it still runs after that time."
    process.join(seconds)
    return process.exitcode is None


def kill(name, folder, given, draw, seconds):
    "`kill -9` at a random moment: the whole group, or one process of it."
    process = start(name, folder, given)
    if not wait(process, draw.uniform(0, seconds)):
        return 'was done'
    one = descendants(process.pid)
    if one and draw.random() < .5:
        try: draw.choice(one).kill()
        except Exception: pass  # it ended meanwhile
        return outcome(process, folder)
    os.killpg(process.pid, signal.SIGKILL)
    for other in one:  # in groups of their own; half of the time they are left to find out by themselves
        if draw.random() < .5:
            try: other.kill()
            except Exception: pass
    process.join()
    return 'killed'


def outcome(process, folder: Path) -> str:
    "How a disturbed run ended, in a word."
    code, lines = ended(process), said(folder)
    if code is None: return 'stuck'
    if code == 0: return 'done'
    if len(lines) > LONGEST: return f'{len(lines)} lines'
    if code < 0: return 'killed'
    if not any('Traceback' in line for line in lines): return 'refused'
    return 'raised, saying why' if re.search(REASONS, lines[-1], re.I) else 'traceback'


@contextmanager
def small_disk(folder: Path, kib: int):
    "A disk of that size at `folder`; yields what makes it large."
    folder.mkdir(parents=True, exist_ok=True)
    mount = lambda options: subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)],
                                           capture_output=True)
    if not shutil.which('mount') or mount(f'size={kib}k').returncode: raise Skip('no disk can be mounted')
    try: yield lambda: mount('remount,size=256m')
    finally: subprocess.run(['umount', '-l', str(folder)], check=True)


def full(name, folder, given, draw, seconds):
    "A disk with room for a part of what is written."
    need = given['bytes'][name]/1024
    with small_disk(folder, max(4, int(draw.uniform(0, 1.1)*need))) as enlarge:
        word = outcome(start(name, folder, given), folder)
        enlarge()
        return word, again(name, folder, given)


def readonly(name, folder, given, draw, seconds):
    "A folder of somebody else, as a user who is not root; half of the time with what was made before."
    if os.geteuid(): raise Skip('only root can become somebody else')
    folder.mkdir(parents=True, exist_ok=True)
    if draw.random() < .5: ended(start(name, folder, given))
    before = sorted(folder.rglob('*'))
    def nobody():
        os.setgid(65534)
        os.setuid(65534)
        os.environ['HOME'] = '/nonexistent'
    word = outcome(start(name, folder, given, nobody), folder)
    return word if sorted(folder.rglob('*')) == before else 'wrote'


def twice(name, folder, given, draw, seconds):
    "Two at once in one folder: both end well, or the second refuses."
    other = folder.with_name(f'{folder.name}-second')
    first = start(name, folder, given)
    wait(first, draw.uniform(0, seconds/2))
    second = FORK.Process(target=child_beside, args=(name, folder, other, given))
    second.start()
    words = outcome(first, folder), outcome(second, other)
    if 'done' not in words: return 'both failed'
    return 'done' if words == ('done', 'done') else next(word for word in words if word != 'done')


def child_beside(name, folder, other, given):
    "The second of two: it works in the first one's folder, and speaks in a file of its own."
    child(lambda place, given: WORK[name](folder, given), other, given, lambda: None)


def clock(name, folder, given, draw, seconds):
    "Killed on the way; then all files come from the future or from 1970, and the clock goes wrong."
    process = start(name, folder, given)
    if wait(process, draw.uniform(0, 1.5*seconds)): os.killpg(process.pid, signal.SIGKILL)
    process.join()
    future = draw.random() < .5
    stamp = time.time() + 10*365*86400 if future else 1
    for path in sorted(folder.rglob('*')): os.utime(path, (stamp, stamp), follow_symlinks=False)
    truth, shift = time.time, draw.uniform(-1, 1)*86400
    def shifted(): time.time = lambda: truth() + shift
    return outcome(start(name, folder, given, shifted), folder)


def memory(name, folder, given, draw, seconds):
    "Address space for a part of what the work takes."
    room = int(draw.uniform(.05, 1)*2**29)
    def limited():
        now = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))
    if name == 'reproduce':  # what it starts is measured from nothing
        room = int(draw.uniform(.1, 2)*2**30)
        limited = lambda: resource.setrlimit(resource.RLIMIT_AS, (room, room))
    return outcome(start(name, folder, given, limited), folder)


def damage(name, folder, given, draw, seconds):
    "Of what a run left (half of the time one that was killed), a file is cut, or a bit of it falls over."
    process = start(name, folder, given)
    if draw.random() < .5 and wait(process, draw.uniform(.3, 1)*seconds):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    # a picture or a table that somebody changes is theirs, and a change of a log changes nothing
    ours = lambda path: path.is_file() and path.suffix not in ('.jpg', '.log') and path.name != 'articles.csv'
    files = [path for path in sorted(folder.rglob('*')) if ours(path) and path.stat().st_size]
    if not files: return 'nothing there'
    path = draw.choice(files)
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < .5: content = content[:place]
    else: content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    word = outcome(start(name, folder, given), folder)
    if word != 'refused': return word
    named = [one for one in files if any(str(one) in line for line in said(folder))]
    for one in named: one.unlink(missing_ok=True)  # as the line says
    return 'refused' if named else 'refused, no file named'


KINDS = dict(kill=kill, full=full, readonly=readonly, twice=twice, clock=clock, memory=memory, damage=damage)
SHARES = dict(embedding=20, sharding=20, training=20, scoring=15, fetch=15, reproduce=10)  # of 100
FINE = {'was done', 'done', 'refused', 'raised, saying why', 'killed', 'nothing there'}


def again(name: str, folder: Path, given: dict) -> str:
    "The same work once more, undisturbed: 'same', or what is wrong."
    code = ended(start(name, folder, given))
    if code is None: return 'stuck'
    if code: return f'failed: {" ".join(said(folder)[-1:])[:200]}'
    return 'same' if result_of(folder) == given['results'][name] else 'other result'


def trial(kind: str, name: str, number: int, given: dict, seed: int) -> tuple[str, str]:
    "One disturbance: how the disturbed run ended, and what the next one found."
    draw = random.Random(f'{seed} {kind} {name} {number}')
    folder = given['place']/f'{kind}-{name}-{number}'
    found = KINDS[kind](name, folder, given, draw, given['seconds'][name])
    word, then = found if isinstance(found, tuple) else (found, again(name, folder, given))
    shutil.rmtree(folder, ignore_errors=True)
    return word, then


def undisturbed(names: list[str], given: dict) -> None:
    "What each work finds, how long it takes and how much it writes."
    for name in names:
        folder = given['place']/f'undisturbed-{name}'
        began = time.perf_counter()
        code = ended(start(name, folder, given))
        given['seconds'][name] = time.perf_counter() - began
        assert code == 0, (name, said(folder))
        given['results'][name] = result_of(folder)
        files = [path for path in folder.rglob('*') if path.is_file()]
        given['bytes'][name] = sum(-(-path.stat().st_size//4096)*4096 for path in files)


@contextmanager
def prepared(names: list[str]):
    "What the works are given, in a folder that goes afterwards."
    from fetch import SERVER
    place = Path(tempfile.mkdtemp(prefix='hardening-'))
    place.chmod(0o755)
    os.environ['NEWSREPRO_CACHE'] = str(place/'cache')
    made = pictures(place/'pictures', 48, seed=0)
    command = [sys.executable, '-c', SERVER.replace('image/jpeg', 'image/png'), '.01', '120', *made[:30]]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    write_notebook(place/'notebooks'/'1_total.ipynb')
    try:
        address = f'http://127.0.0.1:{server.stdout.readline().strip()}'
        yield dict(place=place, pictures=made, server=address, notebooks=place/'notebooks', seconds={},
                   results={}, bytes={})
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(place, ignore_errors=True)


MODULES = dict(embedding='models.store', sharding='embedding', training='methods.fine_tune',
               scoring='models.single_stream', fetch='data.fetch', reproduce='study.reproduce')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trials', type=int, default=100, help='kills; of other kinds a sixth of it each')
    parser.add_argument('--only', choices=KINDS, action='append', help='these kinds alone')
    parser.add_argument('--work', choices=WORK, action='append', help='these works alone')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--json', type=Path, help='write the counts there, too')
    args = parser.parse_args()
    kinds, names = args.only or list(KINDS), args.work or list(WORK)
    rows, faults, began = [], [], time.perf_counter()
    for name in names: import_module(f'newsrepro.{MODULES[name]}')  # once, before the first work begins
    with prepared(names) as given:
        undisturbed(names, given)
        print('| disturbance | work | trials | the disturbed run | same bytes afterwards | faults |\n'
              '|---|---|---:|---|---:|---:|')
        for kind in kinds:
            for name in names:
                trials = round(args.trials*SHARES[name]/100/(1 if kind == 'kill' else 6)) or 1
                words, thens = Counter(), Counter()
                try:
                    for number in range(trials):
                        word, then = trial(kind, name, number, given, args.seed)
                        words[word] += 1
                        thens[then] += 1
                        if word not in FINE or then != 'same': faults.append((kind, name, number, word, then))
                except Skip as why: words[f'skipped: {why}'] += trials
                own = sum(fault[:2] == (kind, name) for fault in faults)
                how = ', '.join(f'{word} {n}' for word, n in words.most_common())
                rows.append(dict(kind=kind, work=name, trials=sum(thens.values()), disturbed=dict(words),
                                 same=thens['same'], faults=own))
                cells = kind, name, sum(thens.values()), how, thens['same'], own
                print('|', ' | '.join(map(str, cells)), '|', flush=True)
    took = time.perf_counter() - began
    count = sum(row['trials'] for row in rows)
    print(f'\n{count} trials, seed {args.seed}, {took:.0f} s, {len(faults)} faults')
    for fault in faults: print('fault:', *fault)
    if args.json:
        found = dict(seed=args.seed, seconds=round(took, 1), trials=count, rows=rows, faults=faults)
        args.json.write_text(json.dumps(found, indent=1) + '\n')
    return bool(faults)


if __name__ == '__main__': sys.exit(main())
