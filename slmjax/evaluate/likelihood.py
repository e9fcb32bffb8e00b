"""Loss, perplexity and bits per byte of held-out token stores."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax import model
from slmjax.config import EvalSetConfig, ExecutionConfig, ModelConfig, RunConfig
from slmjax.data.batch import Batch
from slmjax.data.loader import eval_batches, eval_bytes
from slmjax.ops.loss import token_losses
from slmjax.parallel.mesh import on_mesh
from slmjax.parallel.rules import constrain, host_batch_to_global, process_rows


class EvalResult(NamedTuple):
    """Scores of one set.

    Attributes:
      loss: mean negative log-likelihood of a learned token, nats; the eos of each document is one.
      perplexity: exp(loss).
      bits_per_byte: negative log-likelihood of all learned tokens, eos included, in bits, over the UTF-8 bytes of the
        learned text; does not depend on the tokenizer's vocabulary as the others do.
      tokens: learned tokens.
      bytes: of the learned text.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate_set(
    params: model.Params,
    config: ModelConfig,
    eval_set: EvalSetConfig,
    *,
    execution: ExecutionConfig,
    batch_size: int,
    sequence_length: int,
    document_isolation: bool = True,
    mesh: Mesh | None = None,
    tokenizer_sha256: str | None = None,
) -> EvalResult:
    """Scores `eval_set`. Sums and counts are added up in float64, so the result does not depend on the batches.

    Args:
      params: on one device, or on the devices of `mesh`.
      config: the model.
      eval_set: what to score; with a stride, rows overlap and each token is scored in one of them.
      execution: how to run the model.
      batch_size: rows at one time, rounded up to a multiple of the devices.
      sequence_length: tokens in a row.
      document_isolation: whether packed documents are hidden from each other.
      mesh: devices to spread rows over, on all processes; None is one device.
      tokenizer_sha256: of the tokenizer that the store must have been written with; None does not check.

    Raises:
      ValueError: the store is damaged, or of another tokenizer, or has no token to score.
    """
    batch_size = -(-batch_size // mesh.size) * mesh.size if mesh is not None else batch_size
    batches = eval_batches(
        eval_set,
        batch_size=batch_size,
        sequence_length=sequence_length,
        document_isolation=document_isolation,
        local_rows=None if mesh is None else process_rows(batch_size, mesh),
        tokenizer_sha256=tokenizer_sha256,
    )
    sums_of_rows = _compiled(config, execution, mesh)
    total = np.zeros(2, np.float64)
    pending = None
    for batch in batches:
        sums = sums_of_rows(params, batch if mesh is None else host_batch_to_global(batch, mesh))
        if pending is not None:  # read one batch late, so that the device is never idle
            total += _add_rows(pending)
        pending = sums
    total += 0 if pending is None else _add_rows(pending)
    nll, tokens = total.tolist()
    num_bytes = eval_bytes(eval_set, sequence_length=sequence_length)
    if tokens == 0 or num_bytes == 0:
        raise ValueError(
            f"evaluation set {eval_set.name!r} ({eval_set.source.path}) has no token to score at sequence_length "
            f"{sequence_length}"
        )
    loss = nll / tokens
    return EvalResult(
        loss=loss,
        perplexity=math.inf if loss > 700 else math.exp(loss),
        bits_per_byte=nll / math.log(2) / num_bytes,
        tokens=int(tokens),
        bytes=num_bytes,
    )


def evaluate_all(
    params: model.Params, run_config: RunConfig, *, mesh: Mesh | None = None, tokenizer_sha256: str | None = None
) -> dict[str, float]:
    """Returns <name>/loss, <name>/perplexity and <name>/bits_per_byte of every evaluation set of the run."""
    metrics = {}
    for eval_set in run_config.evaluation.sets:
        result = evaluate_set(
            params,
            run_config.model,
            eval_set,
            execution=run_config.execution,
            batch_size=run_config.evaluation.batch_size,
            sequence_length=run_config.input.sequence_length,
            document_isolation=run_config.input.document_isolation,
            mesh=mesh,
            tokenizer_sha256=tokenizer_sha256,
        )
        for score in ("loss", "perplexity", "bits_per_byte"):
            metrics[f"{eval_set.name}/{score}"] = getattr(result, score)
    return metrics


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig, execution: ExecutionConfig, mesh: Mesh | None) -> Callable:
    """One program for all sets and all evaluations of a run."""

    def sums_of_rows(params: model.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        nll_BT = token_nll(params, batch, config=config, execution=execution, mesh=mesh)
        return jnp.sum(nll_BT, axis=1), jnp.sum(batch.weights, axis=1)

    if mesh is None:
        return jax.jit(sums_of_rows)
    # Every process reads the sums of all rows.
    return jax.jit(on_mesh(mesh, sums_of_rows), out_shardings=NamedSharding(mesh, PartitionSpec()))


def forward(
    params: model.Params, batch: Batch, *, config: ModelConfig, execution: ExecutionConfig, mesh: Mesh | None
) -> model.Output:
    """Returns what the model makes of a batch; with a mesh, activations lie on it by the rules."""
    return model.apply(
        params,
        config,
        batch.tokens,
        documents_BT=batch.documents,
        positions_BT=batch.positions,
        execution=execution,
        constrain=(lambda x, logical_axes: x) if mesh is None else constrain(mesh),
    )


def token_nll(
    params: model.Params, batch: Batch, *, config: ModelConfig, execution: ExecutionConfig, mesh: Mesh | None
) -> jax.Array:
    """Returns the negative log-likelihood of every target times its weight, nats, float32 (B, T)."""
    output = forward(params, batch, config=config, execution=execution, mesh=mesh)
    nll_BT = token_losses(
        output.hidden_BTD,
        model.table(params),
        batch.targets,
        logit_scale=config.logit_scale,
        logit_softcap=config.logit_softcap,
        chunk_tokens=execution.loss_chunk_tokens,
    )
    # where, not a product: whatever a position that is not scored gives, it must not count.
    return jnp.where(batch.weights > 0, batch.weights * nll_BT, 0.0)


def _add_rows(sums: tuple[jax.Array, jax.Array]) -> np.ndarray:
    return np.array([np.asarray(rows_B, np.float64).sum() for rows_B in sums])
