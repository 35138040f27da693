"""The paper study's dress rehearsal: its own collections of 2021 and 2022, its own full-size checkpoints with
random weights, then every notebook in the paper profile. What it prints are no results.

    python benchmarks/rehearsal.py --small                    # two cores, 20 GB of memory
    python benchmarks/rehearsal.py --small --without-truth    # the truth of the test parts is unknown
    python benchmarks/rehearsal.py --device cuda              # 1,914 and 3 x 1,499 test articles, all models
    python benchmarks/rehearsal.py --small --only 14_txv --set 14_txv.epochs=1
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from newsrepro.core.base import MINI_DIR, InputError, cache_dir, notebooks_dir, read_json, write_json
from newsrepro.core.checkpoints import find_backbone
from newsrepro.study.needs import models_of
from newsrepro.study.registry import STUDY_FIGURES, STUDY_TABLES, notebook_parameters
from newsrepro.study.plan import choose, parse_set

MARK = 'rehearsal-random-weights'  # in the name of each collection, so in each row and under each table


@dataclass(frozen=True)
class Size:
    "How much of the study is rehearsed."
    portal: tuple[int, int]  # articles for training and test, of 2021
    rss: tuple[int, int]  # of 2022, likewise
    rt: tuple[int, int]
    tw: tuple[int, int]
    sentence: int  # tokens of each translated sentence; random weights would find no end
    sets: tuple[str, ...]  # parameters that differ from the paper profile's


# of each part, two articles are without text, two without picture, two have a broken one
SMALL = Size((32, 18), (24, 18), (28, 18), (32, 18), 8,
             ('10_vilt.epochs=1', '11_clip_sweep.backbones=RN50,ViT-B/32', '12_fine_tune.epochs=1',
              '13_wise_ft.epochs=1', '14_txv.epochs=2', '15_dual_softmax.epochs=2'))
# one test article fewer than the official sets have, so that no published number stands beside a rehearsal
FULL = Size((7530, 1914), (400, 1499), (1925, 1499), (4410, 1499), 30,
            ('10_vilt.epochs=1', '12_fine_tune.epochs=1', '13_wise_ft.epochs=1'))


def make_collections(folder: Path, size: Size, truth: bool = True) -> dict[str, Path]:  # layout -> folder
    "Two collections in the official layouts, drawn by the generator of the mini study."
    from newsrepro.mini.collections import World, make_mini
    world = World(portal=size.portal, rss=size.rss, rt=size.rt, tw=size.tw, captions=0)
    drawn = make_mini(folder/'drawn', world=world)
    kept = {}
    for layout in ('newsimages2021', 'newsimages2022'):
        kept[layout] = folder/('with-truth' if truth else 'without-truth')/f'{layout}-{MARK}'
        if kept[layout].is_dir(): continue
        hidden = () if truth else ('*-gt.tsv', '*_test_truth.tsv')
        shutil.copytree(drawn/layout, kept[layout], ignore=shutil.ignore_patterns(*hidden))
    return kept


@contextmanager
def hub_folder(weights: Path, repository: str) -> Iterator[Path]:
    "A folder to write a model into; then it lies in `weights` as the hub's library keeps what it fetched."
    place = weights/f"models--{repository.replace('/', '--')}"
    shutil.rmtree(place, ignore_errors=True)
    blobs, snapshot = place/'blobs', place/'snapshots'/('0'*40)
    made = place/'made'
    made.mkdir(parents=True)
    yield made
    made.rename(blobs)
    snapshot.mkdir(parents=True)
    for blob in sorted(blobs.iterdir()): (snapshot/blob.name).symlink_to(f'../../blobs/{blob.name}')
    (place/'refs').mkdir()
    (place/'refs'/'main').write_text('0'*40)


def as_torchscript(state: Mapping, path: Path) -> None:
    "What OpenAI publishes: a TorchScript archive with three numbers beside the weights."
    import torch
    from newsrepro.models.weights import JIT_EXTRAS
    archive = torch.nn.Module()
    for name, value in {**state, **dict(zip(JIT_EXTRAS, map(torch.tensor, (224, 77, 49408))))}.items():
        *folders, last = name.split('.')
        module = archive
        for folder in folders:
            if folder not in module._modules: module.add_module(folder, torch.nn.Module())
            module = module._modules[folder]
        module.register_buffer(last, value)
    torch.jit.script(archive).save(str(path))


ARCHIVES = ('RN50', 'ViT-B/16')  # these in OpenAI's form, the others as the hub keeps them


def archive_name(backbone) -> str:
    "Not OpenAI's own, under which nothing but what it published is read."
    return f'{backbone.model}-{backbone.tag}.pt'


def make_clip(name: str, weights: Path, sentence: int) -> None:
    "OpenAI's models in half precision, others in single."
    import torch
    from safetensors.torch import save_file
    from newsrepro.models.loader import build_model
    backbone = find_backbone(name, 'paper')
    torch.manual_seed(0)
    state = build_model(backbone).state_dict()
    if backbone.file: state = {key: value.half() if value.is_floating_point() else value
                               for key, value in state.items()}
    if name in ARCHIVES: return as_torchscript(state, weights/archive_name(backbone))
    with hub_folder(weights, backbone.repository) as folder:
        save_file(state, folder/'open_clip_model.safetensors')


def make_vilt(name: str, weights: Path, sentence: int) -> None:
    "ViLT-B/32 with the head for masked words only, as the hub has it."
    import torch
    from transformers import ViltConfig, ViltForMaskedLM
    torch.manual_seed(0)
    model = ViltForMaskedLM(ViltConfig())
    with torch.no_grad():  # the positions start at nought, which no trained model has
        for weight in model.parameters(): weight.add_(.02*torch.randn_like(weight))
    pieces = (MINI_DIR/'mini-vilt'/'vocab.txt').read_text(encoding='utf-8').split('\n')[:-1]
    pieces += [f'filler{place}' for place in range(len(pieces), model.config.vocab_size)]
    rule = dict(image_mean=[.5]*3, image_std=[.5]*3, size=384, size_divisor=32, resample=3)
    with hub_folder(weights, name) as folder:
        torch.save(model.state_dict(), folder/'pytorch_model.bin')
        model.config.save_pretrained(folder)
        (folder/'preprocessor_config.json').write_text(json.dumps(rule))
        (folder/'vocab.txt').write_text('\n'.join(pieces) + '\n', encoding='utf-8')


def make_vit(name: str, weights: Path, sentence: int) -> None:
    "ViT-B/32 of 384 pixels with the 1,000 classes of ImageNet."
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    torch.manual_seed(0)
    config = ViTConfig(image_size=384, patch_size=32, num_labels=1000)
    with hub_folder(weights, name) as folder: ViTForImageClassification(config).save_pretrained(folder)


def letters_of(number: int) -> str:
    "A made-up word, which a vocabulary of word pieces can at least spell."
    return 'x' + ''.join('abcdefghijklmnopqrstuvwxyz'[number//26**place % 26] for place in range(4))


def make_marian(name: str, weights: Path, sentence: int) -> None:
    "OPUS-MT's German to English; by its own settings each sentence ends after `sentence` tokens."
    import torch
    from transformers import MarianConfig, MarianMTModel
    last = 58100  # the padding, which is the last of the vocabulary
    ends = dict(pad_token_id=last, eos_token_id=0, forced_eos_token_id=0, decoder_start_token_id=last)
    torch.manual_seed(0)
    model = MarianMTModel(MarianConfig(
        vocab_size=last + 1, d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, max_position_embeddings=512,
        activation_function='swish', scale_embedding=True, tie_word_embeddings=True, **ends))
    model.model.shared.weight.data *= 8  # so that other sentences get other words
    state = {key: value for key, value in model.state_dict().items() if 'embed_positions' not in key}
    state['final_logits_bias'][0, 0] = 100.  # the end, as soon as it is allowed
    own = MINI_DIR/'mini-marian-de-en'
    pieces = [piece for piece in read_json(own/'vocab.json') if piece != '<pad>']
    pieces += [f'▁{letters_of(place)}' for place in range(len(pieces), last)] + ['<pad>']
    search = dict(num_beams=6, max_length=512, min_length=sentence, no_repeat_ngram_size=1,
                  bad_words_ids=[[last]], **ends)
    texts = {'vocab.json': {piece: place for place, piece in enumerate(pieces)},
             'generation_config.json': search,
             'tokenizer_config.json': dict(source_lang='de', target_lang='en')}
    with hub_folder(weights, name) as folder:
        torch.save(state, folder/'pytorch_model.bin')
        model.config.save_pretrained(folder)
        for file, value in texts.items(): (folder/file).write_text(json.dumps(value), encoding='utf-8')
        for file in ('source.spm', 'target.spm'): shutil.copy(own/file, folder/file)


MAKERS = {'clip': make_clip, 'vilt': make_vilt, 'vit': make_vit, 'marian': make_marian}


def wanted_models(names: Sequence[str],  # of notebooks; empty = all
                  sets: Sequence[str]  # NOTEBOOK.PARAMETER=VALUE each
                 ) -> list[tuple[str, str]]:  # kind and name, each once
    "What the notebooks load in the paper profile."
    chosen = choose(names)
    given = [parse_set(text, chosen, notebooks_dir()) for text in sets]
    found = []
    for notebook in chosen:
        declared = notebook_parameters(notebooks_dir()/f'{notebook.name}.ipynb')
        values = {name: parameter.default for name, parameter in declared.items()} | {'profile': 'paper'}
        values |= {name: value for where, name, value in given if where == notebook.name}
        found += models_of(notebook, values)
    return list(dict.fromkeys(found))


def is_made(kind: str, name: str, weights: Path) -> bool:
    "Whether `weights` holds the model already."
    if kind != 'clip': return (weights/f"models--{name.replace('/', '--')}"/'refs'/'main').is_file()
    backbone = find_backbone(name, 'paper')
    folder = weights/f"models--{backbone.repository.replace('/', '--')}"
    if name in ARCHIVES: return (weights/archive_name(backbone)).is_file()
    return (folder/'refs'/'main').is_file()


def make_checkpoints(models: Sequence[tuple[str, str]], weights: Path, sentence: int) -> None:
    "Write those that are not there, each in a process of its own, so that one at a time is in memory."
    weights.mkdir(parents=True, exist_ok=True)
    for kind, name in models:
        if kind not in MAKERS: raise InputError(f'{name}: a rehearsal makes no model of the kind {kind!r}')
        if is_made(kind, name, weights): continue
        began = time.time()
        line = [sys.executable, __file__, '--make', kind, name, str(weights), str(sentence)]
        subprocess.run(line, check=True)
        print(f'made {name} in {time.time() - began:.0f} s', flush=True)


def environment(work: Path) -> dict[str, str]:
    "Nothing of the user's caches is read or written, nothing is fetched."
    own = dict(NEWSREPRO_CACHE=str(work/'cache'), HF_HOME=str(work/'hub'), HF_HUB_OFFLINE='1')
    return dict(os.environ) | own


def command_of(args, data: Sequence[Path], sets: Sequence[str], out: Path) -> list[str]:
    "The line of `newsrepro reproduce` that runs the notebooks, each on the collection of its paper's year."
    line = ['reproduce', '--profile', 'paper', '--weights', str(args.work/'weights'), '--device', args.device,
            '--out', str(out)]
    several = {'--data': data, '--only': args.only, '--set': sets}
    given = [(option, str(value)) for option, values in several.items() for value in values]
    return [*line, *(word for pair in given for word in pair)]


def rehearse(args, data: Sequence[Path], sets: Sequence[str], out: Path) -> None:
    "Run the command, in a process of its own."
    line = command_of(args, data, sets, out)
    print('newsrepro', *line, flush=True)
    main = 'from newsrepro.cli import main; main()'
    subprocess.run([sys.executable, '-c', main, *line], env=environment(args.work), check=False)


def state_of(out: Path, name: str) -> dict:  # state, seconds, peak_memory_mb, said
    "What became of a notebook."
    record, failed = (read_json(out/'.state'/kind/f'{name}.json') for kind in ('results', 'failed'))
    if failed:
        return dict(state='failed', said=f"cell {failed['cell'].get('id', '?')}: {failed['error'][:200]}")
    if not record: return dict(state='not run')
    return dict(state='done', seconds=record['seconds'], peak_memory_mb=record['peak_memory_mb'])


def disk_of(folder: Path) -> float:  # gigabytes
    "What the files of a folder take, links not followed."
    files = (Path(place)/name for place, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_size for path in files)/1e9


def account(out: Path, work: Path, names: Sequence[str], seconds: float) -> dict:
    "What came of the rehearsal."
    return dict(notebooks={name: state_of(out, name) for name in names}, seconds=round(seconds, 1),
                tables=[name for name in STUDY_TABLES if (out/'tables'/f'{name}.csv').is_file()],
                figures=[name for name in STUDY_FIGURES if (out/'figures'/f'{name}.png').is_file()],
                disk_gb={part.name: round(disk_of(part), 2)
                         for part in sorted(work.iterdir()) if part.is_dir()})


def summary(found: Mapping) -> str:
    "The account as Markdown."
    lines = ['| notebook | state | seconds | peak memory, MB |', '|---|---|---|---|']
    for name, own in found['notebooks'].items():
        cells = [name, own['state'], own.get('seconds', ''), own.get('peak_memory_mb', '')]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ['', *(f"{name}: {own['said']}" for name, own in found['notebooks'].items() if 'said' in own)]
    for kind, known in (('tables', STUDY_TABLES), ('figures', STUDY_FIGURES)):
        lacking = [name for name in known if name not in found[kind]]
        said = f"; lacking: {', '.join(lacking)}" if lacking else ''
        lines.append(f'{len(found[kind])} of {len(known)} {kind}{said}')
    disk = ', '.join(f'{name} {size:.2f}' for name, size in found['disk_gb'].items())
    return '\n'.join([*lines, f"{found['seconds']:.0f} s; disk, GB: {disk}", ''])


SAID = 'Rehearsal: random weights, drawn pictures, invented texts. No number here is a result.'


def mark_report(out: Path, text: str) -> None:
    "Say in the report's folder and on top of its page what it is."
    (out/'REHEARSAL.md').write_text(f'{SAID}\n\n{text}', encoding='utf-8')
    page = out/'index.html'
    if not page.is_file(): return
    told, banner = page.read_text(encoding='utf-8'), f'<p role="note"><strong>{SAID}</strong></p>'
    if banner not in told: page.write_text(told.replace('<body>', f'<body>{banner}', 1), encoding='utf-8')


def options() -> argparse.ArgumentParser:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--small', action='store_true', help='a dozen test articles a set, for a CPU')
    parser.add_argument('--without-truth', action='store_true', help='leave out the truth of the test parts')
    parser.add_argument('--device', default='auto')
    parser.add_argument('--only', action='append', default=[], metavar='NOTEBOOK')
    parser.add_argument('--set', action='append', default=[], metavar='NOTEBOOK.PARAMETER=VALUE', dest='sets')
    parser.add_argument('--work', type=Path, help='folder for all of it (default: rehearsal in the cache)')
    parser.add_argument('--fresh', action='store_true', help='forget what an earlier rehearsal computed')
    parser.add_argument('--make', nargs=4, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = options().parse_args()
    if args.make:
        kind, name, weights, sentence = args.make
        MAKERS[kind](name, Path(weights), int(sentence))
        return 0
    began, size = time.time(), SMALL if args.small else FULL
    args.work = (args.work or cache_dir()/'rehearsal').absolute()/('small' if args.small else 'full')
    out = args.work/('report-without-truth' if args.without_truth else 'report')
    for folder in (out, args.work/'cache') if args.fresh else (): shutil.rmtree(folder, ignore_errors=True)
    named = {text.partition('=')[0] for text in args.sets}
    names = [notebook.name for notebook in choose(args.only)]
    usual = [text for text in size.sets
             if text.partition('=')[0] not in named and text.partition('.')[0] in names]
    sets = usual + args.sets
    collections = make_collections(args.work/'data', size, not args.without_truth)
    make_checkpoints(wanted_models(args.only, sets), args.work/'weights', size.sentence)
    print(f'prepared in {time.time() - began:.0f} s', flush=True)
    rehearse(args, list(collections.values()), sets, out)
    found = account(out, args.work, names, time.time() - began)
    text = summary(found)
    mark_report(out, text)
    write_json(out/'rehearsal.json', found | dict(sets=sets, device=args.device))
    print(text)
    return int(any(own['state'] != 'done' for own in found['notebooks'].values()))


if __name__ == '__main__': sys.exit(main())
