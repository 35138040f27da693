"""What `all.py` measures: ways to the same end, ours first, on inputs of any size.

Each function makes the inputs of a size and returns, by name, what prepares a way and gives the work whose
time counts. The ways agree in what they find, where the models are the same."""
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from open_clip.transform import image_transform_v2
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import train
import vilt
from embed import bare, some_pictures
from newsrepro.core.checkpoints import find_backbone
from newsrepro.methods.txv import TxVRecipe, margin_ranking_loss, network_for, train_txv
from newsrepro.models.encoding import encode
from newsrepro.models.loader import Encoder, build_model, preprocessing
from newsrepro.models.single_stream import Effort
from newsrepro.models.train import Recipe
from newsrepro.ranking.metrics import summarise
from newsrepro.ranking.one_to_one import dual_softmax_top_k
from newsrepro.ranking.retrieve import top_k
from newsrepro.ranking.runs import evaluate_files, write_run
from retrieve import bare_product, faiss_search, unit_rows

OURS = 'newsrepro'
Ways = dict[str, Callable[[], Callable[[], object]]]  # name -> what prepares the work and returns it
DIM, BATCH, TEMPERATURE = 512, 64, .01
# module and distribution of those that need not be there
PEERS = {'FAISS IndexFlatIP': ('faiss', 'faiss-cpu'), 'ranx': ('ranx', 'ranx'),
         'clip-benchmark': ('clip_benchmark', 'clip-benchmark')}


def warm(work: Callable) -> Callable:
    "`work` after a first time, which compiles or makes what later ones find."
    work()
    return work


# lists and what they are worth

def longest_lists(n: int, folder: Path, tiny: bool) -> Ways:
    "The 100 best of n images for each of n articles."
    q, c, k = unit_rows(n, DIM, 0), unit_rows(n, DIM, 1), min(100, n)
    nearest = lambda: NearestNeighbors(n_neighbors=k, algorithm='brute').fit(c)  # of unit rows: most alike
    return {OURS: lambda: lambda: top_k(q, c, k)[1],
            'FAISS IndexFlatIP': lambda: lambda: faiss_search(q, c, k),
            'scikit-learn, brute force': lambda: lambda: nearest().kneighbors(q, return_distance=False),
            'bare product': lambda: lambda: bare_product(q, c, 'cpu')}


def dual_softmax(n: int, folder: Path, tiny: bool) -> Ways:
    "The 100 best of n images by dual softmax for each of n articles."
    q, c, k = unit_rows(n, DIM, 0), unit_rows(n, DIM, 1), min(100, n)

    def dense():
        z = torch.from_numpy(q) @ torch.from_numpy(c).T/TEMPERATURE
        return (z.log_softmax(0) + z.log_softmax(1)).topk(k).indices.numpy()
    twice = lambda: [bare_product(q, c, 'cpu') for _ in range(2)]
    return {OURS: lambda: lambda: dual_softmax_top_k(q, c, k, TEMPERATURE)[1], 'dense matrix': lambda: dense,
            'two bare products': lambda: twice}


def evaluation(n: int, folder: Path, tiny: bool) -> Ways:
    "MRR@100 and recalls of a run file of n lists, reading included."
    starts = np.random.default_rng(0).integers(-150, 50, n)
    listed = lambda first: [f'i{(first + place) % n}' for place in range(100)]
    lists = {f'a{i}': listed(i + start) for i, start in enumerate(starts)}
    names = ['mrr@100', *(f'hit_rate@{k}' for k in (1, 5, 10, 20, 50, 100))]

    def ours():
        write_run(folder/'run.tsv', lists)
        rows = ''.join(f'a{i},i{i}\n' for i in range(n))
        (folder/'truth.csv').write_text('article_id,image_id\n' + rows)
        return lambda: evaluate_files(folder/'run.tsv', folder/'truth.csv')['MRR@100']

    def theirs():
        from ranx import Qrels, Run, evaluate
        rows = (f'{article} Q0 {image} {place} {1/place} run\n' for article, images in lists.items()
                for place, image in enumerate(images, 1))
        (folder/'run.trec').write_text(''.join(rows))
        (folder/'truth.trec').write_text(''.join(f'a{i} 0 i{i} 1\n' for i in range(n)))
        qrels = lambda: Qrels.from_file(str(folder/'truth.trec'), kind='trec')
        run = lambda: Run.from_file(str(folder/'run.trec'), kind='trec')
        return warm(lambda: evaluate(qrels(), run(), names)['mrr@100'])
    return {OURS: ours, 'ranx': theirs}


# encoders

def random_encoder(tiny: bool) -> Encoder:
    "ViT-B/32 with random weights, or the mini model of that name."
    backbone = find_backbone('ViT-B/32', 'mini' if tiny else 'paper')
    torch.manual_seed(0)
    model = build_model(backbone).eval().requires_grad_(False)
    return Encoder(backbone, model, 'random', Path(), 'cpu', 'fp32')


class Files(torch.utils.data.Dataset):
    "Pictures as open_clip prepares them, each with a text."
    def __init__(self, paths: list[str], encoder: Encoder, texts: list[str]):
        self.paths, self.texts = paths, texts
        self.transform = image_transform_v2(preprocessing(encoder.backbone), is_train=False)

    def __len__(self): return len(self.paths)

    def __getitem__(self, i: int):
        with Image.open(self.paths[i]) as picture: return self.transform(picture), [self.texts[i]]


def loader(files: Files, tiny: bool) -> DataLoader:
    "Batches of a plain loop."
    together = lambda items: (torch.stack([pixels for pixels, _ in items]), [texts for _, texts in items])
    return DataLoader(files, BATCH, collate_fn=together, num_workers=0 if tiny else min(4, os.cpu_count()))


def encoding(n: int, folder: Path, tiny: bool) -> Ways:
    "Vectors of n JPEG files of 400 x 300."
    paths, quiet = some_pictures(folder, n), tqdm(disable=True)

    def ours():
        encoder = random_encoder(tiny)
        return lambda: encode(encoder, paths, 'image', bar=quiet)

    def open_clip_loop():
        encoder = random_encoder(tiny)
        batches = loader(Files(paths, encoder, ['']*n), tiny)

        @torch.inference_mode()
        def work(): return torch.cat([normalize(encoder.model.encode_image(x)) for x, _ in batches]).numpy()
        return work

    def of_transformers():
        small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
        config = CLIPConfig(text_config=small, vision_config=small) if tiny else CLIPConfig()
        model, processor = CLIPModel(config).eval(), CLIPImageProcessor()

        @torch.inference_mode()
        def work():
            for start in range(0, n, BATCH):
                pictures = [Image.open(path).convert('RGB') for path in paths[start:start + BATCH]]
                model.get_image_features(**processor(images=pictures, return_tensors='pt'))
        return work

    def bare_pass():
        encoder = random_encoder(tiny)
        pixels = torch.rand(n, 3, encoder.backbone.px, encoder.backbone.px)
        return lambda: bare(encoder, pixels, 16)
    return {OURS: ours, 'open_clip, plain loop': open_clip_loop, 'transformers, plain loop': of_transformers,
            'bare pass, pixels ready': bare_pass}


def zero_shot(n: int, folder: Path, tiny: bool) -> Ways:
    "From n pictures and their texts to recall."
    paths, quiet = some_pictures(folder, n), tqdm(disable=True)
    texts = [f'picture {place} of a city after the rain' for place in range(n)]

    def ours():
        encoder = random_encoder(tiny)

        def work():
            images, queries = (encode(encoder, items, kind, bar=quiet)
                               for items, kind in ((paths, 'image'), (texts, 'text')))
            is_right = top_k(queries, images, min(100, n))[1] == np.arange(n)[:, None]
            return summarise(np.where(is_right.any(1), is_right.argmax(1) + 1, 0))['R@10']
        return work

    def clip_benchmark():
        from clip_benchmark.metrics.zeroshot_retrieval import evaluate
        encoder = random_encoder(tiny)
        batches = loader(Files(paths, encoder, texts), tiny)
        run = lambda: evaluate(encoder.model, batches, encoder.tokenize, 'cpu', False, [1, 5, 10])
        return lambda: run()['image_retrieval_recall@10']
    return {OURS: ours, 'clip-benchmark': clip_benchmark}


def matching(n: int, folder: Path, tiny: bool) -> Ways:
    "ViLT-B/32, random weights: n texts against n pictures."
    def with_model(score):
        made = vilt.made(SimpleNamespace(device='cpu', texts=n, images=n), folder)
        return lambda: score(*made)
    return {OURS: lambda: with_model(lambda *made: vilt.ranked(*made, Effort(batch_size=16))),
            'transformers, one by one': lambda: with_model(vilt.alone)}


# training

def joint_space(n: int, folder: Path, tiny: bool) -> Ways:
    "Two epochs of T×V on n pairs."
    draw = np.random.default_rng(0)
    pairs = [[draw.normal(size=(n, DIM)).astype(np.float32)] for _ in range(2)]
    recipe = TxVRecipe(joint=16 if tiny else 2048, epochs=2)

    def plain():
        rows = TensorDataset(*(torch.from_numpy(x) for [x] in pairs))
        batches = DataLoader(rows, recipe.batch_size, shuffle=True)

        def work():
            model = network_for(pairs, recipe).train()
            optimiser = torch.optim.Adam(model.parameters(), lr=recipe.rate)
            for _ in range(recipe.epochs):
                for text, image in batches:
                    optimiser.zero_grad()
                    margin_ranking_loss(model.texts([text]), model.images([image])).backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
                    optimiser.step()
        return work
    return {OURS: lambda: lambda: train_txv(pairs, None, recipe), 'PyTorch, plain loop': plain}


def fine_tuning(n: int, folder: Path, tiny: bool) -> Ways:
    "A step of ViT-B/32 on n pairs, texts of 16 tokens."
    pairs, recipe = train.some_pairs(n, 16), Recipe(100, batch_size=n, rate=1e-5, warmup=0, augment='none')
    return {OURS: lambda: warm(train.our_training(pairs, recipe, 'cpu')),
            'open_clip, plain loop': lambda: warm(train.plain_training(pairs, False, 'cpu'))}


@dataclass(frozen=True)
class Curve:
    "What grows, and from where."
    ways: Callable[[int, Path, bool], Ways]
    axis: str  # what a size counts
    first: int  # size, doubled from there
    tiny: int = 0  # first size of a tiny run; 0: not in one, as the model is of full size


CURVES = {'evaluation of a run file': Curve(evaluation, 'articles, 100 images each', 1000, 150),
          'T×V, two epochs': Curve(joint_space, 'pairs', 1000, 8),
          'ViLT-B/32, all pairs': Curve(matching, 'texts, and as many pictures', 2),
          'training step, ViT-B/32': Curve(fine_tuning, 'pairs', 4),
          'zero-shot retrieval, ViT-B/32': Curve(zero_shot, 'texts, and as many pictures', 32, 16),
          'encoding, ViT-B/32': Curve(encoding, 'pictures', 64, 16),
          'dual softmax, top 100': Curve(dual_softmax, 'articles, and as many images', 2000, 50),
          'exact top 100': Curve(longest_lists, 'articles, and as many images', 2000, 50)}
