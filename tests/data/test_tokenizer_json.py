import json
import pickle

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from slmjax.data.conversations import render
from slmjax.data.tokenizer import ASSISTANT, END, SYSTEM, USER, Tokenizer
from slmjax.data.tokenizer_json import JsonModel, import_tokenizer

TEXTS = ["def push(self, item):\n    return self.items.append(item)  # don't, 1024 times\n", "Grüße, 你好 — mir 😀"] * 5
CONTROLS = (SYSTEM, USER, ASSISTANT, END)


def train(model, trainer, *, normalizer=None, pre_tokenizer=None, decoder=None):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level(specials=("<|endoftext|>", "<|im_start|>"), **kwargs):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return train(models.BPE(), trainer, pre_tokenizer=split, decoder=decoders.ByteLevel(), **kwargs)


def byte_fallback_unigram(fallback=True):
    """A unigram model as Llama's, with bytes for characters that it does not know."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.UnigramTrainer(
        vocab_size=330, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    trained = train(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"))
    vocab = [tuple(entry) for entry in json.loads(trained.to_str())["model"]["vocab"]]
    known = {piece for piece, _ in vocab}
    added = [(piece, -30.0) for piece in [*bytes_, "\n", "\u2581"] if piece not in known]
    tokenizer = tokenizers.Tokenizer(models.Unigram([*vocab, *added], 0, fallback))
    replaced = [decoders.Replace("\u2581", " ")]
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([*replaced, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def source(tokenizer):
    return tokenizer.to_str().encode()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    model, said = import_tokenizer(source(byte_level()), {"bos": "<|im_start|>", USER: "<|im_start|>"})
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    path.write_bytes(model)
    return Tokenizer.load(path), said


def test_byte_level_bpe_has_all_that_a_tokenizer_has(imported):
    tokenizer, said = imported
    library = byte_level()
    text = TEXTS[0] + "  \u2581 <|endoftext|> <|user|> \0\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(TEXTS[0]) == library.encode(TEXTS[0]).ids
    specials = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, *map(tokenizer.control_id, CONTROLS)]
    assert not set(specials) & set(tokenizer.encode(text))
    assert tokenizer.decode([*specials, *tokenizer.encode("a"), *specials]) == "a"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (library.token_to_id("<|im_start|>"), 0)
    assert tokenizer.control_id(USER) == tokenizer.bos_id
    assert tokenizer.pad_id >= 320
    assert tokenizer.vocab_size == max(specials) + 1
    assert said["bos"] == "<|im_start|>"
    assert said["pad"] == "<pad> (added)"
    assert "loses" not in said
    assert tokenizer.encode_arrays(["a", ""], framed=True).lists()[1] == [tokenizer.bos_id, tokenizer.eos_id]
    assert [tokenizer.kind(i) for i in (tokenizer.eos_id, 100)] == ["control", "piece"]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(text) == tokenizer.encode(text)
    assert not tokenizer.is_sentencepiece


def test_importing_is_deterministic_and_importing_again_keeps_what_was_decided(imported):
    tokenizer, _ = imported
    names = {"bos": "<|im_start|>", USER: "<|im_start|>"}
    first, second = (import_tokenizer(source(byte_level()), names)[0] for _ in range(2))
    assert first == second
    assert Tokenizer(first).sha256 == tokenizer.sha256
    again, said = import_tokenizer(first, {"pad": "<|im_start|>"})
    assert Tokenizer(again).bos_id == tokenizer.bos_id
    assert said[USER] == "<|im_start|>"
    assert Tokenizer(again).pad_id == tokenizer.bos_id


def test_conversations_have_their_marks(imported):
    tokenizer, _ = imported
    ids, weights = render([{"role": "user", "content": "a <|end|>"}, {"role": "assistant", "content": "b"}], tokenizer)
    assert ids.count(tokenizer.control_id(END)) == 2
    assert sum(weights) == 2


def test_a_file_with_the_usual_names_needs_no_import(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level(("<pad>", "<s>", "</s>")).save(str(path))
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    with pytest.raises(ValueError, match=r"no control symbol '<\|user\|>'.*tokenizer import"):
        tokenizer.control_id(USER)
    byte_level().save(str(path))
    with pytest.raises(ValueError, match=r"lacks pad, bos; .*slmjax tokenizer import"):
        Tokenizer.load(path)


def test_a_unigram_with_bytes_loses_nothing_but_its_mark_of_spaces():
    with pytest.raises(ValueError, match=r"loses text: '\u2581 \u2581a' comes back as '   a'; --lossy"):
        import_tokenizer(source(byte_fallback_unigram()), {})
    tokenizer = Tokenizer(import_tokenizer(source(byte_fallback_unigram()), {}, lossy=True)[0])
    text = "Ω def push  \n\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "byte" in {tokenizer.kind(i) for i in tokenizer.encode(text)}
    without = Tokenizer(import_tokenizer(source(byte_fallback_unigram(fallback=False)), {}, lossy=True)[0])
    assert without.decode(without.encode(text)) != text


def word_piece():
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return train(model, trainer, pre_tokenizer=pre_tokenizers.Whitespace(), decoder=decoders.WordPiece())


def test_what_loses_text_is_refused_or_taken_by_name(tmp_path):
    lossy = [word_piece(), byte_level(normalizer=normalizers.Lowercase()), byte_level(normalizer=normalizers.NFKC())]
    for tokenizer in lossy:
        with pytest.raises(ValueError, match=r"loses text: .* comes back as .*--lossy"):
            import_tokenizer(source(tokenizer), {})
        model, said = import_tokenizer(source(tokenizer), {}, lossy=True)
        assert "comes back as" in said["loses"]
        assert Tokenizer(model).encode("def")
    path = tmp_path / "t.json"
    byte_level(("<pad>", "<s>", "</s>"), normalizer=normalizers.NFKC()).save(str(path))
    with pytest.raises(ValueError, match=r"t\.json loses text"):
        Tokenizer.load(path)


def test_added_tokens_that_take_spaces_are_found():
    greedy = byte_level()
    greedy.add_tokens([tokenizers.AddedToken("<think>", lstrip=True, rstrip=True)])
    with pytest.raises(ValueError, match=r"loses text: 'a  <think>"):
        import_tokenizer(source(greedy), {})
    plain = byte_level()
    plain.add_tokens([tokenizers.AddedToken("<think>")])
    assert "loses" not in import_tokenizer(source(plain), {})[1]


def test_texts_of_the_user_are_tried_too():
    strange = byte_level(normalizer=normalizers.Replace("zebra", "horse"))
    assert "loses" not in import_tokenizer(source(strange), {}, texts=["a horse"])[1]
    with pytest.raises(ValueError, match="'a zebra' comes back as 'a horse'"):
        import_tokenizer(source(strange), {}, texts=["a horse", "a zebra"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"is not valid JSON"),
        (b"{}", r"is not a tokenizer\.json of Hugging Face: it has no model"),
        (b'{"model": ' + b"[" * 100_000, r"is not valid JSON"),
        (b'{"model": {}, "slmjax": ["<s>"]}', r"names no tokens under 'slmjax'"),
        (b'{"model": {}, "slmjax": {"bos": 3}}', r"names no tokens under 'slmjax'"),
        (b'{"model": 3}', r"is not a tokenizer\.json of Hugging Face \(or is damaged\)"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.json {message}"):
        Tokenizer.load(path)


def with_id(token_id):
    content = json.loads(source(byte_level()))
    content["model"]["vocab"]["far away"] = token_id
    return json.dumps(content).encode()


def test_ids_far_beyond_the_number_of_tokens_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    number = len(json.loads(source(byte_level()))["model"]["vocab"]) + 1
    furthest = number + (1 << 16) - 1
    path.write_bytes(with_id(furthest))
    assert JsonModel(path.read_bytes()).vocab_size == furthest + 1
    for token_id in (furthest + 1, 2**31 - 5, 2**32 - 1):
        path.write_bytes(with_id(token_id))
        with pytest.raises(ValueError, match=rf"tokenizer\.json has {number} tokens and .* the id {token_id:,}: "):
            Tokenizer.load(path)
        with pytest.raises(ValueError, match="more than 65,536 ids would be without a token; number them anew"):
            import_tokenizer(path.read_bytes(), {})


def test_a_file_without_tokens_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(source(tokenizers.Tokenizer(models.BPE())))
    with pytest.raises(ValueError, match=r"tokenizer\.json has no tokens$"):
        Tokenizer.load(path)


def test_names_must_be_tokens_of_the_file():
    with pytest.raises(ValueError, match=r"has no token '<bos>' to take as bos"):
        import_tokenizer(source(byte_level()), {"bos": "<bos>"})
    with pytest.raises(ValueError, match=r"no role 'begin'.*bos, eos, pad"):
        import_tokenizer(source(byte_level()), {"begin": "<|im_start|>"})


def test_without_the_library_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[tokenizers\]' -c constraints\.txt"):
        Tokenizer(b'{"model": {}}')
