"""Throughput and memory of the cleaning steps over the texts of a collection.

    python benchmarks/cleaning.py [DIR] [--language de] [--repeats 3]

Each preset runs in a process of its own, so that its peak memory is its own; repetitions of the presets are
interleaved and medians reported, per second of processor time (one thread). `first` is the first pass, which
loads word lists; `again` has them. `no memo` forgets every remembered word before each text (on a sample).
Without DIR the generated mini collection is read.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def peak() -> float:
    megabyte = 1024**(2 if sys.platform == 'darwin' else 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/megabyte


def read_texts(folder: str) -> list[str]:
    from newsrepro.data.layouts import read_collection
    from newsrepro.study.study import resolve_data
    articles = read_collection(resolve_data(folder, 'newsimages2021')).articles
    return (articles.title + ' ' + articles.text).tolist()


def measure(folder: str, language: str, preset: str, sample: int = 300) -> dict:
    texts = read_texts(folder)
    from newsrepro.text import cleaning
    before, row = peak(), {'texts': len(texts)}
    for name in ('first', 'again'):
        start = time.process_time()
        cleaned = cleaning.clean_all(texts, preset, language)
        row[name] = len(texts) / (time.process_time() - start)
    row['MB'], row['peak'] = peak() - before, peak()
    memos = [f for f in vars(cleaning).values()
             if hasattr(f, 'cache_clear') and f.cache_parameters()['maxsize'] == cleaning.MEMO]
    row['remembered'] = sum(f.cache_info().currsize for f in memos)
    start = time.process_time()
    for text, expected in zip(texts[:sample], cleaned):
        for f in memos: f.cache_clear()
        assert cleaning.clean(text, preset, language) == expected
    row['no memo'] = len(texts[:sample]) / (time.process_time() - start)
    row['characters'] = sum(map(len, cleaned)) / sum(map(len, texts))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', nargs='?', default='mini', help='collection in an official layout, or mini')
    parser.add_argument('--language', default='de', choices=['de', 'en'])
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--presets', default='paper,sensible,tweets,sensible+tweets')
    parser.add_argument('--one', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one: return print(json.dumps(measure(options.folder, options.language, options.one)))
    presets, rows = options.presets.split(','), {}
    for _ in range(options.repeats):
        for preset in presets:
            command = [sys.executable, __file__, options.folder, '--language', options.language]
            done = subprocess.run([*command, '--one', preset], capture_output=True, text=True, check=True)
            rows.setdefault(preset, []).append(json.loads(done.stdout.splitlines()[-1]))
    median = lambda preset, name: statistics.median(row[name] for row in rows[preset])
    print(f"{rows[presets[0]][0]['texts']} texts, language {options.language}, median of {options.repeats}\n")
    print('| steps | first, texts/s | again, texts/s | no memo, texts/s | memo, times faster '
          '| memory added, MB | peak, MB | words remembered | characters left |\n'
          '|---|---|---|---|---|---|---|---|---|')
    for preset in presets:
        faster = median(preset, 'again')/median(preset, 'no memo')
        print(f"| {preset} | {median(preset, 'first'):.0f} | {median(preset, 'again'):.0f} "
              f"| {median(preset, 'no memo'):.0f} | {faster:.1f} "
              f"| {median(preset, 'MB'):.0f} | {median(preset, 'peak'):.0f} "
              f"| {median(preset, 'remembered'):.0f} | {median(preset, 'characters'):.0%} |")


if __name__ == '__main__': main()
