"""What the paper study costs on this machine's GPU, by full-size models of random weights, in nine minutes.

    python benchmarks/gpu.py --out gpu.json            # each part is in the file as soon as it is there
    python benchmarks/gpu.py --only matmul vilt        # of its parts
    python benchmarks/gpu.py --tiny                    # the mini models on a CPU, to see that it runs
"""
import argparse
import math
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from newsrepro.core.base import MINI_DIR, notebooks_dir, write_json
from newsrepro.core.checkpoints import REGISTRY, find_backbone
from newsrepro.methods.txv import TxVRecipe, train_txv
from newsrepro.models.encoding import encode, encode_batch
from newsrepro.models.loader import Encoder, build_model
from newsrepro.models.match import MatchRecipe, load_news_pairs, train_matcher
from newsrepro.models.single_stream import (Effort, Matcher, PictureRule, embed_pictures, load_vilt, new_vilt,
                                            rank_pairs, score_pairs, untaught)
from newsrepro.models.train import (Pairs, Recipe, batch_stream, make_optimiser, normaliser, optimise,
                                    set_modes)
from newsrepro.ranking.one_to_one import dual_softmax_top_k
from newsrepro.study.needs import KINDS_OF_WORK, MARIAN_GFLOPS, VILT_GFLOPS, Part, operations, work_of
from newsrepro.study.registry import NOTEBOOKS, PAPER_LAYOUT, notebook_parameters

WHOLE = 510.  # seconds of all parts


@dataclass(frozen=True)
class Sizes:
    "How much each part works through."
    matrix: int  # side of the matrices whose product is the measure of all others
    pictures: int  # on disk, encoded end to end
    batch: int  # pictures or texts a forward pass of a CLIP model
    texts: int  # ranked by ViLT
    pool: int  # pictures they are ranked over
    pairs: int  # a forward pass of ViLT
    batches: tuple[int, int]  # pairs a step of fine-tuning
    news: int  # pairs that ViLT learns from
    txv: int  # pairs that T×V learns from, an epoch
    joint: int  # dimensions of its joint space
    rows: tuple[int, int]  # texts, and as many images, of dual softmax
    dim: int  # of their vectors
    german: int  # sentences to translate


FULL = Sizes(8192, 1024, 128, 32, 512, 512, (64, 1024), 96, 6840, 2048, (100_000, 1_000_000), 512, 384)
TINY = Sizes(256, 8, 4, 3, 4, 4, (4, 8), 4, 24, 16, (200, 500), 16, 4)


@dataclass(frozen=True)
class Bench:
    "The machine and what lies on its disk."
    device: str  # 'cpu' or 'cuda'
    profile: str  # 'paper', or 'mini' for the small models
    sizes: Sizes
    folder: Path  # for pictures and models
    rates: dict  # operations a second by number format, from the part `matmul`

    @property
    def half(self) -> str:
        "Of the two formats of 16 bits that in which checkpoints are published, where the device has it."
        return 'bf16' if self.device == 'cpu' else 'fp16'

    def wait(self) -> None:
        "Until the GPU has done what it was given."
        if self.device != 'cpu': torch.cuda.synchronize()

    def seconds(self, work: Callable, repeats: int = 3) -> float:
        "The median time of `work`, after a run that warms up."
        work()
        taken = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def share(self, operations: float) -> float:  # NaN where the rate was not measured
        "Operations a second as a share of the bfloat16 product of matrices."
        return operations/self.rates.get('bfloat16', math.nan)

    @cached_property
    def pictures(self) -> list[str]:
        "Files of coarse noise, of the size of news pictures."
        draw, found = np.random.default_rng(0), []
        for place in range(self.sizes.pictures):
            coarse = Image.fromarray(draw.integers(0, 256, (24, 42, 3), dtype=np.uint8))
            found.append(str(self.folder/f'{place}.jpg'))
            coarse.resize((460, 259), Image.Resampling.BICUBIC).save(found[-1], quality=88)
        return found

    @cached_property
    def matcher(self) -> Matcher:
        "ViLT with random weights, its words those of the mini model."
        mini = load_vilt('mini-vilt')
        if self.profile == 'mini': return replace(untaught(mini), untrained=())
        from transformers import ViltConfig
        model = new_vilt(ViltConfig()).to(self.device).eval().requires_grad_(False)
        return replace(mini, name='vilt-b32', model=model, rule=PictureRule(), untrained=(),
                       precision=self.half)

    def words(self, count: int  # texts
             ) -> list[str]:
        "Texts of more word pieces than ViLT reads, as news are."
        known = (MINI_DIR/'mini-vilt'/'vocab.txt').read_text(encoding='utf-8').split('\n')
        plain = [word for word in known if word.isalpha()]
        draw = np.random.default_rng(1)
        return [' '.join(draw.choice(plain, 60)) for _ in range(count)]


def on_device(build: Callable, device: str) -> torch.nn.Module:
    "The model that `build` returns, its random weights drawn where it is to work."
    torch.manual_seed(0)
    with torch.device(device): return build().to(device)


def matmul(bench: Bench) -> dict:
    "Products of large matrices: what all other rates are a share of."
    side = bench.sizes.matrix
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=bench.device).to(kind) for _ in range(2))
        bench.rates[str(kind).removeprefix('torch.')] = 2*side**3/bench.seconds(lambda: a @ b, 7)
    return {f'{name}_tflops': rate/1e12 for name, rate in bench.rates.items()}


def clip(backbone_name: str) -> Callable:
    "The part that measures one CLIP model."
    def measured(bench: Bench) -> dict:
        backbone = find_backbone(backbone_name, bench.profile)
        model = on_device(lambda: build_model(backbone), bench.device).eval().requires_grad_(False)
        found = {}
        for precision in ('fp32', bench.half):
            encoder = Encoder(backbone, model, '0'*64, bench.folder, bench.device, precision)
            name = 'single' if precision == 'fp32' else 'half'
            found |= {f'{what}_{name}': value for what, value in bare_rates(bench, encoder).items()}
        found['share_of_bfloat16'] = bench.share(found['images_half']*backbone.gflops[0]*1e9)
        began = time.perf_counter()
        encode(encoder, bench.pictures, 'image', bench.sizes.batch, os.cpu_count())
        found['images_end_to_end'] = len(bench.pictures)/(time.perf_counter() - began)
        return found
    return measured


def bare_rates(bench: Bench, encoder: Encoder) -> dict:  # images and texts a second
    "Forward passes on inputs that are ready on the device."
    size, px = bench.sizes.batch, encoder.backbone.px
    inputs = dict(images=torch.rand(size, 3, px, px, device=bench.device),
                  texts=noise_tokens(encoder.model, size).to(bench.device))
    return {name: size/bench.seconds(lambda: encode_batch(encoder, batch, size), 2)
            for name, batch in inputs.items()}


def vilt(bench: Bench) -> dict:
    "Each text against each picture: with all that is around it, and the bare forward passes."
    matcher, sizes, found = bench.matcher, bench.sizes, {}
    texts, pool = bench.words(sizes.texts), bench.pictures[:sizes.pool]
    effort = Effort(batch_size=sizes.pairs, workers=os.cpu_count())
    rank_pairs(matcher, texts[:2], pool[:4], 2, effort=effort)  # warms up
    for name, precision in (('single', 'fp32'), ('half', bench.half)):
        began = time.perf_counter()
        rank_pairs(replace(matcher, precision=precision), texts, pool, len(pool), effort=effort)
        found[f'pairs_end_to_end_{name}'] = len(texts)*len(pool)/(time.perf_counter() - began)
    with torch.inference_mode():
        ids = torch.tensor(matcher.tokens(texts[:1]), device=matcher.model.device)
        words = [matcher.model.embed_text(ids)[0]]*sizes.pairs
        picture = torch.zeros(3, *matcher.rule.size(259, 460), dtype=torch.uint8)
        shown = embed_pictures(matcher, [picture], 1)*sizes.pairs
    found['pairs_half'] = sizes.pairs/bench.seconds(lambda: score_pairs(matcher, words, shown, sizes.pairs))
    found['positions'] = len(words[0]) + len(shown[0])
    found['share_of_bfloat16'] = bench.share(found['pairs_half']*pair_operations(matcher, found['positions']))
    return found


def pair_operations(matcher: Matcher, positions: int) -> float:
    "Of one forward pass; a multiply-add is two. The last layer computes one position."
    config = matcher.model.config
    d, wide = config.hidden_size, config.intermediate_size
    layer = lambda queries: 4*positions*d*d + queries*(4*d*d + 4*d*wide + 4*positions*d)
    return (config.num_hidden_layers - 1)*layer(positions) + layer(1)


def vilt_training(bench: Bench) -> dict:
    "Steps of ViLT's fine-tuning, 32 pairs each."
    n = bench.sizes.news
    pairs = load_news_pairs(bench.matcher, bench.words(n), bench.pictures[:n])
    recipe = MatchRecipe(4, batch_size=min(32, n), warmup=1)
    _, history = train_matcher(bench.matcher, pairs, recipe, progress=False)
    seconds = (history[-1]['seconds'] - history[0]['seconds'])/(recipe.steps - 1)  # they count from the start
    return dict(pairs=recipe.batch_size/seconds)


CHUNK = 256  # pairs a forward pass at most; larger batches compute it twice


def training(which: int  # of the two batch sizes
            ) -> Callable:
    "The part that measures a step of fine-tuning ViT-B/32."
    def measured(bench: Bench) -> dict:
        backbone, size, found = find_backbone('ViT-B/32', bench.profile), bench.sizes.batches[which], {}
        pixels = torch.randint(0, 256, (size, 3, backbone.px, backbone.px), dtype=torch.uint8)
        numbers = tuple(range(size))
        for name, mixed in (('single', False), ('half', bench.device != 'cpu')):
            model = on_device(lambda: build_model(backbone), bench.device)
            recipe = Recipe(5, batch_size=size, rate=1e-5, warmup=0, augment='none', mixed=mixed,
                            chunk=0 if size <= CHUNK else CHUNK)
            set_modes(model, recipe)
            optimiser, normalise = make_optimiser(model, recipe), normaliser(backbone)
            pairs = Pairs(pixels, noise_tokens(model, size), numbers, numbers)
            stream = batch_stream(pairs, recipe, backbone.px)
            step = lambda: optimise(model, optimiser, next(stream), recipe, normalise)
            found[f'seconds_a_step_{name}'] = bench.seconds(step)
            found[f'pairs_{name}'] = size/found[f'seconds_a_step_{name}']
        return found | dict(share_of_bfloat16=bench.share(3e9*sum(backbone.gflops)*found['pairs_half']))
    return measured


def noise_tokens(model: torch.nn.Module,  # of open_clip
                 n: int) -> torch.Tensor:  # (n, 77)
    "Texts that fill all positions; the end is the last word of the vocabulary."
    tokens = torch.randint(1, model.vocab_size - 1, (n, 77))
    tokens[:, -1] = model.vocab_size - 1
    return tokens


def txv(bench: Bench) -> dict:
    "Epochs of T×V on one text and one image feature of ViT-H/14's size."
    n, draw = bench.sizes.txv, np.random.default_rng(0)
    dim = find_backbone('ViT-H/14', bench.profile).dim
    features = [draw.normal(size=(n, dim)).astype(np.float32) for _ in range(2)]
    pairs, valid = ([[feature[:rows]] for feature in features] for rows in (n, n//10))
    recipe = TxVRecipe(joint=bench.sizes.joint, epochs=3, batch_size=min(196, n//2))
    began = time.perf_counter()
    train_txv(pairs, valid, recipe, device=bench.device)
    return dict(pairs=n, seconds_an_epoch=(time.perf_counter() - began)/recipe.epochs)


def dual_softmax(which: int  # of the two sizes
                ) -> Callable:
    "The part that measures the streamed search."
    def measured(bench: Bench) -> dict:
        n, dim = bench.sizes.rows[which], bench.sizes.dim
        torch.manual_seed(0)
        texts, images = (torch.randn(n, dim, device=bench.device).cpu().numpy() for _ in range(2))
        began = time.perf_counter()
        dual_softmax_top_k(texts, images, min(100, n), .01, bench.device)
        bench.wait()
        seconds = time.perf_counter() - began
        return dict(rows=n, seconds=seconds, tflops=2*2*n*n*dim/seconds/1e12)
    return measured


def translation(bench: Bench) -> dict:
    "Sentences of the size that news have, put into English by OPUS-MT's network."
    from newsrepro.text.language import MarianTranslator, TranslationMemory
    folder, german = bench.folder/'marian', bench.sizes.german
    if bench.profile == 'paper':
        from rehearsal import make_marian
        make_marian('rehearsal/marian', bench.folder, 25)
        folder = bench.folder/'models--rehearsal--marian'/'snapshots'/('0'*40)
    else: folder = MINI_DIR/'mini-marian-de-en'
    memory = TranslationMemory(bench.folder/'translations.sqlite')
    translate = MarianTranslator('marian', folder, memory, bench.device)
    texts = [f'Satz {place}: ' + 'die alte Brücke bei Köln ist am Montag gesperrt '*2 + '.'
             for place in range(german)]
    translate(texts[:1])  # warms up
    began = time.perf_counter()
    translate(texts)
    return dict(sentences=(german - 1)/(time.perf_counter() - began))


@dataclass(frozen=True)
class Stage:
    "A part of the benchmark."
    name: str
    work: Callable[[Bench], dict]
    budget: float  # seconds it may take


STAGES = (Stage('matmul', matmul, 10),
          *(Stage(f'clip {b.name}', clip(b.name), 30 if b.millions > 400 else 12) for b in REGISTRY['paper']),
          Stage('vilt', vilt, 55), Stage('training, small batch', training(0), 25),
          Stage('training, large batch', training(1), 40), Stage('vilt training', vilt_training, 25),
          Stage('txv', txv, 20), Stage('translation', translation, 40),
          Stage('dual softmax, small', dual_softmax(0), 20),
          Stage('dual softmax, large', dual_softmax(1), 80))


@contextmanager
def limited(seconds: float):
    "Raise `TimeoutError` inside when the time is up."
    def stop(*_): raise TimeoutError(f'more than {seconds:.0f} s')
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_stage(stage: Stage, bench: Bench, left: float  # seconds of the whole
             ) -> dict:
    "What a part found, or why it found nothing; its time and peak memory."
    if left < 3: return dict(skipped=f'{max(0, left):.0f} s left')
    began = time.perf_counter()
    if bench.device != 'cpu':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with limited(min(stage.budget, left)): found = stage.work(bench)
    except TimeoutError as error: found = dict(skipped=str(error))
    except Exception as error:  # the others go on
        found = dict(failed=f'{type(error).__name__}: {error}'[:300])
    if bench.device != 'cpu': found['peak_memory_gb'] = torch.cuda.max_memory_allocated()/1e9
    return found | dict(took=time.perf_counter() - began)


OFFICIAL = {'newsimages2021': {'newsimages2021': Part(7530, 1915, 1915, 1915, 9445, 0)},
            'newsimages2022': {'RSS': Part(400, 1500, 1500, 1500, 0, 400),
                               'RT': Part(1925, 1500, 1500, 1500, 3425, 1925),
                               'TW': Part(4410, 1500, 1500, 1500, 0, 4410)}}
SENTENCES = 75/25  # as long as those timed, in a German article of 75 word pieces


def speeds(parts: Mapping[str, Mapping]) -> dict[str, float]:  # kind of work -> 10^9 operations a second
    "Measured end to end; NaN where the part is missing."
    value = lambda part, name: parts.get(part, {}).get(name, math.nan)
    known = [(find_backbone(name.removeprefix('clip '), 'paper').gflops[0], part['images_end_to_end'])
             for name, part in parts.items() if name.startswith('clip ') and 'images_end_to_end' in part]
    seconds = sum(gflops/rate for gflops, rate in known)
    encoding = sum(gflops for gflops, _ in known)/seconds if known else math.nan
    step = 3*sum(find_backbone('ViT-B/32', 'paper').gflops)
    vilt, marian = VILT_GFLOPS['paper'], MARIAN_GFLOPS['paper']
    own = (encoding, vilt*value('vilt', 'pairs_end_to_end_half'),
           step*value('training, small batch', 'pairs_single'), 3*vilt*value('vilt training', 'pairs'),
           marian*value('translation', 'sentences')/SENTENCES)
    return dict(zip(KINDS_OF_WORK, own))


def bill(rates: Mapping[str, float]) -> dict[str, dict]:  # notebook -> hours, gigabytes
    "What the paper study on collections of the official sizes would take; hours are NaN where a rate lacks."
    found = {}
    for notebook in NOTEBOOKS:
        declared = notebook_parameters(notebooks_dir()/f'{notebook.name}.ipynb')
        values = {name: parameter.default for name, parameter in declared.items()} | {'profile': 'paper'}
        work = work_of(notebook.name, values, OFFICIAL[PAPER_LAYOUT[notebook.paper]])
        if work is None: continue
        amounts = operations(work, 'paper').items()
        hours = sum(gflops/rates[kind] for kind, gflops in amounts if gflops)/3600
        found[notebook.name] = dict(hours=hours, gigabytes=work.megabytes/1000)
    return found


def machine(device: str) -> dict:
    "What the figures belong to."
    none = f'no card, mini models on {platform.machine()}'
    card = torch.cuda.get_device_name() if device != 'cpu' else none
    memory = torch.cuda.get_device_properties(0).total_memory/1e9 if device != 'cpu' else math.nan
    return dict(card=card, memory_gb=memory, torch=torch.__version__, cuda=torch.version.cuda,
                processors=os.cpu_count())


def measure_all(bench: Bench, out: Path, only: list[str], whole: float, began: float) -> dict:
    "Run the parts by turns; the file is complete after each."
    record = machine(bench.device) | dict(tiny=bench.profile == 'mini', parts={})
    parts = record['parts']
    for stage in STAGES:
        if only and not any(stage.name.startswith(name) for name in only): continue
        parts[stage.name] = run_stage(stage, bench, whole - (time.perf_counter() - began))
        record['gflops_per_second'] = speeds(parts)
        record['bill'] = bill(record['gflops_per_second'])
        write_json(out, rounded(record))
        print(f'{stage.name}: {told(parts[stage.name])}', flush=True)
    return record


def rounded(value):
    "Numbers to four figures, NaN as null, in nested dicts."
    if isinstance(value, dict): return {name: rounded(own) for name, own in value.items()}
    if not isinstance(value, float): return value
    return None if math.isnan(value) else float(f'{value:.4g}')


def told(part: Mapping) -> str:
    "A part in a line."
    return ', '.join(f'{name} {rounded(value)}' for name, value in part.items())


def options() -> argparse.ArgumentParser:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tiny', action='store_true', help='the mini models, on the CPU')
    parser.add_argument('--out', type=Path, default=Path('gpu.json'))
    parser.add_argument('--only', nargs='+', default=[], help='parts whose names begin so')
    parser.add_argument('--seconds', type=float, default=WHOLE,
                        help='of all parts; what does not fit is skipped')
    return parser


def main(given: list[str] | None = None) -> int:
    began, args = time.perf_counter(), options().parse_args(given)
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit(f'torch {torch.__version__} sees no GPU here; --tiny runs on the CPU')
    if unknown := [name for name in args.only if not any(s.name.startswith(name) for s in STAGES)]:
        raise SystemExit(f"--only {unknown[0]}: no such part; there are {', '.join(s.name for s in STAGES)}")
    device, profile, sizes = ('cpu', 'mini', TINY) if args.tiny else ('cuda', 'paper', FULL)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, profile, sizes, Path(folder), {})
        record = measure_all(bench, args.out, args.only, args.seconds, began)
    print('\n| notebook | hours | GB |\n|---|---|---|')
    for name, own in record['bill'].items():
        print(f"| {name} | {own['hours']:.2f} | {own['gigabytes']:.1f} |")
    return int(any('failed' in part for part in record['parts'].values()))


if __name__ == '__main__': raise SystemExit(main())
