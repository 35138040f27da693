"""Step rate against a plain open_clip loop, and memory of a large batch in chunks: ViT-B/32 with random
weights.

    python benchmarks/train.py                    # both
    python benchmarks/train.py --only speed --device cuda --mixed --repetitions 20
"""
import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import torch
from open_clip.loss import ClipLoss

from newsrepro.core.checkpoints import find_backbone
from newsrepro.models.loader import build_model
from newsrepro.models.train import (Pairs, Recipe, batch_stream, make_optimiser, normaliser, optimise,
                                    set_modes)

B32 = find_backbone('ViT-B/32', 'paper')
NORMALISE = normaliser(B32)


def some_pairs(n: int, length: int) -> Pairs:
    "Noise and texts of `length` tokens."
    tokens = torch.zeros(n, 77, dtype=torch.int64)
    tokens[:, :length] = torch.randint(1, 49000, (n, length))
    tokens[:, length - 1] = 49407
    return Pairs(torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8), tokens, tuple(range(n)),
                 tuple(range(n)))


def fresh(device: str, build=build_model) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(B32).to(device)


def as_open_clip_builds_it(backbone) -> torch.nn.Module:
    return open_clip.create_model(backbone.model, load_weights=False, force_quick_gelu=backbone.quick_gelu)


def plain_step(model, optimiser, loss_of, images, tokens, mixed):
    "A step as open_clip's own training makes it, pictures ready as floats."
    device = model.logit_scale.device
    images, tokens = images.to(device), tokens.to(device)
    optimiser.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        loss = loss_of(*model(images, tokens))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    optimiser.step()
    with torch.no_grad(): model.logit_scale.clamp_(0, 4.6052)
    return loss.item()


def plain_training(pairs: Pairs, mixed: bool, device: str):
    "A step of open_clip's own."
    theirs = fresh(device, as_open_clip_builds_it).train()
    decays = lambda wanted: [p for p in theirs.parameters() if (p.ndim >= 2) == wanted]
    plain = torch.optim.AdamW([dict(params=decays(True), weight_decay=.1),
                               dict(params=decays(False), weight_decay=0.)], lr=1e-5, betas=(.9, .98))
    images = NORMALISE(pairs.pixels/255)
    return lambda: plain_step(theirs, plain, ClipLoss(), images, pairs.tokens, mixed)


def our_training(pairs: Pairs, recipe: Recipe, device: str):
    "A step of ours."
    ours = fresh(device)
    set_modes(ours, recipe)
    optimiser, stream = make_optimiser(ours, recipe), batch_stream(pairs, recipe, 224)
    return lambda: optimise(ours, optimiser, next(stream), recipe, NORMALISE)


def speed(args, length: int) -> tuple[float, float]:  # median seconds a step: plain, ours
    recipe = Recipe(args.repetitions + 1, batch_size=args.batch, rate=1e-5, warmup=0, augment='none',
                    mixed=args.mixed)
    pairs, seconds = some_pairs(args.batch, length), {'plain': [], 'ours': []}
    steps = {'plain': plain_training(pairs, args.mixed, args.device),
             'ours': our_training(pairs, recipe, args.device)}
    for repetition in range(args.repetitions + 1):
        for name in sorted(steps, reverse=repetition % 2 == 1):
            if args.device != 'cpu': torch.cuda.synchronize()
            start = time.perf_counter()
            steps[name]()
            if args.device != 'cpu': torch.cuda.synchronize()
            if repetition: seconds[name].append(time.perf_counter() - start)  # the first one warms up
    return tuple(statistics.median(values) for values in seconds.values())


def resident_peak() -> float:  # megabytes
    "Most memory this process has held; `ru_maxrss` would start from what its parent held."
    try: return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def peak(args) -> None:
    "Print the peak memory of one step of `batch` pairs in chunks, the optimiser's state included."
    model, recipe = fresh(args.device), Recipe(1, batch_size=args.batch, augment='none', mixed=args.mixed,
                                               chunk=args.chunk)
    set_modes(model, recipe)
    optimiser = make_optimiser(model, recipe)
    small = Recipe(1, batch_size=2, augment='none', mixed=args.mixed)
    optimise(model, optimiser, next(batch_stream(some_pairs(2, 77), small, 224)), small,
             NORMALISE)  # fills Adam's state
    stream = batch_stream(some_pairs(args.batch, 77), recipe, 224)
    loss = optimise(model, optimiser, next(stream), recipe, NORMALISE)['loss']
    megabytes = resident_peak() if args.device == 'cpu' else torch.cuda.max_memory_allocated()/2**20
    print(json.dumps(dict(megabytes=megabytes, loss=loss)))


def measured(args, batch: int, chunk: int) -> float:
    command = [sys.executable, __file__, '--peak', '--batch', str(batch), '--chunk', str(chunk), '--device',
               args.device] + ['--mixed']*args.mixed
    return json.loads(subprocess.run(command, check=True, capture_output=True,
                                     text=True).stdout.splitlines()[-1])['megabytes']


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=['speed', 'memory'], help='one of the two')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--mixed', action='store_true', help='bfloat16 towers')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--chunks', type=int, default=16,
                        help='how many chunks of --batch the large batch has')
    parser.add_argument('--repetitions', type=int, default=5)
    parser.add_argument('--peak', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--chunk', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak: return peak(args)
    print(f'ViT-B/32, batch {args.batch}, {args.device}, {torch.get_num_threads()} threads, '
          f'{"bfloat16" if args.mixed else "float32"}, torch {torch.__version__}\n')
    print('| | plain | ours | ours/plain |\n|---|---|---|---|')
    if args.only != 'memory':
        for length in (77, 16):
            plain, ours = speed(args, length)
            print(f'| step, texts of {length} tokens | {plain:.2f} s | {ours:.2f} s | {ours/plain:.2f} |',
                  flush=True)
    if args.only != 'speed':
        small, large = measured(args, args.batch, 0), measured(args, args.batch*args.chunks, args.batch)
        print(f'| peak memory, batch {args.batch*args.chunks} in {args.chunks} chunks against {args.batch} '
              f'| {small:.0f} MB | {large:.0f} MB | {large/small:.2f} |')


if __name__ == '__main__': main()
