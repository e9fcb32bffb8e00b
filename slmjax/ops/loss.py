"""Output projection and cross-entropy in one, so that the logits of a whole batch never exist.

Tokens are taken in chunks along T, all rows of a device at a time; each device sums over its own rows, and the gradient
of the table is summed over devices once. The gradient of a chunk's logits is formed while they are at hand, in the
forward pass: three matrix products a chunk, none recomputed. On a GPU the logits are written once and read twice; on
Hopper a kernel reads them once and writes their gradient in their place (`slmjax.kernels.hopper.cross_entropy`).

On two CPU cores, 8192 tokens, D 256, V 4096, float32, value and gradients: 0.23 s in chunks of 256 to 1024 tokens, as
long as the three products alone; 0.29 s in chunks of 4096, 0.33 s whole (larger chunks leave the cache); the reference
0.34 s.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.kernels import targets
from slmjax.ops.partition import over_batch


class LossSums(NamedTuple):
    """Sums over tokens, float32 scalars; divide by `weight` for means. Only `loss` can be differentiated.

    Attributes:
      loss: nll + z_loss * z.
      nll: sum of weight * negative log-likelihood, nats.
      z: sum of weight * logsumexp(logits)^2.
      weight: sum of the weights.
    """

    loss: jax.Array
    nll: jax.Array
    z: jax.Array
    weight: jax.Array


class _Options(NamedTuple):
    logit_scale: float
    logit_softcap: float | None
    z_loss: float
    chunk_tokens: int
    logits_dtype: jnp.dtype


def linear_cross_entropy(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_tokens: int = 4096,
    logits_dtype: jax.typing.DTypeLike = jnp.float32,
) -> LossSums:
    """Returns the loss of logits = softcap(logit_scale * hidden @ table.T) against the targets.

    z_loss is that of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5). Matrix products are in the dtype of
    `hidden_BTD`, accumulated in float32, as are all statistics and the gradient of the table.

    Args:
      hidden_BTD: after the final norm.
      table_VD: output table, in any float dtype; its gradient has the same.
      targets_BT: int ids; where the weight is 0 any valid id will do.
      weights_BT: weight of each token.
      logit_scale: factor of the logits.
      logit_softcap: c in c * tanh(logits / c), or None.
      z_loss: factor of the z term.
      chunk_tokens: tokens of a device whose logits exist at one time, rounded down to whole columns; 0 is all.
      logits_dtype: what logits are rounded to between the matrix products and the softmax.
    """
    options = _Options(logit_scale, logit_softcap, z_loss, chunk_tokens, jnp.dtype(logits_dtype))

    def own_rows(hidden_BTD, targets_BT, weights_BT, table_VD):
        return jax.tree.map(
            lambda total: total[None], _loss_sums(options, hidden_BTD, table_VD, targets_BT, weights_BT)
        )

    return jax.tree.map(jnp.sum, over_batch(own_rows, (hidden_BTD, targets_BT, weights_BT), (table_VD,)))


def linear_cross_entropy_reference(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
) -> LossSums:
    """The same, plainly: whole logits, differentiated by JAX."""
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", hidden_BTD, table_VD.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )
    logits_BTV = logit_scale * logits_BTV
    if logit_softcap is not None:
        logits_BTV = logit_softcap * jnp.tanh(logits_BTV / logit_softcap)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll, z = jnp.sum(weights_BT * (lse_BT - target_BT)), jnp.sum(weights_BT * jnp.square(lse_BT))
    return LossSums(nll + z_loss * z, *map(jax.lax.stop_gradient, (nll, z, jnp.sum(weights_BT))))


def token_losses(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int = 4096,
) -> jax.Array:
    """Returns the negative log-likelihood of each target in nats, float32 (B, T), for evaluation."""
    options = _Options(logit_scale, logit_softcap, 0.0, chunk_tokens, jnp.dtype(jnp.float32))
    table_VD = table_VD.astype(hidden_BTD.dtype)

    def chunk(_, piece):
        hidden_BtD, targets_Bt = piece
        lse_Bt, target_Bt, *_ = _statistics(options, _logits(options, hidden_BtD, table_VD), targets_Bt)
        return None, lse_Bt - target_Bt

    length = targets_BT.shape[1]
    _, nll_CBt = jax.lax.scan(chunk, None, _chunks(options, hidden_BTD, targets_BT))
    return _joined(nll_CBt)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(options: _Options, hidden_BTD, table_VD, targets_BT, weights_BT) -> LossSums:
    table_VD = table_VD.astype(hidden_BTD.dtype)

    def chunk(sums, piece):
        hidden_BtD, targets_Bt, weights_Bt = piece
        lse_Bt, target_Bt, *_ = _statistics(options, _logits(options, hidden_BtD, table_VD), targets_Bt)
        return _add(sums, lse_Bt, target_Bt, weights_Bt), None

    sums, _ = jax.lax.scan(chunk, _zeros(), _chunks(options, hidden_BTD, targets_BT, weights_BT))
    return _finish(options, sums)


def _forward(options: _Options, hidden_BTD, table_VD, targets_BT, weights_BT):
    table_dtype = table_VD.dtype
    table_VD = table_VD.astype(hidden_BTD.dtype)

    def chunk(carry, piece):
        sums, d_table_DV = carry
        hidden_BtD, targets_Bt, weights_Bt = piece
        logits_BtV = _logits(options, hidden_BtD, table_VD)
        lse_Bt, target_Bt, d_logits_BtV = _with_gradient(
            options, logits_BtV, targets_Bt, weights_Bt, dtype=hidden_BtD.dtype
        )
        d_hidden_BtD = jnp.einsum("BtV,VD->BtD", d_logits_BtV, table_VD)
        # Transposed, because XLA's CPU backend would otherwise transpose the large operand, d_logits.
        d_table_DV = d_table_DV + jnp.einsum(
            "BtD,BtV->DV", hidden_BtD, d_logits_BtV, preferred_element_type=jnp.float32
        )
        return (_add(sums, lse_Bt, target_Bt, weights_Bt), d_table_DV), d_hidden_BtD

    start = (_zeros(), jnp.zeros(table_VD.shape[::-1], jnp.float32))
    (sums, d_table_DV), d_hidden_CBtD = jax.lax.scan(chunk, start, _chunks(options, hidden_BTD, targets_BT, weights_BT))
    d_hidden_BTD = _joined(d_hidden_CBtD)[:, : hidden_BTD.shape[1]]
    return _finish(options, sums), (d_hidden_BTD, d_table_DV.T.astype(table_dtype))


def _backward(options: _Options, gradients, cotangent: LossSums):
    scaled = [(cotangent.loss * gradient).astype(gradient.dtype) for gradient in gradients]
    return *scaled, None, None


_loss_sums.defvjp(_forward, _backward)


def cross_entropy_reference(
    logits_XV: jax.Array,
    targets_X: jax.Array,
    weights_X: jax.Array,
    *,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `slmjax.kernels.hopper.cross_entropy` computes, by XLA."""
    options = _Options(logit_scale, None, z_loss, 0, logits_XV.dtype)
    return _with_gradient_by_xla(options, logits_XV, targets_X, weights_X, dtype=dtype)


def _logits(options: _Options, hidden_BtD, table_VD) -> jax.Array:
    return jnp.einsum("BtD,VD->BtV", hidden_BtD, table_VD, preferred_element_type=options.logits_dtype)


def _with_gradient(options: _Options, logits_BtV, targets_Bt, weights_Bt, *, dtype: jax.typing.DTypeLike):
    """Returns logsumexp, the target's logit, and the gradient of the logits as they came, in `dtype`."""
    if options.logit_softcap is None and targets.on_hopper():
        from slmjax.kernels.hopper import cross_entropy as kernel  # slow to import, and for this device alone

        logits_XV = logits_BtV.reshape(-1, logits_BtV.shape[-1])
        if kernel.why_not(logits_XV, logit_scale=options.logit_scale) is None:
            results = kernel.cross_entropy(
                logits_XV,
                targets_Bt.reshape(-1),
                weights_Bt.reshape(-1),
                logit_scale=options.logit_scale,
                z_loss=options.z_loss,
                dtype=dtype,
            )
            return tuple(x.reshape(*targets_Bt.shape, *x.shape[1:]) for x in results)
    return _with_gradient_by_xla(options, logits_BtV, targets_Bt, weights_Bt, dtype=dtype)


def _with_gradient_by_xla(options: _Options, logits_BtV, targets_Bt, weights_Bt, *, dtype: jax.typing.DTypeLike):
    lse_Bt, target_Bt, logits_BtV, slope_BtV = _statistics(options, logits_BtV, targets_Bt)
    # d nll / d logit = softmax - onehot; d lse^2 / d logit = 2 lse softmax.
    softmax_BtV = jnp.exp(logits_BtV - lse_Bt[..., None])
    onehot_BtV = jax.lax.broadcasted_iota(jnp.int32, logits_BtV.shape, logits_BtV.ndim - 1) == targets_Bt[..., None]
    factor_Bt = 1.0 + 2.0 * options.z_loss * lse_Bt
    d_logits_BtV = (softmax_BtV * factor_Bt[..., None] - onehot_BtV) * (weights_Bt * options.logit_scale)[..., None]
    if slope_BtV is not None:
        d_logits_BtV = d_logits_BtV * slope_BtV
    return lse_Bt, target_Bt, d_logits_BtV.astype(dtype)


def _statistics(options: _Options, logits_BtV, targets_Bt):
    """Returns logsumexp, the target's logit, the logits in float32 and the softcap's slope (None without one)."""
    logits_BtV = logits_BtV.astype(jnp.float32)
    if options.logit_scale != 1.0:
        logits_BtV = options.logit_scale * logits_BtV
    slope_BtV = None
    if options.logit_softcap is not None:
        ratio_BtV = jnp.tanh(logits_BtV / options.logit_softcap)
        logits_BtV, slope_BtV = options.logit_softcap * ratio_BtV, 1.0 - jnp.square(ratio_BtV)
    lse_Bt = jax.lax.platform_dependent(
        logits_BtV, cuda=_logsumexp_once, default=functools.partial(jax.nn.logsumexp, axis=-1)
    )
    target_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
    return lse_Bt, target_Bt, logits_BtV, slope_BtV


def _logsumexp_once(x_BtV: jax.Array) -> jax.Array:
    """Returns the logsumexp of the last dimension, maximum and sum in one reading (Milakov & Gimelshein 2018)."""

    def join(one, other):
        largest = jnp.maximum(one[0], other[0])
        return largest, one[1] * jnp.exp(one[0] - largest) + other[1] * jnp.exp(other[0] - largest)

    # The smallest finite number, not -inf, whose difference from itself is not a number.
    start = (jnp.finfo(x_BtV.dtype).min, jnp.zeros((), x_BtV.dtype))
    largest_Bt, sum_Bt = jax.lax.reduce((x_BtV, jnp.ones_like(x_BtV)), start, join, (x_BtV.ndim - 1,))
    return largest_Bt + jnp.log(sum_Bt)


def _chunks(options: _Options, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Splits each (B, T, ...) into (C, B, t, ...), padding T with zeros (weight 0)."""
    rows, length = arrays[0].shape[:2]
    width = length if options.chunk_tokens == 0 else min(length, max(1, options.chunk_tokens // rows))
    count = -(-length // width)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * width - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    return tuple(map(split, arrays))


def _joined(x_CBt: jax.Array) -> jax.Array:
    """Undoes `_chunks` but for the padding."""
    x_BCt = jnp.moveaxis(x_CBt, 0, 1)
    return x_BCt.reshape(x_BCt.shape[0], -1, *x_BCt.shape[3:])


def _zeros() -> tuple[jax.Array, ...]:
    return (jnp.zeros((), jnp.float32),) * 3


def _add(sums, lse_Bt, target_Bt, weights_Bt):
    nll, z, weight = sums
    weights_Bt = weights_Bt.astype(jnp.float32)
    return (
        nll + jnp.sum(weights_Bt * (lse_Bt - target_Bt)),
        z + jnp.sum(weights_Bt * jnp.square(lse_Bt)),
        weight + jnp.sum(weights_Bt),
    )


def _finish(options: _Options, sums) -> LossSums:
    nll, z, weight = sums
    return LossSums(nll + options.z_loss * z, nll, z, weight)
