"""Matrix products of groups of rows, each with a matrix of its own, and their gradients: several implementations.

  reference   every row with every matrix; the definition.
  blocks      a loop over blocks of rows in plain XLA, for CPUs.
  ragged_dot  XLA's own; on GPUs it multiplies densely, on CPUs too.
  hopper      the kernels of slmjax.kernels.hopper.

Each has two products: of the rows with the matrices or the transposed matrices (forward, and the rows' gradient), and
of each group's rows with each other (the matrices' gradient).
"""

import functools
import logging
from typing import Literal, assert_never

import jax
import jax.numpy as jnp

from slmjax.kernels import targets

Implementation = Literal["reference", "blocks", "ragged_dot", "hopper"]

_BLOCK_ROWS = 64

_logger = logging.getLogger("slmjax.grouped_matmul")


def grouped_matmul(
    x_XD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    transposed: bool = False,
    implementation: Implementation | Literal["auto"] = "auto",
) -> jax.Array:
    """Multiplies the first group_sizes[0] rows with w[0], the next group_sizes[1] with w[1], and so on; out (X, F).

    Rows after the last group give zeros, and have no part in gradients. Sums are float32. With `transposed`, x is
    (X, F) and is multiplied with the transposed matrices. "auto" chooses by platform, dtype and shapes, and logs each
    different choice once.
    """
    if implementation == "auto":
        implementation = choose_implementation(x_XD, w_EDF)
    return _product(transposed, implementation, x_XD, w_EDF, group_sizes_E)


def transposed_grouped_matmul(
    x_XD: jax.Array,
    dy_XF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: Implementation | Literal["auto"] = "auto",
) -> jax.Array:
    """Returns x[rows of e].T @ dy[rows of e] for each group e, as (E, D, F) in the dtype of `x`; sums are float32."""
    if implementation == "auto":
        implementation = choose_implementation(x_XD, dy_XF)
    match implementation:
        case "reference":
            return jnp.einsum("XD,XF,XE->EDF", x_XD, dy_XF, _rows_of_groups(x_XD, group_sizes_E))
        case "blocks":
            return _transposed_by_blocks(x_XD, dy_XF, group_sizes_E)
        case "ragged_dot":
            contracted = jax.lax.RaggedDotDimensionNumbers(
                dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
            )
            return jax.lax.ragged_dot_general(x_XD, dy_XF, group_sizes_E, contracted)
        case "hopper":
            from slmjax.kernels.hopper.transposed_grouped_matmul import transposed_grouped_matmul as kernel

            return kernel(x_XD, dy_XF, group_sizes_E)
        case _:
            assert_never(implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(transposed: bool, implementation: Implementation, x_XD, w_EDF, group_sizes_E) -> jax.Array:
    match implementation:
        case "reference":
            keep_XE = _rows_of_groups(x_XD, group_sizes_E)
            return jnp.einsum("XF,EDF,XE->XD" if transposed else "XD,EDF,XE->XF", x_XD, w_EDF, keep_XE)
        case "blocks":
            return _multiply_by_blocks(x_XD, w_EDF, group_sizes_E, transposed=transposed)
        case "ragged_dot":
            return jax.lax.ragged_dot(x_XD, w_EDF.swapaxes(1, 2) if transposed else w_EDF, group_sizes_E)
        case "hopper":
            from slmjax.kernels.hopper.grouped_matmul import grouped_matmul as kernel  # only where it is used

            return kernel(x_XD, w_EDF, group_sizes_E, transposed=transposed)
        case _:
            assert_never(implementation)


def _forward(transposed, implementation, x_XD, w_EDF, group_sizes_E):
    return _product(transposed, implementation, x_XD, w_EDF, group_sizes_E), (x_XD, w_EDF, group_sizes_E)


def _backward(transposed, implementation, saved, dout_XF):
    x_XD, w_EDF, group_sizes_E = saved
    dx_XD = _product(not transposed, implementation, dout_XF, w_EDF, group_sizes_E)
    first, second = (dout_XF, x_XD) if transposed else (x_XD, dout_XF)
    dw_EDF = transposed_grouped_matmul(first, second, group_sizes_E, implementation=implementation)
    return dx_XD, dw_EDF.astype(w_EDF.dtype), None


_product.defvjp(_forward, _backward)


def choose_implementation(a_XD: jax.Array, b: jax.Array) -> Implementation:
    """Returns the implementation that "auto" means on this platform for these operands, and logs it once."""
    platform = "hopper" if targets.on_hopper() else jax.default_backend()
    # For ragged_dot, XLA's CPU backend multiplies every row with every matrix. Two cores, 4096 x 256 rows, 256 x 256
    # matrices, float32, forward + backward: 123 ms with 8 groups and 490 with 32; in blocks 18 and 22; one dense
    # product 12. Blocks of 32 to 128 rows are level.
    if platform == "cpu":
        return _log_once("blocks", platform, "ragged_dot is dense there")
    if platform != "hopper":
        return _log_once("ragged_dot", platform, "there is no kernel of ours for it")
    from slmjax.kernels.hopper.ring import why_not

    reason = why_not(a_XD, b)
    return (
        _log_once("hopper", platform, "fits") if reason is None else _log_once("ragged_dot", platform, f"ours {reason}")
    )


@functools.cache
def _log_once(implementation: Implementation, platform: str, reason: str) -> Implementation:
    _logger.info("grouped matmul on %s: %s, because %s", platform, implementation, reason)
    return implementation


def _rows_of_groups(x_XD, group_sizes_E):
    """Returns (X, E): 1 where the row is the group's."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_X1 = jnp.arange(x_XD.shape[0])[:, None]
    return ((row_X1 >= (ends_E - group_sizes_E)[None]) & (row_X1 < ends_E[None])).astype(x_XD.dtype)


def _multiply_by_blocks(x_X, w_EDF, group_sizes_E, *, transposed):
    equation, width = ("RF,DF->RD", w_EDF.shape[1]) if transposed else ("RD,DF->RF", w_EDF.shape[2])

    def visit(out_X, expert, first_row, keep_R1):
        product_R = _dot(equation, _rows(x_X, first_row, keep_R1), w_EDF[expert]).astype(out_X.dtype)
        merged_R = jnp.where(keep_R1, product_R, _rows(out_X, first_row, keep_R1))
        return jax.lax.dynamic_update_slice_in_dim(out_X, merged_R, first_row, axis=0)

    return _over_visits(visit, jnp.zeros((x_X.shape[0], width), x_X.dtype), x_X.shape[0], group_sizes_E)


def _transposed_by_blocks(x_XD, dy_XF, group_sizes_E):
    def visit(dw_EDF, expert, first_row, keep_R1):
        x_RD = jnp.where(keep_R1, _rows(x_XD, first_row, keep_R1), 0.0)
        return dw_EDF.at[expert].add(_dot("RD,RF->DF", x_RD, _rows(dy_XF, first_row, keep_R1)))

    shape = (group_sizes_E.shape[0], x_XD.shape[1], dy_XF.shape[1])
    return _over_visits(visit, jnp.zeros(shape, jnp.float32), x_XD.shape[0], group_sizes_E).astype(x_XD.dtype)


def _over_visits(visit, out, num_rows, group_sizes_E):
    """Folds visit(out, expert, first_row, keep_R1) over each pair of a block of R rows and a group with rows in it.

    At most X / R + E pairs, in the order of MegaBlocks' kernels (arXiv:2211.15841). `keep_R1` says which of the block's
    rows are the group's. The last block is moved back to end with the last row.
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
