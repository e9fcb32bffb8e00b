"""SentencePiece tokenizers (Kudo & Richardson 2018, arXiv:1808.06226), lossless. The only importer of sentencepiece."""

import hashlib
import io
import itertools
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"

# SentencePiece writes a space as U+2581, so a real U+2581 would come back as a space. It is written as _ESCAPE + "1",
# and a real _ESCAPE (private use, all but never seen in text) as _ESCAPE + "0".
_SPACE_MARK, _ESCAPE = "\u2581", "\uee00"

# Encoding needs about 100 bytes of memory a character, so a longer text is encoded in pieces of at most this length.
_MAX_CHARACTERS = 1 << 20
# The trainer rejects sentences with these two; they mark boundaries inside it. Text is cut at them.
_TRAINER_RESERVED = ("\t", "\u2585")
_PASSAGE_CHARACTERS = 4000

# One piece for line breaks and the indentation of the next line, less one space: that one goes to the word, so that
# " return" is the same piece at every depth. On Python source at 4096 pieces: 3.29 bytes a token against 3.04 for a
# separate line break and 3.22 for what BPE finds by itself.
_LINE_BREAKS = (
    *("\n", "\n\n", "\n\n\n"),
    *(breaks + _SPACE_MARK * spaces for breaks in ("\n", "\n\n") for spaces in range(1, 32, 2)),
)


class Tokenizer:
    """A trained SentencePiece model. `decode(encode(text)) == text` for every text that UTF-8 can hold.

    `encode` never yields control ids: a text that spells "<|end|>" is ordinary text.

    Attributes:
      sha256: of the model file, hexadecimal.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads a model file; environment variables and ~ in `path` are expanded.

        Raises:
          ValueError: the file cannot be read or is no SentencePiece model with pad, bos and eos.
        """
        path = Path(os.path.expandvars(path)).expanduser()
        try:
            tokenizer = cls(path.read_bytes())
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer model {path}: {error.strerror}") from error
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model (or is damaged): {error}") from error
        ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        missing = [name for name, token_id in ids.items() if token_id < 0]
        if missing:
            raise ValueError(
                f"the tokenizer model {path} lacks {', '.join(missing)}; train it with these ids switched on"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in one call. Raises ValueError for a lone surrogate, which UTF-8 cannot hold."""
        if any(len(text) > _MAX_CHARACTERS for text in texts):
            return [list(itertools.chain(*self._encode(list(_cut(_escape(text)))))) for text in texts]
        return self._encode([_escape(text) for text in texts])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            return self._processor.encode(texts, num_threads=1)
        except TypeError:
            for text in texts:
                _require_utf8(text)
            raise

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control ids are left out, and bytes that are no UTF-8 become U+FFFD."""
        return _unescape(self._processor.decode([int(token_id) for token_id in ids]))

    def piece(self, token_id: int) -> str:
        """Written form of one id, for people to read; a space is shown as U+2581."""
        return self._processor.id_to_piece(token_id)

    def control_id(self, name: str) -> int:
        """Id of a control symbol such as "<|user|>". Raises ValueError when the model has none of that name."""
        token_id = self._processor.piece_to_id(name)
        if not self._processor.is_control(token_id):
            raise ValueError(
                f"the tokenizer has no control symbol {name!r}; train it with slmjax, which adds "
                f"{SYSTEM}, {USER}, {ASSISTANT} and {END}"
            )
        return token_id


def train_tokenizer(
    texts: Iterable[str],
    path: str | os.PathLike,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    user_symbols: Sequence[str] = (),
    character_coverage: float = 0.9995,
    pieces_across_words: bool = False,
    max_passages: int | None = None,
    seed: int = 0,
) -> Tokenizer:
    """Trains a lossless tokenizer on `texts`, writes it to `path` and returns it. The same input gives the same bytes.

    Ids: pad 0, unk 1 (never used: rare characters become bytes), bos 2, eos 3, the four chat symbols, user symbols,
    line breaks with indentation, 256 bytes, then learned pieces. Digits are always single.

    Args:
      texts: passages of at most 4,000 characters are cut from them and held in memory.
      path: model file to write.
      vocab_size: number of ids, all kinds together.
      model_type: BPE (Sennrich et al. 2016, arXiv:1508.07909) or unigram (Kudo 2018, arXiv:1804.10959).
      user_symbols: strings that are always one piece, wherever they stand in a text.
      character_coverage: share of the characters of `texts` that get a piece of their own; the rest become bytes.
      pieces_across_words: let pieces span spaces and mix letters with punctuation: fewer tokens (3.7 bytes a token
        instead of 3.3 on Python source), with more meanings each.
      max_passages: train on a random sample of this many passages; None is all.
      seed: of that sample.

    Raises:
      ValueError: the text is too little or too varied for `vocab_size`, or is empty.
    """
    model = io.BytesIO()
    passages = _passages(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=passages if max_passages is None else iter(_sample(passages, max_passages, seed)),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=[SYSTEM, USER, ASSISTANT, END],
            user_defined_symbols=[*map(_written, user_symbols), "\t", *_LINE_BREAKS],
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            split_by_whitespace=not pieces_across_words,
            split_by_unicode_script=not pieces_across_words,
            max_sentence_length=8 * _PASSAGE_CHARACTERS,
            num_threads=1,  # unigram sums in the order of threads, so more of them would change the last digits
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"cannot train a tokenizer of vocab_size {vocab_size} on this text: {_reason(str(error))}"
        ) from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)
    return Tokenizer.load(path)


def _reason(error: str) -> str:
    """What SentencePiece says, without the place in its source; where it says nothing, the check that failed."""
    check, _, reason = error.partition("] ")
    if reason.startswith("Vocabulary size too high"):
        return f"{reason} More text allows a larger vocab_size."
    if "sentences_.empty()" in check:
        return "the text is empty."
    return reason.replace(" with --character_coverage option", "") or f"it needs {check.partition('[')[2]}."


def _passages(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        _require_utf8(text)
        for reserved in _TRAINER_RESERVED[1:]:
            text = text.replace(reserved, _TRAINER_RESERVED[0])
        for part in text.split(_TRAINER_RESERVED[0]):
            for start in range(0, len(part), _PASSAGE_CHARACTERS):
                yield _escape(part[start : start + _PASSAGE_CHARACTERS])


def _sample(passages: Iterable[str], size: int, seed: int) -> list[str]:
    """A uniform sample in one pass (Vitter 1985, algorithm R)."""
    generator, sample = random.Random(seed), []
    for i, passage in enumerate(passages):
        if i < size:
            sample.append(passage)
        elif (place := generator.randrange(i + 1)) < size:
            sample[place] = passage
    return sample


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate, {error.object[error.start : error.end]!r} at character {error.start}, "
            "which UTF-8 cannot hold; remove it first"
        ) from error


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most _MAX_CHARACTERS; before a line break where there is one, so that tokens stay the same."""
    start = 0
    while len(text) - start > _MAX_CHARACTERS:
        stop = text.rfind("\n", start + 1, start + _MAX_CHARACTERS)
        while stop > start + 1 and text[stop - 1] == "\n":
            stop -= 1
        stop = stop if stop > start else start + _MAX_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _written(symbol: str) -> str:
    return _escape(symbol).replace(" ", _SPACE_MARK)


def _escape(text: str) -> str:
    return text.replace(_ESCAPE, _ESCAPE + "0").replace(_SPACE_MARK, _ESCAPE + "1")


def _unescape(text: str) -> str:
    return text.replace(_ESCAPE + "1", _SPACE_MARK).replace(_ESCAPE + "0", _ESCAPE)
