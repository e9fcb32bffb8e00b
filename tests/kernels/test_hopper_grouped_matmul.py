"""Grouped products on Hopper: simulated on the CPU, compiled to machine code without a GPU, and run on one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_compiler import spilled_bytes, text_of_assembler
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from slmjax.kernels.hopper.grouped_matmul import grouped_matmul, row_tiles
from slmjax.kernels.hopper.ring import ALIGNED_ROWS, CANDIDATES, MatmulBlocks
from slmjax.kernels.hopper.transposed_grouped_matmul import transposed_grouped_matmul

X, D, F, E = 264, 128, 192, 5
TWO_TEAMS = MatmulBlocks(rows=64, columns=64, stages=3)
ONE_TEAM = MatmulBlocks(rows=128, columns=128, stages=2, teams=1)


def product(kind, **options):
    """One of the three products, of two arrays and the group sizes."""
    if kind == "weights":
        return lambda x_XD, dy_XF, sizes_E: transposed_grouped_matmul(x_XD, dy_XF, sizes_E, **options)
    return lambda x_X, w_EDF, sizes_E: grouped_matmul(x_X, w_EDF, sizes_E, transposed=kind == "inputs", **options)


def operands(kind, sizes, *, shape=(X, D, F), dtype=jnp.bfloat16):
    """Two arrays of a product; for the weights' gradient, rows that no group has are not even finite."""
    X, D, F = shape
    shapes = {
        "forward": ((X, D), (len(sizes), D, F)),
        "inputs": ((X, F), (len(sizes), D, F)),
        "weights": ((X, D), (X, F)),
    }
    a, b = (jax.random.normal(jax.random.key(i), each).astype(dtype) for i, each in enumerate(shapes[kind]))
    if kind == "weights":
        a, b = a.at[sum(sizes) :].set(jnp.nan), b.at[sum(sizes) :].set(jnp.inf)
    return a, b


def expected(kind, a, b, sizes):
    """The same product in float32, group by group."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    ends = np.cumsum(sizes)
    rows = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    if kind == "weights":
        return np.stack([a[r].T @ b[r] for r in rows])
    out = np.zeros((len(a), b.shape[2 if kind == "forward" else 1]), np.float32)
    for group, r in enumerate(rows):
        out[r] = a[r] @ (b[group] if kind == "forward" else b[group].T)
    return out


def assert_rounded_once(got, want):
    """The kernel sums in float32, in its own order, and rounds once to the dtype of the result."""
    epsilon = float(jnp.finfo(got.dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0.51 * epsilon, atol=1e-5 * np.abs(want).max())


cut = jax.jit(row_tiles, static_argnames=("num_rows", "tile_rows"))


@given(
    sizes=st.lists(st.integers(0, 70) | st.sampled_from([0, 8, 64]), min_size=6, max_size=6), everything=st.booleans()
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("tile_rows", [64, 128])
def test_tiles_hold_every_row_once_and_start_aligned(sizes, everything, tile_rows):
    num_rows = 424
    sizes[-1] = num_rows - sum(sizes[:-1]) if everything else sizes[-1]
    tiles = cut(np.array(sizes, np.int32), num_rows=num_rows, tile_rows=tile_rows)
    group_of_row = np.repeat(np.arange(len(sizes) + 1), [*sizes, num_rows - sum(sizes)])
    count = int(tiles.last_tile_G[-1])
    assert count <= len(tiles.group_I)
    seen = np.full(num_rows, -1)
    for group, row, first, last in np.stack([np.asarray(each)[:count] for each in tiles[:4]], axis=1):
        assert row % ALIGNED_ROWS == 0
        assert row <= first < last <= row + tile_rows
        assert np.all(seen[first:last] == -1)
        seen[first:last] = group
    np.testing.assert_array_equal(seen, group_of_row)


# Groups within a tile, over several, empty at both ends and between, on a border, one for all, none at all, and rows
# that no group has. Tiles have 64 or 128 rows.
SIZES = [(30, 0, 100, 70, 40), (64, 64, 72, 0, 64), (0, 264, 0, 0, 0), (1, 2, 3, 4, 5), (0, 0, 0, 0, 0)]


# Not in jax 0.10.
simulated: Any = getattr(plgpu, "force_gpu_interpret_mode", None)


@pytest.mark.skipif(simulated is None, reason="this version of jax has no simulator of Hopper kernels")
class TestSimulated:
    def simulate(self, kind, sizes, capfd, *, blocks, dtype=jnp.bfloat16):
        a, b = operands(kind, sizes, dtype=dtype)
        with simulated(plgpu.InterpretGPUParams(detect_races=True)):  # pyright: ignore[reportAttributeAccessIssue]
            got = jax.jit(product(kind, blocks=blocks, programs=2))(a, b, jnp.array(sizes, jnp.int32))
        assert got.dtype == dtype
        assert_rounded_once(got, expected(kind, a, b, sizes))
        assert "RACE" not in capfd.readouterr().out

    @pytest.mark.parametrize("kind", ["forward", "inputs", "weights"])
    @pytest.mark.parametrize("sizes", SIZES[:2])
    def test_equals_products_group_by_group(self, kind, sizes, capfd):
        self.simulate(kind, sizes, capfd, blocks=TWO_TEAMS)

    @pytest.mark.parametrize("kind", ["forward", "weights"])
    def test_one_team(self, kind, capfd):
        self.simulate(kind, SIZES[0], capfd, blocks=ONE_TEAM, dtype=jnp.float16)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["forward", "inputs", "weights"])
    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("blocks", [TWO_TEAMS, ONE_TEAM], ids=["two_teams", "one_team"])
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_everything(self, kind, sizes, blocks, dtype, capfd):
        self.simulate(kind, sizes, capfd, blocks=blocks, dtype=dtype)


def compile_to_machine_code(kind, blocks, capfd, monkeypatch, shape=(4096, 1024, 512), num_groups=8):
    """Compiles for an H100; returns the largest number of bytes that a function spills."""
    a, b = jax.eval_shape(lambda: operands(kind, [0] * num_groups, shape=shape))
    sizes_E = jax.ShapeDtypeStruct((num_groups,), jnp.int32)
    text = text_of_assembler(product(kind, blocks=blocks), a, b, sizes_E, capfd=capfd, monkeypatch=monkeypatch)
    assert "serialized" not in text, "products wait for each other"
    return spilled_bytes(text)


@pytest.mark.parametrize("kind", ["forward", "inputs", "weights"])
def test_compiles_without_spilling(kind, capfd, monkeypatch):
    assert compile_to_machine_code(kind, MatmulBlocks(), capfd, monkeypatch) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward", "inputs", "weights"])
@pytest.mark.parametrize("blocks", CANDIDATES)
def test_every_candidate_compiles_without_spilling(kind, blocks, capfd, monkeypatch):
    # Widths that tiles do not divide.
    assert compile_to_machine_code(kind, blocks, capfd, monkeypatch, shape=(4104, 704, 320)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["forward", "inputs", "weights"])
@pytest.mark.parametrize("blocks", CANDIDATES)
def test_on_the_device(kind, blocks):
    generator = np.random.default_rng(0)
    for shape, num_groups in (((4104, 704, 320), 8), ((8192, 1024, 512), 64), ((136, 128, 192), 3)):
        for in_groups in (shape[0], shape[0] // 2, 0):
            cuts = np.sort(generator.integers(0, in_groups + 1, num_groups - 1))
            sizes = np.diff([0, *cuts, in_groups])
            a, b = operands(kind, sizes, shape=shape)
            got = jax.jit(product(kind, blocks=blocks))(a, b, jnp.array(sizes, jnp.int32))
            assert_rounded_once(got, expected(kind, a, b, sizes))


def test_what_the_kernels_cannot_do_is_refused():
    x_XD, w_EDF, sizes_E = (
        jnp.ones((144, 128), jnp.bfloat16),
        jnp.ones((2, 128, 192), jnp.bfloat16),
        jnp.ones(2, jnp.int32),
    )
    with pytest.raises(ValueError, match=r"expected x \(X, 192\) and group_sizes \(2,\).*got \(144, 128\)"):
        grouped_matmul(x_XD, w_EDF, sizes_E, transposed=True)
    with pytest.raises(ValueError, match="needs bfloat16 or float16, the same for both, got float32 and bfloat16"):
        grouped_matmul(x_XD.astype(jnp.float32), w_EDF, sizes_E)
    with pytest.raises(ValueError, match="widths that are multiples of 64"):
        grouped_matmul(x_XD, w_EDF[:, :, :150], sizes_E)
    with pytest.raises(ValueError, match="rows that is a multiple of 8, got 143"):
        transposed_grouped_matmul(x_XD[:143], x_XD[:143], sizes_E)
    with pytest.raises(ValueError, match="as many rows of x as of dy, got 144 and 136"):
        transposed_grouped_matmul(x_XD, x_XD[:136], sizes_E)
    with pytest.raises(ValueError, match="at least 128 rows and widths of at least 128"):
        grouped_matmul(x_XD[:64], w_EDF, sizes_E)
    with pytest.raises(ValueError, match="rows must be a multiple of 64 for each warpgroup"):
        MatmulBlocks(rows=64, teams=1)
    with pytest.raises(ValueError, match="teams must be 1 or 2, got 3"):
        MatmulBlocks(teams=3)
