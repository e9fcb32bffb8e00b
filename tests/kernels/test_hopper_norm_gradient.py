"""The gradient of a folded norm on Hopper: simulated on the CPU, compiled without a GPU, and run on one."""

import functools
import re

import hopper_simulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_compiler import spilled_bytes, text_of_assembler

from slmjax.kernels.hopper.norm_gradient import CANDIDATES, NormBlocks, norm_gradient, why_not

DTYPES = [jnp.bfloat16, jnp.float16]


def operands(X, D, dtype=jnp.bfloat16):
    """Rows of which one is zeros, and one much along x, so that most of its gradient cancels."""
    keys = jax.random.split(jax.random.key(X + D), 3)
    dx_XD, x_XD, dresidual_XD = (jax.random.normal(key, (X, D)) for key in keys)
    x_XD = x_XD.at[0].set(0.0)
    dx_XD = dx_XD.at[-1].set(3.0 * x_XD[-1])
    factor_X = jax.lax.rsqrt(jnp.mean(x_XD * x_XD, axis=1) + 1e-5)
    return dx_XD.astype(dtype), x_XD.astype(dtype), factor_X, dresidual_XD.astype(dtype)


def assert_right(got_XD, arrays):
    dtype = arrays[0].dtype
    assert got_XD.dtype == dtype
    dx_XD, x_XD, factor_X, dresidual_XD = (np.asarray(each, np.float64) for each in arrays)
    along_X = np.mean(dx_XD * x_XD, axis=1) * factor_X**2
    want_XD = dx_XD - x_XD * along_X[:, None] + dresidual_XD
    # Rounded once; before that, float32.
    rtol = 0.501 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got_XD, np.float64), want_XD, rtol=rtol, atol=1e-5)


def test_the_formula_is_the_gradient():
    _, x_XD, _, _ = operands(6, 192, jnp.float32)
    x_XD = x_XD[1:]
    w_DF = jax.random.normal(jax.random.key(0), (192, 8)) / 14
    dresidual_XD = jax.random.normal(jax.random.key(1), x_XD.shape)
    dp_XF = jax.random.normal(jax.random.key(2), (5, 8))

    def factor(x_XD):
        return jax.lax.rsqrt(jnp.mean(x_XD * x_XD, axis=1) + 1e-5)

    _, pull_back = jax.vjp(lambda x_XD: ((x_XD * factor(x_XD)[:, None]) @ w_DF, x_XD), x_XD)
    (want_XD,) = pull_back((dp_XF, dresidual_XD))
    assert_right(want_XD, ((dp_XF * factor(x_XD)[:, None]) @ w_DF.T, x_XD, factor(x_XD), dresidual_XD))


# Rows of narrow pieces only, of all three widths and of wide ones; tiles that the rows fill, that overlap, and that
# have more rows than there are.
CASES = {
    "narrow": (8, 64, NormBlocks(warpgroups=2)),
    "a block half empty": (12, 192, NormBlocks(warpgroups=2)),
    "every width": (16, 448, NormBlocks(rows=2)),
    "SmolLM2": (20, 576, NormBlocks(resident=1)),
    "wide": (24, 1024, NormBlocks(warpgroups=2, resident=1)),
    "overlap": (21, 192, NormBlocks(rows=2, warpgroups=2)),
    "few": (3, 576, NormBlocks(rows=2)),
    "one": (1, 64, NormBlocks()),
}


@pytest.mark.skipif(not hopper_simulator.AVAILABLE, reason="the simulator of jax 0.10 knows too few operations")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_simulated(case, dtype, capfd, monkeypatch):
    X, D, blocks = CASES[case]
    monkeypatch.setattr("slmjax.kernels.hopper.norm_gradient.sm_count", lambda: 2)  # each has several tiles
    arrays = operands(X, D, dtype)
    with hopper_simulator.simulated():
        got_XD = jax.block_until_ready(norm_gradient(*arrays, blocks=blocks))
    assert_right(got_XD, arrays)
    # Rows of two tiles are written twice, and their numbers are the same.
    assert ("RACE" in capfd.readouterr().out) == (case == "overlap")


def compile_to_machine_code(D, dtype, blocks, capfd, monkeypatch):
    """Compiles for an H100; returns the registers of a thread, and the most bytes that are spilled."""
    shapes = jax.eval_shape(lambda: operands(4099, D, dtype))
    kernel = functools.partial(norm_gradient, blocks=blocks)
    text = text_of_assembler(kernel, *shapes, capfd=capfd, monkeypatch=monkeypatch)
    return max(map(int, re.findall(r"Used (\d+) registers", text))), spilled_bytes(text)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 192, 576, 960, 1024, 2048, 3008, 3072])
def test_compiles_without_spilling(D, dtype, capfd, monkeypatch):
    registers, spilled = compile_to_machine_code(D, dtype, NormBlocks(), capfd, monkeypatch)
    assert spilled == 0
    # What the multiprocessor's registers hold of rows under way, much more than memory's latency needs.
    threads = min(2048, 65536 // (-(-registers // 8) * 8) // 128 * 128)
    assert threads // 32 * 6 * D >= 24_000


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [64, 576, 960, 1024])
@pytest.mark.parametrize("blocks", CANDIDATES[1:])
def test_other_candidates_compile_without_spilling(blocks, D, dtype, capfd, monkeypatch):
    assert compile_to_machine_code(D, dtype, blocks, capfd, monkeypatch)[1] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", CANDIDATES)
def test_on_the_device(blocks, dtype):
    for X, D in [(1, 64), (4099, 192), (6002, 576), (4096, 960), (9001, 1024), (1023, 2048), (515, 3008)]:
        arrays = operands(X, D, dtype)
        assert_right(norm_gradient(*arrays, blocks=blocks), arrays)


def test_what_the_kernel_cannot_do_is_refused():
    dx_XD, x_XD, factor_X, dresidual_XD = operands(4, 128)
    assert why_not(x_XD) is None
    assert why_not(jnp.ones((4, 3072), jnp.float16)) is None
    assert "multiple of 64, at most 3072, got 3136" in str(why_not(jnp.ones((4, 3136), jnp.bfloat16)))
    with pytest.raises(ValueError, match="needs a width that is a multiple of 64, at most 3072, got 96"):
        norm_gradient(dx_XD[:, :96], x_XD[:, :96], factor_X, dresidual_XD[:, :96])
    with pytest.raises(ValueError, match="needs bfloat16 or float16, got float32"):
        norm_gradient(*operands(4, 128, jnp.float32))
    with pytest.raises(ValueError, match=r"three arrays \(4, 128\) of bfloat16 .* \(4, 128\) of float16"):
        norm_gradient(dx_XD, x_XD, factor_X, dresidual_XD.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"factor \(4,\), got .* and \(3,\)"):
        norm_gradient(dx_XD, x_XD, factor_X[1:], dresidual_XD)
    with pytest.raises(ValueError, match=r"positive numbers, got NormBlocks\(rows=0"):
        NormBlocks(rows=0)
