"""Likelihood of single documents under a trained run: scores for choosing data."""

import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from slmjax.config import RunConfig
from slmjax.evaluate.likelihood import token_nll
from slmjax.evaluate.packed import PackedModel, TokenSequence


class DocumentScorer:
    """A checkpoint that scores texts.

    Attributes:
      identity: digest of the parameters, the tokenizer and the length of a row, on which alone a score depends.
    """

    def __init__(
        self, run_config: RunConfig, *, step: int | None = None, batch_size: int | None = None, mesh: Mesh | None = None
    ):
        """Loads a checkpoint; the arguments and errors are those of `PackedModel`."""
        self._model = PackedModel(run_config, step=step, batch_size=batch_size, mesh=mesh)
        self.identity = self._model.identity
        self._nll = self._model.compiled(token_nll)

    def score(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns loss (nats a token), bits_per_byte and tokens of every text, eos included in all.

        A text longer than a row is cut into windows that do not see each other. Windows are packed into rows, hidden
        from each other, so that a score does not depend on what else is scored, but for rounding.
        """
        tokenizer, length = self._model.tokenizer, self._model.row_length
        ids = [
            np.array([tokenizer.bos_id, *text_ids, tokenizer.eos_id], np.int32)
            for text_ids in tokenizer.encode_batch(list(texts))
        ]
        cuts = [(document, start) for document, each in enumerate(ids) for start in range(0, len(each) - 1, length)]
        windows = []
        for document, start in cuts:
            tokens = ids[document][start : start + length + 1]
            windows.append(TokenSequence(tokens, np.ones(len(tokens) - 1, np.float32)))
        nats = np.zeros(len(ids))
        for places, nll_BT in self._model.run(self._nll, windows):
            for place in places:
                nats[cuts[place.sequence][0]] += nll_BT[place.row, place.positions].sum(dtype=np.float64)
        tokens = np.array([len(each) - 1 for each in ids], np.int64)
        num_bytes = np.array([max(len(text.encode()), 1) for text in texts])
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / num_bytes, "tokens": tokens}
