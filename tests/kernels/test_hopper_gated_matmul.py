"""Gated products on Hopper: simulated on the CPU, compiled to machine code without a GPU, and run on one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_compiler import spilled_bytes, text_of_assembler
from jax.experimental.pallas import mosaic_gpu as plgpu

from slmjax.kernels.hopper import gated_matmul as forward
from slmjax.kernels.hopper import gated_matmul_gradient as backward
from slmjax.kernels.hopper.gated_matmul import gated_matmul, tile_place
from slmjax.kernels.hopper.gated_matmul_gradient import gated_matmul_gradient
from slmjax.kernels.hopper.ring import MatmulBlocks

KINDS = ("forward", "gradient", "gradient with hidden")
CANDIDATES = {
    "forward": forward.CANDIDATES,
    "gradient": backward.CANDIDATES,
    "gradient with hidden": backward.CANDIDATES_WITH_HIDDEN,
}
EVERY = [(kind, blocks) for kind in KINDS for blocks in CANDIDATES[kind]]
# (X, D, F)
SMALL = (264, 128, 192)
WIDTHS = [(65536, 576, 1536), (32768, 2048, 8192), (49152, 960, 2560), (32768, 1024, 3072), (32768, 1024, 2048)]


def product(kind, **options):
    """The kernel as a function of its operands."""
    if kind == "forward":
        return lambda *operands: gated_matmul(*operands, **options)
    with_hidden = kind == "gradient with hidden"
    return lambda *operands: gated_matmul_gradient(*operands, with_hidden=with_hidden, **options)


def operands(kind, shape, *, dtype=jnp.bfloat16, with_factor=True):
    X, D, F = shape
    shapes = [(X, D), (D, 2 * F)] if kind == "forward" else [(X, D), (F, D), (X, 2 * F)]
    scales = [1.0, D**-0.5, 2.0]  # gates on both sides of zero, where the activation bends
    arrays = [
        (jax.random.normal(jax.random.key(i), each) * scale).astype(dtype)
        for i, (each, scale) in enumerate(zip(shapes, scales, strict=False))
    ]
    return *arrays, jax.random.uniform(jax.random.key(9), (X,), minval=0.2, maxval=2.0) if with_factor else None


def halves(in_XG, factor_X):
    """Scaled gate and up, and the sigmoid of the gate."""
    g_XF, u_XF = np.split(np.asarray(in_XG, np.float64), 2, axis=1)
    factor_X1 = 1.0 if factor_X is None else np.asarray(factor_X, np.float64)[:, None]
    g_XF, u_XF = factor_X1 * g_XF, factor_X1 * u_XF
    return g_XF, u_XF, 1 / (1 + np.exp(-g_XF)), factor_X1


def assert_rounded_once(got, want, *, dtype):
    """Sums are float32, in the kernel's own order, special functions good to a few of its bits; then rounded once."""
    assert got.dtype == dtype
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0.51 * epsilon, atol=1e-5 * np.abs(want).max())


def check(kind, arrays, results):
    """Against the same in plain matrix products and float64, from what the kernel itself has rounded."""
    dtype = arrays[0].dtype
    a, b = (np.asarray(each, np.float64) for each in arrays[:2])
    if kind == "forward":
        in_XG, h_XF = results
        assert_rounded_once(in_XG, a @ b, dtype=dtype)
        g_XF, u_XF, s_XF, _ = halves(in_XG, arrays[-1])
        assert_rounded_once(h_XF, g_XF * s_XF * u_XF, dtype=dtype)
        return
    g_XF, u_XF, s_XF, factor_X1 = halves(arrays[2], arrays[3])
    dh_XF = a @ b.T
    din_gate_XF = dh_XF * u_XF * s_XF * (1 + g_XF * (1 - s_XF)) * factor_X1
    din_up_XF = dh_XF * g_XF * s_XF * factor_X1
    din_XG, *h_XF = results if isinstance(results, tuple) else (results,)
    assert_rounded_once(din_XG, np.concatenate([din_gate_XF, din_up_XF], axis=1), dtype=dtype)
    assert len(h_XF) == (kind == "gradient with hidden")
    for each in h_XF:
        assert_rounded_once(each, g_XF * s_XF * u_XF, dtype=dtype)


def test_the_plain_gradient_is_that_of_the_plain_activation():
    _, _, in_XG, factor_X = operands("gradient", (16, 128, 128), dtype=jnp.float32)
    assert factor_X is not None

    def hidden(in_XG):
        gate_XF, up_XF = jnp.split(factor_X[:, None] * in_XG, 2, axis=1)
        return jax.nn.silu(gate_XF) * up_XF

    dy_XD, w_FD = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(16, 128), (128, 128)]))
    h_XF, pull_back = jax.vjp(hidden, in_XG)
    (din_XG,) = pull_back(dy_XD @ w_FD.T)
    g_XF, u_XF, s_XF, factor_X1 = halves(in_XG, factor_X)
    np.testing.assert_allclose(h_XF, g_XF * s_XF * u_XF, rtol=1e-5, atol=1e-5)
    dh_XF = np.asarray(dy_XD @ w_FD.T, np.float64) * factor_X1
    want = np.concatenate([dh_XF * u_XF * s_XF * (1 + g_XF * (1 - s_XF)), dh_XF * g_XF * s_XF], axis=1)
    np.testing.assert_allclose(din_XG, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiles", [(1, 1), (3, 5), (16, 2), (35, 7), (64, 3)])
def test_every_tile_has_its_place(tiles):
    places = jax.vmap(lambda index: tile_place(index, *tiles))(jnp.arange(tiles[0] * tiles[1]))
    assert {(int(row), int(column)) for row, column in zip(*places, strict=True)} == {
        (row, column) for row in range(tiles[0]) for column in range(tiles[1])
    }


# Not in jax 0.10.
simulated: Any = getattr(plgpu, "force_gpu_interpret_mode", None)


@pytest.mark.skipif(simulated is None, reason="this version of jax has no simulator of Hopper kernels")
class TestSimulated:
    def simulate(self, kind, capfd, *, blocks, dtype=jnp.bfloat16, with_factor=True):
        arrays = operands(kind, SMALL, dtype=dtype, with_factor=with_factor)
        with simulated(plgpu.InterpretGPUParams(detect_races=True)):  # pyright: ignore[reportAttributeAccessIssue]
            results = jax.jit(product(kind, blocks=blocks, programs=2))(*arrays)
        check(kind, arrays, results)
        assert "RACE" not in capfd.readouterr().out

    def test_forward(self, capfd):
        self.simulate("forward", capfd, blocks=MatmulBlocks(stages=3))

    def test_forward_of_float16_with_one_team_and_no_factor(self, capfd):
        blocks = MatmulBlocks(columns=256, stages=2, teams=1)
        self.simulate("forward", capfd, blocks=blocks, dtype=jnp.float16, with_factor=False)

    def test_gradient(self, capfd):
        self.simulate("gradient", capfd, blocks=MatmulBlocks(stages=3))

    def test_gradient_of_float16_with_hidden_numbers_and_no_factor(self, capfd):
        blocks = MatmulBlocks(stages=2, teams=1)
        self.simulate("gradient with hidden", capfd, blocks=blocks, dtype=jnp.float16, with_factor=False)

    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "blocks"), EVERY)
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize("with_factor", [True, False])
    def test_everything(self, kind, blocks, dtype, with_factor, capfd):
        self.simulate(kind, capfd, blocks=blocks, dtype=dtype, with_factor=with_factor)


def compile_to_machine_code(kind, blocks, capfd, monkeypatch, shape, *, dtype=jnp.bfloat16, with_factor=True):
    """Compiles for an H100; returns the largest number of bytes that a function spills."""
    arrays = jax.eval_shape(lambda: operands(kind, shape, dtype=dtype, with_factor=with_factor))
    text = text_of_assembler(product(kind, blocks=blocks), *arrays, capfd=capfd, monkeypatch=monkeypatch)
    assert "serialized" not in text, "products wait for each other"
    return spilled_bytes(text)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_spilling(kind, capfd, monkeypatch):
    assert compile_to_machine_code(kind, CANDIDATES[kind][0], capfd, monkeypatch, WIDTHS[0]) == 0


# A process assembles a kernel once: what the test above compiles, the assembler would be silent about here.
OTHERS = [
    (kind, blocks, shape)
    for kind, blocks in EVERY
    for shape in WIDTHS
    if (blocks, shape) != (CANDIDATES[kind][0], WIDTHS[0])
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "blocks", "shape"), OTHERS)
def test_every_candidate_compiles_without_spilling(kind, blocks, shape, capfd, monkeypatch):
    assert compile_to_machine_code(kind, blocks, capfd, monkeypatch, shape) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "blocks"), EVERY)
def test_widths_that_tiles_do_not_divide_and_no_factor_compile_without_spilling(kind, blocks, capfd, monkeypatch):
    assert compile_to_machine_code(kind, blocks, capfd, monkeypatch, (4104, 704, 320), with_factor=False) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "blocks"), EVERY)
def test_float16_compiles_without_spilling(kind, blocks, capfd, monkeypatch):
    assert compile_to_machine_code(kind, blocks, capfd, monkeypatch, WIDTHS[0], dtype=jnp.float16) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "blocks"), EVERY)
def test_on_the_device(kind, blocks):
    shapes = [(4104, 576, 1536), (2056, 704, 320), (128, 128, 128), (264, 192, 1024)]
    for shape, dtype, with_factor in zip(
        shapes, [jnp.bfloat16, jnp.float16, jnp.bfloat16, jnp.bfloat16], [True, True, False, True], strict=True
    ):
        arrays = operands(kind, shape, dtype=dtype, with_factor=with_factor)
        check(kind, arrays, jax.jit(product(kind, blocks=blocks))(*arrays))


def test_what_the_kernels_cannot_do_is_refused():
    x_XD, w_DG, w_FD = (jnp.ones(shape, jnp.bfloat16) for shape in [(144, 128), (128, 256), (128, 128)])
    in_XG, factor_X = jnp.ones((144, 256), jnp.bfloat16), jnp.ones(144)
    with pytest.raises(ValueError, match=r"expected w \(128, an even number\) and factor \(144,\).*got \(256, 128\)"):
        gated_matmul(x_XD, w_DG.T, factor_X)
    with pytest.raises(ValueError, match=r"factor \(144,\) or None .*got \(128, 256\) and \(143,\)"):
        gated_matmul(x_XD, w_DG, factor_X[1:])
    with pytest.raises(ValueError, match="needs bfloat16 or float16, the same for both, got float32 and bfloat16"):
        gated_matmul(x_XD.astype(jnp.float32), w_DG)
    with pytest.raises(ValueError, match="widths that are multiples of 64"):
        gated_matmul(x_XD, w_DG[:, :192])
    with pytest.raises(ValueError, match="at least 128 rows and widths of at least 128"):
        gated_matmul(x_XD, w_DG[:, :128])
    with pytest.raises(ValueError, match="columns of blocks must be a multiple of 128"):
        gated_matmul(x_XD, w_DG, blocks=MatmulBlocks(columns=64))
    with pytest.raises(ValueError, match=r"expected w \(F, 128\), in \(144, 2 F\) of bfloat16"):
        gated_matmul_gradient(x_XD, w_FD, in_XG[:, :192], factor_X)
    with pytest.raises(ValueError, match=r"\(144, 256\) of float16"):
        gated_matmul_gradient(x_XD, w_FD, in_XG.astype(jnp.float16), factor_X)
    with pytest.raises(ValueError, match="rows that is a multiple of 8, got 143"):
        gated_matmul_gradient(x_XD[:143], w_FD, in_XG[:143])
    assert forward.why_not(x_XD, w_DG) is None
    assert backward.why_not(x_XD, w_FD) is None
