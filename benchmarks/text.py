"""Language detection, paragraphs and selection over a collection: counts, texts a second, memory; and the
mini translator's sentences a second.

    python benchmarks/text.py                       # the mini collection of 2021
    python benchmarks/text.py path/to/newsimages2021
"""
import argparse
import resource
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from newsrepro.data.layouts import read_collection
from newsrepro.study.study import resolve_data
from newsrepro.text.language import (SELECTIONS, TranslationMemory, detect_languages, find_translator,
                                     paragraphs, select, sentences)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('folder', nargs='?', default='mini')
parser.add_argument('--repeats', type=int, default=3)
parser.add_argument('--translate', type=int, default=400,
                    help='articles whose sentences are translated (mini data only)')
args = parser.parse_args()

memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
collection = read_collection(resolve_data(args.folder, 'newsimages2021'))
articles = collection.articles
whole, start_memory = (articles.title + ' ' + articles.text).tolist(), memory()


def timed(work):
    "Median seconds of `work`, and what it returned."
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


print(f'{len(articles)} articles of {collection.name}, {collection.layout}; median of {args.repeats}\n')
print('| work | texts/s | peak memory, MB | result |\n|---|---|---|---|')
for name, texts in (('language of title + text', whole), ('language of title', articles.title.tolist())):
    seconds, found = timed(lambda: detect_languages(texts))
    counts = ', '.join(f"{code or 'no words'} {count}" for code, count in Counter(found).most_common())
    print(f'| {name} | {len(texts)/seconds:,.0f} | {memory():.0f} | {counts} |')
seconds, found = timed(lambda: [len(paragraphs(text)) for text in articles.text])
several = sum(n > 1 for n in found)
print(f'| paragraphs | {len(found)/seconds:,.0f} | {memory():.0f} | {several} texts of two or more |')
for selection in SELECTIONS:
    seconds, found = timed(lambda: select(articles, selection))
    words = statistics.mean(len(text.split()) for text in found)
    print(f'| select {selection} | {len(found)/seconds:,.0f} | {memory():.0f} | {words:.1f} words a text |')
print(f'\n{start_memory:.0f} MB before the first line (Python, pandas, the collection).')

if args.folder == 'mini':
    texts = articles.text[:args.translate].tolist()
    count = len({s for text in texts for part in paragraphs(text) for s in sentences(part, 'de')})
    translator = find_translator('profile', 'mini',
                                 TranslationMemory(Path(tempfile.mkdtemp())/'memory.sqlite'))
    translator(texts[:1])
    for state in ('first', 'again, from the memory'):
        start = time.perf_counter()
        translator(texts)
        speed = count/(time.perf_counter() - start)
        print(f'\nTranslation of {len(texts)} bodies, {count} different sentences, {state}: '
              f'{speed:,.0f} sentences/s.')
