"""The feed-forward of a mixture of experts, once it is known which tokens go to which.

On paper, of the bytes that a layer moves beside its products, most are rows of width D, one for each of the k experts
of a token (A = X * k of them). So a row is gathered straight from the tokens (order // k), never repeated first; a
token's weight is applied to its F hidden numbers before the last product, so that neither the weighting nor its
gradient touches D-wide rows; and the backward pass gathers the rows again instead of keeping them. It keeps the order
of the assignments and the hidden products, A rows of F (2 F if gated), both named "experts" for remat policies.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from slmjax.config import Activation
from slmjax.ops.activation import activate
from slmjax.ops.grouped_matmul import Implementation, grouped_matmul, transposed_grouped_matmul
from slmjax.ops.partition import over_batch


class Order(NamedTuple):
    """Assignments, which are pairs of a token and one of its k experts, sorted by expert.

    Attributes:
      assignment_A: the sorted assignments; a token's are numbered token * k + its choice.
      place_XK: where each is among the sorted.
      group_sizes_E: assignments to each expert.
    """

    assignment_A: jax.Array
    place_XK: jax.Array
    group_sizes_E: jax.Array


def moe_feed_forward(
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    *,
    w_up_EDF: jax.Array,
    w_gate_EDF: jax.Array | None,
    w_down_EFD: jax.Array,
    activation: Activation,
    implementation: Implementation | Literal["auto"] = "auto",
) -> jax.Array:
    """Returns sum over k of weights[x, k] * expert ids[x, k] of x; no token is dropped (MegaBlocks, arXiv:2211.15841).

    Each device sorts and multiplies its own tokens, with all experts' weights (`ops.partition`).
    """
    w_in = (w_up_EDF,) if w_gate_EDF is None else (w_gate_EDF, w_up_EDF)

    def feed_forward(x_XD, ids_XK, weights_XK, w_in, w_down_EFD):
        order = _named(sort_by_expert(ids_XK, num_experts=w_down_EFD.shape[0]))
        return _feed_forward(activation, implementation, x_XD, weights_XK, w_in, w_down_EFD, order)

    return over_batch(feed_forward, (x_XD, ids_XK, weights_XK), (w_in, w_down_EFD))


def sort_by_expert(ids_XK: jax.Array, *, num_experts: int) -> Order:
    """Sorts assignments by expert; those of one expert stay in the order of tokens."""
    expert_A = ids_XK.reshape(-1)
    assignment_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    place_A = (
        jnp.zeros_like(assignment_A)
        .at[assignment_A]
        .set(jnp.arange(expert_A.shape[0], dtype=jnp.int32), unique_indices=True)
    )
    # Not bincount, a scatter whose additions meet: A * E comparisons, which XLA never stores, are less work.
    group_sizes_E = jnp.sum(expert_A[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)
    return Order(assignment_A, place_A.reshape(ids_XK.shape), group_sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _feed_forward(activation, implementation, x_XD, weights_XK, w_in, w_down_EFD, order: Order) -> jax.Array:
    return _forward(activation, implementation, x_XD, weights_XK, w_in, w_down_EFD, order)[0]


def _forward(activation, implementation, x_XD, weights_XK, w_in, w_down_EFD, order):
    sizes_E, k = order.group_sizes_E, weights_XK.shape[1]
    product = functools.partial(grouped_matmul, implementation=implementation)
    x_AD = _take(x_XD, jax.lax.div(order.assignment_A, k))
    # Gate and up as one product read x once and give it one gradient, for a copy of the weights. That does not pay for
    # few rows, as in decoding.
    E, F = w_down_EFD.shape[:2]
    joined = [jnp.concatenate(w_in, axis=-1)] if x_AD.shape[0] >= E * F else w_in
    products = [product(x_AD, w_EDF, sizes_E) for w_EDF in joined]
    in_AG = _named(jnp.concatenate(products, axis=-1))
    h_AF = _hidden(
        in_AG, _take(weights_XK.reshape(-1), order.assignment_A), activation=activation, gated=len(w_in) == 2
    )
    y_AD = product(h_AF, w_down_EFD, sizes_E)
    return _sum_of_choices(y_AD, order.place_XK), (x_XD, weights_XK, in_AG, w_in, w_down_EFD, order)


def _backward(activation, implementation, saved, dy_XD):
    # Without the barrier XLA finds that the forward pass computed the same, and keeps that.
    *arrays, order = saved
    (x_XD, weights_XK, in_AG, w_in, w_down_EFD), dy_XD = jax.lax.optimization_barrier((arrays, dy_XD))
    sizes_E, token_A = order.group_sizes_E, jax.lax.div(order.assignment_A, weights_XK.shape[1])
    of_rows = functools.partial(grouped_matmul, transposed=True, implementation=implementation)
    of_matrices = functools.partial(transposed_grouped_matmul, implementation=implementation)
    weight_A = _take(weights_XK.reshape(-1), order.assignment_A)
    hidden = functools.partial(_hidden, activation=activation, gated=len(w_in) == 2)
    h_AF, pull_back = jax.vjp(hidden, in_AG, weight_A)
    dy_AD = _take(dy_XD, token_A)
    dw_down_EFD = of_matrices(h_AF, dy_AD, sizes_E)
    din_AG, dweight_A = pull_back(of_rows(dy_AD, w_down_EFD, sizes_E))
    dw_in_EDG = of_matrices(_take(x_XD, token_A), din_AG, sizes_E)
    dx_AD = of_rows(din_AG, jnp.concatenate(w_in, axis=-1), sizes_E)
    dw_in = tuple(jnp.split(dw_in_EDG.astype(w_in[0].dtype), len(w_in), axis=-1))
    dx_XD, dweights_XK = _sum_of_choices(dx_AD, order.place_XK), _take(dweight_A, order.place_XK)
    return dx_XD, dweights_XK, dw_in, dw_down_EFD.astype(w_down_EFD.dtype), None


_feed_forward.defvjp(_forward, _backward)


def _hidden(in_AG, weight_A, *, activation: Activation, gated: bool):
    """The hidden numbers of each assignment times its weight: in float32 until they are stored."""
    parts = jnp.split(in_AG.astype(jnp.float32), 2 if gated else 1, axis=-1)
    h_AF = activate(activation, parts[0]) * (parts[1] if gated else 1.0)
    return (h_AF * weight_A.astype(jnp.float32)[:, None]).astype(in_AG.dtype)


def _sum_of_choices(y_AD, place_XK):
    """Sums a token's k rows: a gather, where a scatter would add them up in any order."""
    choices = (_take(y_AD, place_XK[:, k]).astype(jnp.float32) for k in range(place_XK.shape[1]))
    return functools.reduce(jnp.add, choices).astype(y_AD.dtype)


def _named(tree):
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, "experts"), tree)


def _take(x, index):
    return x.at[index].get(mode="promise_in_bounds")
