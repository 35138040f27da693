"""Readers under damaged input: the only outcomes are a right value and `InputError`. Counts them by reader;
whatever else comes is kept as a file.

    python benchmarks/fuzz.py --count 100000 --seed 0
    python benchmarks/fuzz.py --count 5000 --reader image --first 1234    # from the 1234th input on

An input depends on seed, reader and number alone, so each can be made again. Readers run in processes of
their own, with a limit on memory and on time: one that hangs or dies costs its input and no other.
"""
import argparse
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from newsrepro.core.base import InputError

EXTREMES = [b'0', b'-1', b'-0', b'1e309', b'-1e309', b'nan', b'inf', b'9'*30, b'2147483648',
            b'18446744073709551616',
            b'1e-400', b'1_000', '٣'.encode(), b'0x10', b'']
PIECES = [b'\0', b'"', b'""', b"'", b'\r', b'\n', b'\r\n', b'\t', b',', b';', b'\xff', b'\xef\xbb\xbf',
          b'\xff\xfe', b'\xfe\xff',
          b'\x81', b'\xed\xa0\x80', '\u2028'.encode(), '\u0085'.encode(), b'=', b'#', b'{', b'[', b'\\ud800',
          b'..', b'/', b'%s',
          b'null', b'true', b'[]', b'{}', b'A'*3000, b'['*3000]
ENCODINGS = ['utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'cp1252', 'latin-1', 'utf-8-sig', 'utf-7', 'cp037']


def mutate(data: bytes, others: list[bytes], pieces: list[bytes], rng: random.Random) -> bytes:
    "`data` with one damage of a random kind."
    at, to = sorted(rng.randint(0, len(data)) for _ in range(2))
    kind = rng.randrange(13)
    if kind == 0: return data[:at] + bytes([rng.randrange(256)]) + data[at + 1:]
    if kind == 1:
        if at == len(data): return data
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    if kind == 2: return data[:at]
    if kind == 3: return data[:at] + data[to:]
    if kind == 4: return data[:to] + data[at:to]*rng.choice([1, 1, 2, 9]) + data[to:]
    if kind == 5:
        other = rng.choice(others)
        return data[:at] + other[rng.randint(0, len(other)):]
    if kind == 6: return data[:at] + rng.choice(pieces) + data[at:]
    if kind == 7: return data[:at] + rng.choice(pieces) + data[to:]
    if kind == 8:
        numbers = list(re.finditer(rb'-?\d+(?:\.\d+)?', data))
        if not numbers: return data + rng.choice(EXTREMES)
        one = rng.choice(numbers)
        return data[:one.start()] + rng.choice(EXTREMES) + data[one.end():]
    if kind == 9:
        width = rng.choice([1, 2, 4, 8])
        return data[:at] + rng.choice([b'\0', b'\xff', b'\x7f', b'\x80'])*width + data[at + width:]
    if kind == 10: return data.decode('utf-8', 'replace').encode(rng.choice(ENCODINGS), 'replace')
    lines = data.split(b'\n')
    i, j = (rng.randrange(len(lines)) for _ in range(2))
    if kind == 11: lines[i], lines[j] = lines[j], lines[i]
    else: lines.insert(i, lines[j])
    return b'\n'.join(lines)


@dataclass(frozen=True)
class Reader:
    "What is read, and what is true of any value."
    seeds: Callable[[], list[bytes]]  # valid inputs
    read: Callable[[Path], object]  # of a file of that content
    check: Callable[[object], None]  # raises AssertionError for what cannot be a value
    file: str  # its name, in a folder of its own
    around: Callable[[Path], None] = lambda folder: None  # writes what lies beside it
    share: int = 1  # of the inputs
    pieces: tuple[bytes, ...] = ()  # words of the format


def input_of(name: str, number: int, seed: int) -> bytes:
    "The `number`th input of a reader; the first ones are the valid inputs themselves."
    seeds, reader = seeds_of(name), READERS[name]
    if number < len(seeds): return seeds[number]
    rng = random.Random(f'{seed} {name} {number}')
    data = rng.choice(seeds)
    for _ in range(rng.choice([1, 1, 2, 3, 5])): data = mutate(data, seeds, PIECES + [*reader.pieces]*8, rng)
    return data


@cache
def seeds_of(name: str) -> list[bytes]: return READERS[name].seeds()


def is_text(value: str) -> bool:
    "Whether every string that is kept can be written again."
    return isinstance(value, str) and not re.search('[\ud800-\udfff]', value)


# run files

def run_seeds() -> list[bytes]:
    ids = [f'i{k}' for k in range(5)]
    plain = ''.join('\t'.join([f'a{n}', *ids[n:], *ids[:n]]) + '\n' for n in range(3))
    return [plain.encode(), ('articleID\tiid1\tiid2\tiid3\n1000265260\t900001\t900002\t900003\n').encode(),
            '\ufeff"https://e.org/ü,1"\tA0\t"B\t1"\r\nhttps://e.org/2\tB1\r\n'.encode()]


def read_run_file(path: Path):
    from newsrepro.ranking.runs import read_run
    return read_run(path, shortest=1)


def check_run(run) -> None:
    assert run and all(is_text(article) and article and article == article.strip() for article in run)
    for images in run.values():
        assert 1 <= len(images) <= 100 == 100 and len(set(images)) == len(images)
        assert all(is_text(image) and image and image == image.strip() for image in images)


# tables

def table_seeds() -> list[bytes]:
    return ['article_id,title,image_id\n1,"Rain, in Köln",a\n2,Snow,b\n'.encode(),
            'article\ttitle\ttext\tiid\n512345678\tDie „Bild“\t"zwei\nZeilen"\t900001\n'.encode('utf-8-sig'),
            'text;translation\nHund;dog\nKatze;cat\n'.encode('utf-16'),
            'a,text\n1,KÃ¶ln\n2,Münze\n'.encode('cp1252', 'ignore')]


def read_any_table(path: Path):
    from newsrepro.data.tables import read_table
    return read_table(path)


def check_table(found) -> None:
    table, notes = found
    assert table.columns.is_unique and all(map(is_text, table.columns)) and all(map(is_text, notes))
    for column in table: assert all(map(is_text, table[column]))
    assert table.index.is_monotonic_increasing and table.index.is_unique


def parquet_seeds() -> list[bytes]:
    import pandas as pd
    table = pd.DataFrame(dict(article_id=[1, 2], title=['Rain', None],
                              when=pd.to_datetime(['2022-11-05', None]), share=[.5, math.nan]))
    def written(**options):
        file = io.BytesIO()
        table.to_parquet(file, **options)
        return file.getvalue()
    return [written(), written(compression=None, index=True)]


def translation_seeds() -> list[bytes]:
    return ['text,translation\nHund,dog\nKatze,cat\n'.encode(),
            'translation\ttext\nhound\t"Hund\nund Katze"\n'.encode()]


def read_translation_table(path: Path):
    from newsrepro.text.language import read_translations
    return read_translations(path)


def check_translations(found) -> None:
    assert isinstance(found, dict) and all(is_text(text) and is_text(told) for text, told in found.items())


def truth_seeds() -> list[bytes]:
    return [b'article_id,image_id\na,i\nb,j\n',
            b'article\taid\turl\timg\tiid\n512345678\t700001\thttps://e.org/1\tx\t900001\n']


def read_truth_table(path: Path):
    from newsrepro.ranking.runs import read_truth
    return read_truth(path)


def check_truth(truth) -> None:
    assert truth.image_of and all(article and image for article, image in truth.image_of.items())
    assert set(truth.alias.values()) <= set(truth.image_of) and set(truth.image_of.values()) <= truth.pool


# collections and pictures

def picture(kind: str, mode: str = 'RGB', size: tuple[int, int] = (9, 7), **options) -> bytes:
    from PIL import Image
    file, image = io.BytesIO(), Image.effect_noise(size, 90).convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


def picture_seeds() -> list[bytes]:
    return [picture('JPEG'),
            picture('JPEG', progressive=True,
                    exif=b'Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0'),
            picture('PNG', 'RGBA'),
            picture('PNG', 'P'), picture('PNG', 'I;16'), picture('GIF', 'P'), picture('WEBP'),
            picture('WEBP', 'RGBA', lossless=True), picture('BMP'),
            picture('TIFF'), picture('TIFF', 'CMYK', compression='tiff_lzw'), picture('PPM'),
            picture('JPEG', 'CMYK'), picture('JPEG2000')]


def read_picture(path: Path):
    from newsrepro.data.pictures import open_image
    return open_image(path)


def check_picture(image) -> None:
    assert image.mode == 'RGB' and min(image.size) >= 1 and len(image.tobytes()) == 3*image.width*image.height


def beside_articles(folder: Path) -> None:
    (folder/'images').mkdir()
    for name in 'ab': (folder/'images'/f'{name}.png').write_bytes(picture('PNG'))


def beside_picture(folder: Path) -> None:
    (folder.parent/'articles.csv').write_text('article_id,title,image_id\n1,Rain,a\n2,Snow,b\n')


def collection_seeds() -> list[bytes]:
    full = ('article_id,title,text,image_id,split,dataset,date,url,lang\n'
            '1,Rain,It rains.,a,train,EU/US,2022-11-05,https://e.org/1,en\n'
            '2,Schnee,Es schneit.,b,test,EU/US,5.11.2022,,de\n')
    return [full.encode(),
            b'article_id,title,image_id\n1,Rain,a\n2,Snow,b\n',
            b'article\ttitle\ttext\tiid\n512345678\tA\tB\ta\n512345679\tA\tB\tb\n',
            b'article_id,article_title,image_id,date_published\n1,A,a,2025-01-01\n2,B,b,2025-01-02\n']


def read_whole_collection(path: Path):
    from newsrepro.data.layouts import check_data, read_collection
    folder = path.parent if path.parent.name != 'images' else path.parent.parent
    return read_collection(folder), check_data(folder)


def check_collection(found) -> None:
    collection, told = found
    assert set(collection.articles.split) <= {'train', 'test'}
    states = {'ok', 'missing', 'broken', 'oversized', 'extreme', 'outside'}
    assert set(collection.images.status) <= states
    assert sum(part['articles'] for part in told['splits'].values()) == len(collection.articles)
    assert not collection.articles.duplicated(['dataset', 'split', 'article_id']).any()
    assert all(collection.articles.article_id != '')
    assert all(map(is_text, told['problems'])) and len(collection.fingerprint) == 64
    json.dumps(told)


# checkpoints

def weight_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save
    torch.manual_seed(0)
    state, model = {'a.weight': torch.randn(3, 2), 'b': torch.arange(4)}, torch.nn.Linear(2, 2)
    def pickled(value, **options):
        file = io.BytesIO()
        torch.save(value, file, **options)
        return file.getvalue()
    scripted = io.BytesIO()
    with warnings.catch_warnings(action='ignore'): torch.jit.save(torch.jit.script(model), scripted)
    return [save(state), pickled(state), pickled({'state_dict': state}),
            pickled(state, _use_new_zipfile_serialization=False),
            save(state), save({'h': torch.ones(2, dtype=torch.float16)}), scripted.getvalue()]


def read_checkpoint(path: Path):
    from newsrepro.models.weights import read_weights
    return read_weights(path)


def check_weights(state) -> None:
    import torch
    assert isinstance(state, dict) and all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                           for key, value in state.items())
    assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())
    for value in state.values(): value.sum()  # its bytes are there


# reports

ROWS = ('dataset,split,run,metric,value,ci_low,ci_high,n,published,difference,'
        'profile,data,checkpoint,seed,commit\n')
TABLE = (ROWS + 'RT,test,RN50,R@1,0.25,0.2,0.3,40,,,mini,x:1,c:1,0,abc\n'
         'RT,test,RN50,"p",0.04,,,40,0.5,-.46,mini,x:1,,0,abc\n')


def read_report_table(path: Path):
    from newsrepro.study.verify import verify
    folder = path.parent.parent if path.parent.name == 'tables' else path.parent
    return verify(folder, Path(folder.parent/'other'))


def beside_report(folder: Path) -> None:
    root = folder.parent if folder.name == 'tables' else folder
    for place in (root, root.parent/'other'):
        (place/'tables').mkdir(parents=True, exist_ok=True)
        (place/'tables'/'zhang2022-table-2.csv').write_text(TABLE)
        (place/'manifest.json').write_bytes(manifest_seeds()[0])


def manifest_seeds() -> list[bytes]:
    record = {'notebooks': {'11_clip_sweep': {'command': 'newsrepro reproduce', 'seconds': 1.5}},
              'libraries': {'torch': '2.9'}, 'device': 'cpu', 'platform': 'Linux'}
    return [json.dumps(record, indent=1).encode(), json.dumps({'libraries': None, 'notebooks': {}}).encode()]


def check_verified(found) -> None:
    verdicts = ('identical', 'close', 'differs', 'missing')
    assert all(isinstance(found[verdict], int) for verdict in verdicts)
    for verdict in verdicts:
        assert found[verdict] == sum(counts[verdict] for counts in found['tables'].values())
    assert len(found['worst']) <= 10 and all(one['verdict'] in ('differs', 'missing')
                                             for one in found['worst'])
    json.dumps(found)


# settings

PARAMETERS = '''profile: str = 'mini'  # which checkpoints
seed: int = 0  # seed of every draw, in [0, inf)
rate: float = 1e-4  # learning rate, in (0, 1)
shares: str = '0.25,0.5'  # shares of the training part (empty: none), in (0, 1)
depths: str = '5,10'  # how many are re-ranked, in [1, inf)
part: str = 'title'  # what is read, one of title, paragraph-starts, full
exact: bool = True  # no short cuts
'''


def notebook_seeds() -> list[bytes]:
    cell = dict(cell_type='code', id='params', metadata=dict(tags=['parameters']), execution_count=None,
                outputs=[], source=PARAMETERS)
    other = dict(cell_type='markdown', id='title', metadata={}, source=['# A\n', '> b'])
    return [json.dumps(dict(cells=cells, nbformat=4, nbformat_minor=5, metadata={}), indent=1).encode()
            for cells in ([other, cell], [cell], [other])]


def read_parameters(path: Path):
    from newsrepro.study.registry import notebook_parameters
    return notebook_parameters.__wrapped__(path)


def check_parameters(found) -> None:
    kinds = {'str': str, 'int': int, 'float': float, 'bool': bool}
    assert all(name.isidentifier() and type(p.default) is kinds[p.kind] for name, p in found.items())


def source_seeds() -> list[bytes]: return [PARAMETERS.encode()]


def read_source(path: Path):
    from newsrepro.study.registry import parse_parameters
    return parse_parameters(path.read_bytes().decode('utf-8', 'surrogateescape'))


def set_seeds() -> list[bytes]:
    return [f'1_toy.{text}'.encode() for text in ('seed=7', 'rate=.5', 'shares=0.1,0.9', 'depths=5, 10',
                                                  'part=full', 'exact=no', 'profile=a=b')]


def beside_set(folder: Path) -> None: (folder/'1_toy.ipynb').write_bytes(notebook_seeds()[0])


def read_set(path: Path):
    from newsrepro.study.registry import Notebook, check_value, notebook_parameters
    from newsrepro.study.plan import parse_set
    text = path.read_bytes().decode('utf-8', 'surrogateescape')  # as the system hands arguments over
    _, name, value = parse_set(text, [Notebook('1_toy', 'zhang2022', 'a toy', ())], path.parent)
    return name, check_value('1_toy', notebook_parameters(path.parent/'1_toy.ipynb')[name], value)


def check_set(found) -> None:
    name, value = found
    fits = dict(seed=lambda: type(value) is int and value >= 0, rate=lambda: 0 < value < 1,
                part=lambda: value in ('title', 'paragraph-starts', 'full'),
                exact=lambda: type(value) is bool, profile=lambda: False,
                shares=lambda: all(0 < float(x) < 1 for x in value.split(',') if x.strip()),
                depths=lambda: all(int(x) >= 1 for x in value.split(',') if x.strip()))
    assert fits[name]()


# what servers answer

def header_seeds() -> list[bytes]:
    return [b'120', b'Wed, 21 Oct 2026 07:28:00 GMT', b'0.5', b'Wed, 21 Oct 2026 07:28:00 +0100']


def read_header(path: Path):
    from newsrepro.data.fetch import retry_after
    return retry_after(path.read_bytes().decode('latin-1'), 1.8e9)


def check_header(seconds) -> None: assert seconds is None or math.isfinite(seconds) and seconds >= 0


def url_seeds() -> list[bytes]:
    return [b'https://e.org/a.jpg?x=1&amp;y=2', b'//host/x.jpg', 'https://müller.de/ä ö.png#f'.encode(),
            b'http://[::1]:80/a', b'http://user:pw@e.org:8080/../x.jpg']


def read_url(path: Path):
    from newsrepro.data.fetch import Dropped, checked_url
    try: return checked_url(path.read_bytes().decode('utf-8', 'replace'))
    except Dropped as error:
        assert error.outcome in ('bad_url', 'bad_address')
        raise InputError(str(error)) from None


def check_url(url) -> None: assert str(url).startswith(('http://', 'https://')) and str(url).isascii()


READERS = {
    'run': Reader(run_seeds, read_run_file, check_run, 'run.tsv', share=20,
                  pieces=(b'\t', b'articleID', b'header', b'i1', b'a1\t')),
    'table': Reader(table_seeds, read_any_table, check_table, 'table.csv', share=10,
                    pieces=(b'article_id', b'"', b'title', 'Ã¶'.encode())),
    'parquet': Reader(parquet_seeds, read_any_table, check_table, 'table.parquet', share=5,
                      pieces=(b'PAR1',)),
    'translations': Reader(translation_seeds, read_translation_table, check_translations, 'told.csv', share=5,
                           pieces=(b'text', b'translation')),
    'truth': Reader(truth_seeds, read_truth_table, check_truth, 'truth.tsv', share=5,
                    pieces=(b'article_id', b'image_id', b'512345678')),
    'collection': Reader(collection_seeds, read_whole_collection, check_collection, 'articles.csv',
                         beside_articles, 5, (b'test', b'train', b'../', b'iid', b'split')),
    'picture of a collection': Reader(picture_seeds, read_whole_collection, check_collection, 'images/a.png',
                                      beside_picture, 5),
    'image': Reader(picture_seeds, read_picture, check_picture, 'a.png', share=15,
                    pieces=(b'IHDR', b'iCCP', b'eXIf', b'\xff\xe1', b'\xff\xe2', b'VP8 ', b'8BPS')),
    'checkpoint': Reader(weight_seeds, read_checkpoint, check_weights, 'model.pt', share=8,
                         pieces=(b'ctorch\n', b'cos\nsystem\n', b'F32', b'data_offsets', b'PK\3\4')),
    'report': Reader(lambda: [TABLE.encode()], read_report_table, check_verified,
                     'report/tables/zhang2022-table-2.csv', beside_report, 4, (b'nan', b'inf', b'p')),
    'manifest': Reader(manifest_seeds, read_report_table, check_verified, 'report/manifest.json',
                       beside_report, 4, (b'"notebooks"', b'"libraries"', b'5', b'[1]', b'"x"')),
    'notebook': Reader(notebook_seeds, read_parameters, check_parameters, 'a.ipynb', share=3,
                       pieces=(b'"cells"', b'"source"', b'"tags"')),
    'parameters': Reader(source_seeds, read_source, check_parameters, 'source.txt', share=4,
                         pieces=(b': int = ', b'  # in [1, inf)', b'# one of a, b', b'(')),
    'set': Reader(set_seeds, read_set, check_set, 'set.txt', beside_set, 4,
                  (b'=', b'.', b'seed', b'inf', b'nan', b',')),
    'header': Reader(header_seeds, read_header, check_header, 'header.txt', share=1,
                     pieces=(b'GMT', b'Wed, ')),
    'url': Reader(url_seeds, read_url, check_url, 'url.txt', share=2,
                  pieces=(b'http://', b'&amp;', b'%00', b'@', b':99999', b'[', b']')),
}


# running

TIME, MEMORY = 20, 6*2**30  # seconds an input, bytes of address space beyond what is there when it starts


class TooLong(BaseException):
    "No answer in `TIME` seconds; not an `Exception`, so that no reader takes it for damage."


def outcome_of(reader: Reader, path: Path,
               data: bytes) -> tuple[str, str]:  # 'value', 'refused' or what went wrong; where
    "Read `data` and say what came of it."
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_REAL, TIME)
    try: value = reader.read(path)
    except InputError as error:
        if len(str(error).splitlines()) == 1: return 'refused', ''
        return 'refused in several lines', str(error)[:200]
    except TooLong: return 'hangs', ''
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)
        own = [entry for entry in frame if 'newsrepro' in entry.filename] or frame
        return type(error).__name__, f'{Path(own[-1].filename).name} {own[-1].name}: {str(error)[:120]!r}'
    finally: signal.setitimer(signal.ITIMER_REAL, 0)
    try: reader.check(value)
    except Exception as error:
        return 'wrong value', f'{traceback.extract_tb(error.__traceback__)[-1].line} {str(error)[:80]}'
    return 'value', ''


def work(name: str, first: int, end: int, seed: int, at, found) -> None:
    "Read inputs `first` to `end`; says in `at` which one it is at, and in `found` how many ended how."
    def too_long(*_): raise TooLong
    signal.signal(signal.SIGALRM, too_long)
    warnings.simplefilter('ignore')
    reader, folder = READERS[name], Path(tempfile.mkdtemp(prefix='fuzz-'))
    path = folder/'place'/reader.file
    path.parent.mkdir(parents=True)
    reader.around(path.parent)
    for data in seeds_of(name)[:1]: outcome_of(reader, path, data)  # imports what it needs
    pages = int(Path('/proc/self/statm').read_text().split()[0]) if Path('/proc').exists() else 0
    used = pages*resource.getpagesize()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff and others talk of each damage
    if used: resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    counts = Counter()
    try:
        for number in range(first, end):
            at.value = number
            kind, where = outcome_of(reader, path, input_of(name, number, seed))
            counts[kind] += 1
            if kind not in ('value', 'refused'): found.send((number, kind, where))
    finally:
        found.send(counts)
        shutil.rmtree(folder, ignore_errors=True)


def fuzz(name: str, count: int, seed: int = 0, first: int = 0) -> tuple[Counter, list[tuple[int, str, str]]]:
    "Outcomes of `count` inputs, and those that are neither a value nor a refusal: number, kind, where."
    context, counts, findings = multiprocessing.get_context('spawn'), Counter(), []
    end = first + count
    while first < end:
        at, (ours, theirs) = context.Value('l', first), context.Pipe(False)
        process = context.Process(target=work, args=(name, first, min(end, first + 20_000), seed, at, theirs))
        process.start()
        theirs.close()
        last = min(end, first + 20_000)
        try:
            while True:
                message = ours.recv()
                if isinstance(message, Counter): counts += message
                else: findings.append(message)
        except EOFError: process.join()
        if process.exitcode:  # what it had counted is lost with it
            counts += Counter({'value': 0, 'not counted': at.value - first, 'dies': 1})
            findings.append((at.value, 'dies', f'exit code {process.exitcode}'))
            last = at.value + 1
        first = last
    return counts, findings


def shares(count: int, names: list[str]) -> dict[str, int]:
    "Inputs by reader."
    whole = sum(READERS[name].share for name in names)
    return {name: max(1, round(count*READERS[name].share/whole)) for name in names}


def keep(folder: Path, name: str, number: int, seed: int) -> Path:
    "Write a reproducing file."
    path = folder/f'{name.replace(" ", "-")}-{seed}-{number}-{Path(READERS[name].file).name}'
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(input_of(name, number, seed))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=100_000, help='inputs of all readers together')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--first', type=int, default=0, help='number of the first input of a reader')
    parser.add_argument('--reader', choices=list(READERS), action='append', help='only this one; repeatable')
    parser.add_argument('--jobs', type=int, default=min(2, os.cpu_count() or 1), help='processes')
    parser.add_argument('--out', type=Path, default=Path('fuzz-findings'),
                        help='folder for reproducing files')
    args = parser.parse_args()
    started, wanted = time.time(), shares(args.count, args.reader or list(READERS))
    print('| reader | inputs | value | refused | other |\n|---|---|---|---|---|', flush=True)
    bad = total = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {name: pool.submit(fuzz, name, count, args.seed, args.first) for name, count in wanted.items()}
        told = []
        for name, job in jobs.items():
            counts, findings = job.result()
            print(f'| {name} | {wanted[name]:,} | {counts["value"]:,} | {counts["refused"]:,} '
                  f'| {len(findings):,} |', flush=True)
            bad, total = bad + len(findings), total + wanted[name]
            kinds = Counter((kind, where.partition(':')[0]) for _, kind, where in findings)
            for (kind, place), n in kinds.most_common():
                number, where = next((number, where) for number, k, where in findings
                                     if (k, where.partition(':')[0]) == (kind, place))
                kept = keep(args.out, name, number, args.seed)
                told.append(f'{name}: {kind} ({n} times) {where}\n  {kept}')
    print(f'\n{total:,} inputs, seed {args.seed}: {bad:,} neither a value nor refused; '
          f'{time.time() - started:.0f} s in {args.jobs} processes')
    print(*told, sep='\n')
    return int(bool(bad))


if __name__ == '__main__': raise SystemExit(main())
