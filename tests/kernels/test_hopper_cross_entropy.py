"""Cross-entropy on Hopper: simulated on the CPU, compiled to machine code without a GPU, and run on one."""

import functools

import hopper_simulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_compiler import compiled_for_hopper, spilled_bytes, text_of_assembler

from slmjax.kernels.hopper.cross_entropy import CANDIDATES, RowBlocks, cross_entropy, why_not
from slmjax.ops.loss import cross_entropy_reference

VOCABULARIES = [49152, 50304, 128256, 151936]


def operands(X, V, dtype=jnp.bfloat16):
    """Rows of which one has large logits, one small ones and one no weight; targets at both ends."""
    keys = jax.random.split(jax.random.key(0), 3)
    logits_XV = 3.0 * jax.random.normal(keys[0], (X, V))
    logits_XV = logits_XV.at[1].multiply(100.0).at[2].add(-1000.0).at[0, 5].set(-jnp.inf)
    targets_X = jax.random.randint(keys[1], (X,), 0, V).at[0].set(0).at[-1].set(V - 1)
    weights_X = jax.random.uniform(keys[2], (X,)).at[1].set(0.0)
    return logits_XV.astype(dtype), targets_X, weights_X


def expected(logits_XV, targets_X, weights_X, *, logit_scale=1.0, z_loss=0.0):
    logits_XV, weights_X = (np.asarray(x, np.float64) for x in (logits_XV, weights_X))
    rows, targets_X, logits_XV = np.arange(len(logits_XV)), np.asarray(targets_X), logit_scale * logits_XV
    top_X = logits_XV.max(axis=1)
    lse_X = top_X + np.log(np.exp(logits_XV - top_X[:, None]).sum(axis=1))
    d_logits_XV = np.exp(logits_XV - lse_X[:, None]) * (1 + 2 * z_loss * lse_X)[:, None]
    d_logits_XV[rows, targets_X] -= 1
    return lse_X, logits_XV[rows, targets_X], d_logits_XV * (weights_X * logit_scale)[:, None]


def assert_right(got, arguments, *, dtype, logit_scale=1.0, z_loss=0.0):
    want_lse_X, want_target_X, want_XV = expected(*arguments, logit_scale=logit_scale, z_loss=z_loss)
    lse_X, target_X, gradient_XV = got
    assert lse_X.dtype == target_X.dtype == jnp.float32
    assert gradient_XV.dtype == dtype
    np.testing.assert_allclose(target_X, want_target_X, rtol=1e-6)
    np.testing.assert_allclose(lse_X, want_lse_X, rtol=1e-6, atol=1e-5)
    # Rounded to the dtype; and where logits are large, their float32 in the exponent by 2^-24 of themselves.
    largest = np.abs(want_lse_X).max()
    rtol = 0.51 * float(jnp.finfo(dtype).eps) + 2 * 2.0**-23 * largest
    atol = 2.0**-24 if dtype == jnp.float16 else 1e-6 * (1 + 2 * z_loss * largest)
    np.testing.assert_allclose(np.asarray(gradient_XV, np.float64), want_XV, rtol=rtol, atol=atol)


OPTIONS = {"plain": {}, "scale and z": {"logit_scale": 0.7, "z_loss": 0.01}}
TWO = RowBlocks(warpgroups=2, vectors=2, slots=3)
# Of a row of 41 lines of 128: pieces that stay; some that are read again, with one that is cut off at the end; a
# warpgroup without a piece.
CASES = {
    "stays": (5, 5248, jnp.bfloat16, jnp.bfloat16, TWO),
    "read again": (5, 5248, jnp.bfloat16, jnp.bfloat16, RowBlocks(warpgroups=2, vectors=1, slots=2)),
    "narrowed": (4, 5248, jnp.float32, jnp.bfloat16, RowBlocks(warpgroups=3, vectors=3, slots=2)),
    "half": (3, 5248, jnp.float16, jnp.float16, TWO),
    "widened": (3, 1152, jnp.bfloat16, jnp.float32, TWO),
    "wide": (5, 1024, jnp.float32, jnp.float32, RowBlocks(warpgroups=2, vectors=4, slots=2)),
}


@pytest.mark.skipif(not hopper_simulator.AVAILABLE, reason="the simulator of jax 0.10 knows too few operations")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_simulated(case, options, capfd):
    X, V, logits_dtype, dtype, blocks = case
    arguments = operands(X, V, logits_dtype)
    function = functools.partial(cross_entropy, **options, dtype=dtype, blocks=blocks, programs=2)
    with hopper_simulator.simulated():
        got = jax.block_until_ready(jax.jit(function)(*arguments))
    assert_right(got, arguments, dtype=dtype, **options)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.skipif(not hopper_simulator.AVAILABLE, reason="the simulator of jax 0.10 knows too few operations")
def test_targets_outside_the_vocabulary_are_read_nowhere():
    logits_XV, _, weights_X = operands(4, 1152, jnp.float32)
    arguments = logits_XV, jnp.array([-1, 1152, 2**31 - 1, -1153], jnp.int32), weights_X
    with hopper_simulator.simulated():
        got = jax.jit(functools.partial(cross_entropy, dtype=jnp.float32, blocks=TWO, programs=2))(*arguments)
    for ours, plain in zip(got, cross_entropy_reference(*arguments, dtype=jnp.float32), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=2e-4, atol=1e-5)
    assert np.isnan(got[1]).tolist() == [False, True, True, True]


def shapes(X, V, dtype):
    return jax.eval_shape(lambda: operands(X, V, dtype))


def assert_compiles_without_spilling(V, logits_dtype, dtype, blocks, capfd, monkeypatch):
    kernel = functools.partial(cross_entropy, dtype=dtype, blocks=blocks)
    text = text_of_assembler(kernel, *shapes(264, V, logits_dtype), capfd=capfd, monkeypatch=monkeypatch)
    assert spilled_bytes(text) == 0


@pytest.mark.parametrize("logits_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_compiles_without_spilling(V, logits_dtype, capfd, monkeypatch):
    assert_compiles_without_spilling(V, logits_dtype, jnp.bfloat16, RowBlocks(), capfd, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", CANDIDATES)
def test_every_candidate_compiles_without_spilling(blocks, capfd, monkeypatch):
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert_compiles_without_spilling(50432, dtype, dtype, blocks, capfd, monkeypatch)


def test_the_gradient_takes_the_place_of_the_logits():
    def products(x_XD, w_DV, targets_X, weights_X):
        logits_XV = jnp.dot(x_XD, w_DV)
        lse_X, target_X, gradient_XV = cross_entropy(logits_XV, targets_X, weights_X, dtype=logits_XV.dtype)
        return lse_X, target_X, jnp.dot(gradient_XV, w_DV.T)

    logits_XV, targets_X, weights_X = shapes(2048, 49152, jnp.bfloat16)
    x_XD, w_DV = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2048, 64), (64, 49152)))
    temporaries = compiled_for_hopper(products, x_XD, w_DV, targets_X, weights_X).memory_analysis().temp_size_in_bytes
    assert logits_XV.size * 2 <= temporaries < 1.5 * logits_XV.size * 2


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("blocks", CANDIDATES)
def test_on_the_device(blocks, options):
    narrow, wide, half = jnp.bfloat16, jnp.float32, jnp.float16
    cases = [(1024, wide, narrow), (5248, half, half), (49152, narrow, narrow), (49152, wide, narrow)]
    for V, logits_dtype, dtype in [*cases, (VOCABULARIES[-1], narrow, narrow)]:
        arguments = operands(300, V, logits_dtype)
        got = jax.jit(functools.partial(cross_entropy, **options, dtype=dtype, blocks=blocks))(*arguments)
        assert_right(got, arguments, dtype=dtype, **options)


def test_what_the_kernel_cannot_do_is_refused():
    logits_XV, targets_X, weights_X = operands(4, 1024)
    assert why_not(logits_XV) is None
    assert "multiple of 128, at least 1024, got 1000" in str(why_not(logits_XV[:, :1000]))
    assert "at least 1024, got 896" in str(why_not(logits_XV[:, :896]))
    assert "bfloat16, float16 or float32, got int32" in str(why_not(logits_XV.astype(jnp.int32)))
    with pytest.raises(ValueError, match="needs a positive logit_scale, got -1"):
        cross_entropy(logits_XV, targets_X, weights_X, logit_scale=-1.0, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="more slots than those ahead"):
        RowBlocks(slots=1)
    with pytest.raises(ValueError, match="at most 32 in all warpgroups"):
        RowBlocks(warpgroups=8)
