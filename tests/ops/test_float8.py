"""Products in 8-bit floats against those in full precision, and what XLA makes of them for Hopper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config import ExecutionConfig
from slmjax.kernels.targets import hopper_devices
from slmjax.ops.float8 import FORWARD, GRADIENT, dequantise, quantise, scale_of
from slmjax.ops.linear import project, project_activated
from slmjax.train.compiler import compiler_options


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def distance(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("dtype", "largest"), [(FORWARD, 448.0), (GRADIENT, 57344.0)])
def test_the_scale_is_the_smallest_power_of_two_that_fits(dtype, largest):
    for exponent in (-20, 0, 20):
        exact = largest * 2.0**exponent
        assert float(scale_of(jnp.array([-exact, 0.0]), dtype)) == 2.0**exponent
        assert float(scale_of(jnp.array([exact * 1.001]), dtype)) == 2.0 ** (exponent + 1)
    assert float(scale_of(jnp.zeros(3), dtype)) == 2.0**-126


@pytest.mark.parametrize(("dtype", "fraction_bits"), [(FORWARD, 3), (GRADIENT, 2)])
def test_quantised_is_rounded_to_the_fraction_of_the_format(dtype, fraction_bits):
    x = jnp.concatenate([normal(0, 1000), jnp.zeros(1)])
    back = dequantise(quantise(x, dtype), jnp.float32)
    normal_numbers = np.abs(np.asarray(x)) > 0.01  # smaller ones are subnormal in e4m3
    relative = np.abs(np.asarray(back - x))[normal_numbers] / np.abs(np.asarray(x))[normal_numbers]
    assert 0 < relative.max() <= 2.0 ** -(fraction_bits + 1)
    assert float(back[-1]) == 0.0
    assert np.isnan(np.asarray(dequantise(quantise(x.at[0].set(jnp.nan), dtype), jnp.float32))).any()


def feed_forward(products, recompute=False):
    def loss(x_BTD, w_gate, w_up, w_down):
        h = project(x_BTD, [w_gate, w_up], products=products)
        y_BTD = project_activated(h, w_down, activation="silu", gated=True, recompute=recompute, products=products)
        return jnp.sum(y_BTD * normal(9, *y_BTD.shape)), y_BTD

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 16), (2, 32, 16)], ids=["fewer tokens than D", "more"])
def test_values_and_gradients_are_those_of_full_precision_but_for_rounding(shape, recompute):
    D, F = shape[-1], 64
    arguments = (normal(0, *shape), normal(1, D, F) / 4, normal(2, D, F) / 4, normal(3, F, D) / 8)
    (_, want), want_gradients = feed_forward("compute_dtype")(*arguments)
    (_, got), gradients = feed_forward("float8", recompute)(*arguments)
    # Roundings of operands are independent, by 2^-4 / sqrt(3) at most forward and 2^-3 / sqrt(3) backward, three and
    # six of them on the way to a result.
    assert 0 < distance(got, want) < 0.1
    for a, b in zip(gradients, want_gradients, strict=True):
        assert a.dtype == b.dtype
        assert 0 < distance(a, b) < 0.2


def test_hopper_multiplies_in_eight_bits():
    """cuBLAS's product for 8-bit floats: one forward and two backward for each of two projections."""
    try:
        device = hopper_devices()[0]
    except RuntimeError as error:
        pytest.skip(str(error))
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = ((1, 256, 128), (128, 256), (128, 256), (256, 128))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    lowered = jax.jit(feed_forward("float8")).trace(*arguments).lower(lowering_platforms=("cuda",))
    options = compiler_options("gpu", ExecutionConfig(products="float8"))
    text = lowered.compile(compiler_options=options).as_text()
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 6


def test_compiler_options_are_for_gpus():
    assert compiler_options("cpu", ExecutionConfig(products="float8")) == {}
    assert compiler_options("gpu", ExecutionConfig()) == {}
