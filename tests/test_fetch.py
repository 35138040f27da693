"""Images by URL against a server on loopback that does everything a bad one may do; each case must end in
its row."""
import asyncio
import base64
import csv
import gzip
import io
import json
import os
import random
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from textwrap import dedent

import httpcore
import numpy as np
import pytest
import trustme
from PIL import Image

from newsrepro.core.base import InputError
from newsrepro.data.layouts import check_data, read_collection
from newsrepro.data.fetch import (COLUMNS, JOURNAL, LOCK, OUTCOMES, REPORT, Dropped, PublicBackend,
                                  checked_url, fetch_images, plan, read_report, retry_after, summary,
                                  write_report)
from newsrepro.data.fetch_settings import FetchSettings

QUICK = dict(timeout=1, deadline=3, retries=1, max_wait=2, allow_private=True, max_bytes=2**20)
PUBLIC = '93.184.215.14'


def picture(kind='JPEG', size=(60, 40), colour='red', **options) -> bytes:
    Image.new('RGB', size, colour).save(raw := io.BytesIO(), kind, **options)
    return raw.getvalue()


NOISE = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)).save(NOISE, 'JPEG')
GOOD = NOISE.getvalue()


def plain(body=b'', status='200 OK', **headers) -> bytes:
    lines = [f'HTTP/1.1 {status}', f'Content-Length: {len(body)}',
             *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return '\r\n'.join(lines).encode() + b'\r\n\r\n' + body


class Server:
    "An HTTP server that is told byte by byte what to say."
    def __init__(self, context=None, pace=0.):
        self.asked, self.heard, self.times, self.pace, self.context = Counter(), [], [], pace, context
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        self.thread.start()
        self.ready.wait()
        self.url = f'http://127.0.0.1:{self.port}'

    async def serve(self):
        self.loop, self.stop, self.open = asyncio.get_running_loop(), asyncio.Event(), 0
        server = await asyncio.start_server(self.client, '127.0.0.1', 0, ssl=self.context, backlog=500)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.stop.wait()

    def close(self):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()

    async def client(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b'\r\n\r\n')).decode()
                path = head.split()[1]
                self.asked[path] += 1
                self.heard.append(head)
                self.times.append((time.monotonic(), path))
                await asyncio.sleep(self.pace)
                if not await self.answer(path.strip('/').split('/')[0], path, writer): break
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError, ssl.SSLError): pass
        finally: writer.close()

    async def chunks(self, writer, piece, pause, head=b''):
        writer.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n' + head + b'\r\n')
        while True:
            writer.write(b'%x\r\n' % len(piece) + piece + b'\r\n')
            await writer.drain()
            await asyncio.sleep(pause)

    async def answer(self, what, path, writer) -> bool:  # whether the connection stays open
        first = self.asked[path] == 1
        if what == 'silent': await asyncio.sleep(30)
        if what == 'slow-head':
            for byte in plain(GOOD)[:300]:
                writer.write(bytes([byte])); await writer.drain(); await asyncio.sleep(.1)
        if what == 'drip': await self.chunks(writer, b'x', .05)
        if what == 'endless': await self.chunks(writer, bytes(2**16), 0)
        if what == 'reset':
            writer.transport.abort()
            return False
        said = {
            'gone': plain(b'none', '410 Gone'), 'missing': plain(b'none', '404 Not Found'),
                'forbidden': plain(b'', '403 Forbidden'), 'empty': plain(b''),
            'broken-once': plain(b'', '500 Oops') if first else plain(GOOD),
                'unavailable-once': plain(b'', '503 Busy') if first else plain(GOOD),
            'limited-once': plain(b'', '429 Slow down', Retry_After=2) if first else plain(GOOD),
                'limited': plain(b'', '429 Slow down', Retry_After=0),
            'limited-long': plain(b'', '503 Later', Retry_After=86400),
            'page': plain(b'<html><body>Not here</body></html>', Content_Type='image/jpeg'),
                'half': plain(GOOD[:len(GOOD)//2]),
            'cut': plain(GOOD).replace(str(len(GOOD)).encode(), str(len(GOOD) + 999).encode(), 1),
                'cut-open': b'HTTP/1.1 200 OK\r\n\r\n' + GOOD[:len(GOOD)//2],
            'open': b'HTTP/1.1 200 OK\r\n\r\n' + GOOD, 'bomb': plain(BOMB),
                'huge': b'HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n' + GOOD,
            'loop': plain(b'', '302 Found', Location='/loop2'),
                'loop2': plain(b'', '302 Found', Location='/loop'),
            'chain': plain(b'', '301 Moved', Location=path + '/x'),
                'moved': plain(b'', '308 Moved', Location='good'), 'nowhere': plain(b'', '302 Found'),
            'to-file': plain(b'', '302 Found', Location='file:///etc/passwd'),
                'to-loopback': plain(b'', '302 Found', Location=f'http://127.0.0.1:{self.port}/good'),
            'to-other': plain(b'', '302 Found', Location=f'http://other.example:{self.port}/good'),
                'to-metadata': plain(b'', '302 Found', Location='http://[::ffff:169.254.169.254]/latest'),
            'gzip': plain(gzip.compress(GOOD), Content_Encoding='gzip'),
                'gzip-bomb': plain(GZIP_BOMB, Content_Encoding='gzip'),
            'brotli': plain(b'xx', Content_Encoding='br'), 'garbage': b'220 smtp.example ESMTP\r\n',
                'png': plain(PNG, Content_Type='image/jpeg'),
        }.get(what) or plain(GOOD)
        writer.write(said)
        await writer.drain()
        return what not in ('cut', 'cut-open', 'open', 'huge', 'garbage')


Image.new('1', (12000, 12000)).save(raw := io.BytesIO(), 'PNG')
BOMB = raw.getvalue()  # 144 million pixels in 18 KB
GZIP_BOMB, PNG = gzip.compress(bytes(2**25)), picture('PNG')


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def collection(folder: Path, urls: dict[str, str]) -> Path:
    "A plain collection whose images have these URLs."
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'articles.csv', 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([('article_id', 'title', 'image_id', 'image_url'),
                                    *((n, f'Title {n}', i, url) for n, (i, url) in enumerate(urls.items()))])
    return folder


def by_id(folder: Path) -> dict[str, dict]:
    return {image: row for (_, image), row in read_report(folder).items()}


def mapped(server, names=('news.example', 'other.example')) -> PublicBackend:
    """A backend to which some names are public, and whose way to their address ends at `server`; it counts
    what it dials."""
    class Wire(httpcore.AnyIOBackend):
        dialled = []
        async def connect_tcp(self, host, port, *rest, **more):
            self.dialled.append(host)
            address = '127.0.0.1' if host == PUBLIC else host
            return await super().connect_tcp(address, server.port, *rest, **more)
    async def resolve(host, port): return [PUBLIC] if host in names else [host.strip('[]')]
    return PublicBackend(resolve=resolve, network=Wire())


CASES = dict(good='fetched', open='fetched', moved='fetched', gzip='fetched', png='fetched', missing='gone',
             gone='gone', forbidden='refused', nowhere='refused', brotli='refused',
             page='not_image', empty='not_image', half='damaged', bomb='too_large', huge='too_large',
             endless='too_large', loop='redirects', chain='redirects')
CASES |= {'gzip-bomb': 'too_large', 'to-file': 'redirects', 'broken-once': 'fetched',
          'unavailable-once': 'fetched', 'limited-once': 'fetched', 'limited': 'busy',
          'limited-long': 'busy', 'silent': 'timeout', 'drip': 'timeout', 'slow-head': 'timeout',
          'cut': 'connection', 'cut-open': 'connection', 'reset': 'connection', 'garbage': 'connection'}


def test_every_case_ends_in_its_row(server, tmp_path):
    folder = collection(tmp_path/'c', {what: f'{server.url}/{what}' for what in CASES})
    began = time.monotonic()
    found = fetch_images(folder, FetchSettings(**QUICK, jobs=16, per_host=16))
    assert time.monotonic() - began < 20
    rows = by_id(folder)
    assert {what: row['status'] for what, row in rows.items()} == CASES
    assert all(bool(row['reason']) != (row['status'] == 'fetched') for row in rows.values())
    kept = [what for what, outcome in CASES.items() if outcome == 'fetched']
    names = {f"{what}.{'png' if what == 'png' else 'jpg'}" for what in kept}
    assert {p.name for p in (folder/'images').iterdir()} == names
    assert (folder/'images'/'good.jpg').read_bytes() == (folder/'images'/'gzip.jpg').read_bytes() == GOOD
    good = [rows['good'][column] for column in ('width', 'height', 'bytes', 'http_status', 'file')]
    assert good == ['120', '80', str(len(GOOD)), '200', 'images/good.jpg']
    assert '10000000000 bytes announced' in rows['huge']['reason']
    assert '12000 x 12000 pixels' in rows['bomb']['reason'] and '404' in rows['missing']['reason']
    assert found['have'] + found['dropped'] + found['waiting'] == found['images'] == len(CASES)
    splits = check_data(folder)['splits'].values()  # a split is made
    assert sum(split['with_image'] for split in splits) == len(kept)
    # a passing failure is tried as often as allowed, a lasting one once; what asks to come back tomorrow, not
    assert {what: server.asked[f'/{what}'] for what in ('missing', 'page', 'half', 'huge', 'silent', 'cut',
                                                        'reset', 'limited', 'limited-long')} == \
           dict(missing=1, page=1, half=1, huge=1, silent=2, cut=2, reset=2, limited=2) | {'limited-long': 1}


def test_second_run_asks_only_for_what_may_have_passed(server, tmp_path):
    folder = collection(tmp_path/'c', {what: f'{server.url}/{what}' for what in CASES
                                       if what not in ('endless', 'silent', 'drip', 'slow-head')})
    fetch_images(folder, FetchSettings(**QUICK))
    server.asked.clear()
    found = fetch_images(folder, FetchSettings(**QUICK | dict(retries=0)))
    assert set(server.asked) == {f'/{what}' for what, outcome in CASES.items()
                                 if OUTCOMES[outcome][0] == 'again' and what in by_id(folder)}
    assert found['outcomes']['present'] == list(CASES.values()).count('fetched')
    server.asked.clear()
    fetch_images(folder, FetchSettings(**QUICK | dict(retries=0)), retry_failed=True)
    assert {'/missing', '/page', '/huge'} <= set(server.asked) and '/good' not in server.asked


def test_only_public_addresses_are_dialled(server, tmp_path):
    "The redirect of a public server to loopback or to a cloud's metadata is refused, and no byte goes there."
    urls = {what: f'http://news.example/{what}' for what in ('good', 'to-loopback', 'to-metadata', 'to-file')}
    urls |= {'direct': f'{server.url}/good', 'six': 'http://[::1]/good'}
    folder, backend = collection(tmp_path/'c', urls), mapped(server)
    fetch_images(folder, FetchSettings(**QUICK | dict(allow_private=False)), backend=backend)
    rows = by_id(folder)
    refused = dict.fromkeys(('to-loopback', 'to-metadata', 'direct', 'six'), 'bad_address')
    outcomes = {'good': 'fetched', 'to-file': 'redirects'} | refused
    assert {i: row['status'] for i, row in rows.items()} == outcomes
    assert set(backend.network.dialled) == {PUBLIC}
    assert server.asked['/good'] == 1
    found = fetch_images(folder, FetchSettings(**QUICK))  # now they may be asked, without --retry-failed
    assert by_id(folder)['direct']['status'] == 'fetched' and found['asked'] == 4


def test_a_name_that_changes_its_address_is_checked_for_each_connection(server, tmp_path):
    backend, answers = mapped(server), iter([PUBLIC])
    async def resolve(host, port): return [next(answers, '127.0.0.1')]
    backend.resolve = resolve
    folder = collection(tmp_path/'c', {'a': 'http://news.example/open/1',
                                       'b': 'http://news.example/open/2'})  # each closes its connection
    fetch_images(folder, FetchSettings(**QUICK | dict(allow_private=False), per_host=1), backend=backend)
    assert [row['status'] for row in by_id(folder).values()].count('bad_address') == 1
    assert backend.network.dialled == [PUBLIC]


def test_tls_verifies_the_name_although_an_address_is_dialled(tmp_path, monkeypatch):
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert('news.example').configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path/'authority.pem')
    monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path/'authority.pem'))
    server = Server(context)
    try:
        folder = collection(tmp_path/'c',
                            {'right': 'https://news.example/good', 'wrong': 'https://other.example/good'})
        fetch_images(folder, FetchSettings(**QUICK | dict(allow_private=False)), backend=mapped(server))
    finally: server.close()
    rows = by_id(folder)
    assert (rows['right']['status'], rows['wrong']['status']) == ('fetched', 'connection')
    assert 'CERTIFICATE_VERIFY' in rows['wrong']['reason'] and rows['wrong']['attempts'] == '1'


def test_a_password_stays_with_its_server(server, tmp_path):
    folder = collection(tmp_path/'c', {'a': f'http://me:secret@news.example:{server.port}/to-other'})
    fetch_images(folder, FetchSettings(**QUICK | dict(allow_private=False)), backend=mapped(server))
    first, second = server.heard
    assert by_id(folder)['a']['status'] == 'fetched'
    assert f"Basic {base64.b64encode(b'me:secret').decode()}" in first
    assert 'other.example' in second and 'Authorization' not in second
    assert 'User-Agent: newsrepro/' in first


def test_429_holds_back_the_whole_host(server, tmp_path):
    folder = collection(tmp_path/'c', {'l': f'{server.url}/limited-once'}
                        | {f'i{n}': f'{server.url}/good/{n}' for n in range(30)})
    fetch_images(folder, FetchSettings(**QUICK | dict(retries=4), per_host=2))
    limited = next(when for when, path in server.times if path == '/limited-once')
    early = [path for when, path in server.times if limited + 1 < when < limited + 1.9]
    assert early == [] and {row['status'] for row in by_id(folder).values()} == {'fetched'}


def test_a_host_that_only_fails_is_left_alone(server, tmp_path):
    folder = collection(tmp_path/'c', {f'i{n}': f'{server.url}/limited/{n}' for n in range(200)}
                        | {'other': f'http://localhost:{server.port}/good'})
    fetch_images(folder, FetchSettings(**QUICK | dict(retries=0), give_up=8, per_host=2))
    rows = by_id(folder)
    assert rows.pop('other')['status'] == 'fetched'
    assert {row['status'] for row in rows.values()} == {'busy'} and sum(server.asked.values()) < 8 + 2 + 1
    assert sum('left alone' in row['reason'] for row in rows.values()) > 180


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    server, most = Server(pace=.02), 0
    answer, now = server.answer, 0
    async def counting(*args):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(.02)
        now -= 1
        return await answer(*args)
    server.answer = counting
    try:
        fetch_images(collection(tmp_path/'c', {f'i{n}': f'{server.url}/good/{n}' for n in range(40)}),
                     FetchSettings(**QUICK, per_host=3))
    finally: server.close()
    assert 1 < most <= 3


def test_one_url_is_fetched_once_for_all_its_images(server, tmp_path):
    folder = collection(tmp_path/'c', {f'i{n}': f'{server.url}/good#{n}' for n in range(5)})
    found = fetch_images(folder, FetchSettings(**QUICK))
    assert (server.asked['/good'], found['outcomes']) == (1, dict(fetched=5))


HOSTILE = ['../up', '..', '.', '/absolute', 'sub/dir', 'back\\slash', 'C:drive', 'nul', 'CON.jpg', 'x'*300,
           'ü'*200, '.hidden', 'bell\a', 'question?']


def test_no_table_writes_outside_its_folder(server, tmp_path):
    folder = collection(tmp_path/'deep'/'c',
                        {i: f'{server.url}/good' for i in HOSTILE} | {'fine': f'{server.url}/good'})
    before = {p for p in tmp_path.rglob('*')}
    fetch_images(folder, FetchSettings(**QUICK))
    assert {p.relative_to(folder).as_posix()
            for p in set(tmp_path.rglob('*')) - before} == {'images', 'images/fine.jpg', REPORT, LOCK}
    assert {row['status'] for i, row in by_id(folder).items() if i != 'fine'} == {'bad_name'}


def test_links_lead_nowhere(server, tmp_path):
    folder, outside = collection(tmp_path/'c', {'a': f'{server.url}/good'}), tmp_path/'outside'
    outside.mkdir()
    (folder/'images').symlink_to(outside)
    with pytest.raises(InputError, match='reached by a link'): fetch_images(folder, FetchSettings(**QUICK))
    (folder/'images').unlink()
    (folder/'images').mkdir()
    (folder/'images'/'a.jpg').symlink_to(outside/'victim.jpg')
    (folder/JOURNAL).symlink_to(outside/'victim.txt')
    with pytest.raises(InputError, match='cannot be written'): fetch_images(folder, FetchSettings(**QUICK))
    (folder/JOURNAL).unlink()
    assert fetch_images(folder, FetchSettings(**QUICK))['outcomes'] == dict(bad_name=1)
    assert list(outside.iterdir()) == []


def test_pictures_land_where_each_layout_looks(server, tmp_path):
    "2021 (with a file name in the table), 2025, and a plain folder that has some pictures already."
    old = tmp_path/'2021'
    old.mkdir()
    lines = [['articleID', 'aid', 'url', 'img', 'iid', 'hashvalue', 'title', 'text', 'imgFile'],
             *([f'{n}', f'{n}', 'u', f'{server.url}/good/{n}', f'{n}', 'h', 'Titel', 'Text', f'hash{n}.jpg']
               for n in range(5))]
    (old/'content2019-01.tsv').write_text('\n'.join('\t'.join(line) for line in lines))
    new = tmp_path/'2025'
    (new/'newsimages').mkdir(parents=True)
    head = 'article_id,article_url,article_title,article_tags,image_id,image_url\n'
    rows = ''.join(f'{n},u,Title,t,I{n},{server.url}/png/{n}\n' for n in range(5))
    (new/'newsarticles.csv').write_text(head + rows)
    mixed = collection(tmp_path/'plain', {'here': f'{server.url}/good/h', 'there': f'{server.url}/good/t'})
    (mixed/'here.png').write_bytes(picture('PNG'))
    for folder, file in ((old, 'images/3.jpg'), (new, 'newsimages/I3.png'), (mixed, 'there.jpg')):
        found = fetch_images(folder, FetchSettings(**QUICK))
        assert found['have'] == found['images'] and (folder/file).exists()
        assert set(read_collection(folder).images.status) == {'ok'}
    assert server.asked['/good/h'] == 0


def test_convert_only_if_asked(server, tmp_path):
    for convert, kinds in (('', ['JPEG', 'PNG']), ('jpeg', ['JPEG', 'JPEG']), ('png', ['PNG', 'PNG'])):
        folder = collection(tmp_path/f'c{convert}', {'a': f'{server.url}/good', 'b': f'{server.url}/png'})
        fetch_images(folder, FetchSettings(**QUICK, convert=convert))
        assert [Image.open(folder/'images'/Path(by_id(folder)[i]['file']).name).format for i in 'ab'] == kinds
        assert ((folder/'images'/'a.jpg').read_bytes() == GOOD) if convert != 'png' else True


RUN = [sys.executable, '-c', 'from newsrepro.cli import main; main()', 'fetch-images']


def started(server, folder, *options):
    return subprocess.Popen([*RUN, folder, '--allow-private', '--per-host', '4', *options],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, 'nothing happened'
        time.sleep(.01)


@pytest.fixture
def slow():
    server = Server(pace=.05)
    yield server
    server.close()


def test_kill_loses_nothing(slow, tmp_path):
    folder = collection(tmp_path/'c', {f'i{n}': f'{slow.url}/good/{n}' for n in range(200)}
                        | {f'm{n}': f'{slow.url}/missing/{n}' for n in range(20)})
    wait = started(slow, folder)
    wait_for(lambda: sum(slow.asked.values()) > 30)
    wait.send_signal(signal.SIGKILL)
    wait.communicate()
    whole = {p.stem for p in (folder/'images').iterdir() if p.suffix == '.jpg'}
    known = set(by_id(folder))
    assert 10 < len(whole) < 200 and (folder/JOURNAL).exists() and not (folder/REPORT).exists()
    before = Counter(slow.asked)
    (folder/'images'/'.fetch-1-1.part').write_bytes(b'left by the kill')
    done = started(slow, folder, '--json')
    out, err = done.communicate()
    assert (done.returncode, json.loads(out)['have'], json.loads(out)['dropped']) == (0, 200, 20), err
    again = {path.rsplit('/')[-1] for path in slow.asked if slow.asked[path] > before[path] > 0}
    assert not again & {i[1:] for i in whole | known
                        if i.startswith('i')} and len(again) <= 4  # only those that were on the wire
    assert len(list((folder/'images').iterdir())) == 200 and not (folder/JOURNAL).exists()


def test_interrupted_it_writes_its_report(slow, tmp_path):
    folder = collection(tmp_path/'c', {f'i{n}': f'{slow.url}/good/{n}' for n in range(2000)})
    run = started(slow, folder)
    wait_for(lambda: sum(slow.asked.values()) > 20)
    second = started(slow, folder)  # while the first is at work
    assert (second.communicate()[1].count('\n'), second.returncode) == (1, 2)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err.count('\n')) == (130, '', 1) and 'interrupted' in err
    rows = by_id(folder)
    assert len(rows) == 2000 and not (folder/JOURNAL).exists()
    assert {i for i, row in rows.items()
            if row['status'] == 'fetched'} == {p.stem for p in (folder/'images').iterdir()} != set()


def test_memory_stays_bounded(server, tmp_path):
    """Eight endless bodies at a time, of which 64 MiB each are read; the files are the only place where
    they are."""
    folder = collection(tmp_path/'c', {f'e{n}': f'{server.url}/endless/{n}' for n in range(8)}
                        | {'b': f'{server.url}/bomb'})
    code = dedent('''
        import os, resource, sys
        from newsrepro.data.fetch import fetch_images
        from newsrepro.data.fetch_settings import FetchSettings
        def high():  # MiB; Linux counts the parent's peak into ru_maxrss, but not into VmHWM
            if not os.path.exists("/proc/self/status"):
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
            return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])/1024
        fetch_images(sys.argv[1], FetchSettings(allow_private=True, jobs=1, max_bytes=1000))
        before = high()
        settings = FetchSettings(allow_private=True, per_host=8, deadline=20)
        found = fetch_images(sys.argv[1], settings, retry_failed=True)
        print(high() - before, found["outcomes"])''')
    done = subprocess.run([sys.executable, '-c', code, str(folder)], capture_output=True, text=True,
                          check=True)
    grown, outcomes = done.stdout.split(maxsplit=1)
    assert float(grown) < 32 and 'fetched' not in outcomes
    assert list((folder/'images').iterdir()) == []


def test_a_full_disk_ends_the_run(server, tmp_path, monkeypatch):
    import newsrepro.data.fetch as fetch
    def full(*_): raise OSError(28, 'No space left on device')
    folder = collection(tmp_path/'c', {f'i{n}': f'{server.url}/good/{n}' for n in range(20)})
    with monkeypatch.context() as patched:
        patched.setattr(fetch.os, 'replace', lambda a,
                        b: full() if str(b).endswith('.jpg') else os.rename(a, b))
        with pytest.raises(OSError, match='No space left'): fetch_images(folder, FetchSettings(**QUICK))
    assert {row['status']
            for row in by_id(folder).values()} == {'pending'} and list((folder/'images').iterdir()) == []
    assert fetch_images(folder, FetchSettings(**QUICK))['outcomes'] == dict(fetched=20)


FULL = [sys.executable, '-c',
        'import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),)*2)\n'
        'from newsrepro.cli import main; main()']


# not enough for one picture; enough for pictures, but not for what is noted of 60
@pytest.mark.parametrize('room', [1000, 9000])
def test_no_room_is_one_line_and_the_next_run_goes_on(server, tmp_path, room):
    "The system itself refuses to let files grow, as on a full disk."
    folder = collection(tmp_path/'c', {f'i{n}': f'{server.url}/png/{n}' if room > 1000
                                       else f'{server.url}/good/{n}' for n in range(60)})
    done = subprocess.run([*FULL, str(room), 'fetch-images', folder, '--allow-private'], capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (1, '', 1), done.stderr
    assert 'File too large; what came is kept, and the same command goes on from there' in done.stderr
    have = {p.stem for p in (folder/'images').glob('[!.]*')}
    assert not list((folder/'images').glob('.*')) and (bool(have) == (room > 1000))
    before = Counter(server.asked)
    assert fetch_images(folder, FetchSettings(**QUICK))['have'] == 60
    asked_again = {path for path in server.asked if server.asked[path] > before[path]}
    assert not asked_again & {f'/png/{i[1:]}' for i in have}


def test_tables_of_2021(server, tmp_path, newsimages2021):
    "A copy of the 2021 collection whose URLs lead to loopback."
    for path in newsimages2021.glob('*.tsv'):
        (tmp_path/path.name).write_bytes(re.sub(rb'https://(www\.ksta\.de|portal\.example)',
                                                server.url.encode(), path.read_bytes()))
    known = read_collection(tmp_path).images
    images = len(known[known.split == 'test'])
    found = fetch_images(tmp_path, FetchSettings(**QUICK), split='test', limit=50)
    assert images > 100
    assert (found['images'], found['asked']) == (images, 50)
    assert found['outcomes']['pending'] == images - found['have']
    assert check_data(tmp_path)['splits']['test']['with_image'] == found['have'] >= 50


# --- the same picture for many URLs

def spread(server, folder, images=5, **more):
    "A placeholder at 5 URLs, a photo of two outlets, one URL of two articles, and a picture of its own."
    urls = {f'p{n}': f'{server.url}/good/{n}' for n in range(images)}
    urls |= {f's{n}': f'{server.url}/png/{n}' for n in range(2)}
    return collection(folder, urls | {f'o{n}': f'{server.url}/own' for n in range(5)} | more)


@pytest.fixture
def placeholders(server):
    answer = server.answer
    async def with_own(what, path, writer):
        if what != 'own': return await answer(what, path, writer)
        writer.write(plain(picture(colour='blue')))
        return True
    server.answer = with_own
    return server


def test_one_picture_for_many_urls_is_told(placeholders, tmp_path):
    folder = spread(placeholders, tmp_path/'c')
    found = fetch_images(folder, FetchSettings(**QUICK))
    assert found['outcomes'] == dict(fetched=5 + 2 + 5)
    assert [(p['urls'], p['images'], p['dropped'], p['example'][0])
            for p in found['placeholders']] == [(5, 5, 0, 'p')]
    assert found['shared'] == dict(pictures=1, urls=2)
    equal = {f'p{n}': '5' for n in range(5)} | {f'o{n}': '' for n in range(5)} | dict(s0='2', s1='2')
    assert {i: row['equal_urls'] for i, row in by_id(folder).items()} == equal
    present = fetch_images(folder, FetchSettings(**QUICK))  # and again, as present
    assert present['placeholders'] == found['placeholders']
    assert fetch_images(folder, FetchSettings(**QUICK, placeholder_urls=5))['placeholders'] == []


def test_placeholders_are_dropped_only_if_asked_and_asked_again_only_if_told(placeholders, tmp_path):
    folder = spread(placeholders, tmp_path/'c')
    found = fetch_images(folder, FetchSettings(**QUICK, drop_placeholders=True))
    assert found['outcomes'] == dict(fetched=7, placeholder=5) and found['placeholders'][0]['dropped'] == 5
    assert {p.stem for p in (folder/'images').iterdir()} == {'s0', 's1', *(f'o{n}' for n in range(5))}
    assert by_id(folder)['p0']['reason'] == 'the same picture as 4 other URLs gave'
    assert by_id(folder)['p0']['file'] == ''
    placeholders.asked.clear()
    assert fetch_images(folder, FetchSettings(**QUICK))['outcomes'] == dict(present=7, placeholder=5)
    assert not placeholders.asked
    # a sixth URL with the known picture is dropped although it alone was fetched
    spread(placeholders, folder, images=6)
    found = fetch_images(folder, FetchSettings(**QUICK, drop_placeholders=True))
    assert found['outcomes'] == dict(present=7, placeholder=6)
    assert sum(placeholders.asked.values()) == 1
    found = fetch_images(folder, FetchSettings(**QUICK), retry_failed=True)
    assert found['outcomes'] == dict(present=7, fetched=6)


def test_a_picture_of_ones_own_is_never_dropped(placeholders, tmp_path):
    folder = spread(placeholders, tmp_path/'c')
    (folder/'images').mkdir()
    (folder/'images'/'p3.jpg').write_bytes(GOOD)  # the same bytes, but put there by hand
    fetch_images(folder, FetchSettings(**QUICK))
    (folder/'images'/'p4.jpg').write_bytes(picture(colour='green'))  # fetched, then replaced by hand
    found = fetch_images(folder, FetchSettings(**QUICK, drop_placeholders=True))
    assert found['outcomes'] == dict(present=2 + 5 + 2, placeholder=3)
    assert (folder/'images'/'p3.jpg').read_bytes() == GOOD and (folder/'images'/'p4.jpg').exists()


def test_placeholders_survive_a_kill(slow, tmp_path):
    folder = collection(tmp_path/'c', {f'i{n}': f'{slow.url}/good/{n}' for n in range(60)})
    run = started(slow, folder, '--drop-placeholders')
    wait_for(lambda: sum(slow.asked.values()) > 20)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    done = started(slow, folder, '--drop-placeholders')
    out, err = done.communicate()
    assert (done.returncode, list((folder/'images').iterdir())) == (0, []), err
    assert 'the same picture for 60 different URLs, 60 images such as i' in out, out
    assert '60 of them left out' in out
    assert max(slow.asked.values()) <= 2
    assert {row['status'] for row in by_id(folder).values()} == {'placeholder'}


def test_killed_while_dropping(placeholders, tmp_path, monkeypatch):
    folder = spread(placeholders, tmp_path/'c')
    fetch_images(folder, FetchSettings(**QUICK))
    with monkeypatch.context() as patched:
        patched.setattr('newsrepro.data.fetch.Path.unlink',
                        lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch_images(folder, FetchSettings(**QUICK, drop_placeholders=True))
    placeholders.asked.clear()
    found = fetch_images(folder, FetchSettings(**QUICK, drop_placeholders=True))
    assert found['outcomes'] == dict(present=7, placeholder=5)
    assert not placeholders.asked


# --- URLs as people write them

def test_urls_are_mended_where_one_can_be_meant(server, tmp_path):
    host = server.url.removeprefix('http://')
    urls = {'relative': f'//{host}/good/1', 'bare': f'{host}/good/2',
            'entity': f'{server.url}/good/3?a=1&amp;b=2', 'blank': f' {server.url}/good/4 5.jpg\u200b',
            'iri': f'{server.url}/good/ü.jpg', 'backslash': f'{server.url}\\good\\7',
            'quoted': f'"{server.url}/good/8"', 'numeric': f'{server.url}/good/9?a&#38;b&#x26;c',
            'path': 'images/x.jpg', 'share': r'\\server\x.jpg',
            'two': f'{server.url}/good/1 {server.url}/good/2', 'mail': 'mailto:a@b.example'}
    folder = collection(tmp_path/'c', urls)
    found = fetch_images(folder, FetchSettings(**QUICK))
    rows = by_id(folder)
    assert {i for i, row in rows.items() if row['status'] == 'bad_url'} == {'path', 'share', 'two', 'mail'}
    assert found['outcomes'] == dict(fetched=8, bad_url=4) and found['mended'] == 7
    assert set(server.asked) == {'/good/1', '/good/2', '/good/3?a=1&b=2', '/good/4%205.jpg',
                                 '/good/%C3%BC.jpg', '/good/7', '/good/8', '/good/9?a&b&c'}
    assert rows['relative']['asked_as'] == f'{server.url}/good/1'
    assert rows['entity']['asked_as'] == f'{server.url}/good/3?a=1&b=2'
    assert rows['iri']['asked_as'] == '' and rows['two']['reason'].endswith('more than one URL')


# --- fuzzing

ODD = ['', ' ', '0', '-1', '1e9', '9'*400, '\x00', 'ü', '²', '"', ',', ';', '\r', '\n', '\r\n', '[', '{"a":',
       ']'*50, '&amp;', '%', '%zz', '\\', '/', '//', '..', ':', '@', '#', '?',
       'http://', 'https:', 'file:///etc/passwd', '\u2028', '\ufeff', 'NaN', 'null', 'gzip', 'chunked',
       'Thu, 01 Jan 1970 00:00:00 GMT', 'text/html', 'h2', '64', '127.0.0.1']


def mangled(draw: random.Random, raw: bytes, most=4) -> bytes:
    "Up to `most` cuts, flips, repetitions and insertions."
    raw = bytearray(raw)
    for _ in range(draw.randint(0, most)):
        at, to = sorted(draw.randint(0, len(raw)) for _ in range(2))
        what = draw.randrange(5)
        if what == 0: del raw[at:]
        if what == 1: del raw[at:min(to, at + 20)]
        if what == 2: raw[at:at] = draw.choice(ODD).encode()
        if what == 3: raw[at:at] = raw[at:min(to, at + 200)]
        if what == 4 and raw: raw[at % len(raw)] = draw.randrange(256)
    return bytes(raw)


Image.new('1', (1200, 1200)).save(raw := io.BytesIO(), 'PNG')
HUGE = raw.getvalue()  # more pixels than the fuzz allows
BODIES = [GOOD, PNG, gzip.compress(GOOD), gzip.compress(bytes(2**21)), b'', b'<html>', GOOD[:900], HUGE,
          bytes(2**16), picture('GIF'), picture('WEBP')]
PICTURES = {GOOD, PNG, picture('GIF'), picture('WEBP')}


def any_answer(draw: random.Random) -> bytes:
    """What a server may send: right, lying, or broken. The body is never changed but by cutting it, so
    what decodes is known."""
    body = draw.choice(BODIES)
    names = ['Content-Length', 'Content-Type', 'Content-Encoding', 'Retry-After', 'Location',
             'Transfer-Encoding', 'Connection', 'X']
    values = [str(len(body)), str(len(body) + 7), str(max(0, len(body) - 7)), 'image/jpeg', 'deflate',
              'http://a.example/x', '/x', 'http://[::1/', '//', 'http://h3.example/y', *ODD]
    headers = [f'{draw.choice(names)}: {draw.choice(values)}' for _ in range(draw.randint(0, 4))]
    if draw.random() < .6: headers.append(f'Content-Length: {len(body)}')
    if body[:2] == b'\x1f\x8b' and draw.random() < .8: headers.append('Content-Encoding: gzip')
    status = draw.choice(['200 OK']*6
                         + ['301 Moved', '302', '307 x', '404 No', '429 Busy', '503 Later', '206 Part',
                            '204 None', '100 Continue', '999 ü', '20 x', '-1', '500 Oops'])
    head = '\r\n'.join([f'HTTP/1.1 {status}', *headers, '', '']).encode()
    if draw.random() < .4: head = mangled(draw, head, 2)
    return head + (body if draw.random() < .8 else body[:draw.randint(0, len(body))])


def is_known(raw: bytes) -> bool:
    "One of the pictures that are sent; its last bytes may lack where all pixels are there."
    pixels = lambda raw: Image.open(io.BytesIO(raw)).convert('RGB').tobytes()
    return any(known == raw or known.startswith(raw) and pixels(known) == pixels(raw) for known in PICTURES)


class Strangers(httpcore.AsyncMockBackend):
    "Each connection gets an answer drawn from the seed and the name of the host."
    def __init__(self, seed): self.seed = seed
    async def connect_tcp(self, host, *_, **__):
        draw = random.Random(f'{self.seed} {host}')
        if draw.random() < .02: raise httpcore.ConnectError('no route')
        raw, size = any_answer(draw), draw.choice([1000, 2**16])
        return httpcore.AsyncMockStream([raw[n:n + size] for n in range(0, len(raw), size)])


def fuzz_answers(cases: int, seed: int, folder: Path) -> Counter:
    """Ask strangers; each image ends in an outcome, and what was fetched is one of the pictures that were
    sent. Returns the outcomes."""
    collection(folder, {f'i{n}': f'http://h{n}.example/x' for n in range(cases)})
    settings = FetchSettings(max_bytes=2**20, max_pixels=10**6, retries=0, max_wait=0, deadline=20,
                             give_up=cases)
    found = fetch_images(folder, settings, backend=Strangers(seed))
    rows = by_id(folder)
    assert len(rows) == found['images'] == cases
    assert found['have'] + found['dropped'] + found['waiting'] == cases
    for image, row in rows.items():
        assert row['status'] in OUTCOMES and row['status'] not in ('pending', 'present'), row
        assert row['reason'].isprintable(), row
        files = list((folder/'images').glob(f'{image}.*'))
        assert len(files) == (row['status'] == 'fetched'), row
        if files: assert is_known(files[0].read_bytes()) and row['bytes'] == str(files[0].stat().st_size), row
    assert not list((folder/'images').glob('.*'))
    return Counter(row['status'] for row in rows.values())


def any_rows(draw: random.Random) -> dict:
    text = lambda: ''.join(draw.choice(ODD + ['abc', 'http://a.example/x.jpg', "'"])
                           for _ in range(draw.randint(0, 3)))
    rows = [{c: text() for c in COLUMNS}
            | dict(dataset='RSS', image_id=f'i{n}', status=draw.choice(list(OUTCOMES)),
                   attempts=draw.choice(['', '3']),
                   bytes=draw.choice(['', '12']), equal_urls='') for n in range(draw.randint(0, 4))]
    return {(row['dataset'], row['image_id']): row for row in rows}


def fuzz_reports(cases: int, seed: int, folder: Path) -> Counter:
    """Read reports and journals that were mangled: rows that any run can go on from, or a refusal. Returns
    how often which."""
    import pandas as pd
    folder.mkdir(parents=True, exist_ok=True)
    draw, found = random.Random(seed), Counter()
    images = pd.DataFrame([dict(dataset='RSS', split='train', image_id=f'i{n}', url='http://a.example/x.jpg',
                                folder=str(folder), path='', status='missing', sha256='') for n in range(4)])
    for case in range(cases):
        rows = any_rows(draw)
        write_report(folder, rows)
        journal = '\n'.join(json.dumps(row) for row in any_rows(draw).values())
        (folder/JOURNAL).write_bytes(mangled(draw, journal.encode()))
        if case % 2: (folder/REPORT).write_bytes(mangled(draw, (folder/REPORT).read_bytes()))
        try: read = read_report(folder)
        except InputError as error:
            assert case % 2, f'case {case}: refused its own report: {error}'
            found['refused'] += 1
            continue
        found['read'] += 1
        if not case % 2: assert rows.keys() <= read.keys()
        planned, _ = plan(images, folder, read, FetchSettings(), retry_failed=bool(case % 3))
        assert sum(summary(list(planned.values()), read.values(), 3, 0, 0)['outcomes'].values()) == 4
        write_report(folder, read)
        assert read_report(folder) == read, case  # nothing changes on its way through a report
    return found


def fuzz_urls(cases: int, seed: int) -> Counter:
    "URLs, redirects and Retry-After made of odd parts: a URL of the web, or `Dropped`; seconds, or nothing."
    draw, found, base = random.Random(seed), Counter(), checked_url('http://a.example/b/c')
    parts = ODD + ['a.example', 'www.', '.jpg', 'x', ':80', '[::1]', 'user:pw@', 'a_b', 'HTTP', '\ud800',
                   '\u3002', 'xn--', '&#0;', '&#xD800;', '&amp;amp;amp;', '<', '>']
    for _ in range(cases):
        text = ''.join(draw.choice(parts) for _ in range(draw.randint(0, 6)))
        wait = retry_after(text, now=1e9)
        assert wait is None or 0 <= wait < 1e12
        came_from = draw.choice([None, base])
        try: url = checked_url(text, came_from)
        except Dropped as error: found[error.outcome] += 1
        else:
            assert url.scheme in ('http', 'https') and url.raw_host and not url.fragment, text
            assert str(url).isprintable(), text
            assert str(checked_url(str(url), came_from)) == str(url), text
            found['url'] += 1
    return found


def test_fuzz(tmp_path):
    answers = fuzz_answers(400, 1, tmp_path/'answers')
    reports = fuzz_reports(100, 1, tmp_path/'reports')
    urls = fuzz_urls(3000, 1)
    assert {'fetched', 'gone', 'connection', 'not_image', 'too_large', 'damaged', 'busy', 'refused',
            'redirects'} <= set(answers)
    assert min(reports['read'], reports['refused']) > 10
    assert min(urls['url'], urls['bad_url'], urls['redirects']) > 10


def test_a_separator_before_the_seconds_says_nothing():
    "Found by fuzzing: it is a space to a regular expression and none to `float`."
    from newsrepro.data.fetch import retry_after
    assert [retry_after(value, 0) for value in ('\x1e20', ' 20\t', '20')] == [None, 20, 20]


if __name__ == '__main__':  # python tests/test_fetch.py CASES SEED
    cases, seed = map(int, sys.argv[1:])
    for start in range(0, cases, 2000):
        with tempfile.TemporaryDirectory() as scratch:
            for fuzz in (fuzz_answers, fuzz_reports):
                print(start, fuzz.__name__, dict(fuzz(2000, seed + start, Path(scratch)/fuzz.__name__)),
                      flush=True)
            print(start, 'fuzz_urls', dict(fuzz_urls(10000, seed + start)), flush=True)
