"""A gated feed-forward behind an RMS norm: on Hopper with kernels that compute the activation within its products.

The first product writes its result and the hidden numbers at once, and the product that brings the gradient of the
hidden numbers writes that of the first product's result: what is F wide is neither read for the activation nor written
for its gradient. Elsewhere, and for what the kernels are not built for, it is the two calls of `ops.linear` for which
they stand.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from slmjax.config import Activation
from slmjax.kernels import targets
from slmjax.ops.linear import Products, few_tokens, multiply_with_gain_backward, project, project_activated, with_gain
from slmjax.ops.norm import PendingNorm
from slmjax.ops.partition import devices_of_batch, over_batch

# Wider models gain nothing: their products take longer than what is read and written beside them. One H200, forward and
# gradient, XLA's / ours: width 576 0.48 / 0.42 and 0.42 / 0.32 ms, 1024 0.73 / 0.67 and 0.53 / 0.48, 2048 3.50 / 3.54
# and 2.08 / 2.28.
_WIDEST = 1024

_logger = logging.getLogger("slmjax.gated")


def gated_feed_forward(
    x: jax.Array | PendingNorm,
    w_gate_DF: jax.Array,
    w_up_DF: jax.Array,
    w_down_FD: jax.Array,
    *,
    activation: Activation,
    recompute: bool = False,
    products: Products = "compute_dtype",
) -> jax.Array:
    """Returns (activation(x @ w_gate) * (x @ w_up)) @ w_down for x (B, T, D), of which a norm may be pending.

    With `recompute`, the hidden numbers are not kept for the backward pass but computed again there.
    """
    if targets.on_hopper():
        reason = _why_not_fused(x, w_gate_DF, activation=activation, products=products)
        _log_once(reason)
        if reason is None and isinstance(x, PendingNorm):
            w_DG = jnp.concatenate([w_gate_DF, w_up_DF], axis=1)
            hidden: tuple[jax.Array, jax.Array] = _hidden_with_gain(x.x_D, x.gain_D, x.factor_D1, w_DG)
            return _multiply_hidden(recompute, hidden[0], x.factor_D1, hidden[1], w_down_FD)
    wide = project(x, [w_gate_DF, w_up_DF], products=products)
    return project_activated(wide, w_down_FD, activation=activation, gated=True, recompute=recompute, products=products)


def _why_not_fused(
    x: jax.Array | PendingNorm, w_DF: jax.Array, *, activation: Activation, products: Products
) -> str | None:
    if activation != "silu":
        return f"is built for silu, not {activation}"
    if products != "compute_dtype":
        return f"has no {products} products"
    if not isinstance(x, PendingNorm):
        return "is built for an RMS norm before it"
    if few_tokens(x.x_D):
        return "gains nothing for few tokens"
    if x.x_D.shape[-1] > _WIDEST:
        return f"gains nothing for models wider than {_WIDEST}"
    from slmjax.kernels.hopper.ring import why_not  # Pallas is slow to import, and of use here only

    B, T, D = x.x_D.shape
    return why_not(jax.ShapeDtypeStruct((B // devices_of_batch() * T, D), x.x_D.dtype), w_DF)


@functools.cache
def _log_once(reason: str | None) -> None:
    _logger.info("gated feed-forward: %s", "fused" if reason is None else f"not fused: the kernel {reason}")


@jax.custom_vjp
def _hidden_with_gain(
    x_BTD: jax.Array, gain_D: jax.Array | None, factor_BT1: jax.Array, w_DG: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns x @ (gain * w), and the hidden numbers of its product with the factor.

    Only the first has a gradient: whoever reads the second puts its own into it.
    """
    return _hidden_with_gain_forward(x_BTD, gain_D, factor_BT1, w_DG)[0]


def _hidden_with_gain_forward(x_BTD, gain_D, factor_BT1, w_DG):
    scaled_DG = with_gain(gain_D, w_DG)

    def kernel(x_BTD, factor_BT1, scaled_DG):
        from slmjax.kernels.hopper.gated_matmul import gated_matmul

        outputs = gated_matmul(x_BTD.reshape(-1, x_BTD.shape[-1]), scaled_DG, factor_BT1.reshape(-1))
        return tuple(y.reshape(*x_BTD.shape[:2], y.shape[-1]) for y in outputs)

    outputs = over_batch(kernel, (x_BTD, factor_BT1), (scaled_DG,))
    return outputs, (x_BTD, gain_D, factor_BT1, w_DG, scaled_DG)


def _hidden_with_gain_backward(saved, cotangents):
    x_BTD, gain_D, factor_BT1, w_DG, scaled_DG = saved
    dx_BTD, dgain_D, dw_DG = multiply_with_gain_backward((x_BTD, gain_D, w_DG, scaled_DG), cotangents[0])
    return dx_BTD, dgain_D, jnp.zeros_like(factor_BT1), dw_DG


_hidden_with_gain.defvjp(_hidden_with_gain_forward, _hidden_with_gain_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_hidden(
    recompute: bool, in_BTG: jax.Array, factor_BT1: jax.Array, h_BTF: jax.Array, w_FD: jax.Array
) -> jax.Array:
    """Returns h @ w; its gradient goes to what h was computed from, `in_BTG`."""
    return h_BTF @ w_FD


def _multiply_hidden_forward(recompute: bool, in_BTG, factor_BT1, h_BTF, w_FD):
    return h_BTF @ w_FD, (in_BTG, factor_BT1, None if recompute else h_BTF, w_FD)


def _multiply_hidden_backward(recompute: bool, saved, dy_BTD):
    in_BTG, factor_BT1, h_BTF, w_FD = saved

    def kernel(dy_BTD, in_BTG, factor_BT1, w_FD):
        from slmjax.kernels.hopper.gated_matmul_gradient import gated_matmul_gradient

        rows = [x.reshape(-1, x.shape[-1]) for x in (dy_BTD, in_BTG)]
        outputs = gated_matmul_gradient(rows[0], w_FD, rows[1], factor_BT1.reshape(-1), with_hidden=recompute)
        return jax.tree.map(lambda y: y.reshape(*dy_BTD.shape[:2], y.shape[-1]), outputs)

    outputs = over_batch(kernel, (dy_BTD, in_BTG, factor_BT1), (w_FD,))
    din_BTG, h_BTF = outputs if recompute else (outputs, h_BTF)
    dw_FD = jnp.einsum("BTF,BTD->FD", h_BTF, dy_BTD)
    return din_BTG, jnp.zeros_like(factor_BT1), jnp.zeros_like(h_BTF), dw_FD


_multiply_hidden.defvjp(_multiply_hidden_forward, _multiply_hidden_backward)
