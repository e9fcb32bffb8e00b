"""The backward pass of attention on a TPU: one kernel for the gradients of queries, keys and values.

It walks the tiles of scores in the same order as the forward pass and computes each once: five products a tile, where
a kernel for dq and another for dk and dv need seven. dq gathers over the steps of a tile of queries; dk and dv of all
keys lie on chip meanwhile and are written at the end of their head. A sequence too long for that is taken in pieces of
keys. Sums are taken in one order, so that the result is the same every time.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slmjax.kernels.tpu.attention_problem import (
    LOG2_E,
    Problem,
    block_specs,
    compiler_params,
    current_step,
    dot,
    hide,
    join_heads,
    join_rows,
    like,
    scores_base_2,
)
from slmjax.kernels.tpu.attention_schedule import BEGIN, EDGE, END, WORK, Schedule, k_tile_of


def backward(
    problem: Problem,
    schedules: tuple[Schedule, ...],
    q_BNHT: jax.Array,
    k_BKHS: jax.Array,
    v_BKHS: jax.Array,
    dout_BNHT: jax.Array,
    lse_BUGT: jax.Array,
    delta_BUGT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (dq_BNHT, dk_BKHS, dv_BKHS), given the sum delta over H of out * dout.

    There is one schedule for each piece of the keys, in which keys count from the piece's first.
    """
    piece = k_BKHS.shape[3] // len(schedules)
    dq_dtype = q_BNHT.dtype if len(schedules) == 1 else jnp.float32
    dq, dk_parts, dv_parts = [], [], []
    for index, schedule in enumerate(schedules):
        k_part, v_part = (x_BKHS[..., index * piece : (index + 1) * piece] for x_BKHS in (k_BKHS, v_BKHS))
        arrays = (q_BNHT, k_part, v_part, dout_BNHT, lse_BUGT, delta_BUGT, *dq)
        *dq, dk_part, dv_part = _piece(problem, schedule, *arrays, dq_dtype=dq_dtype)
        dk_parts.append(dk_part)
        dv_parts.append(dv_part)
    return dq[0].astype(q_BNHT.dtype), jnp.concatenate(dk_parts, axis=3), jnp.concatenate(dv_parts, axis=3)


def _piece(problem, schedule, q_BNHT, k_BKHS, v_BKHS, dout_BNHT, lse_BUGT, delta_BUGT, *dq, dq_dtype):
    """Returns (dq, dk, dv) due to these keys; to the dq of the pieces before, if given, dq is added in place."""
    tiling, tile = problem.tiling, problem.tiling.backward
    B, N, H = q_BNHT.shape[:3]
    K, S = k_BKHS.shape[1], k_BKHS.shape[3]
    groups = N // K // tiling.heads
    ranges, queries, rows, keys = block_specs(
        schedule, heads=tiling.heads, groups=groups, head_dim=H, q_tile=tile.q, k_tile=tile.k
    )
    all_keys = pl.BlockSpec((None, None, H, S), lambda b, kv_head, *_: (b, kv_head, 0, 0))
    lanes = tiling.heads * tile.q
    scratch = [pltpu.VMEM((H, size), jnp.float32) for size in (lanes, S, S)]
    steps = B * K * groups * schedule.expected
    return pl.pallas_call(
        functools.partial(_kernel, problem, schedule.row_stride),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, groups, schedule.num_steps),
            in_specs=[ranges, queries, keys, keys, queries, rows, rows, *[queries for _ in dq]],
            out_specs=[queries, all_keys, all_keys],
            scratch_shapes=scratch,
        ),
        out_shape=[
            like(q_BNHT, q_BNHT.shape, dq_dtype),
            like(q_BNHT, k_BKHS.shape, k_BKHS.dtype),
            like(q_BNHT, v_BKHS.shape, v_BKHS.dtype),
        ],
        compiler_params=compiler_params(
            [
                *((x.block_shape, q_BNHT.dtype) for x in (queries, queries, keys, keys, all_keys, all_keys)),
                *((x.block_shape, jnp.float32) for x in (queries, queries, rows, rows)),
            ],
            scratch,
            lanes=lanes,
            k_tile=tile.k,
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * steps * H * lanes * tile.k,
            transcendentals=steps * lanes * tile.k,
            bytes_accessed=3 * q_BNHT.nbytes + 2 * k_BKHS.nbytes + steps * 2 * H * tile.k * k_BKHS.dtype.itemsize,
        ),
        input_output_aliases={8: 0} if dq else {},
        interpret=problem.interpret,
        name="tpu_attention_backward",
    )(
        *(schedule.steps, schedule.ranges_X2T, q_BNHT, k_BKHS, v_BKHS, dout_BNHT, lse_BUGT, delta_BUGT, *dq),
    )


def _kernel(
    problem,
    row_stride,
    steps_ref,
    ranges_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    *refs,
):
    *dq_before_refs, dq_ref, dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref = refs
    heads, _, q_tile = q_ref.shape
    k_tile = k_ref.shape[1]
    step = current_step(row_stride, steps_ref)
    group, s = pl.program_id(2), pl.program_id(3)

    @pl.when((group == 0) & (s == 0))
    def _begin_head():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @pl.when(step & BEGIN != 0)
    def _begin():
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    def differentiate(edge):
        q_HM, dout_HM = join_heads(q_ref), join_heads(dout_ref)
        k_HS, v_HS = k_ref[...], v_ref[...]
        first_key = k_tile_of(step) * k_tile
        scores_SM, tanh_SM = scores_base_2(problem, k_HS, q_HM)
        if edge:
            scores_SM = hide(scores_SM, ranges_ref[...], first_key, heads)
        weights_SM = jnp.exp2(scores_SM - join_rows(lse_ref) * LOG2_E)
        dweights_SM = dot(v_HS, dout_HM, 0, 0)
        dscores_SM = weights_SM * (dweights_SM - join_rows(delta_ref))
        if tanh_SM is not None:
            dscores_SM = dscores_SM * (1.0 - tanh_SM * tanh_SM)
        weights_SM, dscores_SM = weights_SM.astype(dout_HM.dtype), dscores_SM.astype(q_HM.dtype)
        keys = pl.ds(pl.multiple_of(first_key, k_tile), k_tile)
        dq_sum_ref[...] += dot(k_HS, dscores_SM, 1, 0)
        dk_sum_ref[:, keys] += dot(q_HM, dscores_SM, 1, 1)
        dv_sum_ref[:, keys] += dot(dout_HM, weights_SM, 1, 1)

    pl.when(step & (WORK | EDGE) == WORK)(lambda: differentiate(False))
    pl.when(step & (WORK | EDGE) == WORK | EDGE)(lambda: differentiate(True))

    @pl.when(step & END != 0)
    def _end():
        for head in range(heads):
            dq_HT = problem.scale * dq_sum_ref[:, pl.ds(head * q_tile, q_tile)]
            for before_ref in dq_before_refs:
                dq_HT += before_ref[head]
            dq_ref[head] = dq_HT.astype(dq_ref.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (s == pl.num_programs(3) - 1))
    def _end_head():
        dk_ref[...] = (problem.scale * dk_sum_ref[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)
