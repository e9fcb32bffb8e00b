"""Which conversations help with a target: LESS (Xia et al. 2024, arXiv:2402.04333), on the gradients of adapters."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from slmjax.config import AdamWConfig, InfluenceConfig, RunConfig
from slmjax.data.conversations import render
from slmjax.data.packing import empty_batch, row_of
from slmjax.evaluate.adapter_gradients import (
    adapter_gradients,
    first_factors,
    num_features,
    project,
    select_projections,
)
from slmjax.evaluate.packed import TokenSequence, require_scoring
from slmjax.train.restore import load_adam_moments, load_run, params_sha256

Conversation = Sequence[Mapping[str, Any]]

_FEATURE_BYTES = 64 << 20  # that wait to be projected together
_SHORTEST_ROW = 64


class InfluenceScorer:
    """A checkpoint that compares conversations with targets, on the first device.

    Attributes:
      moments: those of Adam that shape the features, or None: gradients are taken as they are.
      identity: of all that the scores depend on besides the conversations.
    """

    def __init__(
        self,
        run_config: RunConfig,
        config: InfluenceConfig,
        targets: Mapping[str, Sequence[Conversation]],
        *,
        step: int | None = None,
        batch_size: int | None = None,
    ):
        """Loads a checkpoint and takes the gradients of the targets.

        Args:
          run_config: the run, as it was trained.
          config: adapters and projection; the paths of its targets are not looked at.
          targets: conversations of each target, by name.
          step: checkpoint to use; the newest whole one if None.
          batch_size: examples at one time, each with gradients as large as the projections; None is the evaluation's.

        Raises:
          ValueError: there is no checkpoint, or not with the moments that the config wants; a target has nothing to
            learn; `batch_size` is no size; there are several processes.
        """
        require_scoring(batch_size)
        self._config = config
        loaded = load_run(run_config, step=step)
        self._params, self._tokenizer = loaded.params, loaded.tokenizer
        self._row_length = run_config.input.sequence_length
        self._batch_size = run_config.evaluation.batch_size if batch_size is None else batch_size
        weights = select_projections(loaded.params, config.projections)
        self._factors = first_factors(weights, config)
        self._num_features = num_features(weights, config)
        self.moments = None
        if config.moments != "none":
            self.moments = load_adam_moments(run_config, list(weights), step=loaded.step)
        if config.moments == "adam" and self.moments is None:
            raise ValueError(
                f"the checkpoint of step {loaded.step} in {run_config.output_dir} has no moments of Adam for all of "
                f"{', '.join(config.projections)}; set InfluenceConfig.moments = 'none'"
            )
        optimizer = run_config.optimizer
        settings = optimizer if isinstance(optimizer, AdamWConfig) else getattr(optimizer, "adamw", None)
        self._gradients = jax.jit(
            functools.partial(
                adapter_gradients,
                config=run_config.model,
                execution=run_config.execution,
                optimizer=settings or AdamWConfig(peak_lr=1.0),
            )
        )
        self._project = jax.jit(functools.partial(project, dimensions=config.dimensions, seed=config.seed))
        self.identity = (
            f"influence {params_sha256(self._params)} {self._tokenizer.sha256} {self._row_length} {config.projections} "
            f"{config.rank} {config.dimensions} {config.seed} {'adam' if self.moments is not None else 'gradient'}"
        )
        self._targets = {}
        for name, conversations in targets.items():
            features, learned = self.features(conversations, moments=False)
            if not learned.any():
                raise ValueError(f"target {name!r} has no conversation of which a row of {self._row_length} learns")
            self._targets[name] = _unit(features[learned].mean(axis=0))
            self.identity += f" {name} {params_sha256({'mean': self._targets[name]})}"

    def score(self, conversations: Sequence[Conversation]) -> dict[str, np.ndarray]:
        """Returns influence_<target>, the cosine of a conversation with the mean gradient of each, and their maximum.

        A conversation longer than a row loses its end, as in training; where nothing is left to learn it is -1.
        """
        features, learned = self.features(conversations, moments=self.moments is not None)
        unit = _unit(features)
        columns = {
            f"influence_{name}": np.where(learned, unit @ target, -1.0).astype(np.float64)
            for name, target in self._targets.items()
        }
        return {"influence": np.max(list(columns.values()), axis=0), **columns}

    def features(self, conversations: Sequence[Conversation], *, moments: bool) -> tuple[np.ndarray, np.ndarray]:
        """Projected gradients (of Adam's updates with `moments`), and of which conversations anything is learned."""
        found = np.zeros((len(conversations), self._config.dimensions), np.float32)
        sequences = [self._sequence(messages) for messages in conversations]
        learned = np.array([sequence.weights.any() for sequence in sequences], bool)
        lengths = np.array([len(sequence.weights) for sequence in sequences], np.int64)
        # A few lengths of rows, so that padding at most doubles the work; of each one program.
        rows = np.minimum(2 ** np.ceil(np.log2(np.maximum(lengths, _SHORTEST_ROW))).astype(np.int64), self._row_length)
        waiting: list[tuple[np.ndarray, jax.Array]] = []
        at_once = max(_FEATURE_BYTES // (4 * self._num_features * self._batch_size), 1)
        for row in np.unique(rows[learned]).tolist():
            chosen = np.flatnonzero(learned & (rows == row))
            for first in range(0, len(chosen), self._batch_size):
                part = chosen[first : first + self._batch_size]
                batch = empty_batch(self._batch_size, row)
                for i, number in enumerate(part.tolist()):
                    out, (tokens, weights) = row_of(batch, i), sequences[number]
                    place = slice(0, len(weights))
                    out.tokens[place], out.targets[place] = tokens[:-1], tokens[1:]
                    out.weights[place], out.documents[place] = weights, 1
                    out.positions[place] = np.arange(len(weights))
                used = self.moments if moments else None
                waiting.append((part, self._gradients(self._params, self._factors, used, batch)))
                if len(waiting) == at_once:
                    self._finish(waiting, found)
                    waiting = []
        self._finish(waiting, found)
        return found, learned

    def _finish(self, waiting: list[tuple[np.ndarray, jax.Array]], found: np.ndarray) -> None:
        """Projects batches of gradients together, since making the random signs takes as long for one as for many."""
        if waiting:
            projected = np.asarray(self._project(jax.numpy.concatenate([gradients for _, gradients in waiting])))
            for i, (part, _) in enumerate(waiting):
                found[part] = projected[i * self._batch_size :][: len(part)]

    def _sequence(self, messages: Conversation) -> TokenSequence:
        ids, learned = render(messages, self._tokenizer)
        stop = self._row_length + 1
        return TokenSequence(np.array(ids[:stop], np.int32), np.array(learned[1:stop], np.float32))


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-30)
