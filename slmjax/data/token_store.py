"""Token stores: documents as memory-mapped token ids with offsets, one directory each (docs/architecture.md)."""

import array
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmjax.data.tokenizer import Tokenizer
from slmjax.data.tokenizer_words import ids_dtype

FORMAT_VERSION = 1
_METADATA = "metadata.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardMetadata:
    """One shard: the name its files begin with, counts, and the sha256 of each file by the rest of its name."""

    name: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    sha256: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreMetadata:
    """metadata.json. `num_bytes` are the UTF-8 bytes of the text that is learned."""

    format_version: int
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    tokenizer_sha256: str
    vocab_size: int
    config_sha256: str
    with_weights: bool
    shards: tuple[ShardMetadata, ...]

    @classmethod
    def from_json(cls, text: str) -> "StoreMetadata":
        """Reads what `to_json` wrote; KeyError, TypeError or ValueError for anything else."""
        fields = json.loads(text)
        return cls(**{**fields, "shards": tuple(ShardMetadata(**shard) for shard in fields["shards"])})

    def to_json(self) -> str:
        """Text of metadata.json."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


class TokenStoreWriter:
    """Writes a store, one document at a time; a context manager that throws the partial store away on an exception.

    Files grow in a directory `.<name>.partial` beside `path`, which `close` renames, so `path` is whole or absent.

    Args:
      path: directory to make; it must not exist, or be empty.
      tokenizer_sha256: `Tokenizer.sha256`.
      vocab_size: ids are below it; uint16 is used up to 65,536.
      config_sha256: of the config that made the documents.
      with_weights: whether every document comes with a 0 or 1 for each token.
      shard_tokens: a shard is closed when it holds this many tokens; documents are never split.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        tokenizer_sha256: str,
        vocab_size: int,
        config_sha256: str,
        with_weights: bool = False,
        shard_tokens: int = 1 << 29,
    ):
        self._path = _expand(path)
        if self._path.exists() and any(self._path.iterdir()):
            raise ValueError(f"{self._path} exists and is not empty; remove it or choose another directory")
        self._partial = self._path.with_name(f".{self._path.name}.partial")
        shutil.rmtree(self._partial, ignore_errors=True)  # of a writer that was killed
        self._partial.mkdir(parents=True)
        self._dtype = ids_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._identity = {"tokenizer_sha256": tokenizer_sha256, "config_sha256": config_sha256}
        self._with_weights = with_weights
        self._shard_tokens = shard_tokens
        self._shards: list[ShardMetadata] = []
        self._open_shard()

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            if error_type is None:
                self.close()
        finally:
            self.abort()

    def _open_shard(self) -> None:
        prefix = self._partial / f"{len(self._shards):05d}"
        self._tokens_file = open(f"{prefix}.tokens.bin", "wb")  # noqa: SIM115 (closed by _close_shard)
        self._weights_file = open(f"{prefix}.weights.bin", "wb") if self._with_weights else None  # noqa: SIM115
        self._offsets, self._bytes = array.array("q", [0]), array.array("q")

    def add(
        self, ids: Sequence[int] | np.ndarray, num_bytes: int, weights: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Adds a document: all of its ids, bos and eos included, and the UTF-8 bytes of its learned text.

        Raises:
          ValueError: an id outside the vocabulary, no ids, or weights missing, unwanted or of another length.
        """
        ids = np.asarray(ids, dtype=np.int64)
        self.add_batch(ids, np.array([0, len(ids)]), np.array([num_bytes]), weights)

    def add_batch(
        self,
        ids: np.ndarray,
        offsets: np.ndarray,
        num_bytes: np.ndarray,
        weights: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Adds documents; document i is `ids[offsets[i] : offsets[i + 1]]`. The store is that of as many `add`.

        Args:
          ids: integers, of all documents, from offsets[0] = 0 to offsets[-1] = len(ids).
          offsets: increasing, one more than documents.
          num_bytes: as `add`, of each document.
          weights: as `add`, of all documents; as many as ids.

        Raises:
          ValueError: as `add`; nothing is added.
        """
        if (weights is not None) != self._with_weights:
            raise ValueError(f"weights must {'' if self._with_weights else 'not '}be given: with_weights is fixed")
        if len(num_bytes) == 0:
            return
        shortest = np.diff(offsets).min()
        if ids.ndim != 1 or shortest < 1 or offsets[0] != 0 or offsets[-1] != len(ids):
            raise ValueError(
                f"a document needs at least one token, in one dimension; got shape {ids.shape}, the shortest with "
                f"{shortest}, offsets from {offsets[0]} to {offsets[-1]}"
            )
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise ValueError(f"ids must lie in [0, {self._vocab_size}), got {ids.min()} to {ids.max()}")
        learned = None
        if weights is not None:
            learned = np.asarray(weights)
            if learned.shape != ids.shape or not ((learned == 0) | (learned == 1)).all():
                raise ValueError(f"weights must be {len(ids)} times 0 or 1, got shape {learned.shape}")
        first = 0
        while first < len(num_bytes):
            start, held = offsets[first], self._offsets[-1]
            last = min(int(np.searchsorted(offsets, start + self._shard_tokens - held)), len(num_bytes))
            tokens = slice(start, offsets[last])
            self._tokens_file.write(ids[tokens].astype(self._dtype, copy=False).tobytes())
            if learned is not None and self._weights_file is not None:
                self._weights_file.write(learned[tokens].astype(np.uint8, copy=False).tobytes())
            self._offsets.frombytes((offsets[first + 1 : last + 1] + (held - start)).astype(np.int64).tobytes())
            self._bytes.frombytes(np.asarray(num_bytes[first:last], np.int64).tobytes())
            if self._offsets[-1] >= self._shard_tokens:
                self._close_shard()
                self._open_shard()
            first = last

    def _close_shard(self) -> None:
        name = f"{len(self._shards):05d}"
        prefix = self._partial / name
        suffixes = ["tokens.bin", "offsets.npy", "bytes.npy"]
        self._close_file(self._tokens_file)
        if self._weights_file is not None:
            self._close_file(self._weights_file)
            suffixes.append("weights.bin")
        for suffix, values in (("offsets.npy", self._offsets), ("bytes.npy", self._bytes)):
            with open(f"{prefix}.{suffix}", "wb") as file:
                np.save(file, np.asarray(values, dtype=np.int64))
                self._close_file(file)
        if len(self._bytes) == 0:
            for suffix in suffixes:
                os.remove(f"{prefix}.{suffix}")
            return
        self._shards.append(
            ShardMetadata(
                name=name,
                num_tokens=self._offsets[-1],
                num_documents=len(self._bytes),
                num_bytes=sum(self._bytes),
                sha256={suffix: _sha256(Path(f"{prefix}.{suffix}")) for suffix in suffixes},
            )
        )

    @staticmethod
    def _close_file(file) -> None:
        file.flush()
        os.fsync(file.fileno())
        file.close()

    def close(self) -> StoreMetadata:
        """Writes what is left and the metadata, and puts the store in its place."""
        self._close_shard()
        metadata = StoreMetadata(
            format_version=FORMAT_VERSION,
            dtype=self._dtype.name,
            num_tokens=sum(shard.num_tokens for shard in self._shards),
            num_documents=sum(shard.num_documents for shard in self._shards),
            num_bytes=sum(shard.num_bytes for shard in self._shards),
            vocab_size=self._vocab_size,
            with_weights=self._with_weights,
            shards=tuple(self._shards),
            **self._identity,
        )
        with open(self._partial / _METADATA, "w", encoding="utf-8") as file:
            file.write(metadata.to_json())
            self._close_file(file)
        self._partial.replace(self._path)
        return metadata

    def abort(self) -> None:
        """Throws away what was written; nothing after `close`."""
        for file in filter(None, (self._tokens_file, self._weights_file)):
            with contextlib.suppress(OSError):  # a full disk: what is buffered cannot be written, and need not be
                file.close()
        shutil.rmtree(self._partial, ignore_errors=True)


class TokenStore:
    """A store on disk, read through memory maps; cheap to open, to pickle and to share between threads.

    Positions count tokens over all shards in order, documents likewise.

    Attributes:
      path: its directory.
      metadata: its counts and hashes.
    """

    def __init__(self, path: Path, metadata: StoreMetadata):
        self.path = path
        self.metadata = metadata
        self._token_bounds = _bounds(shard.num_tokens for shard in metadata.shards)
        self._document_bounds = _bounds(shard.num_documents for shard in metadata.shards)

    @classmethod
    def open(cls, path: str | os.PathLike) -> "TokenStore":
        """Opens a store and compares the sizes of its files with its metadata; ~ and environment variables expand.

        Raises:
          ValueError: no store, one of another format version, or a file that is missing or not of its size.
        """
        path = _expand(path)
        try:
            text = (path / _METADATA).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{path} is not a token store: cannot read {_METADATA} ({error.strerror})") from error
        try:
            version = json.loads(text)["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, this program reads {FORMAT_VERSION}; make the store again")
            metadata = StoreMetadata.from_json(text)
            store = cls(path, metadata)
            expected = [store._expected_sizes(shard) for shard in metadata.shards]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path / _METADATA} cannot be used: {error}") from error
        for file, size in itertools.chain(*map(dict.items, expected)):
            got = file.stat().st_size if file.exists() else None
            if got != size:
                state = "is missing" if got is None else f"has {got} bytes"
                raise ValueError(f"{file} {state}, expected {size} bytes; the store is damaged, make it again")
        return store

    def _expected_sizes(self, shard: ShardMetadata) -> dict[Path, int]:
        sizes = {"tokens.bin": shard.num_tokens * np.dtype(self.metadata.dtype).itemsize}
        if self.metadata.with_weights:
            sizes["weights.bin"] = shard.num_tokens
        for suffix, num_values in (("offsets.npy", shard.num_documents + 1), ("bytes.npy", shard.num_documents)):
            sizes[suffix] = 128 + 8 * num_values  # numpy pads the header of a short one-dimensional array to 128
        return {self.path / f"{shard.name}.{suffix}": size for suffix, size in sizes.items()}

    def verify(self) -> None:
        """Reads every file and compares its sha256. Raises ValueError naming the first that differs."""
        for shard in self.metadata.shards:
            for suffix, expected in shard.sha256.items():
                file = self.path / f"{shard.name}.{suffix}"
                if _sha256(file) != expected:
                    raise ValueError(
                        f"{file} does not have the sha256 of {_METADATA}; the store is damaged, make it again"
                    )

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, bos and eos included."""
        return self.metadata.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return self.metadata.num_documents

    @functools.cached_property
    def _maps(self) -> dict[str, list[np.ndarray]]:
        """Arrays of each kind of file, one a shard."""
        prefixes = [self.path / shard.name for shard in self.metadata.shards]
        maps = {
            "tokens": [np.memmap(f"{prefix}.tokens.bin", dtype=self.metadata.dtype, mode="r") for prefix in prefixes],
            "offsets": [np.load(f"{prefix}.offsets.npy", mmap_mode="r") for prefix in prefixes],
            "bytes": [np.load(f"{prefix}.bytes.npy", mmap_mode="r") for prefix in prefixes],
        }
        if self.metadata.with_weights:
            maps["weights"] = [np.memmap(f"{prefix}.weights.bin", dtype=np.uint8, mode="r") for prefix in prefixes]
        return {kind: [np.asarray(array) for array in arrays] for kind, arrays in maps.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_maps"}

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids at positions [start, stop), in the type of the store; shorter where the store ends.

        Raises:
          ValueError: an id lies outside the vocabulary, which a model would take for another without a word.
        """
        ids = self._slice("tokens", start, stop)
        if len(ids) and ids.max() >= self.metadata.vocab_size:
            raise ValueError(
                f"{self.path} holds the id {ids.max()} near token {start:,}, its vocabulary has "
                f"{self.metadata.vocab_size} ids; the store is damaged, make it again"
            )
        return ids

    def weights(self, start: int, stop: int) -> np.ndarray:
        """Whether each token at [start, stop) is learned, uint8; ones for a store without weights."""
        if self.metadata.with_weights:
            return self._slice("weights", start, stop)
        return np.ones(max(0, min(stop, self.num_tokens) - start), np.uint8)

    def document(self, index: int) -> np.ndarray:
        """Ids of one document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        shard, index = _locate(self._document_bounds, index)
        offsets = self._maps["offsets"][shard]
        return self._maps["tokens"][shard][offsets[index] : offsets[index + 1]]

    def document_of(self, position: int) -> int:
        """The document that holds the token at `position`."""
        if not 0 <= position < self.num_tokens:
            raise IndexError(f"position {position} of {self.num_tokens}")
        shard, position = _locate(self._token_bounds, position)
        inside = int(self._maps["offsets"][shard].searchsorted(position, side="right")) - 1
        return self._document_bounds[shard] + inside

    def starts(self, first: int, last: int) -> np.ndarray:
        """Positions where documents [first, last) start, int64; document `num_documents` starts at the end."""
        pieces = [
            self._maps["offsets"][shard][low:high] + self._token_bounds[shard]
            for shard, low, high in _overlaps(self._document_bounds, first, last)
        ]
        if first <= self.num_documents < last:
            pieces.append(np.array([self.num_tokens], np.int64))
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    @property
    def document_starts(self) -> np.ndarray:
        """Where every document starts and, last, where the store ends: int64, num_documents + 1."""
        return self.starts(0, self.num_documents + 1)

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the learned text of every document, int64."""
        return np.concatenate([np.zeros(0, np.int64), *self._maps["bytes"]])

    def _slice(self, kind: str, start: int, stop: int) -> np.ndarray:
        arrays = self._maps[kind]
        pieces = [arrays[shard][low:high] for shard, low, high in _overlaps(self._token_bounds, start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.zeros(0, self.metadata.dtype if kind == "tokens" else np.uint8), *pieces])


def check_tokenizer(store: TokenStore, tokenizer: Tokenizer | str) -> None:
    """Raises ValueError unless `store` was written with `tokenizer`, given as itself or by its sha256."""
    expected = tokenizer if isinstance(tokenizer, str) else tokenizer.sha256
    if store.metadata.tokenizer_sha256 != expected:
        raise ValueError(
            f"{store.path} was written with the tokenizer {store.metadata.tokenizer_sha256}, the run's tokenizer is "
            f"{expected} (sha256 of the model files); give the tokenizer of the store, or tokenise again"
        )


def _bounds(counts: Iterable[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)]


def _locate(bounds: list[int], index: int) -> tuple[int, int]:
    """The shard that holds an index, and the index within it."""
    shard = bisect.bisect_right(bounds, index) - 1
    return shard, index - bounds[shard]


def _overlaps(bounds: list[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The shards that share indices with [start, stop), and which of their own they share."""
    shard = bisect.bisect_right(bounds, start) - 1
    while shard < len(bounds) - 1 and bounds[shard] < stop:
        base, end = bounds[shard], bounds[shard + 1]
        yield shard, max(start, base) - base, min(stop, end) - base
        shard += 1


def _expand(path: str | os.PathLike) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
