"""The gated feed-forward with Hopper's kernels against the one without: on the CPU with stand-ins for the kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config import MeshConfig
from slmjax.kernels import targets
from slmjax.kernels.hopper import gated_matmul, gated_matmul_gradient, norm_gradient
from slmjax.ops.gated import gated_feed_forward
from slmjax.ops.norm import norm_branch, norm_gradient_reference
from slmjax.parallel import batch_sharding, make_mesh, on_mesh

B, T, D, F = 8, 128, 128, 192  # a kernel needs 128 rows of each device


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def activated(in_XG, factor_X):
    gate_XF, up_XF = jnp.split(in_XG.astype(jnp.float32) * factor_X[:, None], 2, axis=1)
    return jax.nn.silu(gate_XF) * up_XF


def plain_product(x_XD, w_DG, factor_X):
    in_XG = x_XD @ w_DG
    return in_XG, activated(in_XG, factor_X).astype(x_XD.dtype)


def plain_gradient(dy_XD, w_FD, in_XG, factor_X, *, with_hidden):
    dh_XF = jnp.einsum("XD,FD->XF", dy_XD, w_FD, preferred_element_type=jnp.float32)
    h_XF, pull = jax.vjp(lambda in_XG: activated(in_XG, factor_X), in_XG)
    (din_XG,) = pull(dh_XF)
    return (din_XG, h_XF.astype(dy_XD.dtype)) if with_hidden else din_XG


def plain_norm_gradient(dx_XD, x_XD, factor_X, dresidual_XD):
    return norm_gradient_reference(dx_XD, x_XD, factor_X[:, None], dresidual_XD)


@pytest.fixture
def stand_ins(monkeypatch):
    """Kernels are chosen as on a Hopper GPU; the names of those that were called."""
    called = []

    def noted(name, function):
        return lambda *arguments, **options: (called.append(name), function(*arguments, **options))[1]

    monkeypatch.setattr(gated_matmul, "gated_matmul", noted("product", plain_product))
    monkeypatch.setattr(gated_matmul_gradient, "gated_matmul_gradient", noted("gradient", plain_gradient))
    monkeypatch.setattr(norm_gradient, "norm_gradient", noted("norm", plain_norm_gradient))
    return called


def arguments(gain=True, dtype=jnp.bfloat16):
    x_BTD = normal(0, B, T, D, dtype=dtype) * jnp.array([0.1, 1.0], dtype).repeat(B // 2)[:, None, None]
    gain_D = 1 + normal(1, D, dtype=jnp.float32) / 2 if gain else None
    shapes = ((D, F), (D, F), (F, D))
    weights = [normal(i + 2, *shape, dtype=dtype) / shape[0] ** 0.5 for i, shape in enumerate(shapes)]
    return x_BTD, gain_D, *weights


def feed_forward(x_BTD, gain_D, *weights, **options):
    residual_BTD, branch = norm_branch(x_BTD, gain_D, eps=1e-5)
    return residual_BTD + gated_feed_forward(branch, *weights, **{"activation": "silu", **options})


def value_and_gradients(function, arguments):
    def loss(*arguments):
        y_BTD = function(*arguments)
        return jnp.sum(jnp.sin(y_BTD.astype(jnp.float32))), y_BTD

    numbers = tuple(i for i, argument in enumerate(arguments) if argument is not None)
    (_, y_BTD), gradients = jax.jit(jax.value_and_grad(loss, argnums=numbers, has_aux=True))(*arguments)
    return y_BTD, *gradients


def wide(arrays):
    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)


def errors(got, want):
    """Norms of differences over norms."""
    wide = [[np.asarray(x, np.float64) for x in arrays] for arrays in (got, want)]
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*wide, strict=True)]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("gain", [True, False], ids=["gain", "no gain"])
def test_values_and_gradients_are_no_worse_than_without_the_kernels(stand_ins, recompute, gain):
    function = functools.partial(feed_forward, recompute=recompute)
    plain = value_and_gradients(function, arguments(gain))
    assert stand_ins == []
    with targets.compiling_for_hopper():
        fused = value_and_gradients(functools.partial(feed_forward, recompute=recompute), arguments(gain))
    assert stand_ins == ["product", "gradient", "norm"]
    exact = value_and_gradients(function, wide(arguments(gain)))
    assert [x.dtype for x in fused] == [x.dtype for x in plain]
    for ours, theirs in zip(errors(fused, exact), errors(plain, exact), strict=True):
        assert 0 < ours < 1.1 * theirs


@pytest.mark.multidevice
def test_each_device_multiplies_its_own_rows(stand_ins):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with targets.compiling_for_hopper():
        whole = value_and_gradients(feed_forward, arguments())
        x_BTD, *others = arguments()
        divided = value_and_gradients(
            on_mesh(mesh, feed_forward), (jax.device_put(x_BTD, batch_sharding(mesh)), *others)
        )
    assert stand_ins == ["product", "gradient", "norm"] * 2
    assert divided[1].sharding.spec == batch_sharding(mesh).spec
    # Sums over rows in another order, rounded to bfloat16 on the way.
    assert max(errors(divided, whole)) < float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.multidevice
@pytest.mark.parametrize(("length", "fused"), [(128, True), (64, False), (132, False)])
def test_the_rows_of_one_device_decide(stand_ins, length, fused):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    _, *others = arguments()
    x_BTD = jax.ShapeDtypeStruct((8, length, D), jnp.bfloat16)
    with targets.compiling_for_hopper():
        jax.eval_shape(on_mesh(mesh, feed_forward), x_BTD, *others)
    assert stand_ins == ["product"] * fused


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"activation": "gelu"}, jnp.bfloat16), ({"products": "float8"}, jnp.bfloat16), ({}, jnp.float32)],
    ids=["another activation", "8-bit products", "float32"],
)
def test_what_the_kernels_are_not_built_for_is_computed_without(stand_ins, options, dtype):
    with targets.compiling_for_hopper():
        jax.eval_shape(functools.partial(feed_forward, **options), *arguments(dtype=dtype))
        jax.eval_shape(lambda x, gain, *weights: gated_feed_forward(x, *weights, activation="silu"), *arguments())
        x_BTD, *others = arguments()
        jax.eval_shape(feed_forward, x_BTD[:1, :1], *others)
    assert stand_ins == []


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_on_the_device(recompute):
    function = functools.partial(feed_forward, recompute=recompute)
    fused = value_and_gradients(function, arguments())
    exact = value_and_gradients(function, wide(arguments()))
    assert max(errors(fused, exact)) < 1e-2
