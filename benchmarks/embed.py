"""Images a second of `encode` against a bare forward pass of the best batch size; full size, random weights.

    python benchmarks/embed.py                    # RN50, ViT-B/32 and a CNN of timm
    python benchmarks/embed.py --only ViT-B/32 --images 32 --json embed.json
    python benchmarks/embed.py --pixels 224 --pictures FOLDER --images 500   # one core's preprocessing
"""
import argparse
import json
import math
import platform
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from PIL import Image
from tqdm import tqdm

from open_clip.transform import PreprocessCfg, image_transform_v2

from newsrepro.core.checkpoints import Backbone, find_backbone
from newsrepro.data.pictures import PICTURE_SUFFIXES, open_image
from newsrepro.models.encoding import encode, encode_pictures, largest_tensor, rows_at_once
from newsrepro.models.foreign import FeatureEncoder, ImageTower
from newsrepro.models.loader import Encoder, build_model
from newsrepro.models.pixels import compiles, framed, framing_of, normalised

CNN = 'tf_efficientnet_lite2'
NAMES = ('RN50', 'ViT-B/32', CNN)
SIZES = (1, 2, 4, 8, 16, 32, 64)  # batches of the bare pass


def fresh(name: str, device: str) -> Encoder | FeatureEncoder:
    "The encoder with random weights."
    torch.manual_seed(0)
    if name != CNN:
        backbone = find_backbone(name, 'paper')
        model = build_model(backbone).eval().requires_grad_(False).to(device)
        return Encoder(backbone, model, 'random', Path(), device, 'fp32')
    net = timm.create_model(name, num_classes=0)
    config = timm.data.resolve_model_data_config(net)
    backbone = Backbone(name, name, 'timm', config['input_size'][-1], net.num_features, 0, quick_gelu=False)
    tower = ImageTower(net).eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    transform = timm.data.create_transform(**config, is_training=False)
    return FeatureEncoder(backbone, tower, 'random', device, transform)


def some_pictures(folder: Path, n: int) -> list[str]:
    "Coarse noise, 400 x 300, as JPEG."
    draw = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((400, 300)).save(folder/f'{i}.jpg')
    return [str(folder/f'{i}.jpg') for i in range(n)]


def pictures_of(folder: Path, n: int) -> list[str]:
    "Drawn from the folder and those below it."
    found = sorted(str(path) for path in folder.rglob('*') if path.suffix.lower() in PICTURE_SUFFIXES)
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:n]]


def seconds(work, device: str) -> float:
    start = time.perf_counter()
    work()
    if device != 'cpu': torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def bare(encoder, pixels: torch.Tensor, size: int) -> None:
    "The model alone, on pixels that are there already."
    for part in pixels.split(size): encoder.model.encode_image(part.to(encoder.device)).cpu()


def measure(name: str, paths: list[str], repetitions: int, device: str) -> dict:
    "Images a second by each way, the best of `repetitions` taken by turns."
    encoder, n = fresh(name, device), len(paths)
    side, quiet = encoder.backbone.px, tqdm(disable=True)
    one, pixels = torch.zeros(1, 3, side, side), torch.rand(n, 3, side, side)
    sizes = [size for size in SIZES if size <= n]
    ways = {f'bare, {size} a batch': lambda size=size: bare(encoder, pixels, size) for size in sizes}
    ways |= {'encode, pixels ready': lambda: encode_pictures(encoder, pixels.split),
             'encode, from files': lambda: encode(encoder, paths, 'image', bar=quiet)}
    best = dict.fromkeys(ways, math.inf)
    for repetition in range(repetitions + 1):
        for way in ways if repetition % 2 else reversed(ways):
            took = seconds(ways[way], device)
            if repetition: best[way] = min(best[way], took)  # the first one warms up
    rates = {way: n/took for way, took in best.items()}
    top = max(rate for way, rate in rates.items() if way.startswith('bare'))
    rule = dict(rows=rows_at_once(encoder, one, 64))
    if device == 'cpu': rule['largest_mib'] = largest_tensor(encoder.model, one)/2**20
    return dict(encoder=name, images=n, **rule, rates=rates,
                ratio_pixels=rates['encode, pixels ready']/top, ratio_files=rates['encode, from files']/top)


def preprocessing(paths: list[str], px: int, repetitions: int) -> dict:
    "Images a second of one core's time, the median image of each way; the ways take turns at each file."
    torch.set_num_threads(1)
    transform = image_transform_v2(PreprocessCfg(size=px), is_train=False)
    framing = framing_of(transform)

    def ours(compiled: bool) -> dict:
        seen = lambda path: torch.tensor(framed(open_image(path), framing, compiled))
        numbers = lambda path: normalised(seen(path)[None], framing)[0]
        name = 'ours, by numba' if compiled else 'ours'
        return {f'{name}, bytes': seen, f'{name}, numbers': numbers}

    ways = {'decoding alone': lambda path: Image.open(path).load(),
            'open_clip': lambda path: transform(Image.open(path)), **ours(False)}
    if compiles(framing): ways |= ours(True)
    took = {way: [] for way in ways}
    same = 0
    for repetition in range(repetitions + 1):
        for path in paths:
            found = {}
            for way in ways if repetition % 2 else reversed(ways):
                start = time.thread_time()
                found[way] = ways[way](path)
                if repetition: took[way].append(time.thread_time() - start)  # the first one warms up
            same += all(torch.equal(found['open_clip'], found[way]) for way in ways if 'numbers' in way)
    rates = {way: 1/float(np.median(times)) for way, times in took.items()}
    return dict(px=px, images=len(paths), rates=rates, same=same/len(paths)/(repetitions + 1),
                ratios={way: rate/rates['open_clip'] for way, rate in rates.items()})


def show_preprocessing(row: dict, file: Path | None) -> None:
    print('| way | images/s a core | of open_clip |\n|---|---|---|')
    for way, rate in row['rates'].items(): print(f"| {way} | {rate:.0f} | {row['ratios'][way]:.2f} |")
    print(f"numbers equal to the last bit: {row['same']:.1%} of {row['images']} pictures")
    if file: file.write_text(json.dumps(row, indent=1) + '\n')


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument('--only', choices=NAMES)
    parser.add_argument('--images', type=int, default=64)
    parser.add_argument('--repetitions', type=int, default=3)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--pixels', type=int, help='side of squares; measures preprocessing alone')
    parser.add_argument('--pictures', type=Path, help='folder of pictures to take instead of noise')
    parser.add_argument('--json', type=Path, help='file for the figures')
    args = parser.parse_args()
    found = []
    with TemporaryDirectory() as folder:
        paths = pictures_of(args.pictures, args.images) if args.pictures else some_pictures(
            Path(folder), args.images)
        if args.pixels:
            return show_preprocessing(preprocessing(paths, args.pixels, args.repetitions), args.json)
        print('| encoder | rows | best bare pass | encode, pixels ready | encode, from files | shares |')
        print('|---|---|---|---|---|---|')
        for name in [args.only] if args.only else NAMES:
            row = measure(name, paths, args.repetitions, args.device)
            way = max((way for way in row['rates'] if way.startswith('bare')), key=row['rates'].get)
            rate = row['rates'][way]
            ready, files = row['rates']['encode, pixels ready'], row['rates']['encode, from files']
            print(f"| {name} | {row['rows']} | {rate:.1f} ({way[6:]}) | {ready:.1f} | {files:.1f} | "
                  f"{row['ratio_pixels']:.2f}, {row['ratio_files']:.2f} |", flush=True)
            found.append(row)
    record = dict(device=args.device, machine=platform.machine(), threads=torch.get_num_threads(),
                  torch=torch.__version__, encoders=found)
    if args.json: args.json.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__': main()
