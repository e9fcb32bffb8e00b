"""Smaller vocabularies: a SentencePiece model without the pieces that a corpus uses least."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.tokenizers.samples import Samples
from slmjax.data.sentencepieces import SPACE_MARK, ModelProto
from slmjax.data.tokenizer import Tokenizer, write_model

_KIND = ModelProto.SentencePiece
_LEARNED = (_KIND.NORMAL, _KIND.UNUSED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trimmed:
    """A smaller model.

    Attributes:
      model: the file.
      dropped: the pieces that went.
      num_unused: how many of these the corpus did not use.
    """

    model: bytes
    dropped: Sequence[str]
    num_unused: int


def count_tokens(tokenizer: Tokenizer, batches: Iterable[Sequence[str]]) -> np.ndarray:
    """How often each id stands for a part of the texts, int64."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for texts in batches:
        counts += np.bincount(tokenizer.encode_arrays(texts).ids, minlength=tokenizer.vocab_size)
    return counts


def trim(model: bytes, counts: np.ndarray, *, vocab_size: int | None = None) -> Trimmed:
    """Drops learned pieces, those first that are used least; of equal ones those that were learned last.

    Kept are specials, bytes, user symbols, the piece of a space and, in a BPE, every piece that a kept one is merged
    from: a text that needs no dropped piece keeps its tokens. What needs one is written with smaller pieces, or bytes.

    Args:
      model: a SentencePiece model.
      counts: of `count_tokens`.
      vocab_size: ids that are left; by default all pieces that are used.

    Raises:
      ValueError: `vocab_size` is not smaller, or too small for what must be kept.
    """
    proto = ModelProto.FromString(model)
    pieces = list(proto.pieces)
    # Without its piece a space would come back as the mark that stands for it.
    learned = [i for i, piece in enumerate(pieces) if piece.type in _LEARNED and piece.piece != SPACE_MARK]
    num_fixed = len(pieces) - len(learned)
    if vocab_size is not None and not num_fixed <= vocab_size < len(pieces):
        raise ValueError(
            f"vocab_size must be at least {num_fixed} (specials, bytes, user symbols and the space) and less than "
            f"{len(pieces)}, the size now; got {vocab_size}"
        )
    merges = _Merges(pieces[i] for i in learned) if proto.trainer_spec.model_type == proto.trainer_spec.BPE else None
    ids = {pieces[i].piece: i for i in learned}
    room = (len(pieces) if vocab_size is None else vocab_size) - num_fixed
    kept: set[int] = set()
    for i in sorted(learned, key=lambda i: (-counts[i], i)):
        if vocab_size is None and not counts[i]:
            break
        needed = {i} if merges is None else {i, *(ids[part] for part in merges.parts(pieces[i].piece))}
        if len(kept) + len(needed - kept) <= room:
            kept |= needed
    dropped = {i: pieces[i].piece for i in learned if i not in kept}
    del proto.pieces[:]
    proto.pieces.extend(piece for i, piece in enumerate(pieces) if i not in dropped)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.DiscardUnknownFields()  # such as examples of what the whole vocabulary makes of texts
    return Trimmed(
        model=proto.SerializeToString(deterministic=True),
        dropped=list(dropped.values()),
        num_unused=sum(not counts[i] for i in dropped),
    )


class _Merges:
    """The merges of a BPE, best first."""

    def __init__(self, pieces: Iterable):
        self._scores: Mapping[str, float] = {piece.piece: piece.score for piece in pieces}

    def parts(self, piece: str) -> set[str]:
        """The pieces that are made on the way from the characters of `piece` to it."""
        symbols, made = list(piece), set(piece) & self._scores.keys()
        while True:
            pairs = (
                (-self._scores[left + right], i)
                for i, (left, right) in enumerate(itertools.pairwise(symbols))
                if left + right in self._scores
            )
            best = min(pairs, default=None)
            if best is None:
                return made
            i = best[1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
            made.add(symbols[i])


def trim_file(source: Path, output: Path, samples: Samples, *, vocab_size: int | None = None) -> str:
    """Writes a smaller model of the model `source`, as `trim` does; returns what it costs, for people to read.

    Raises:
      ValueError: as `trim`, the model cannot be read or is a tokenizer.json, or there are no texts.
    """
    tokenizer = Tokenizer.load(source)
    if not tokenizer.is_sentencepiece:
        raise ValueError(f"{source} is a tokenizer.json, and only SentencePiece models can be trimmed")
    counts = count_tokens(tokenizer, samples.text_batches())
    if not counts.any():
        raise ValueError(f"no texts to count pieces in; {sum(samples.rejected.values())} records were rejected")
    trimmed = trim(Path(os.path.expandvars(source)).expanduser().read_bytes(), counts, vocab_size=vocab_size)
    smaller = Tokenizer(trimmed.model)
    num_bytes = num_tokens = 0
    for texts in samples.text_batches():
        encoded = smaller.encode_arrays(texts)
        num_tokens += len(encoded.ids)
        num_bytes += sum(len(text.encode()) for text in texts)
        for text, ids in zip(texts, encoded.lists(), strict=True):
            if smaller.decode(ids) != text:
                raise ValueError(
                    f"the trimmed model would lose text, as {source} does: {text[:80]!r} does not come back"
                )
    write_model(trimmed.model, output)
    before, after = num_bytes / counts.sum(), num_bytes / num_tokens
    return (
        f"{tokenizer.vocab_size:,} -> {smaller.vocab_size:,} ids: {len(trimmed.dropped):,} pieces dropped, of which "
        f"{trimmed.num_unused:,} were unused; {before:.4f} -> {after:.4f} bytes a token ({after / before - 1:+.2%}) on "
        f"{num_bytes / 1e6:.1f} MB. Wrote {output}, sha256 {smaller.sha256}"
    )
