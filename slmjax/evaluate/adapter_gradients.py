"""Gradients of single examples with respect to fresh low-rank adapters, from those with respect to the weights.

An adapter makes W + A B of a projection W (Hu et al. 2021, arXiv:2106.09685). As it starts, A is random and B zero: the
model is that of the checkpoint, the gradient of A is zero and that of B is A^T dL/dW. So no model code changes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import model
from slmjax.config import AdamWConfig, ExecutionConfig, InfluenceConfig, ModelConfig
from slmjax.data.batch import Batch
from slmjax.ops.partition import over_examples
from slmjax.train.restore import AdamMoments

Weights = dict[str, jax.Array]  # by path, such as "group_0/layer_0/mixer/w_q_DNH"

_BLOCK = 4096  # features that are projected at one time


def select_projections(params: model.Params, projections: Sequence[str]) -> Weights:
    """The weights whose names begin with those given.

    Raises:
      ValueError: one of these fits no weight, or a weight is no matrix.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    names = {path: path.rpartition("/")[2] for path in leaves}
    for projection in projections:
        if not any(_fits(name, projection) for name in names.values()):
            known = sorted({name for name in names.values() if name.startswith("w_")})
            raise ValueError(f"projections: the model has no weight {projection!r}; its matrices are {known}")
    chosen = {path: leaf for path, leaf in leaves.items() if any(_fits(names[path], each) for each in projections)}
    for path in chosen:
        if not names[path].startswith("w_"):
            raise ValueError(f"projections: {path} is no matrix between features, and has no adapter")
    return chosen


def _fits(name: str, projection: str) -> bool:
    return name == projection or name.startswith(f"{projection}_")


def matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A weight as (how many matrices, inputs, outputs): layers and experts are matrices of their own.

    The letters at the end of the name say which dimensions are inputs: D is the model's width, all others are on the
    other side of it.
    """
    letters = path.rpartition("_")[2]
    stacked = len(shape) - len(letters) + letters.startswith("E")
    sides, inner = shape[stacked:], letters.removeprefix("E")
    inputs = 1 if inner.startswith("D") else len(inner) - 1
    return int(np.prod(shape[:stacked])), int(np.prod(sides[:inputs])), int(np.prod(sides[inputs:]))


def first_factors(weights: Weights, config: InfluenceConfig) -> Weights:
    """A of every adapter, (matrices, inputs, rank): normal with variance 1 / rank, which keeps lengths on average."""
    factors = {}
    for number, (path, leaf) in enumerate(sorted(weights.items())):
        count, inputs, _ = matrix_shape(path, leaf.shape)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        factors[path] = jax.random.normal(key, (count, inputs, config.rank)) / np.sqrt(config.rank)
    return factors


def num_features(weights: Weights, config: InfluenceConfig) -> int:
    """Numbers in the second factors of all adapters."""
    shapes = [matrix_shape(path, leaf.shape) for path, leaf in weights.items()]
    return sum(count * config.rank * outputs for count, _, outputs in shapes)


def example_loss(params: model.Params, batch: Batch, *, config: ModelConfig, execution: ExecutionConfig) -> jax.Array:
    """Mean negative log-likelihood of the learned tokens of one example; the fields of `batch` are (T,)."""
    output = model.apply(
        params,
        config,
        batch.tokens[None],
        documents_BT=batch.documents[None],
        positions_BT=batch.positions[None],
        execution=execution,
    )
    logits_TV = model.logits(params, config, output.hidden_BTD)[0]
    nll_T = -jnp.take_along_axis(jax.nn.log_softmax(logits_TV), batch.targets[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(batch.weights > 0, batch.weights * nll_T, 0.0)) / jnp.maximum(jnp.sum(batch.weights), 1.0)


def adapter_gradients(
    params: model.Params,
    factors: Weights,
    moments: AdamMoments | None,
    batch: Batch,
    *,
    config: ModelConfig,
    execution: ExecutionConfig,
    optimizer: AdamWConfig,
) -> jax.Array:
    """Returns for every row of `batch`, one example each, A^T G of all projections as one vector (B, P), float32.

    G is the gradient of the example's loss or, with moments, the update that Adam would make of it, but for the
    learning rate.
    """
    # Our kernels are not made for one example at a time, nor are 8-bit products worth their rounding.
    plain = dataclasses.replace(execution, attention="chunked", products="compute_dtype", remat="none")

    def one(example: Batch) -> jax.Array:
        def loss(chosen: Weights) -> jax.Array:
            return example_loss(_with(params, chosen), example, config=config, execution=plain)

        gradients = jax.grad(loss)({path: _at(params, path) for path in factors})
        if moments is not None:
            gradients = adam_updates(gradients, moments, optimizer)
        pieces = []
        for path in sorted(factors):
            matrices = gradients[path].reshape(matrix_shape(path, gradients[path].shape))
            pieces.append(jnp.einsum("lio,lir->lro", matrices, factors[path], precision=jax.lax.Precision.HIGHEST))
        return jnp.concatenate([piece.reshape(-1) for piece in pieces])

    return over_examples(one, batch)


def adam_updates(gradients: Weights, moments: AdamMoments, optimizer: AdamWConfig) -> Weights:
    """The next update of Adam, were each gradient that of the next step."""
    b1, b2, steps = optimizer.b1, optimizer.b2, moments.count + 1

    def update(path: str) -> jax.Array:
        gradient = gradients[path]
        mean = (b1 * moments.mean[path] + (1 - b1) * gradient) / (1 - b1**steps)
        square = (b2 * moments.square[path] + (1 - b2) * gradient**2) / (1 - b2**steps)
        return mean / (jnp.sqrt(square) + optimizer.eps)

    return {path: update(path) for path in gradients}


def project(features_BP: jax.Array, *, dimensions: int, seed: int) -> jax.Array:
    """Returns features (B, P) times a matrix of random signs over sqrt(K), (B, K).

    The matrix is made a block of rows at a time from the seed and the number of the block, so that it is never whole.
    """
    padded = -features_BP.shape[1] % _BLOCK
    blocks = jnp.pad(features_BP, ((0, 0), (0, padded))).reshape(len(features_BP), -1, _BLOCK).swapaxes(0, 1)
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)  # of none of the adapters

    def add(total_BK, numbered):
        number, block_BP = numbered
        signs_PK = jax.random.rademacher(jax.random.fold_in(key, number), (_BLOCK, dimensions), jnp.float32)
        return total_BK + jnp.matmul(block_BP, signs_PK, precision=jax.lax.Precision.HIGHEST), None

    start = jnp.zeros((len(features_BP), dimensions))
    total_BK, _ = jax.lax.scan(add, start, (jnp.arange(len(blocks)), blocks))
    return total_BK / np.sqrt(dimensions)


def _at(tree: Any, path: str) -> jax.Array:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _with(params: model.Params, chosen: Weights) -> model.Params:
    """The parameters with others in some places."""

    def one(path, leaf):
        return chosen.get(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(one, params)
