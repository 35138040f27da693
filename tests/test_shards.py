"""Pools of millions, in small: shards that share nothing, kills, damage, Ray, and exact lists from what was
written."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from newsrepro import embedding
from newsrepro.cli import run
from newsrepro.core.base import InputError
from newsrepro.embedding import embed, pool_files, read_ids, search_pool, shard_path, stored_rows
from newsrepro.models.store import content_key
from newsrepro.ranking.one_to_one import best_columns, dual_softmax
from newsrepro.ranking.retrieve import as_unit_rows, ranked_lists

QUICK = dict(backbone='ViT-B/32', shards=2, portion=5, device='cpu')


def drawn(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40 + seed, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


PICTURES = {f'{i % 4}/{i:02}.png': drawn(i) for i in range(36)}
PICTURES |= {f'copies/{i}.png': drawn(0) for i in range(4)}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "The same pictures in a folder, in tar files, in Parquet; one more that ends too early, and a text."
    root = tmp_path_factory.mktemp('sources')
    files = PICTURES | {'broken.png': drawn(40)[:300]}
    for name, raw in (files | {'0/00.txt': b'no picture'}).items():
        (root/'folder'/name).parent.mkdir(parents=True, exist_ok=True)
        (root/'folder'/name).write_bytes(raw)
    (root/'tars').mkdir()
    (root/'parquet').mkdir()
    rows = list(files.items())
    for at, part in enumerate((rows[:15], rows[15:])):
        with tarfile.open(root/'tars'/f'{at}.tar', 'w') as tar:
            for name, raw in [*part, ('0/00.txt', b'no picture')]:
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
        table = pd.DataFrame(part, columns=['image_id', 'image'])
        table.to_parquet(root/'parquet'/f'{at}.parquet')
    return root


@pytest.fixture(scope='module')
def pool(sources, tmp_path_factory):
    "The folder, embedded without disturbance."
    out = tmp_path_factory.mktemp('pools')/'pool'
    return out, embed(sources/'folder', out, **QUICK)


def vectors_of(out, shards=2):
    "Content key -> vector."
    return {key: row for shard in range(shards)
            for key, row in stored_rows(shard_path(out, shard, shards)).items()}


def contents_of(out):
    "Every file of a pool, without the seconds that it took."
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == '.safetensors'}
    for path in out.glob('*.json'):
        facts = json.loads(path.read_text())
        facts.pop('seconds', None)
        files[path.name] = facts
    return files


def never(*arguments, **options): raise AssertionError('encoded again')


def test_what_is_broken_is_named_and_the_rest_is_there(pool):
    out, facts = pool
    assert (facts['pictures'], facts['missing'], facts['made']) == (40, [], [0, 1])
    (left,) = facts['left_out']
    assert left['name'] == 'broken.png' and left['reason']
    ids = [own for path in pool_files(out) for own in read_ids(path)]
    assert sorted(ids) == sorted(PICTURES)


def test_vectors_are_those_of_the_encoder(sources, pool):
    from newsrepro.core.checkpoints import find_backbone
    from newsrepro.models.encoding import encode
    from newsrepro.models.loader import load_encoder
    paths = [str(sources/'folder'/name) for name in PICTURES]
    expected = encode(load_encoder(find_backbone('ViT-B/32', 'mini')), paths, 'image')
    found = vectors_of(pool[0])
    assert (np.stack([found[content_key(path, 'image')] for path in paths]) == expected).all()


@pytest.mark.parametrize('source', ['tars', 'parquet'])
def test_every_source_comes_to_the_same_vectors(source, sources, pool, tmp_path):
    facts = embed(sources/source, tmp_path/'pool', **QUICK)
    assert (facts['pictures'], [one['reason'] for one in facts['left_out']]) == (
        40, [one['reason'] for one in pool[1]['left_out']])
    expected, found = vectors_of(pool[0]), vectors_of(tmp_path/'pool')
    assert found.keys() == expected.keys()
    assert all((found[key] == expected[key]).all() for key in expected)


def test_jobs_one_by_one_and_again(sources, pool, tmp_path, monkeypatch):
    "Each shard by itself, in any order, comes to the files of one run; a second time nothing is encoded."
    for shard in (1, 0): facts = embed(sources/'folder', tmp_path/'pool', shard=shard, **QUICK)
    assert (facts['made'], facts['missing']) == ([0], [])
    assert contents_of(tmp_path/'pool') == contents_of(pool[0])
    monkeypatch.setattr(embedding, 'fill', never)
    before = contents_of(tmp_path/'pool')
    assert embed(sources/'folder', tmp_path/'pool', **QUICK)['pictures'] == 40
    assert contents_of(tmp_path/'pool') == before


def test_a_picture_that_came_is_encoded_alone(sources, pool, tmp_path, monkeypatch):
    shutil.copytree(sources/'folder', tmp_path/'folder')
    out = tmp_path/'pool'
    embed(tmp_path/'folder', out, **QUICK)
    before = contents_of(out)
    (tmp_path/'folder'/'new.png').write_bytes(drawn(41))
    asked, fill = [], embedding.fill

    def noted(encoder, lacking, *given, **options):
        asked.append(lacking)
        return fill(encoder, lacking, *given, **options)

    monkeypatch.setattr(embedding, 'fill', noted)
    assert embed(tmp_path/'folder', out, **QUICK)['pictures'] == 41
    assert [list(lacking.values()) for lacking in asked] == [[str(tmp_path/'folder'/'new.png')]]
    changed = {name for name, content in contents_of(out).items() if content != before[name]}
    assert len(changed) == 2  # the vectors of one shard, and what is said of them


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'no json'])
def test_a_damaged_shard_is_made_again(damage, sources, pool, tmp_path):
    out = tmp_path/'pool'
    shutil.copytree(pool[0], out)
    victim = shard_path(out, 1, 2)
    raw = bytearray(victim.read_bytes())
    raw[len(raw)//2] ^= 16
    if damage == 'cut': victim.write_bytes(raw[:len(raw)//2])
    elif damage == 'flipped': victim.write_bytes(raw)
    else: victim.with_suffix('.json').unlink()
    embed(sources/'folder', out, **QUICK)
    assert contents_of(out) == contents_of(pool[0])


def saved_portions(out):
    return [path for path in out.glob('work/*/*/image/*.safetensors') if path.name[0] != '.']


def test_killed_and_run_again(sources, pool, tmp_path):
    "A job is killed as soon as it has saved a portion; the next one goes on, to the same files."
    out = tmp_path/'pool'
    given = ['embed', sources/'folder', '--out', out, '--backbone', 'ViT-B/32', '--device', 'cpu',
             '--shards', 2, '--portion', 1]
    command = [sys.executable, '-c', 'from newsrepro.cli import main; main()', *map(str, given)]
    job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 120
    while not saved_portions(out) and time.monotonic() < ends and job.poll() is None: time.sleep(.002)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert saved_portions(out) and not shard_path(out, 1, 2).is_file()
    facts = embed(sources/'folder', out, **QUICK)
    assert facts['missing'] == [] and not [path for path in (out/'work').iterdir() if path.is_dir()]
    assert contents_of(out) == contents_of(pool[0])


@pytest.fixture
def ray(monkeypatch):
    "Ray with two processors, for as long as a test."
    # nothing is written to the home, nobody is told, and processes get their turn on a busy machine
    variables = dict(RAY_AUTH_MODE='disabled', RAY_USAGE_STATS_ENABLED='0', RAY_worker_niceness='0')
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    ray = pytest.importorskip('ray', reason='Ray is not installed: pip install "newsrepro[ray]"')
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def kill_a_worker(out, killed):
    "Kill one of Ray's two processes as soon as it has saved something."
    ends = time.monotonic() + 300
    while not saved_portions(out) and time.monotonic() < ends: time.sleep(.002)
    words = lambda process: ' '.join(process.info['cmdline'] or ())
    killed += [one for one in psutil.process_iter(['cmdline']) if 'ShardWorker' in words(one)][:1]
    for one in killed: one.kill()


def test_two_workers_of_ray(sources, pool, ray, tmp_path):
    "Folder and tar files by two processes, one of them killed in the middle: the files of the local run."
    killed = []
    killer = threading.Thread(target=kill_a_worker, args=[tmp_path/'pool', killed])
    killer.start()
    facts = embed(sources/'folder', tmp_path/'pool', engine='ray', workers=2, **QUICK | dict(portion=1))
    killer.join()
    assert len(killed) == 1
    assert (facts['pictures'], facts['made']) == (40, [0, 1])
    assert contents_of(tmp_path/'pool') == contents_of(pool[0])
    tars = embed(sources/'tars', tmp_path/'tars', engine='ray', workers=2, **QUICK)
    embed(sources/'tars', tmp_path/'local', **QUICK)
    assert contents_of(tmp_path/'tars') == contents_of(tmp_path/'local') and tars['pictures'] == 40


def test_what_a_worker_of_ray_refuses_is_one_line(sources, ray, tmp_path):
    raw = (sources/'tars'/'0.tar').read_bytes()
    (tmp_path/'cut.tar').write_bytes(raw[:len(raw)//2 + 100])
    with pytest.raises(InputError, match='cut.tar: a damaged tar'):
        embed(tmp_path/'cut.tar', tmp_path/'pool', engine='ray', **QUICK | dict(shards=1))


def test_without_ray_a_line_says_what_to_install(sources, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)  # as where it is not installed
    with pytest.raises(InputError, match=r'newsrepro\[ray\]'):
        embed(sources/'folder', tmp_path/'pool', engine='ray', **QUICK)


@pytest.mark.parametrize('rows', [1, 7, 2**18])
@pytest.mark.parametrize('temperature', [None, .01, 1.])
def test_lists_are_those_of_the_whole_matrix(temperature, rows, pool):
    "Against the dense float64 formula; the pool has a picture five times, in both shards."
    files = pool_files(pool[0])
    ids = [own for path in files for own in read_ids(path)]
    rng = np.random.default_rng(3)
    matrix = np.concatenate([block for path in files for block, _ in embedding.blocks(path)])
    queries = rng.normal(size=(23, matrix.shape[1])).astype(np.float32)
    scores, names = search_pool(queries, files, 15, temperature, rows=rows)
    if temperature is None:
        expected = ranked_lists(list(range(23)), queries, ids, matrix, 15)
        assert names.tolist() == list(expected.values())
        return
    order = embedding.tie_order(ids)
    cosines = as_unit_rows(queries, 'q').double() @ as_unit_rows(matrix[order], 'c').double().T
    log = dual_softmax(cosines.numpy(), temperature)
    columns = best_columns(log.round(9), 15)  # copies differ in the last digits of a product
    assert names.tolist() == np.array(ids, object)[order][columns].tolist()
    assert np.abs(scores - np.take_along_axis(log, columns, 1)).max() < 1e-5


@pytest.mark.parametrize('changed, said', [
    (['--shards', '3'], 'a pool with shards 2'),
    (['--shards', '2', '--dtype', 'fp16'], 'a pool with dtype fp32'),
    (['--shards', '2', '--backbone', 'RN50'], 'a pool with'),
    (['--shards', '2', '--shard', '2'], '--shard 2: 0 to 1'),
    (['--shards', '0'], '--shards 0'),
    (['--shards', '2', '--profile', 'papr'], '--profile papr'),
    (['--shards', '2', '--weights', 'nowhere'], 'no such folder'),
])
def test_a_mistake_is_one_line(changed, said, sources, pool, capsys):
    given = ['embed', sources/'folder', '--out', pool[0], '--backbone', 'ViT-B/32', '--device', 'cpu']
    given += changed
    assert run(list(map(str, given))) == 2
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1


def test_a_tar_that_was_cut_and_no_pool_at_all(sources, tmp_path):
    raw = (sources/'tars'/'0.tar').read_bytes()
    (tmp_path/'cut.tar').write_bytes(raw[:len(raw)//2 + 100])
    with pytest.raises(InputError, match='cut.tar: a damaged tar'):
        embed(tmp_path/'cut.tar', tmp_path/'pool', **QUICK | dict(shards=1))
    with pytest.raises(InputError, match='at most 2'):
        embed(sources/'tars', tmp_path/'pool', **QUICK | dict(shards=3))
    with pytest.raises(InputError, match='shard 0 of 1 is not finished'): pool_files(tmp_path/'pool')
    with pytest.raises(InputError, match='no pool'): pool_files(sources)
