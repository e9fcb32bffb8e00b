"""Tokenizers of Hugging Face, from a tokenizer.json. The only importer of tokenizers (extra `tokenizers`).

slmjax adds one key to the file when it imports one, beside those that the package tokenizers knows:
"slmjax": {"bos": TOKEN, "eos": TOKEN, "pad": TOKEN, "<|user|>": TOKEN, ..., "lossless": true or false}.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from slmjax.data.control_symbols import ASSISTANT, BOS, END, EOS, PAD, SYSTEM, USER
from slmjax.data.tokenizer_words import Encoded, gathered, ids_dtype

OWN_KEY = "slmjax"
# What tokenizers usually call these, where a file does not say it.
_USUAL = {
    "bos": (BOS, "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>"),
    "eos": (EOS, "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>"),
    "pad": (PAD, "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>"),
}
_MOST_UNUSED = 1 << 16  # ids without a token: some files leave out what is kept for later, a few thousand at most
# Texts of which tokenizers that normalise, trim, or know no bytes lose something.
_PROBES = (
    *(
        "",
        " ",
        "  a  b ",
        "\n\n \t x\r\n",
        "don't we'll , . ! ?",
        "1234567890 12.5",
        "def f(self):\n        return x\n",
    ),
    *(
        "\uff26\uff55\uff4c\uff4c \ufb01 \xbd \xb2",
        "e\u0301 \xe9 \u212b",
        "\u0130\u0131\u017f",
        "\u2581 \u2581a",
        "\u0120 \u010a",
    ),
    *(
        "\x00\x01\x7f\x85\xa0",
        "\ufeff\ufffd\u2028\u200b",
        "\U0001f600\U0001f3f3\ufe0f\u200d\U0001f308",
        "\u4f60\u597d\uff0c",
    ),
    "<s> </s> <unk> [UNK] [CLS] <|endoftext|> <|end|>",
    "".join(map(chr, range(0x20, 0x530))),
)


class JsonModel:
    """What a `slmjax.data.tokenizer.Tokenizer` asks of a tokenizer.json.

    Raises:
      ValueError: `model` is none, or loses text and was not imported as such.
      ImportError: the package tokenizers is not installed.
    """

    def __init__(self, model: bytes):
        self._source = model
        self._own: dict[str, Any] = read_source(model)[1]
        self.vocab_size: int = _vocab_size(self._library)
        specials = {token.content: token_id for token_id, token in self._added.items() if token.special}
        self.bos_id, self.eos_id, self.pad_id = (
            next((specials[name] for name in (self._own.get(key), *names) if name in specials), -1)
            for key, names in _USUAL.items()
        )
        self._specials = specials
        self._dtype = ids_dtype(self.vocab_size)
        if "lossless" not in self._own and (loss := self.first_loss()):
            raise ValueError(f"loses text: {loss}. `slmjax tokenizer import --lossy` takes it nevertheless")

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_library", "_added")}

    @functools.cached_property
    def _library(self) -> Any:
        return open_tokenizer(read_source(self._source)[0])

    @functools.cached_property
    def _added(self) -> Mapping[int, Any]:
        return self._library.get_added_tokens_decoder()

    def encode(self, content: bytes, bounds: np.ndarray, *, framed: bool) -> Encoded:
        """Ids of texts in UTF-8; text i is content[bounds[i] : bounds[i + 1]]."""
        texts = [content[start:stop].decode() for start, stop in itertools.pairwise(bounds.tolist())]
        rows = [row.ids for row in self._library.encode_batch_fast(texts, add_special_tokens=False)]
        return gathered([[self.bos_id, *row, self.eos_id] for row in rows] if framed else rows, self._dtype)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without special tokens."""
        return self._library.decode(ids, skip_special_tokens=True)

    def first_loss(self, texts: Iterable[str] = ()) -> str | None:
        """What is lost of some hard texts, or else of those given, for people to read; None where all come back."""
        # Tokens that were added may take the spaces around them.
        added = (f"a  {token.content}  b{token.content}c" for token in self._added.values())
        return _first_loss(self._round_trip, itertools.chain(_PROBES, added, texts))

    def _round_trip(self, text: str) -> str:
        return self.decode(self._library.encode(text, add_special_tokens=False).ids)

    def piece(self, token_id: int) -> str:
        """Written form of one id, as the file has it."""
        return self._library.id_to_token(token_id) or ""

    def control_id(self, name: str) -> int | None:
        """Id of a control symbol, None where there is none."""
        return self._specials.get(self._own.get(name, name))

    def kind(self, token_id: int) -> Literal["control", "byte", "symbol", "piece"]:
        """What an id is: a special token, a byte (of models with byte fallback), an added token, or learned."""
        if token_id in self._added:
            return "control" if self._added[token_id].special else "symbol"
        piece = self.piece(token_id)
        return "byte" if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else "piece"


def read_source(model: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a tokenizer.json without what slmjax added, and that.

    Raises:
      ValueError: not JSON, or not of a tokenizer, or what slmjax added is damaged.
    """
    try:
        source = json.loads(model)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(source, dict) or "model" not in source:
        raise ValueError("is not a tokenizer.json of Hugging Face: it has no model")
    own = source.pop(OWN_KEY, {})
    if not isinstance(own, dict) or not all(isinstance(own[name], str) for name in own.keys() - {"lossless"}):
        raise ValueError(f"names no tokens under {OWN_KEY!r}; take that key out, or import the file again")
    return source, own


def open_tokenizer(source: Mapping[str, Any]) -> Any:
    """The library's tokenizer, which takes special tokens in a text for ordinary text, and texts as they are.

    Raises:
      ValueError: the library cannot read it.
      ImportError: the library is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "a tokenizer.json needs the package tokenizers: pip install -e '.[tokenizers]' -c constraints.txt"
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(source))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"is not a tokenizer.json of Hugging Face (or is damaged): {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _vocab_size(tokenizer: Any) -> int:
    """The highest id and one. Models have a row, and the library when it writes the file takes a step, for every id."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise ValueError("has no tokens")
    size = max(ids) + 1
    if size > len(ids) + _MOST_UNUSED:
        raise ValueError(
            f"has {len(ids):,} tokens and among them the id {size - 1:,}: more than {_MOST_UNUSED:,} ids would be "
            "without a token; number them anew, or take the file as it was before it was changed"
        )
    return size


def _first_loss(round_trip: Callable[[str], str], texts: Iterable[str]) -> str | None:
    """Where the first text that does not come back differs, for people to read; None where all come back."""
    for text in texts:
        back = round_trip(text)
        if back != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
            )
            around = slice(max(at - 10, 0), at + 10)
            return f"{text[around]!r} comes back as {back[around]!r}"
    return None


def import_tokenizer(
    model: bytes, names: Mapping[str, str], *, texts: Iterable[str] = (), lossy: bool = False
) -> tuple[bytes, dict[str, str]]:
    """A tokenizer.json that has all that slmjax needs.

    Args:
      model: a tokenizer.json.
      names: tokens of the file to take as "bos", "eos", "pad", or as a control symbol such as "<|user|>". For a role
        that is not named the usual names are looked for, and else a token is added.
      texts: that must come back as they are, besides some that are hard.
      lossy: take it even if they do not.

    Returns:
      The new file, and for people to read what each role is, and under "loses" what is lost.

    Raises:
      ValueError: not a tokenizer.json, a name is no token of it, or it loses text and `lossy` is False.
    """
    source, before = read_source(model)
    tokenizer = open_tokenizer(source)
    _vocab_size(tokenizer)
    roles = {**_USUAL, **{name: (name,) for name in (SYSTEM, USER, ASSISTANT, END)}}
    if unknown := sorted(names.keys() - roles):
        raise ValueError(f"has no role {unknown[0]!r} for a token; the roles are {', '.join(roles)}")
    own, said = {}, {}
    for role, usual in roles.items():
        if role in names and tokenizer.token_to_id(names[role]) is None:
            raise ValueError(f"has no token {names[role]!r} to take as {role}")
        candidates = (names.get(role), before.get(role), *usual)
        known = [name for name in candidates if name is not None and tokenizer.token_to_id(name) is not None]
        own[role] = known[0] if known else usual[0]
        said[role] = own[role] if known else f"{own[role]} (added)"
        tokenizer.add_special_tokens([own[role]])
    imported = json.loads(tokenizer.to_str())
    result = JsonModel(_written(imported, {**own, "lossless": False}))
    loss = result.first_loss(texts)
    if loss and not lossy:
        raise ValueError(f"loses text: {loss}; --lossy takes it nevertheless")
    if loss:
        said["loses"] = loss
    return _written(imported, {**own, "lossless": loss is None}), said


def _written(source: Mapping[str, Any], own: Mapping[str, Any]) -> bytes:
    return json.dumps({**source, OWN_KEY: own}, ensure_ascii=False, indent=1).encode()
