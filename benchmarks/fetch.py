"""Images a second of `fetch_images` and of a plain httpx loop, from the same loopback server, by turns.

The server is a process of its own and delays each answer, so that it sets the pace (`--delay 0`: as fast as
it can). The plain loop checks nothing: it has as many requests open and writes what it gets. `fetch_images`
is the whole command, with reading the collection, the journal and the report; `download_all` is its engine,
which decodes every image, too.

    python benchmarks/fetch.py                    # 9,445 images, as many as the collection of 2021 has
    python benchmarks/fetch.py --rate 0 --delay 0 # how fast each can be
"""
import argparse
import asyncio
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SERVER = '''
import asyncio, sys
bodies = [open(path, 'rb').read() for path in sys.argv[3:]]
opening = b'HTTP/1.1 200 OK\\r\\nContent-Type: image/jpeg\\r\\nContent-Length: %d\\r\\n\\r\\n'
answers = [opening % len(body) + body for body in bodies]
delay, rate = float(sys.argv[1]), float(sys.argv[2])

class Server(asyncio.Protocol):
    due = 0.
    def connection_made(self, transport): self.transport, self.buffer = transport, b''
    def data_received(self, data):
        self.buffer += data
        while b'\\r\\n\\r\\n' in self.buffer:
            head, _, self.buffer = self.buffer.partition(b'\\r\\n\\r\\n')
            answer = answers[int(head.split(b' ')[1].strip(b'/').split(b'.')[0]) % len(answers)]
            loop = asyncio.get_running_loop()
            Server.due = max(Server.due + (1/rate if rate else 0), loop.time())
            when = Server.due + delay
            if when > loop.time(): loop.call_at(when, self.transport.write, answer)
            else: self.transport.write(answer)

async def main():
    server = await asyncio.get_running_loop().create_server(Server, '127.0.0.1', 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
'''


def peak_mb() -> float:
    "Peak resident memory of this process, which `fork` does not inherit."
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) / 1024


async def plain(urls, folder, jobs):
    "As many requests as `jobs` at a time, whatever comes is written."
    import httpx
    queue = iter(enumerate(urls))
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=jobs,
                                                     max_keepalive_connections=jobs)) as client:
        async def work():
            for n, url in queue:
                response = await client.get(url)
                (folder/f'{n}.jpg').write_bytes(response.content)
        await asyncio.gather(*(work() for _ in range(jobs)))


def child(kind, urls, folder, jobs):
    "Fetch once, print seconds, images and peak memory."
    folder = Path(folder)
    if kind == 'httpx loop':
        began = time.perf_counter()
        asyncio.run(plain(urls, folder, jobs))
    else:
        import httpx
        from newsrepro.data.fetch import Download, Target, download_all, fetch_images
        from newsrepro.data.fetch_settings import FetchSettings
        settings = FetchSettings(jobs=jobs, per_host=jobs, allow_private=True)
        if kind == 'fetch_images':
            with open(folder/'articles.csv', 'w', newline='') as file:
                csv.writer(file).writerows([('article_id', 'title', 'image_id', 'image_url'),
                                            *((n, 'T', n, url) for n, url in enumerate(urls))])
            (folder/'images').mkdir()
            began = time.perf_counter()
            fetch_images(folder, settings)
        else:
            downloads = [Download(httpx.URL(url), [Target(('x', str(n)), folder)])
                         for n, url in enumerate(urls)]
            began = time.perf_counter()
            asyncio.run(download_all(downloads, settings, lambda job, found: None))
    print(json.dumps(dict(seconds=time.perf_counter() - began, images=len(list(folder.rglob('*.jpg'))),
                          peak=peak_mb())))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=9445)
    parser.add_argument('--jobs', type=int, default=32)
    parser.add_argument('--rate', type=float, default=300,
                        help='answers a second that the server gives at most; 0: no limit')
    parser.add_argument('--delay', type=float, default=.02, help='seconds before each answer')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--child', nargs=3)
    args = parser.parse_args()
    if args.child:
        kind, base, folder = args.child
        return child(kind, [f'{base}/{n}.jpg' for n in range(args.images)], folder, args.jobs)
    kinds, seconds, peaks = ['httpx loop', 'download_all', 'fetch_images'], {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        root, rng = Path(temporary), np.random.default_rng(0)
        for n in range(20):  # 300 x 150 pixels, as those of 2021
            noise = Image.fromarray(rng.integers(0, 255, (19, 38, 3), np.uint8)).resize((300, 150))
            noise.save(root/f'body{n}.jpg', quality=85)
        server = subprocess.Popen([sys.executable, '-c', SERVER, str(args.delay), str(args.rate),
                                   *map(str, sorted(root.glob('body*.jpg')))], stdout=subprocess.PIPE,
                                  text=True)
        try:
            base = f'http://127.0.0.1:{server.stdout.readline().strip()}'
            for repeat in range(args.repeats):
                for kind in kinds[repeat % 3:] + kinds[:repeat % 3]:
                    folder = root/f'{kind}-{repeat}'
                    folder.mkdir()
                    command = [sys.executable, __file__, '--images', str(args.images), '--jobs',
                               str(args.jobs), '--child', kind, base, str(folder)]
                    done = json.loads(subprocess.run(command, capture_output=True, text=True,
                                                     check=True).stdout)
                    assert done['images'] == args.images, done
                    seconds.setdefault(kind, []).append(done['seconds'])
                    peaks.setdefault(kind, []).append(done['peak'])
        finally: server.kill()
        size = statistics.mean(path.stat().st_size for path in root.glob('body*.jpg'))
    limit = f'{args.rate:g} a second' if args.rate else 'no limit'
    print(f'{args.images} images of {size/1024:.1f} KiB, {args.jobs} at a time; server: {limit}, '
          f'{args.delay:g} s a request; median of {args.repeats}; {os.cpu_count()} cores\n')
    print('| | images/s | of the httpx loop | of the server | peak MiB |\n|---|---:|---:|---:|---:|')
    for kind in kinds:
        rate = args.images/statistics.median(seconds[kind])
        ratio = statistics.median(b/a for a, b in zip(seconds[kind], seconds['httpx loop']))
        share = f'{rate/args.rate:.2f}' if args.rate else ''
        print(f'| {kind} | {rate:.0f} | {ratio:.2f} | {share} | {max(peaks[kind]):.0f} |')


if __name__ == '__main__': main()
