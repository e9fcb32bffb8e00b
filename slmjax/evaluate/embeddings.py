"""Documents as vectors under a trained run: the mean of the last hidden states."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from slmjax import model
from slmjax.config import ExecutionConfig, ModelConfig, RunConfig
from slmjax.data.batch import Batch
from slmjax.evaluate.likelihood import forward
from slmjax.evaluate.packed import PackedModel, TokenSequence

_DOCUMENTS = 32  # in a row at most


class Embedder:
    """A checkpoint that embeds texts.

    Attributes:
      identity: of all that the vectors depend on besides the texts.
    """

    def __init__(
        self, run_config: RunConfig, *, step: int | None = None, batch_size: int | None = None, mesh: Mesh | None = None
    ):
        """Loads a checkpoint; the arguments and errors are those of `PackedModel`."""
        self._model = PackedModel(run_config, step=step, batch_size=batch_size, mesh=mesh)
        self.identity = f"embedding {self._model.identity}"
        self._width = run_config.model.width
        self._sums = self._model.compiled(document_sums)

    def score(self, texts: Sequence[str]) -> dict[str, pa.Array]:
        """Returns embedding, a list of fixed size: the mean hidden state after the final norm, bos included.

        Of a text longer than a row it is the mean over windows that do not see each other.
        """
        tokenizer, length = self._model.tokenizer, self._model.row_length
        windows, owners = [], []
        counts = np.zeros(len(texts))
        for number, ids in enumerate(tokenizer.encode_batch(list(texts))):
            # The end is no input, but a target; here nothing is predicted.
            tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32)
            counts[number] = len(tokens) - 1
            for start in range(0, len(tokens) - 1, length):
                window = tokens[start : start + length + 1]
                windows.append(TokenSequence(window, np.ones(len(window) - 1, np.float32)))
                owners.append(number)
        sums = np.zeros((len(texts), self._width))
        for places, sums_BMD in self._model.run(self._sums, windows, max_per_row=_DOCUMENTS):
            for place in places:
                sums[owners[place.sequence]] += sums_BMD[place.row, place.document - 1]
        means = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        return {"embedding": pa.FixedSizeListArray.from_arrays(pa.array(means.reshape(-1)), self._width)}


def document_sums(
    params: model.Params, batch: Batch, *, config: ModelConfig, execution: ExecutionConfig, mesh: Mesh | None
) -> jax.Array:
    """Returns the sums of the hidden states of the documents 1 to 32 of each row, float32 (B, M, D)."""
    output = forward(params, batch, config=config, execution=execution, mesh=mesh)
    of_document_BTM = batch.documents[:, :, None] == jnp.arange(1, _DOCUMENTS + 1)[None, None]
    hidden_BTD = output.hidden_BTD.astype(jnp.float32)
    return jnp.einsum(
        "BTM,BTD->BMD", of_document_BTM.astype(jnp.float32), hidden_BTD, precision=jax.lax.Precision.HIGHEST
    )
