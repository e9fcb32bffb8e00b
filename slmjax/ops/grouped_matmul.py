"""Matrix products of groups of rows, each with a matrix of its own, and the mixture-of-experts feed-forward on them."""

import jax
import jax.numpy as jnp

from slmjax.config import Activation
from slmjax.ops.activation import activate

_BLOCK_ROWS = 64


def grouped_matmul(x_XD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Multiplies the first group_sizes[0] rows with w[0], the next group_sizes[1] with w[1], and so on; out (X, F).

    Rows after the last group give zeros.
    """
    # For ragged_dot, XLA's CPU backend multiplies every row with every matrix. Two cores, 4096 x 256 rows, 256 x 256
    # matrices, float32, forward + backward: 123 ms with 8 groups and 490 with 32; in blocks 18 and 22; one dense
    # product 12. Blocks of 32 to 128 rows are level.
    if jax.default_backend() == "cpu":
        return grouped_matmul_by_blocks(x_XD, w_EDF, group_sizes_E)
    return jax.lax.ragged_dot(x_XD, w_EDF, group_sizes_E)


def grouped_matmul_reference(x_XD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The same, plainly: every row with every matrix, and the right one kept."""
    ends_E = jnp.cumsum(group_sizes_E)
    expert_X = jnp.sum(jnp.arange(x_XD.shape[0])[:, None] >= ends_E[None], axis=1)
    keep_XE = jax.nn.one_hot(expert_X, w_EDF.shape[0], dtype=x_XD.dtype)
    return jnp.einsum("XD,EDF,XE->XF", x_XD, w_EDF, keep_XE)


@jax.custom_vjp
def grouped_matmul_by_blocks(x_XD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """The same in a loop over blocks of rows, each met by every group that has rows in it.

    At most X / block + E products of a block; the order is that of MegaBlocks' kernels (arXiv:2211.15841).
    """
    return _multiply(x_XD, w_EDF, group_sizes_E, "RD,DF->RF", width=w_EDF.shape[2])


def _forward(x_XD, w_EDF, group_sizes_E):
    return grouped_matmul_by_blocks(x_XD, w_EDF, group_sizes_E), (x_XD, w_EDF, group_sizes_E)


def _backward(saved, dout_XF):
    x_XD, w_EDF, group_sizes_E = saved
    dx_XD = _multiply(dout_XF, w_EDF, group_sizes_E, "RF,DF->RD", width=w_EDF.shape[1])

    def visit(dw_EDF, expert, first_row, keep_R1):
        x_RD = jnp.where(keep_R1, _rows(x_XD, first_row, keep_R1), 0.0)
        return dw_EDF.at[expert].add(_dot("RD,RF->DF", x_RD, _rows(dout_XF, first_row, keep_R1)))

    dw_EDF = _over_visits(visit, jnp.zeros(w_EDF.shape, jnp.float32), x_XD.shape[0], group_sizes_E)
    return dx_XD, dw_EDF.astype(w_EDF.dtype), None


grouped_matmul_by_blocks.defvjp(_forward, _backward)


def _multiply(x_X, w_E, group_sizes_E, equation, *, width):
    def visit(out_X, expert, first_row, keep_R1):
        product_R = _dot(equation, _rows(x_X, first_row, keep_R1), w_E[expert]).astype(out_X.dtype)
        merged_R = jnp.where(keep_R1, product_R, _rows(out_X, first_row, keep_R1))
        return jax.lax.dynamic_update_slice_in_dim(out_X, merged_R, first_row, axis=0)

    return _over_visits(visit, jnp.zeros((x_X.shape[0], width), x_X.dtype), x_X.shape[0], group_sizes_E)


def _over_visits(visit, out, num_rows, group_sizes_E):
    """Folds visit(out, expert, first_row, keep_R1) over each pair of a block of R rows and a group with rows in it.

    `keep_R1` says which of the block's rows are the group's. The last block is moved back to end with the last row.
    """
    R = min(_BLOCK_ROWS, num_rows)
    end_E = jnp.cumsum(group_sizes_E)
    start_E = end_E - group_sizes_E
    blocks_E = jnp.where(group_sizes_E > 0, -(-end_E // R) - start_E // R, 0)
    last_visit_E = jnp.cumsum(blocks_E)

    def body(i, out):
        expert = jnp.sum(last_visit_E <= i)
        block_row = (start_E[expert] // R + i - (last_visit_E[expert] - blocks_E[expert])) * R
        first_row = jnp.minimum(block_row, num_rows - R)
        row_R = first_row + jnp.arange(R)
        keep_R = (row_R >= jnp.maximum(block_row, start_E[expert])) & (row_R < end_E[expert])
        return visit(out, expert, first_row, keep_R[:, None])

    return jax.lax.fori_loop(0, last_visit_E[-1], body, out)


def _rows(x_X, first_row, keep_R1):
    return jax.lax.dynamic_slice_in_dim(x_X, first_row, keep_R1.shape[0])


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def moe_feed_forward(
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    *,
    w_up_EDF: jax.Array,
    w_gate_EDF: jax.Array | None,
    w_down_EFD: jax.Array,
    activation: Activation,
) -> jax.Array:
    """Returns sum over k of weights[x, k] * expert ids[x, k] of x; no token is dropped (MegaBlocks, arXiv:2211.15841).

    Assignments are sorted by expert, so that each expert's rows lie together, and put back in order afterwards.
    """
    num_experts, k = w_up_EDF.shape[0], ids_XK.shape[1]
    expert_A = ids_XK.reshape(-1)
    order_A = jnp.argsort(expert_A, stable=True)
    place_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(order_A.shape[0]), unique_indices=True)
    group_sizes_E = jnp.bincount(expert_A, length=num_experts).astype(jnp.int32)
    x_AD = _permute(jnp.repeat(x_XD, k, axis=0), order_A, place_A)
    up_AF = grouped_matmul(x_AD, w_up_EDF, group_sizes_E)
    if w_gate_EDF is None:
        h_AF = activate(activation, up_AF)
    else:
        h_AF = activate(activation, grouped_matmul(x_AD, w_gate_EDF, group_sizes_E)) * up_AF
    y_AD = _permute(grouped_matmul(h_AF, w_down_EFD, group_sizes_E), place_A, order_A)
    return jnp.einsum("XKD,XK->XD", y_AD.reshape(-1, k, y_AD.shape[-1]), weights_XK.astype(y_AD.dtype))


@jax.custom_vjp
def _permute(x_AD, order_A, inverse_A):
    """Returns x_AD[order_A]. Its gradient is a gather too; JAX's own is a scatter, which GPUs add up in any order."""
    return x_AD[order_A]


_permute.defvjp(
    lambda x_AD, order_A, inverse_A: (x_AD[order_A], inverse_A),
    lambda inverse_A, dy_AD: (dy_AD[inverse_A], None, None),
)
