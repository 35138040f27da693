"""Pairs a second of ViLT-B/32 with random weights: our scorer, the bare encoder on ready embeddings,
`transformers` one by one.

    python benchmarks/vilt.py                    # 8 texts x 16 pictures, on the CPU
    python benchmarks/vilt.py --device cuda      # 512 texts x 256 pictures, several batch sizes

About an hour on two cores:

    python benchmarks/vilt.py --texts 64 --images 64 --repeats 1 --only ours encoder alone
"""
import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizer, ViltConfig, ViltForImageAndTextRetrieval, ViltImageProcessorPil

from newsrepro.models.single_stream import Effort, Matcher, PictureRule, new_vilt, quantised, rank_pairs

POOL = 1915  # articles and pictures of the paper's test set
NAMES = {'ours': 'ours, all pairs from texts and files',
         'encoder': 'bare encoder of `transformers` on ready embeddings',
         'alone': '`transformers`, one pair at a time', 'int8': 'ours, int8', 'bfloat16': 'ours, bfloat16'}


def made(args, folder: Path) -> tuple[Matcher, list[str], list[Path]]:
    "A model with random weights, texts of 8 to 40 word pieces, pictures of 384 x 576 and 384 x 384 by turns."
    vocabulary, draw = folder/'vocab.txt', np.random.default_rng(0)
    vocabulary.write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]',
                                     *(f'word{place}' for place in range(30517))]) + '\n')
    model = new_vilt(ViltConfig()).eval().requires_grad_(False)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.add_(.02*torch.randn_like(weight))  # positions too: they begin at nought
    words = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    matcher = Matcher('vilt-b32', model.to(args.device), words, PictureRule(), '', vocabulary)
    lengths = np.linspace(8, 40, args.texts).round().astype(int) - 2  # start and end
    texts = [' '.join(f'word{place}' for place in draw.integers(30517, size=length)) for length in lengths]
    paths = [folder/f'{place}.jpg' for place in range(args.images)]
    for place, path in enumerate(paths):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 12, 3), dtype=np.uint8))
        coarse.resize((576, 384) if place % 2 else (400, 400), Image.Resampling.BICUBIC).save(path)
    return matcher, texts, paths


def positions(matcher: Matcher, paths: list[Path]) -> list[int]:
    "Class token and patches of each picture."
    return [1 + int(np.prod(matcher.rule.size(*Image.open(path).size[::-1])))//matcher.rule.divisor**2
            for path in paths]


def ranked(matcher: Matcher, texts: list[str], paths: list[Path],
           effort: Effort) -> np.ndarray:  # (texts, images)
    "Scores of all pairs, with all that is done once for each text and picture."
    scores, places = rank_pairs(matcher, texts, paths, k=len(paths), effort=effort)
    return np.take_along_axis(scores, places.argsort(1), axis=1)


@torch.inference_mode()
def encoded(matcher: Matcher, texts: list[str], paths: list[Path], effort: Effort) -> None:
    """The twelve layers of `transformers`, whole, over as many pairs of the same lengths in batches as large;
    nothing else."""
    device, patches = matcher.model.device, positions(matcher, paths)
    for words in (len(row) for row in matcher.tokens(texts)):
        for length in sorted(set(patches)):
            left = patches.count(length)
            while left > 0:
                matcher.model.vilt.encoder(torch.randn(min(left, effort.batch_size), words + length, 768,
                                                       device=device))
                left -= effort.batch_size


@torch.inference_mode()
def alone(matcher: Matcher, texts: list[str], paths: list[Path]) -> np.ndarray:  # (texts, images)
    "As the documentation of `transformers` has it, but each text and picture is prepared once."
    theirs = ViltForImageAndTextRetrieval(matcher.model.config)
    theirs.vilt, theirs.rank_output = matcher.model.vilt, matcher.model.rank_output
    words, pictures = BertTokenizer(vocab=str(matcher.vocabulary),
                                    do_lower_case=True), ViltImageProcessorPil()
    told = [words(text, truncation=True, max_length=40, return_tensors='pt').to(matcher.model.device)
            for text in texts]
    shown = [pictures(Image.open(path).convert('RGB'), return_tensors='pt').to(matcher.model.device)
             for path in paths]
    return np.array([[theirs(**text, **picture).logits.item() for picture in shown] for text in told],
                    dtype=np.float32)


def timed(work, device: str) -> tuple[float, object]:
    "Seconds, and what came out."
    if device != 'cpu': torch.cuda.synchronize()
    start = time.perf_counter()
    found = work()
    if device != 'cpu': torch.cuda.synchronize()
    return time.perf_counter() - start, found


def on_cpu(args, folder: Path) -> None:
    matcher, texts, paths = made(args, folder)
    effort = Effort(batch_size=args.batch)
    ours = lambda kind: lambda: ranked(kind, texts, paths, effort)
    works = {'ours': ours(matcher), 'encoder': lambda: encoded(matcher, texts, paths, effort),
             'alone': lambda: alone(matcher, texts, paths),
             'int8': lambda: ranked(eighth, texts, paths, effort),
             'bfloat16': ours(replace(matcher, precision='bf16'))}
    works = {name: work for name, work in works.items() if name in args.only}
    eighth = quantised(matcher) if 'int8' in works else None
    seconds, scores = {name: [] for name in works}, {}
    for repeat in range(args.repeats):
        for name in sorted(works, reverse=repeat % 2 == 1):
            taken, scores[name] = timed(works[name], 'cpu')
            seconds[name].append(taken)
    rate = {name: args.texts*args.images/statistics.median(taken) for name, taken in seconds.items()}
    print(f'ViLT-B/32, {args.texts} texts x {args.images} pictures, batches of {args.batch}, '
          f'{args.threads} threads, torch {torch.__version__}; median of {args.repeats}, by turns\n')
    print('| | pairs/s | of the bare encoder | of one by one '
          '| largest difference to one by one | Spearman to ours |')
    print('|---|---|---|---|---|---|')
    for name in works:
        share = [f'{rate[name]/rate[base]:.3f}' if base in rate else '' for base in ('encoder', 'alone')]
        known = scores[name] is not None
        apart = f"{np.abs(scores[name] - scores['alone']).max():.1e}" if known and 'alone' in scores else ''
        order = ''
        if known and 'ours' in scores:
            order = f"{spearmanr(scores[name].ravel(), scores['ours'].ravel()).statistic:.4f}"
        print(f"| {NAMES[name]} | {rate[name]:.2f} | {' | '.join(share)} | {apart} | {order} |")
    for found in [found for found in scores.values() if found is not None][:1]:
        print(f'\nStandard deviation of the scores: {found.std():.3f}.')


def operations(words: int, patches: int, config: ViltConfig) -> float:
    """Multiplications and additions of one pair that ours makes: in the last layer keys and values for all,
    the rest for one position."""
    n, d, wide = words + patches, config.hidden_size, config.intermediate_size
    whole = config.num_hidden_layers - 1
    layer = lambda queries: 4*n*d*d + queries*(4*d*d + 4*d*wide + 4*n*d)
    return whole*layer(n) + layer(1)


def matrix_rate(size: int = 8192, times: int = 30) -> float:
    "Operations a second of a product of two large bfloat16 matrices."
    a, b = (torch.randn(size, size, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5): a @ b
    return 2*size**3*times/timed(lambda: [a @ b for _ in range(times)] and None, 'cuda')[0]


def on_cuda(args, folder: Path) -> None:
    matcher, texts, paths = made(args, folder)
    few = texts[::max(1, args.texts//16)][:16], paths[:8]
    alone(matcher, few[0][:2], few[1][:2])  # warms up
    taken, reference = timed(lambda: alone(matcher, *few), 'cuda')
    single, limit = reference.size/taken, matrix_rate()
    lengths, sizes = [len(row) for row in matcher.tokens(texts)], positions(matcher, paths)
    work = np.mean([operations(words, patches, matcher.model.config) for words in lengths
                    for patches in sizes])
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}: '
          f'one pair at a time through `transformers` {single:.1f} pairs/s; '
          f'product of bfloat16 matrices {limit/1e12:.0f} TFLOP/s; {work/1e9:.1f} GFLOP a pair\n')
    print(f'| {args.texts} x {args.images} | batch | pairs/s | of one by one '
          f'| minutes for {POOL} x {POOL} | share of the matrix rate '
          '| largest difference to one by one | Spearman |\n|---|---|---|---|---|---|---|---|')
    for mixed in (True, False):
        scorer = replace(matcher, precision='bf16' if mixed else 'fp32')
        close = ranked(scorer, *few, Effort())
        for batch in args.batches:
            effort = Effort(batch_size=batch)
            ranked(scorer, texts[:4], paths[:16], effort)  # warms up
            seconds = [timed(lambda: ranked(scorer, texts, paths, effort), 'cuda')[0]
                       for _ in range(args.repeats)]
            rate = args.texts*args.images/statistics.median(seconds)
            print(f"| {'bfloat16' if mixed else 'float32'} | {batch} "
                  f'| {rate:,.0f} | {rate/single:.1f} | {POOL**2/rate/60:.1f} '
                  f'| {rate*work/limit:.3f} | {np.abs(close - reference).max():.1e} '
                  f'| {spearmanr(close.ravel(), reference.ravel()).statistic:.4f} |', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--texts', type=int, default=0, help='0 = 8, on a GPU 512')
    parser.add_argument('--images', type=int, default=0, help='0 = 16, on a GPU 256')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--batch', type=int, default=16, help='pairs a forward pass on the CPU')
    parser.add_argument('--batches', type=int, nargs='+', default=[64, 256, 512, 1024],
                        help='the same on a GPU')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--only', choices=list(NAMES), nargs='+', default=list(NAMES),
                        help='on the CPU, of its rows')
    args = parser.parse_args()
    cpu = args.device == 'cpu'
    args.texts, args.images = args.texts or (8 if cpu else 512), args.images or (16 if cpu else 256)
    if cpu: torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder: (on_cpu if cpu else on_cuda)(args, Path(folder))


if __name__ == '__main__': main()
