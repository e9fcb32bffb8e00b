"""Likelihood of single documents under a trained run: scores for choosing data."""

import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax.config import RunConfig
from slmjax.data.batch import Batch
from slmjax.data.packing import best_fit, empty_batch, row_of
from slmjax.evaluate.likelihood import token_nll
from slmjax.parallel.mesh import make_mesh, on_mesh
from slmjax.parallel.rules import host_batch_to_global
from slmjax.train.restore import load_run, params_sha256


class DocumentScorer:
    """A checkpoint that scores texts.

    Attributes:
      identity: digest of the parameters, the tokenizer and the length of a row, on which alone a score depends.
    """

    def __init__(
        self, run_config: RunConfig, *, step: int | None = None, batch_size: int | None = None, mesh: Mesh | None = None
    ):
        """Loads the newest whole checkpoint of a run, or that of `step`.

        Args:
          run_config: the run, as it was trained.
          step: checkpoint to use.
          batch_size: rows at one time, rounded up to a multiple of the devices; None is the evaluation's.
          mesh: devices to spread rows over; None is that of the run.

        Raises:
          ValueError: the run has no checkpoint, or there are several processes.
        """
        if jax.process_count() > 1:
            raise ValueError(f"documents are scored by one process, got {jax.process_count()}; start one on each host")
        self._mesh = make_mesh(run_config.mesh) if mesh is None else mesh
        self._loaded = load_run(run_config, step=step, mesh=self._mesh)
        rows = run_config.evaluation.batch_size if batch_size is None else batch_size
        self._num_rows = -(-rows // self._mesh.size) * self._mesh.size
        self._row_length = run_config.input.sequence_length
        self.identity = f"{params_sha256(self._loaded.params)} {self._loaded.tokenizer.sha256} {self._row_length}"
        nll = functools.partial(token_nll, config=run_config.model, execution=run_config.execution, mesh=self._mesh)
        self._nll = jax.jit(on_mesh(self._mesh, nll), out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns loss (nats a token), bits_per_byte and tokens of every text, eos included in all.

        A text longer than a row is cut into windows that do not see each other. Windows are packed into rows, hidden
        from each other, so that a score does not depend on what else is scored, but for rounding.
        """
        tokenizer = self._loaded.tokenizer
        ids = [
            np.array([tokenizer.bos_id, *text_ids, tokenizer.eos_id], np.int32)
            for text_ids in tokenizer.encode_batch(list(texts))
        ]
        windows = [
            (document, start, min(self._row_length, len(tokens) - 1 - start))
            for document, tokens in enumerate(ids)
            for start in range(0, len(tokens) - 1, self._row_length)
        ]
        windows.sort(key=lambda window: -window[2])
        rows = best_fit(np.array([length for *_, length in windows], np.int64), self._row_length)
        members: list[list[int]] = [[] for _ in range(int(rows.max(initial=-1)) + 1)]
        for number, row in enumerate(rows.tolist()):
            members[row].append(number)
        nats = np.zeros(len(ids))
        pending = None
        for first in range(0, len(members), self._num_rows):
            part = [[windows[number] for number in row] for row in members[first : first + self._num_rows]]
            batch = host_batch_to_global(self._batch(part, ids), self._mesh)
            nll_BT = self._nll(self._loaded.params, batch)
            if pending is not None:  # read one batch late, so that the device is never idle
                _add(nats, *pending)
            pending = part, nll_BT
        if pending is not None:
            _add(nats, *pending)
        tokens = np.array([len(each) - 1 for each in ids], np.int64)
        num_bytes = np.array([max(len(text.encode()), 1) for text in texts])
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / num_bytes, "tokens": tokens}

    def _batch(self, part: list[list[tuple[int, int, int]]], ids: list[np.ndarray]) -> Batch:
        batch = empty_batch(self._num_rows, self._row_length)
        for i, row in enumerate(part):
            out, begin = row_of(batch, i), 0
            for number, (document, start, length) in enumerate(row, start=1):
                place, tokens = slice(begin, begin + length), ids[document][start : start + length + 1]
                out.tokens[place], out.targets[place] = tokens[:-1], tokens[1:]
                out.weights[place], out.documents[place] = 1.0, number
                out.positions[place] = np.arange(length)
                begin += length
        return batch


def _add(nats: np.ndarray, part: list[list[tuple[int, int, int]]], nll_BT: jax.Array) -> None:
    """Adds the nats of every window to those of its document."""
    values = np.asarray(nll_BT, np.float64)
    for i, row in enumerate(part):
        begin = 0
        for document, _, length in row:
            nats[document] += values[i, begin : begin + length].sum()
            begin += length
