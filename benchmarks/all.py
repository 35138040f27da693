"""Time and peak memory of everything that has a peer, beside it, for sizes that double while time and memory
last: a page, its figures as JSON, a picture of the growth.

    python benchmarks/all.py --budget 5               # minutes; writes results.md, .json and .svg beside it
    python benchmarks/all.py --only 'exact top 100'   # one curve, printed
    python benchmarks/all.py --tiny                   # to see that it runs
"""
import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from matplotlib import rc_context
from matplotlib.figure import Figure

from growth import CURVES, OURS, PEERS
from newsrepro.core.base import free_memory

LEAST = 120  # seconds that a point may take, whatever the budget
HERE = Path(__file__).resolve().parent
LIBRARIES = ('newsrepro', 'torch', 'numpy', 'open_clip_torch', 'transformers', 'scikit-learn',
             *(distribution for _, distribution in PEERS.values()))


# a point: one way at one size, in a process of its own

def work_through(curve: str, way: str, size: int, tiny: bool, answer) -> None:
    "Send median seconds, and the megabytes above what the imports hold; without `way`, which ways there are."
    before, seconds = psutil.Process().memory_info().rss, []
    with TemporaryDirectory() as folder:
        try:
            ways = CURVES[curve].ways(size, Path(folder), tiny)
            if not way: return answer.send(dict(ways=list(ways)))
            work = ways[way]()
            while not seconds or (sum(seconds) < 1 and len(seconds) < 5 and not tiny):
                start = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - start)
        except Exception as error:
            return answer.send(dict(failed=f'{type(error).__name__}: {error}'[:200]))
    unit = 1 if sys.platform == 'darwin' else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*unit
    answer.send(dict(seconds=statistics.median(seconds), repeats=len(seconds),
                     megabytes=max(0, peak - before)/2**20))


def point(curve: str, way: str, size: int, tiny: bool, limit: float) -> dict:
    "What `work_through` sends, or why it sent nothing; the seconds of the whole process."
    start, context = time.perf_counter(), multiprocessing.get_context('fork')
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=work_through, args=(curve, way, size, tiny, sender))
    process.start()
    sender.close()
    try: found = answer.recv() if answer.poll(limit) else dict(failed=f'more than {limit:.0f} s')
    except EOFError: found = dict(failed='ended without a word, as where memory runs out')
    process.kill()
    process.join()
    return found | dict(took=time.perf_counter() - start)


def is_there(way: str) -> bool:
    "Whether a peer is installed; it is imported before its processes start."
    module, _ = PEERS.get(way, ('json', ''))
    return importlib.util.find_spec(module) is not None and bool(importlib.import_module(module))


# a curve: sizes that double

def next_value(own: list[dict], what: str) -> float:
    "Grown as it did last, and at least twofold; fourfold after the first size; 0 before it."
    if not own: return 0
    last = own[-1][what]
    return last*max(2, last/own[-2][what] if len(own) > 1 and own[-2][what] else 4)


def fits(done: dict[str, list[dict]], ways: list[str], seconds: float) -> list[str]:
    "Of `ways` those that the next size leaves time and memory for; the slowest of the others goes first."
    free = free_memory()/2**20
    costs = {way: done[way][-1]['took'] + next_value(done[way], 'seconds') if done[way] else 0 for way in ways
             if next_value(done[way], 'megabytes') < free}
    left = sorted(costs, key=lambda way: (way != OURS, costs[way]))
    while sum(costs[way] for way in left) > max(0, seconds): left.pop()
    return left


def grow(name: str, tiny: bool, seconds: float) -> tuple[list[dict], list[str]]:  # points, remarks
    "All ways of a curve, as far as `seconds` reach."
    end, curve = time.perf_counter() + seconds, CURVES[name]
    size = curve.tiny if tiny else curve.first
    ways = point(name, '', size, tiny, LEAST)['ways']
    remarks = [f'{way}: not installed: pip install {PEERS[way][1]}' for way in ways if not is_there(way)]
    ways = [way for way in ways if is_there(way)]
    done = {way: [] for way in ways}
    for size in (size*2**step for step in range(2 if tiny else 30)):
        for way in (ways := fits(done, ways, end - time.perf_counter())):
            found = point(name, way, size, tiny, max(LEAST, 2*(end - time.perf_counter())))
            if 'failed' in found: remarks.append(f"{name}, {way}, {size:,}: {found['failed']}")
            else: done[way].append(dict(curve=name, way=way, size=size) | found)
        ways = [way for way in ways if done[way] and done[way][-1]['size'] == size]
    return [one for own in done.values() for one in own], remarks


def with_ratios(points: list[dict]) -> list[dict]:
    "Each point of another way with our seconds and megabytes at that size, and their ratio to its own."
    ours = {(one['curve'], one['size']): one for one in points if one['way'] == OURS}
    for one in points:
        base = ours.get((one['curve'], one['size']))
        if base is None or one['way'] == OURS: continue
        for what in ('seconds', 'megabytes'):
            one[f'own_{what}'] = base[what]
            one[f'ratio_{what}'] = base[what]/one[what] if one[what] else None
    return points


# what is written

def machine() -> dict:
    "Processor, cores, memory and system."
    try: model = re.search(r'model name\s*:\s*(.*)', Path('/proc/cpuinfo').read_text())[1]
    except (OSError, TypeError): model = platform.processor()
    return dict(processor=model, cores=os.cpu_count(), system=f'{platform.system()} {platform.machine()}',
                memory_gib=round(psutil.virtual_memory().total/2**30), load=round(os.getloadavg()[0], 1))


def versions() -> dict:
    "Of Python and of the libraries that are there."
    found = dict(python=platform.python_version())
    for name in LIBRARIES:
        with suppress(PackageNotFoundError): found[name] = version(name)
    return found


def circumstances(args) -> dict:
    "Where, when and with what."
    command = ['git', '-C', str(HERE), 'describe', '--always', '--dirty']
    done = subprocess.run(command, capture_output=True, text=True)
    return dict(machine=machine(), versions=versions(), date=f'{datetime.now(timezone.utc):%Y-%m-%d}',
                commit=done.stdout.strip(), budget_minutes=args.budget, tiny=args.tiny)


def table(head: str, rows: list[tuple]) -> str:
    "Markdown."
    columns = head.split('|')
    return '\n'.join(f"| {' | '.join(map(str, row))} |" for row in [columns, ['---']*len(columns), *rows])


def number(value: float | None) -> str:
    "Three digits that count."
    if value is None: return ''
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def ratios(points: list[dict]) -> str:
    "Ours beside each other way, at the largest size that both have reached."
    last = {(one['curve'], one['way']): one for one in points if 'ratio_seconds' in one}
    rows = []
    for (curve, way), one in last.items():
        shown = [one[f'{key}{what}'] for what in ('seconds', 'megabytes') for key in ('own_', '', 'ratio_')]
        rows.append((curve, way, f"{one['size']:,}", *map(number, shown)))
    return table(f'what|beside|size|{OURS}, s|other, s|ratio|{OURS}, MB|other, MB|ratio', rows)


def growth(points: list[dict]) -> str:
    "How far each way came, and what the last doubling cost."
    rows, by_way = [], {}
    for one in points: by_way.setdefault((one['curve'], one['way']), []).append(one)
    for (curve, way), own in by_way.items():
        costs = [own[-1][what]/own[-2][what] if len(own) > 1 and own[-2][what] else None
                 for what in ('seconds', 'megabytes')]
        rows.append((curve, way, f"{own[-1]['size']:,} {CURVES[curve].axis}", number(own[-1]['seconds']),
                     number(own[-1]['megabytes']), *map(number, costs)))
    return table('what|way|up to|s|MB|times s|times MB', rows)


def page(found: dict) -> str:
    "The Markdown page."
    at, used = found['machine'], ', '.join(' '.join(one) for one in found['versions'].items())
    remarks = ''.join(f'- {remark}\n' for remark in found['remarks'])
    how = '--tiny' if found['tiny'] else f"--budget {found['budget_minutes']:g}"
    return f"""# Measured beside others

`python benchmarks/all.py {how}` on {at['processor']}, {at['cores']} cores, {at['memory_gib']} GiB, \
{at['system']}, {found['date']}, commit {found['commit'] or 'unknown'}; \
load of the machine before it began: {at['load']}.
{used}.

Every way and size has a process of its own. Seconds are the median of up to five runs, \
of one where it takes a second or more; MB are the most memory held above what the imports hold, \
without the workers of a loader. Weights and vectors are random. \
[`results.json`](results.json) has every point.

## Ratios

At the largest size that both reached; below 1, {OURS} takes less.

{ratios(found['points'])}

## Growth

Sizes double while the time given and the memory last. The last two columns: what the last doubling cost.

![Seconds and megabytes of every way against the size, both logarithmic; the table has the ends.](results.svg)

{growth(found['points'])}
""" + (f'\n## Not measured\n\n{remarks}' if remarks else '')


def draw(points: list[dict]) -> Figure:
    "Time and memory of each curve, side by side."
    names = list(dict.fromkeys(one['curve'] for one in points))
    figure = Figure(figsize=(8, 2.4*len(names)), layout='constrained')
    for row, name in zip(figure.subplots(len(names), 2, squeeze=False), names):
        for axis, what in zip(row, ('seconds', 'megabytes')):
            own = [one for one in points if one['curve'] == name]
            for way in dict.fromkeys(one['way'] for one in own):
                x, y = zip(*((one['size'], one[what]) for one in own if one['way'] == way))
                axis.loglog(x, y, 'o-', base=2, label=way, markersize=3, linewidth=2 if way == OURS else 1)
            axis.set(title=f'{name}: {what}', xlabel=CURVES[name].axis)
            axis.set_xticks(sizes := sorted({one['size'] for one in own}), [f'{size:,}' for size in sizes])
            axis.yaxis.set_major_formatter('{x:.3g}')
            axis.minorticks_off()
            axis.grid(alpha=.3)
        row[0].legend(frameon=False)
    return figure


def write(found: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'results.json').write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')
    (folder/'results.md').write_text(page(found), encoding='utf-8')
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': OURS, 'font.size': 8}):
        draw(found['points']).savefig(folder/'results.svg', metadata={'Date': None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--budget', type=float, default=5, help='minutes for all curves together')
    parser.add_argument('--only', choices=list(CURVES), nargs='+', help='of the curves; printed, not written')
    parser.add_argument('--tiny', action='store_true', help='two small sizes; printed, not written')
    parser.add_argument('--out', type=Path, help='folder to write to; of a whole run: where this file lies')
    args = parser.parse_args(arguments)
    names = args.only or [name for name, curve in CURVES.items() if curve.tiny or not args.tiny]
    found, end = circumstances(args) | dict(points=[], remarks=[]), time.perf_counter() + 60*args.budget
    for place, name in enumerate(names):
        points, remarks = grow(name, args.tiny, (end - time.perf_counter())/(len(names) - place))
        found['points'] += with_ratios(points)
        found['remarks'] += remarks
        print('\n'.join([*remarks, growth(points)]), flush=True)
    print('\n' + ratios(found['points']))
    folder = args.out or (None if args.tiny or args.only else HERE)
    if folder: write(found, folder)


if __name__ == '__main__': main()
