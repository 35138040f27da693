"""Checkpoints of the true architectures and forms, random weights: found, loaded, encoded as by others."""
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from newsrepro.core.base import InputError, file_digest
from newsrepro.core.checkpoints import MINI_BACKBONES, PAPER_BACKBONES, MissingCheckpoint, find_backbone
from newsrepro.data.layouts import read_collection
from newsrepro.data.pictures import open_image
from newsrepro.models.encoding import encode, encode_tokens, rows_at_once
from newsrepro.models.foreign import ImageTower, load_image_encoder
from newsrepro.models.loader import build_model, load_encoder
from newsrepro.models.pixels import compiles, framed, framing_of, normalised
from newsrepro.models.store import EmbeddingStore, embed
from newsrepro.models.weights import JIT_EXTRAS
from newsrepro.ranking.metrics import rank_of_truth
from newsrepro.ranking.pool import Pool, ranked
from newsrepro.study.study import mini_root

TEXTS = ['A red car waits in front of the town hall', 'Überschwemmung: 300 Häuser evakuiert',
         'breaking 🔥 #news', 'word ' * 200]
SMALL = ('RN50', 'ViT-B/32')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    shapes = {'wide.jpg': (150, 300), 'tall.png': (300, 120), 'grey.jpg': (240, 240)}
    for name, shape in shapes.items():
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(shape[::-1])
        (coarse.convert('L') if name == 'grey.jpg' else coarse).save(folder/name)
    return [str(folder/name) for name in shapes]


def random_model(backbone):
    "The architecture with random weights, rounded to half precision as the originals are."
    torch.manual_seed(0)
    model = build_model(backbone).eval()
    for value in model.state_dict().values():
        if value.is_floating_point(): value.copy_(value.half().float())
    return model


def half(model):
    state = model.state_dict()
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


def as_torchscript(model, path):
    "What OpenAI publishes: a TorchScript archive in half precision with three extra buffers."
    archive = torch.nn.Module()

    def put(name, value):
        *folders, last = name.split('.')
        module = archive
        for folder in folders:
            if folder not in module._modules: module.add_module(folder, torch.nn.Module())
            module = module._modules[folder]
        module.register_buffer(last, value)
    for name, value in half(model).items(): put(name, value)
    for name, number in zip(JIT_EXTRAS, (224, 77, 49408)): put(name, torch.tensor(number))
    torch.jit.script(archive).save(str(path))


def as_hub_cache(model, backbone, root):
    "What huggingface_hub keeps: blobs, and a snapshot of links to them."
    folder = root/f"models--{backbone.repository.replace('/', '--')}"
    snapshot, made = folder/'snapshots'/('0'*40), folder/'blobs'/'made'
    snapshot.mkdir(parents=True), made.parent.mkdir()
    save_file(half(model), made)
    blob = made.rename(made.with_name(file_digest(made)))
    (snapshot/'open_clip_model.safetensors').symlink_to('../../blobs/' + blob.name)
    (folder/'refs').mkdir(); (folder/'refs'/'main').write_text('0'*40)


def reference(model, name, pictures):
    "Embeddings as open_clip's own functions give them, one input at a time."
    _, _, transform = open_clip.create_model_and_transforms(name, load_weights=False)
    tokenize = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        pixels = [transform(Image.open(path))[None] for path in pictures]
        images = torch.cat([model.encode_image(one, normalize=True) for one in pixels])
        texts = torch.cat([model.encode_text(tokenize([text]), normalize=True) for text in TEXTS])
    return images.numpy(), texts.numpy()


def agree(encoder, pictures, images, texts):
    assert np.abs(encode(encoder, pictures, 'image', batch_size=4) - images).max() < 1e-4
    assert np.abs(encode(encoder, TEXTS, 'text', batch_size=4) - texts).max() < 1e-4


@pytest.mark.parametrize('name', [pytest.param(b.name, marks=() if b.name in SMALL else pytest.mark.large)
                                  for b in PAPER_BACKBONES])
def test_true_architecture(name, tmp_path, pictures, monkeypatch):
    backbone = find_backbone(name, 'paper')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr('pathlib.Path.home', lambda: tmp_path/'home')
    with pytest.raises(MissingCheckpoint, match='not found: looked for'): load_encoder(backbone)

    model = random_model(backbone)
    images, texts = reference(model, backbone.model + ('-quickgelu' if backbone.quick_gelu else ''), pictures)
    as_hub_cache(model, backbone, tmp_path/'hub')
    agree(load_encoder(backbone), pictures, images, texts)
    blob, = (tmp_path/'hub').glob('*/blobs/*')
    with blob.open('r+b') as file:  # the sign of the last weight
        file.seek(-1, os.SEEK_END)
        last = file.read()[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 128]))
    with pytest.raises(InputError, match='damaged or another file; fetch it again'): load_encoder(backbone)
    shutil.rmtree(tmp_path/'hub')

    if not backbone.file: return
    (tmp_path/'weights').mkdir()
    archive = tmp_path/'weights'/backbone.file
    as_torchscript(model, archive)
    with pytest.raises(InputError, match=f'published is {backbone.sha256[:12]}'):  # it is not OpenAI's
        load_encoder(backbone, tmp_path/'weights')
    archive = archive.rename(tmp_path/'weights'/f'{backbone.model}-openai.pt')
    del model
    encoder = load_encoder(backbone, tmp_path/'weights')
    agree(encoder, pictures, images, texts)
    del encoder
    own = open_clip.load_openai_model(str(archive), precision='fp32', device='cpu')
    again = reference(own, backbone.model + '-quickgelu', pictures)
    assert np.abs(again[0] - images).max() < 1e-4 and np.abs(again[1] - texts).max() < 1e-4


def as_transformers(state, layers):
    "open_clip's keys in transformers' words."
    out = {'logit_scale': state['logit_scale'],
           'visual_projection.weight': state['visual.proj'].T,
           'text_projection.weight': state['text_projection'].T,
           'vision_model.embeddings.class_embedding': state['visual.class_embedding'],
           'vision_model.embeddings.patch_embedding.weight': state['visual.conv1.weight'],
           'vision_model.embeddings.position_embedding.weight': state['visual.positional_embedding'],
           'text_model.embeddings.token_embedding.weight': state['token_embedding.weight'],
           'text_model.embeddings.position_embedding.weight': state['positional_embedding']}
    names = {'vision_model.pre_layrnorm': 'visual.ln_pre', 'vision_model.post_layernorm': 'visual.ln_post',
             'text_model.final_layer_norm': 'ln_final'}
    parts = {'layer_norm1': 'ln_1', 'layer_norm2': 'ln_2', 'mlp.fc1': 'mlp.c_fc', 'mlp.fc2': 'mlp.c_proj',
             'self_attn.out_proj': 'attn.out_proj'}
    for tower, ours in (('vision_model', 'visual.transformer'), ('text_model', 'transformer')):
        for i in range(layers):
            there, here = f'{tower}.encoder.layers.{i}', f'{ours}.resblocks.{i}'
            names |= {f'{there}.{theirs}': f'{here}.{own}' for theirs, own in parts.items()}
            for kind in ('weight', 'bias'):
                thirds = state[f'{here}.attn.in_proj_{kind}'].chunk(3)
                out |= {f'{there}.self_attn.{part}_proj.{kind}': value for part, value in zip('qkv', thirds)}
    return out | {f'{there}.{kind}': state[f'{here}.{kind}']
                  for there, here in names.items() for kind in ('weight', 'bias')}


def test_vit_b_32_equals_transformers(tmp_path, pictures):
    from transformers import CLIPConfig, CLIPModel
    backbone = find_backbone('ViT-B/32', 'paper')
    model = random_model(backbone)
    save_file(model.state_dict(), tmp_path/'ViT-B-32.safetensors')
    config = CLIPConfig(projection_dim=512, text_config=dict(hidden_act='quick_gelu', eos_token_id=49407),
                        vision_config=dict(hidden_act='quick_gelu', patch_size=32))
    other = CLIPModel(config).eval()
    missing = other.load_state_dict(as_transformers(model.state_dict(), 12), strict=False)
    assert not missing.unexpected_keys and all('position_ids' in key for key in missing.missing_keys)
    encoder = load_encoder(backbone, tmp_path)
    pixels = torch.stack([encoder.transform(open_image(path)) for path in pictures])
    with torch.inference_mode():
        both = other(input_ids=encoder.tokenize(TEXTS), pixel_values=pixels)
    agree(encoder, pictures, both.image_embeds.numpy(), both.text_embeds.numpy())


@pytest.mark.parametrize('kernel, shorter', [('bicubic', 224), ('bilinear', 64)])
def test_pixels_are_those_of_open_clip_to_the_bit(kernel, shorter):
    "Noise, of random sizes and of all that a picture's shape can do, against open_clip's own transform."
    transform = image_transform_v2(PreprocessCfg(size=shorter, interpolation=kernel), is_train=False)
    framing, draw = framing_of(transform), np.random.default_rng(shorter)
    sizes = [*draw.integers(1, 700, (15, 2)), *draw.integers(200, 270, (15, 2)), (460, 259), (259, 460),
             (1, 1), (2, 1), (1, 2), (900, 5), (5, 900), (224, 224), (225, 224), (224, 225), (448, 224)]
    for wide, high in sizes:
        picture = Image.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8))
        for compiled in (False, compiles(framing)):
            ours = normalised(torch.tensor(framed(picture, framing, compiled)[None]), framing)[0]
            assert torch.equal(ours, transform(picture)), (wide, high, compiled)


def test_pixels_of_every_mode_and_tall_pictures_turned(tmp_path):
    "What `open_image` makes of a file is seen as open_clip would see it."
    transform = image_transform_v2(PreprocessCfg(size=64), is_train=False)
    noise = np.random.default_rng(0).integers(0, 256, (70, 111, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    files = {f'{mode}.{kind}': Image.fromarray(noise).convert(mode) for mode, kind in
             (('RGB', 'jpg'), ('L', 'jpg'), ('CMYK', 'jpg'), ('RGBA', 'png'), ('LA', 'png'), ('P', 'png'),
              ('1', 'png'), ('RGB', 'webp'))}
    files['16.png'] = Image.fromarray(noise[..., 0].astype(np.uint16)*255)
    for name, picture in files.items():
        picture.save(tmp_path/name, **(dict(exif=exif) if name == 'RGB.jpg' else {}))
        for turned in (False, True):
            seen = open_image(tmp_path/name, turned)
            assert seen.mode == 'RGB' and (seen.height > seen.width) == (turned and name == 'RGB.jpg')
            ours = normalised(torch.tensor(framed(seen, framing_of(transform))[None]), framing_of(transform))
            assert torch.equal(ours[0], transform(seen)), name


def test_the_plain_name_would_have_been_wrong(tmp_path, pictures):
    "mlfoundations/open_clip #771: under the plain name a file runs with GELU, by the registry it does not."
    backbone = find_backbone('ViT-B/32', 'paper')
    save_file(random_model(backbone).state_dict(), tmp_path/'ViT-B-32.safetensors')
    plain = open_clip.create_model('ViT-B-32', pretrained=str(tmp_path/'ViT-B-32.safetensors')).eval()
    images, _ = reference(plain, 'ViT-B-32', pictures)
    ours = encode(load_encoder(backbone, tmp_path), pictures, 'image', batch_size=4)
    assert np.abs(ours - images).max() > 1e-3


@pytest.fixture(scope='module')
def part():
    "A test part of the mini study."
    return read_collection(mini_root()/'newsimages2022').usable()[0].subset('RSS', 'test')


@pytest.mark.parametrize('name', [b.name for b in MINI_BACKBONES])
def test_texts_cut_behind_their_end_are_and_rank_as_all_77_tokens(name, part):
    encoder = load_encoder(find_backbone(name))
    tokens = encoder.tokenize(part.articles.title.tolist())
    with torch.inference_mode(): whole = encoder.model.encode_text(tokens, normalize=True).numpy()
    cut = encode_tokens(encoder, tokens)
    assert np.abs(cut - whole).max() < 1e-6
    images = encode(encoder, part.images.path.tolist(), 'image')
    pool = Pool.of_part(part)
    ranks = [rank_of_truth(ranked(pool, texts, images), pool.truth) for texts in (cut, whole)]
    assert (ranks[0] == ranks[1]).all() and (ranks[0] > 0).any()


def test_full_size_texts_cut_behind_their_end(tmp_path):
    backbone = find_backbone('ViT-B/32', 'paper')
    save_file(random_model(backbone).state_dict(), tmp_path/'ViT-B-32.safetensors')
    encoder = load_encoder(backbone, tmp_path)
    tokens = encoder.tokenize(TEXTS)
    with torch.inference_mode(): whole = encoder.model.encode_text(tokens, normalize=True).numpy()
    assert np.abs(encode(encoder, TEXTS, 'text', batch_size=4) - whole).max() < 1e-6


def test_a_tower_that_looks_both_ways_reads_all_it_is_given():
    encoder = load_encoder(find_backbone('ViT-B/32'))
    encoder.model.attn_mask = None
    tokens = encoder.tokenize(TEXTS)
    with torch.inference_mode(): whole = encoder.model.encode_text(tokens, normalize=True).numpy()
    assert np.abs(encode_tokens(encoder, tokens) - whole).max() < 1e-6


def test_batches_that_fit_the_cache_in_every_family():
    "The largest tensor of RN50 is its stem's, 64 x 112 x 112 numbers; a ViT-B/32's a block's, 50 x 3072."
    encoder = load_encoder(find_backbone('RN50'))
    for name, largest in (('RN50', 64*112*112*4), ('ViT-B/32', 50*4*768*4)):
        full = replace(encoder, model=build_model(find_backbone(name, 'paper')).eval())
        fitting = 26*2**20//largest
        rows = rows_at_once(full, torch.zeros(1, 3, 224, 224), 64)
        assert fitting/2 < rows <= fitting and rows in (1, 2, 4, 8, 16, 32, 64)
    lite = replace(encoder,
                   model=ImageTower(timm.create_model('tf_efficientnet_lite2', num_classes=0)).eval())
    assert rows_at_once(lite, torch.zeros(1, 3, 260, 260), 64) == 4
    assert rows_at_once(lite, torch.zeros(1, 3, 260, 260), 3) == 3


@pytest.mark.parametrize('kind', ['text', 'image'])
def test_memory_that_lacks_halves_the_batch(kind, pictures, monkeypatch, capsys):
    encoder, items = load_encoder(find_backbone('RN50')), dict(text=TEXTS, image=pictures)[kind]*13
    want = encode(encoder, items, kind)
    run = getattr(type(encoder.model), f'encode_{kind}')

    def cramped(model, x):
        if len(x) > 20: raise torch.OutOfMemoryError('full')
        return run(model, x)
    monkeypatch.setattr(type(encoder.model), f'encode_{kind}', cramped)
    assert np.abs(encode(encoder, items, kind) - want).max() < 1e-6
    lines = [line for line in capsys.readouterr().err.splitlines() if 'out of memory' in line]
    assert lines[:2] == ['RN50: cpu is out of memory with 64 rows at once; going on with 32',
                         'RN50: cpu is out of memory with 32 rows at once; going on with 16']


def test_precision_is_asked_for_and_part_of_the_key(tmp_path, pictures, monkeypatch):
    store, backbone = EmbeddingStore(tmp_path), find_backbone('ViT-B/32')
    encoders = [load_encoder(backbone, precision=name) for name in ('auto', 'fp32', 'bf16', 'fp16')]
    assert [encoder.precision for encoder in encoders] == ['fp32', 'fp32', 'bf16', 'fp16']
    kept = [embed(encoder, pictures, 'image', store) for encoder in encoders]
    assert (kept[0] == kept[1]).all() and len(list(tmp_path.iterdir())) == 3
    assert all(0 < np.abs(low - kept[0]).max() < .02 for low in kept[2:])
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda including_emulation: False)
    for load in (lambda: load_encoder(backbone, device='cuda', precision='bf16'),
                 lambda: load_image_encoder('resnet18', device='cuda', precision='bf16')):
        with pytest.raises(InputError, match="precision 'bf16': cuda has no bf16"): load()


def test_a_long_call_shows_how_far_it_is(monkeypatch, capsys, pictures):
    encoder = load_encoder(find_backbone('RN50'))
    encode(encoder, pictures, 'image')
    assert capsys.readouterr().err == ''
    from newsrepro.models import encoding
    at_once = partial(encoding.tqdm, **dict(delay=0, mininterval=0))
    monkeypatch.setattr(encoding, 'tqdm', lambda **how: at_once(**(how | at_once.keywords)))
    encode(encoder, pictures, 'image')
    assert '3/3' in (said := capsys.readouterr().err) and 'images/s' in said
