"""The forward pass of attention on a TPU: one kernel, the flash algorithm (Dao 2023, arXiv:2307.08691) transposed.

Scores are held as [keys, queries], heads as [H, T]: docs/decisions/0009-tpu-attention-layout.md says why.
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
    like,
    scores_base_2,
)
from slmjax.kernels.tpu.attention_schedule import BEGIN, EDGE, END, WORK, Schedule, k_tile_of

# The rows of ones below the values: with them the product that sums the values also sums the weights.
_SUM_ROWS = 16


def forward(
    problem: Problem,
    schedule: Schedule,
    q_BNHT: jax.Array,
    k_BKHS: jax.Array,
    v_BKHS: jax.Array,
    sinks_N: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns (out_BNHT, lse_BUGT): attention, and the log of the sum of each row's exponentials, the sink's included.

    G heads share a tile and U = N // G. T and S are multiples of the tile, H of 16. A sink of -1e30 is none.
    """
    tiling, tile = problem.tiling, problem.tiling.forward
    B, N, H, T = q_BNHT.shape
    K = k_BKHS.shape[1]
    groups = N // K // tiling.heads
    ranges, queries, rows, keys = block_specs(
        schedule, heads=tiling.heads, groups=groups, head_dim=H, q_tile=tile.q, k_tile=tile.k
    )
    lanes = tiling.heads * tile.q
    scratch = [pltpu.VMEM((1, lanes), jnp.float32), pltpu.VMEM((H + _SUM_ROWS, lanes), jnp.float32)]
    steps = B * K * groups * schedule.expected
    return pl.pallas_call(
        functools.partial(_kernel, problem, schedule.row_stride),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, groups, schedule.num_steps),
            in_specs=[ranges, queries, keys, keys],
            out_specs=[queries, rows],
            scratch_shapes=scratch,
        ),
        out_shape=[
            like(q_BNHT, q_BNHT.shape, q_BNHT.dtype),
            like(q_BNHT, (B, N // tiling.heads, tiling.heads, T), jnp.float32),
        ],
        compiler_params=compiler_params(
            [*((x.block_shape, q_BNHT.dtype) for x in (queries, queries, keys, keys)), (rows.block_shape, jnp.float32)],
            scratch,
            lanes=lanes,
            k_tile=tile.k,
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * steps * H * lanes * tile.k,
            transcendentals=steps * lanes * tile.k,
            bytes_accessed=2 * q_BNHT.nbytes + steps * 2 * H * tile.k * k_BKHS.dtype.itemsize,
        ),
        interpret=problem.interpret,
        name="tpu_attention_forward",
    )(schedule.steps, sinks_N, schedule.ranges_X2T, q_BNHT, k_BKHS, v_BKHS)


def _kernel(
    problem, row_stride, steps_ref, sinks_ref, ranges_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, peak_ref, sum_ref
):
    heads, H, q_tile = q_ref.shape
    step = current_step(row_stride, steps_ref)
    first_head = (pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)) * heads

    @pl.when(step & BEGIN != 0)
    def _begin():
        # A sink is a key whose value is zero, met before all others.
        for head in range(heads):
            peak_ref[:, pl.ds(head * q_tile, q_tile)] = jnp.full(
                (1, q_tile), sinks_ref[first_head + head] * LOG2_E, jnp.float32
            )
        sum_ref[:H] = jnp.zeros((H, heads * q_tile), jnp.float32)
        sum_ref[H:] = jnp.ones((_SUM_ROWS, heads * q_tile), jnp.float32)

    def attend(edge):
        scores_SM, _ = scores_base_2(problem, k_ref[...], join_heads(q_ref))
        if edge:
            scores_SM = hide(scores_SM, ranges_ref[...], k_tile_of(step) * problem.tiling.forward.k, heads)
        peak_1M = peak_ref[...]
        new_peak_1M = jnp.maximum(peak_1M, jnp.max(scores_SM, axis=0, keepdims=True))
        weights_SM = jnp.exp2(scores_SM - new_peak_1M).astype(v_ref.dtype)
        v_ones_HS = jnp.concatenate([v_ref[...], jnp.ones((_SUM_ROWS, v_ref.shape[1]), v_ref.dtype)], axis=0)
        peak_ref[...] = new_peak_1M
        sum_ref[...] = sum_ref[...] * jnp.exp2(peak_1M - new_peak_1M) + dot(v_ones_HS, weights_SM, 1, 0)

    pl.when(step & (WORK | EDGE) == WORK)(lambda: attend(False))
    pl.when(step & (WORK | EDGE) == WORK | EDGE)(lambda: attend(True))

    @pl.when(step & END != 0)
    def _end():
        total_1M = sum_ref[pl.ds(H, 1)]
        out_HM = sum_ref[:H] / total_1M
        lse_1M = peak_ref[...] * (1 / LOG2_E) + jnp.log(total_1M)
        for head in range(heads):
            queries = slice(head * q_tile, (head + 1) * q_tile)
            out_ref[head] = out_HM[:, queries].astype(out_ref.dtype)
            lse_ref[pl.ds(head, 1)] = lse_1M[:, queries]
