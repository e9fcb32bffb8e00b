"""Token sequences under a trained run: packed into rows and hidden from each other, so that none sees another."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax.config import RunConfig
from slmjax.data.batch import Batch
from slmjax.data.packing import best_fit, empty_batch, row_of
from slmjax.model import Params
from slmjax.parallel.mesh import make_mesh, on_mesh
from slmjax.parallel.rules import host_batch_to_global
from slmjax.train.restore import load_run, params_sha256


class TokenSequence(NamedTuple):
    """Tokens of which all but the first are targets.

    Attributes:
      tokens: int32 (n + 1,), no more than a row's length and one.
      weights: float32 (n,), of the targets.
    """

    tokens: np.ndarray
    weights: np.ndarray


class Place(NamedTuple):
    """Where a sequence stands in a batch: row, number among the documents of the row (from 1), and positions."""

    sequence: int
    row: int
    document: int
    positions: slice


def require_scoring(batch_size: int | None) -> None:
    """Raises ValueError where `batch_size` is neither None nor positive, or where there are several processes."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if jax.process_count() > 1:
        raise ValueError(f"documents are scored by one process, got {jax.process_count()}; start one on each host")


class PackedModel:
    """A checkpoint and the devices on which it looks at sequences.

    Attributes:
      run_config: of the run.
      mesh: the devices.
      params, tokenizer: of the checkpoint.
      row_length: tokens in a row.
      identity: digest of the parameters, the tokenizer and the length of a row.
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
          ValueError: the run has no checkpoint, `batch_size` is no size, or there are several processes.
        """
        require_scoring(batch_size)
        self.run_config = run_config
        self.mesh = make_mesh(run_config.mesh) if mesh is None else mesh
        loaded = load_run(run_config, step=step, mesh=self.mesh)
        self.params, self.tokenizer = loaded.params, loaded.tokenizer
        rows = run_config.evaluation.batch_size if batch_size is None else batch_size
        self._num_rows = -(-rows // self.mesh.size) * self.mesh.size
        self.row_length = run_config.input.sequence_length
        self.identity = f"{params_sha256(self.params)} {self.tokenizer.sha256} {self.row_length}"

    def compiled(self, function: Callable[..., jax.Array]) -> Callable[[Params, Batch], jax.Array]:
        """Returns the program of a function whose result has the rows of the batch as its first dimension.

        Args:
          function: of parameters and batch, and by name of config, execution and mesh, which are those of the run.
        """
        given = functools.partial(
            function, config=self.run_config.model, execution=self.run_config.execution, mesh=self.mesh
        )
        return jax.jit(on_mesh(self.mesh, given), out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def run(
        self,
        program: Callable[[Params, Batch], jax.Array],
        sequences: Sequence[TokenSequence],
        *,
        max_per_row: int | None = None,
    ) -> Iterator[tuple[list[Place], np.ndarray]]:
        """Yields, batch by batch, where the sequences stand and what the program gives; every sequence once."""
        lengths = np.array([len(sequence.weights) for sequence in sequences], np.int64)
        order = np.argsort(-lengths, kind="stable")
        least = 1 if max_per_row is None else -(-self.row_length // max_per_row)
        rows = best_fit(np.maximum(lengths[order], least), self.row_length)
        members: list[list[int]] = [[] for _ in range(int(rows.max(initial=-1)) + 1)]
        for sequence, row in zip(order.tolist(), rows.tolist(), strict=True):
            members[row].append(sequence)
        pending = None
        for first in range(0, len(members), self._num_rows):
            places, batch = self._batch(members[first : first + self._num_rows], sequences)
            result = program(self.params, host_batch_to_global(batch, self.mesh))
            if pending is not None:  # read one batch late, so that the device is never idle
                yield pending[0], np.asarray(pending[1])
            pending = places, result
        if pending is not None:
            yield pending[0], np.asarray(pending[1])

    def _batch(self, members: list[list[int]], sequences: Sequence[TokenSequence]) -> tuple[list[Place], Batch]:
        batch = empty_batch(self._num_rows, self.row_length)
        places = []
        for i, row in enumerate(members):
            out, begin = row_of(batch, i), 0
            for number, sequence in enumerate(row, start=1):
                tokens, weights = sequences[sequence]
                place = slice(begin, begin + len(weights))
                out.tokens[place], out.targets[place] = tokens[:-1], tokens[1:]
                out.weights[place], out.documents[place] = weights, number
                out.positions[place] = np.arange(len(weights))
                places.append(Place(sequence, i, number, place))
                begin = place.stop
        return places, batch
