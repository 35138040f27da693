"""Translation with a model of the true architecture and file format, kills, damage, and the properties
that no text may break."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MarianConfig, MarianMTModel

from newsrepro.text import language as text_module
from newsrepro.core.checkpoints import TRANSLATORS, find_model
from newsrepro.core.base import InputError
from newsrepro.data.layouts import read_collection
from newsrepro.data.tables import repair_mojibake
from newsrepro.text.language import (TranslationMemory, detect_languages, find_translator, load_marian,
                                     paragraphs, select, sentences, translate_batches, windows)

GERMAN = ['Warum?', 'Die Bahn kommt.', 'Ein Bär!', 'Der Rhein tritt über die Ufer.',
          'Die Feuerwehr rettet einen Hund aus dem Fluss.',
          'Köln baut eine neue Brücke über den Rhein, sagt die Stadt.',
          'Am Montag fällt der Unterricht aus.', 'Die Bahn streicht Züge.', 'Ein Bär läuft durch den Wald.',
          'Das Spiel endet ohne Tore.']


def opus_folder(folder, layers=6, width=512, words=58100):
    """OPUS-MT's German-English model as it is published, with random weights and a small SentencePiece
    model; or a smaller one."""
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(GERMAN*4),
                                             model_prefix=str(folder/'source'), vocab_size=120,
                                             hard_vocab_limit=False, minloglevel=2)
    (folder/'source.model').rename(folder/'source.spm'); (folder/'source.vocab').unlink()
    (folder/'target.spm').write_bytes((folder/'source.spm').read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder/'source.spm'))
    known = [name for i in range(pieces.get_piece_size())
             if (name := pieces.id_to_piece(i)) not in ('</s>', '<unk>', '<s>')]
    names = ['</s>', '<unk>', *known, *(f'▁word{i}' for i in range(words - 2 - len(known))), '<pad>']
    (folder/'vocab.json').write_text(json.dumps({name: i for i, name in enumerate(names)},
                                                ensure_ascii=False), encoding='utf-8')
    (folder/'tokenizer_config.json').write_text(json.dumps({'source_lang': 'de', 'target_lang': 'en'}))
    config = MarianConfig(vocab_size=words + 1, d_model=width, encoder_layers=layers, decoder_layers=layers,
                          encoder_attention_heads=8, decoder_attention_heads=8,
                          encoder_ffn_dim=4*width, decoder_ffn_dim=4*width, max_position_embeddings=512,
                          activation_function='swish', scale_embedding=True,
                          pad_token_id=words, eos_token_id=0, decoder_start_token_id=words,
                          forced_eos_token_id=0)
    config.save_pretrained(folder)
    generation = {'num_beams': 4, 'max_length': 512, 'pad_token_id': words, 'eos_token_id': 0,
                  'forced_eos_token_id': 0, 'decoder_start_token_id': words, 'bad_words_ids': [[words]]}
    (folder/'generation_config.json').write_text(json.dumps(generation))
    torch.manual_seed(0)
    state = MarianMTModel(config).state_dict()
    state = {key: value for key, value in state.items()
             if 'embed_positions' not in key}  # sines, not published
    state['model.shared.weight'] *= 8  # so that its words differ
    for key in ('model.encoder.embed_tokens.weight', 'model.decoder.embed_tokens.weight', 'lm_head.weight'):
        if key in state: state[key] = state['model.shared.weight']
    torch.save(state, folder/'pytorch_model.bin')
    return folder


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    "A hub cache that holds the model."
    cache = tmp_path_factory.mktemp('hub')
    folder = cache/('models--' + TRANSLATORS['paper'].replace('/', '--'))
    snapshot = opus_folder(folder/'snapshots'/('a'*40))
    (folder/'blobs').mkdir(); (folder/'refs').mkdir()
    (folder/'refs'/'main').write_text('a'*40)
    for path in list(snapshot.iterdir()):
        path.rename(folder/'blobs'/path.name); path.symlink_to(f'../../blobs/{path.name}')
    return cache


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "The same files of a small model, for what does not depend on size."
    return opus_folder(tmp_path_factory.mktemp('small')/'opus', 1, 64, 300)


def test_true_architecture(hub, tmp_path, monkeypatch):
    """Found in the hub's cache without a network; a batch gives what each sentence gives alone; nothing is
    translated twice."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(hub))
    monkeypatch.setattr('socket.socket.connect', lambda *_: pytest.fail('asked the network'))
    folder = find_model(TRANSLATORS['paper'])
    model, tokenizer = load_marian(folder)
    attention, wide, norm = 4*(512*512 + 512), 2*512*2048 + 2048 + 512, 2*512
    encoder, decoder = 6*(attention + wide + 2*norm), 6*(2*attention + wide + 3*norm)
    tables = 58101*512 + 2*512*512  # one of words, two of positions
    assert sum(p.numel() for p in model.parameters()) == tables + encoder + decoder
    alone = {sentence: next(translate_batches(model, tokenizer, [sentence]))[sentence]
             for sentence in GERMAN[:3]}
    assert len(set(alone.values())) == 3 and all(alone.values())
    batches = list(translate_batches(model, tokenizer, GERMAN[:3], budget=24))
    assert len(batches) == 2 and {k: v for batch in batches for k, v in batch.items()} == alone

    monkeypatch.setattr(text_module, 'load_marian', lambda folder: (model, tokenizer))
    translator = find_translator('profile', 'paper', TranslationMemory(tmp_path/'memory.sqlite'))
    body = f'{GERMAN[0]} {GERMAN[1]}\n{GERMAN[2]}'
    assert translator([body, GERMAN[2]]) == [
        f'{alone[GERMAN[0]]} {alone[GERMAN[1]]}\n{alone[GERMAN[2]]}', alone[GERMAN[2]]]
    monkeypatch.setattr(text_module, 'translate_batches', lambda *_: pytest.fail('translated again'))
    again = find_translator('profile', 'paper', TranslationMemory(tmp_path/'memory.sqlite'))
    assert again([GERMAN[1], f'{GERMAN[2]} {GERMAN[0]}']) == [
        alone[GERMAN[1]], f'{alone[GERMAN[2]]} {alone[GERMAN[0]]}']
    assert again.label.startswith('Helsinki-NLP/opus-mt-de-en:')


CHILD = """
import sys
from pathlib import Path
from newsrepro.text.language import MarianTranslator, TranslationMemory
texts = Path(sys.argv[3]).read_text(encoding='utf-8').splitlines()
MarianTranslator('opus', Path(sys.argv[1]), TranslationMemory(sys.argv[2]), budget=20)(texts)
"""


def test_kill(small, tmp_path, monkeypatch):
    """Killed with SIGKILL between two batches, the next run translates only what is missing and ends with
    the same texts."""
    texts = [f'Der Bär {i} läuft über {i*7} Brücken.' for i in range(60)]
    (tmp_path/'texts.txt').write_text('\n'.join(texts), encoding='utf-8')
    memory = TranslationMemory(tmp_path/'memory.sqlite')
    translator = text_module.MarianTranslator('opus', small, memory, budget=20)
    child = subprocess.Popen([sys.executable, '-c', CHILD, str(small), str(memory.path),
                              str(tmp_path/'texts.txt')], env=os.environ | {'OMP_NUM_THREADS': '1'})
    deadline = time.time() + 120
    while not (3 <= len(memory.all(translator.label))) and child.poll() is None and time.time() < deadline:
        time.sleep(.01)
    child.send_signal(signal.SIGKILL); child.wait()
    done = memory.all(translator.label)
    assert 3 <= len(done) < len(texts)
    asked, whole = [], text_module.translate_batches
    monkeypatch.setattr(text_module, 'translate_batches', lambda model, tokenizer, texts,
                        budget: asked.extend(texts) or whole(model, tokenizer, texts, budget))
    resumed = translator(texts)
    assert sorted(asked) == sorted(set(texts) - set(done))
    undisturbed = text_module.MarianTranslator('opus', small, TranslationMemory(tmp_path/'other.sqlite'),
                                               budget=20)(texts)
    assert resumed == undisturbed


def test_long_sentence(small, tmp_path):
    """A sentence with more tokens than the model has positions is cut at spaces, nothing is lost on the
    way in."""
    translator = text_module.MarianTranslator('opus', small, TranslationMemory(tmp_path/'memory.sqlite'))
    sentence = 'Der Bär läuft durch den Wald und '*200 + 'schläft.'
    [pieces] = translator.pieces(sentence)
    assert len(pieces) > 1 and ' '.join(pieces) == sentence
    assert all(len(translator.marian[1](piece).input_ids) <= 512 for piece in pieces)


def junk(n): return 'iVBORw0KGgo'*(n//11)


@pytest.mark.parametrize('word', [junk(2000), '\ufdfa'*500, 'e'*511, 'Hund'*3000])
def test_long_word(small, tmp_path, word):
    """A word longer than the model is read as far as the model goes; that is said with a count, and the
    rest goes on."""
    translator = text_module.MarianTranslator('opus', small, TranslationMemory(tmp_path/'memory.sqlite'))
    alone = translator(GERMAN[:2])
    for _ in range(2):  # translated, then from the memory
        with pytest.warns(UserWarning,
                          match=r'opus: words of more than 511 tokens, read only so far: 1; the first is'):
            told = translator([f'{GERMAN[0]}\n{word}\n{GERMAN[1]}', GERMAN[1]])
        assert told[0].split('\n')[::2] == alone and told[1] == alone[1]


def test_no_warning_without_a_cut(small, tmp_path, recwarn):
    translator = text_module.MarianTranslator('opus', small, TranslationMemory(tmp_path/'memory.sqlite'))
    translator(['Der Bär läuft durch den Wald und '*200 + 'schläft.', 'q'*200])
    assert not [warning for warning in recwarn if 'tokens, read only so far' in str(warning.message)]


@pytest.mark.parametrize('text',
                         ['', ' \n\t ', '?!… — ---', '3:1', '🔥🔥👩‍👩‍👧‍👦', '\u200b\u200d\ufeff\u2060', '2021'])
def test_nothing_to_translate(small, tmp_path, text):
    "A text without a letter is not given to a model, which would make up a sentence."
    translator = text_module.MarianTranslator('opus', small, TranslationMemory(tmp_path/'memory.sqlite'))
    assert letters(translator([text])[0]) == letters(text) and not translator.memory.all(translator.label)


def test_half_characters(small, tmp_path):
    "A lone surrogate counts as the character for what could not be read; a NUL stays."
    translator = text_module.MarianTranslator('opus', small, TranslationMemory(tmp_path/'memory.sqlite'))
    assert translator(['Ein Bär \ud800!']) == translator(['Ein Bär \ufffd!'])
    assert sentences('Ein \ud800 Bär', 'de') == ['Ein \ufffd Bär'] and len(translator(['Ein\0Bär'])) == 1


@pytest.mark.parametrize('text', ['Hund'*250_000, 'Der Hund läuft. '*65_000,
                                  'Der Hund läuft über die Brücke. ' + junk(10**6)])
def test_a_megabyte(text):
    "A text of 1 MB is looked at in seconds, whatever it holds."
    began = time.time()
    assert detect_languages([text, text[:40]]) == ['de', 'de']
    assert letters(''.join(paragraphs(text))) == letters(text)
    assert time.time() - began < 60  # 200 s for one word, before


strange = st.text(st.one_of(st.characters(exclude_categories=['Cs']), st.sampled_from('"\r\n,\t\ufeff ')),
                  max_size=20)

@settings(max_examples=100, deadline=None)
@given(table=st.dictionaries(strange, strange, max_size=4))
def test_tables_of_translations_come_back(tmp_path_factory, table):
    "What is written is read: all texts but those of nothing but space."
    path = tmp_path_factory.mktemp('table')/'translations.csv'
    table = {text: told for text, told in table.items()
             if text.strip() and '\0' not in text + told and text == repair_mojibake(text)}
    text_module.write_translations(path, table)
    assert text_module.read_translations(path) == table


@pytest.mark.parametrize('damage, message', [
    (lambda f: (f/'vocab.json').unlink(), 'no vocab.json'),
    (lambda f: (f/'pytorch_model.bin').write_bytes(b'PK nonsense'), 'corrupt or no Marian model'),
    (lambda f: torch.save({k: v for k, v in torch.load(f/'pytorch_model.bin').items()
                           if 'decoder.layers.0.fc1' not in k}, f/'pytorch_model.bin'), 'fc1'),
    (lambda f: (f/'pytorch_model.bin').unlink(), 'corrupt or no Marian model'),
    (lambda f: (f/'source.spm').write_bytes(b'nonsense'), 'corrupt or no Marian model'),
    (lambda f: (f/'vocab.json').write_text('[]'), 'corrupt or no Marian model'),
    (lambda f: (f/'config.json').write_text('{'), 'corrupt or no Marian model'),
])
def test_damaged(small, tmp_path, damage, message):
    "A model that is not whole is refused; none of its weights is random."
    import shutil
    folder = shutil.copytree(small, tmp_path/'damaged')
    damage(folder)
    with pytest.raises(InputError, match=message):
        translator = find_translator(str(folder), 'paper', TranslationMemory(tmp_path/'memory.sqlite'))
        translator(GERMAN[:1])


def test_absent_model(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(InputError, match="model 'Helsinki-NLP/opus-mt-de-en' not found in .*--weights"):
        find_translator('profile', 'paper', TranslationMemory(tmp_path/'memory.sqlite'))


def letters(text): return ''.join(text.split())


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(exclude_categories=['Cs']), st.sampled_from('aB.!?„“ \n')),
               max_size=120))
def test_nothing_is_lost(text):
    "Cutting a text loses no character but space."
    assert letters(''.join(paragraphs(text))) == letters(text)
    assert letters(''.join(sentences(text, 'de'))) == letters(text)
    assert letters(''.join(windows(text, len, 7))) == letters(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=5))
def test_detection_never_fails(texts):
    assert len(detect_languages(texts)) == len(texts)


def test_german_articles(newsimages2021):
    """A portal's articles, selected in all ways; the organisers took the line breaks out, and about a
    fifth of their texts shows where."""
    articles = read_collection(newsimages2021).articles
    texts = (articles.title + ' ' + articles.text).tolist()
    assert detect_languages(texts) == ['de' if text.strip() else '' for text in texts]
    first = select(articles, 'paragraph-starts')
    for selection in ('title', 'full'): assert len(select(articles, selection)) == len(articles)
    assert all(start.startswith(' '.join(title.split())) for start, title in zip(first, articles.title))
    several = articles.text.map(lambda text: len(paragraphs(text)) > 1)
    assert several[articles.text.str.contains('\n')].all() and several.any()
    assert len(articles) != 9445 or 1800 < several.sum() < 2300
