"""Checkpoints of the true architectures and file formats, filled with random weights: found, loaded offline, encoded as open_clip and transformers do."""
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from newsrepro.core.checkpoints import PAPER_BACKBONES, MissingCheckpoint, find_backbone
from newsrepro.models.encoding import encode
from newsrepro.models.loader import build_model, load_encoder
from newsrepro.models.weights import JIT_EXTRAS

TEXTS = ['A red car waits in front of the town hall', 'Überschwemmung: 300 Häuser evakuiert', 'breaking 🔥 #news', 'word ' * 200]
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
    "The architecture with random weights whose embeddings differ between inputs, in half precision as the originals are."
    torch.manual_seed(0)
    model = build_model(backbone).eval()
    for value in model.state_dict().values():
        if value.is_floating_point(): value.copy_(value.half().float())
    return model


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
    for name, value in model.state_dict().items(): put(name, value.half() if value.is_floating_point() else value)
    for name, number in zip(JIT_EXTRAS, (224, 77, 49408)): put(name, torch.tensor(number))
    torch.jit.script(archive).save(str(path))


def as_hub_cache(model, backbone, root):
    "What huggingface_hub keeps: blobs, and a snapshot of links to them."
    folder = root/f"models--{backbone.repository.replace('/', '--')}"
    snapshot, blob = folder/'snapshots'/('0'*40), folder/'blobs'/('1'*64)
    snapshot.mkdir(parents=True), blob.parent.mkdir()
    save_file({key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}, blob)
    (snapshot/'open_clip_model.safetensors').symlink_to('../../blobs/' + blob.name)
    (folder/'refs').mkdir(); (folder/'refs'/'main').write_text('0'*40)


def reference(model, name, pictures):
    "Embeddings as open_clip's own functions give them, one input at a time."
    _, _, transform = open_clip.create_model_and_transforms(name, load_weights=False)
    tokenize = open_clip.get_tokenizer(name)
    with torch.inference_mode():
        images = torch.cat([model.encode_image(transform(Image.open(path))[None], normalize=True) for path in pictures])
        texts = torch.cat([model.encode_text(tokenize([text]), normalize=True) for text in TEXTS])
    return images.numpy(), texts.numpy()


def agree(encoder, pictures, images, texts):
    assert np.abs(encode(encoder, pictures, 'image', batch_size=4) - images).max() < 1e-4
    assert np.abs(encode(encoder, TEXTS, 'text', batch_size=4) - texts).max() < 1e-4


@pytest.mark.parametrize('name', [pytest.param(b.name, marks=() if b.name in SMALL else pytest.mark.large) for b in PAPER_BACKBONES])
def test_true_architecture(name, tmp_path, pictures, monkeypatch):
    backbone = find_backbone(name, 'paper')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr('pathlib.Path.home', lambda: tmp_path/'home')
    with pytest.raises(MissingCheckpoint, match='not found: looked for'): load_encoder(backbone)

    model = random_model(backbone)
    images, texts = reference(model, backbone.model + ('-quickgelu' if backbone.quick_gelu else ''), pictures)
    as_hub_cache(model, backbone, tmp_path/'hub')
    agree(load_encoder(backbone), pictures, images, texts)
    shutil.rmtree(tmp_path/'hub')

    if not backbone.file: return
    (tmp_path/'weights').mkdir()
    as_torchscript(model, tmp_path/'weights'/backbone.file)
    del model
    encoder = load_encoder(backbone, tmp_path/'weights')
    agree(encoder, pictures, images, texts)
    del encoder
    own = open_clip.load_openai_model(str(tmp_path/'weights'/backbone.file), precision='fp32', device='cpu')
    again = reference(own, backbone.model + '-quickgelu', pictures)
    assert np.abs(again[0] - images).max() < 1e-4 and np.abs(again[1] - texts).max() < 1e-4


def as_transformers(state, layers):
    "open_clip's keys in transformers' words."
    out = {'logit_scale': state['logit_scale'], 'visual_projection.weight': state['visual.proj'].T, 'text_projection.weight': state['text_projection'].T,
           'vision_model.embeddings.class_embedding': state['visual.class_embedding'], 'vision_model.embeddings.patch_embedding.weight': state['visual.conv1.weight'],
           'vision_model.embeddings.position_embedding.weight': state['visual.positional_embedding'],
           'text_model.embeddings.token_embedding.weight': state['token_embedding.weight'], 'text_model.embeddings.position_embedding.weight': state['positional_embedding']}
    norms = {'vision_model.pre_layrnorm': 'visual.ln_pre', 'vision_model.post_layernorm': 'visual.ln_post', 'text_model.final_layer_norm': 'ln_final'}
    for tower, ours in (('vision_model', 'visual.transformer'), ('text_model', 'transformer')):
        for i in range(layers):
            there, here = f'{tower}.encoder.layers.{i}', f'{ours}.resblocks.{i}'
            norms |= {f'{there}.layer_norm1': f'{here}.ln_1', f'{there}.layer_norm2': f'{here}.ln_2', f'{there}.mlp.fc1': f'{here}.mlp.c_fc',
                      f'{there}.mlp.fc2': f'{here}.mlp.c_proj', f'{there}.self_attn.out_proj': f'{here}.attn.out_proj'}
            for kind in ('weight', 'bias'):
                for part, value in zip('qkv', state[f'{here}.attn.in_proj_{kind}'].chunk(3)): out[f'{there}.self_attn.{part}_proj.{kind}'] = value
    return out | {f'{there}.{kind}': state[f'{here}.{kind}'] for there, here in norms.items() for kind in ('weight', 'bias')}


def test_vit_b_32_equals_transformers(tmp_path, pictures):
    from transformers import CLIPConfig, CLIPModel
    backbone = find_backbone('ViT-B/32', 'paper')
    model = random_model(backbone)
    save_file(model.state_dict(), tmp_path/'ViT-B-32.safetensors')
    config = CLIPConfig(projection_dim=512, text_config=dict(hidden_act='quick_gelu', eos_token_id=49407), vision_config=dict(hidden_act='quick_gelu', patch_size=32))
    other = CLIPModel(config).eval()
    missing = other.load_state_dict(as_transformers(model.state_dict(), 12), strict=False)
    assert not missing.unexpected_keys and all('position_ids' in key for key in missing.missing_keys)
    encoder = load_encoder(backbone, tmp_path)
    from newsrepro.data.pictures import open_image
    pixels = torch.stack([encoder.transform(open_image(path)) for path in pictures])
    with torch.inference_mode():
        both = other(input_ids=encoder.tokenize(TEXTS), pixel_values=pixels)
    agree(encoder, pictures, both.image_embeds.numpy(), both.text_embeds.numpy())


def test_the_plain_name_would_have_been_wrong(tmp_path, pictures):
    "mlfoundations/open_clip #771: a file under the plain name runs with GELU; through the registry it does not."
    backbone = find_backbone('ViT-B/32', 'paper')
    save_file(random_model(backbone).state_dict(), tmp_path/'ViT-B-32.safetensors')
    plain = open_clip.create_model('ViT-B-32', pretrained=str(tmp_path/'ViT-B-32.safetensors')).eval()
    images, _ = reference(plain, 'ViT-B-32', pictures)
    assert np.abs(encode(load_encoder(backbone, tmp_path), pictures, 'image', batch_size=4) - images).max() > 1e-3
