"""The fused loss against plain logits differentiated by JAX."""

import functools
import re

import hopper_simulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_compiler import compiled_for_hopper
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slmjax.config import MeshConfig
from slmjax.kernels.targets import compiling_for_hopper
from slmjax.ops.loss import _logsumexp_once, linear_cross_entropy, linear_cross_entropy_reference, token_losses
from slmjax.parallel.mesh import make_mesh, on_mesh

B, T, D, V = 2, 7, 8, 13


@pytest.fixture(autouse=True)
def strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def inputs(dtype=jnp.float32, V=V):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden_BTD = jax.random.normal(keys[0], (B, T, D), dtype)
    table_VD = jax.random.normal(keys[1], (V, D), dtype)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weights_BT = jax.random.uniform(keys[3], (B, T)).at[0, 2:4].set(0.0).at[1].set(0.0)
    return hidden_BTD, table_VD, targets_BT, weights_BT


def value_and_gradients(function, hidden_BTD, table_VD, targets_BT, weights_BT):
    def loss(hidden_BTD, table_VD):
        sums = function(hidden_BTD, table_VD, targets_BT, weights_BT)
        # Only `loss` carries a gradient; 3 shows that its cotangent is used.
        return 3.0 * sums.loss + sums.nll + sums.z + sums.weight, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden_BTD, table_VD)
    return sums, gradients


OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "softcap and scale": {"logit_softcap": 2.0, "logit_scale": 0.5},
    "all": {"logit_softcap": 3.0, "logit_scale": 1.5, "z_loss": 0.01},
}


@pytest.mark.parametrize("chunk_tokens", [1, 6, 0], ids=["column", "ragged", "whole"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_reference(options, chunk_tokens):
    """Six tokens are three columns of two rows, so that 7 columns need padding."""
    reference = functools.partial(linear_cross_entropy_reference, **options)
    fused = functools.partial(linear_cross_entropy, **options, chunk_tokens=chunk_tokens)
    want, want_gradients = value_and_gradients(reference, *inputs())
    got, got_gradients = value_and_gradients(fused, *inputs())
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        # float32 sums of a few terms of size about 1, in another order.
        np.testing.assert_allclose(a, b, atol=1e-5)
    undifferentiated = fused(*inputs())
    np.testing.assert_allclose(undifferentiated, want, rtol=1e-5)


def test_reference_equals_the_definition():
    hidden_BTD, table_VD, targets_BT, weights_BT = (np.asarray(x, np.float64) for x in inputs())
    logits_BTV = 2.0 * np.tanh(0.5 * (hidden_BTD @ table_VD.T) / 2.0)
    lse_BT = np.log(np.exp(logits_BTV).sum(-1))
    nll = z = 0.0
    for b in range(B):
        for t in range(T):
            nll += weights_BT[b, t] * (lse_BT[b, t] - logits_BTV[b, t, int(targets_BT[b, t])])
            z += weights_BT[b, t] * lse_BT[b, t] ** 2
    sums = linear_cross_entropy_reference(*inputs(), logit_scale=0.5, logit_softcap=2.0, z_loss=0.1)
    np.testing.assert_allclose(sums, (nll + 0.1 * z, nll, z, weights_BT.sum()), rtol=1e-5)


def test_a_batch_without_weight_has_no_loss_and_no_gradient():
    hidden_BTD, table_VD, targets_BT, weights_BT = inputs()
    sums, gradients = value_and_gradients(
        functools.partial(linear_cross_entropy, z_loss=0.1), hidden_BTD, table_VD, targets_BT, 0.0 * weights_BT
    )
    assert not np.any(np.asarray(sums))
    assert not any(np.any(gradient) for gradient in gradients)


def test_certain_predictions_stay_finite():
    """Logits of +-1e4 at and beside the target: losses 0 and 2e4, softmax exactly one-hot."""
    hidden_BTD = jnp.ones((1, 2, 1))
    table_VD = jnp.array([[1e4], [-1e4], [-1e4]])
    targets_BT = jnp.array([[0, 1]])
    sums, (d_hidden_BTD, d_table_VD) = value_and_gradients(
        linear_cross_entropy, hidden_BTD, table_VD, targets_BT, jnp.ones((1, 2))
    )
    np.testing.assert_allclose(sums.nll, 2e4)
    np.testing.assert_allclose(d_hidden_BTD[0, :, 0], [0.0, 3 * 2e4])
    np.testing.assert_allclose(d_table_VD[:, 0], [3.0, -3.0, 0.0])


def test_bfloat16_keeps_statistics_in_float32_and_rounds_gradients_thrice():
    narrow = inputs(jnp.bfloat16)
    wide = (*(x.astype(jnp.float32) for x in narrow[:2]), *narrow[2:])
    options = {"z_loss": 0.01, "logit_softcap": 4.0}
    exact, exact_gradients = value_and_gradients(functools.partial(linear_cross_entropy_reference, **options), *wide)
    fused, gradients = value_and_gradients(functools.partial(linear_cross_entropy, **options, chunk_tokens=4), *narrow)
    assert all(x.dtype == jnp.float32 for x in fused)
    np.testing.assert_allclose(fused, exact, rtol=1e-5)
    for a, b in zip(exact_gradients, gradients, strict=True):
        assert b.dtype == jnp.bfloat16
        # The gradient of the logits, its product and the scaled product: each is rounded to 8 bits, by 2^-9 at most.
        assert float(jnp.linalg.norm((b - a).ravel()) / jnp.linalg.norm(a.ravel())) < 3 * 2.0**-9


def test_rounded_logits_move_the_loss_by_their_rounding():
    hidden_BTD, table_VD, targets_BT, weights_BT = inputs()
    want, want_gradients = value_and_gradients(linear_cross_entropy, hidden_BTD, table_VD, targets_BT, weights_BT)
    rounded = functools.partial(linear_cross_entropy, logits_dtype=jnp.bfloat16)
    got, gradients = value_and_gradients(rounded, hidden_BTD, table_VD, targets_BT, weights_BT)
    # A logit is rounded by 2^-9 of itself; the loss of a token has two terms no larger than the largest logit.
    largest = np.abs(np.asarray(hidden_BTD @ table_VD.T)).max()
    assert 0 < abs(float(got.nll - want.nll)) < 2 * 2.0**-9 * largest * float(want.weight)
    for a, b in zip(gradients, want_gradients, strict=True):
        assert b.dtype == a.dtype
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 2 * 2.0**-9 * largest


def test_logsumexp_in_one_reading_is_that_in_two():
    x = jnp.array([[0.0, 0.0, 0.0], [-1e4, 1e4, 1e4], [3e38, 1.0, -3e38], [-3e38, -3e38, -3e38], [-90.0, 0.1, 3.0]])
    np.testing.assert_allclose(_logsumexp_once(x), jax.nn.logsumexp(x, axis=-1), rtol=1e-6)
    assert np.isnan(np.asarray(_logsumexp_once(jnp.array([[1.0, jnp.nan, 2.0]])))).all()


@pytest.mark.multidevice
def test_the_gradient_of_the_table_is_summed_over_devices_once():
    """Rows over eight devices, the table's D too: as on one device, and no communication in the loop over chunks."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    keys = jax.random.split(jax.random.key(1), 3)
    arguments = (
        jax.random.normal(keys[0], (8, T, D)),
        jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (8, T), 0, V),
        jnp.ones((8, T)),
    )
    function = jax.value_and_grad(lambda *a: linear_cross_entropy(*a, chunk_tokens=2).loss, argnums=(0, 1))
    want = function(*arguments)
    rows, table = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P(None, "fsdp"))
    placed = jax.device_put(arguments, (rows, table, rows, rows))
    compiled = jax.jit(on_mesh(mesh, function), out_shardings=(None, (rows, table))).lower(*placed).compile()
    for got, wanted in zip(jax.tree.leaves(compiled(*placed)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    computations = re.split(r"\n(?=\S)", compiled.as_text())
    (body,) = re.findall(r"body=(%[\w.-]+)", compiled.as_text())
    (loop,) = [text for text in computations if text.startswith(f"{body} ")]
    communicate = re.compile(r" (all-|reduce-scatter|collective)")
    assert "dot_general" in loop
    assert not communicate.search(loop)
    assert any(communicate.search(text) for text in computations)


def test_value_alone_forms_no_gradient():
    """One matrix product without differentiation, three with it; the backward pass has none of its own."""
    arguments = inputs()

    def products(function):
        return jax.jit(function).lower(*arguments).compile().as_text().count(" dot(")

    assert products(lambda *a: linear_cross_entropy(*a).loss) == 1
    assert products(jax.grad(lambda *a: linear_cross_entropy(*a).loss, argnums=(0, 1))) == 3


def test_token_losses_are_the_terms_of_the_sum():
    hidden_BTD, table_VD, targets_BT, weights_BT = inputs()
    options = {"logit_scale": 0.5, "logit_softcap": 2.0}
    want = linear_cross_entropy_reference(hidden_BTD, table_VD, targets_BT, weights_BT, **options)
    for chunk_tokens in (6, 0):
        nll_BT = token_losses(hidden_BTD, table_VD, targets_BT, **options, chunk_tokens=chunk_tokens)
        assert nll_BT.shape == (B, T)
        np.testing.assert_allclose(jnp.sum(nll_BT * weights_BT), want.nll, rtol=1e-5)


def assert_the_kernel_gives_the_reference(options):
    """1152 ids, the fewest of which the last piece of a row is cut off; two chunks, the second padded."""
    arguments = inputs(V=1152)
    want, want_gradients = value_and_gradients(functools.partial(linear_cross_entropy_reference, **options), *arguments)
    got, got_gradients = value_and_gradients(
        functools.partial(linear_cross_entropy, **options, chunk_tokens=8), *arguments
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


SERVED = {"plain": {}, "scale and z-loss": {"logit_scale": 0.5, "z_loss": 0.01}}


@pytest.mark.skipif(not hopper_simulator.AVAILABLE, reason="the simulator of jax 0.10 knows too few operations")
@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_the_kernel_gives_the_reference(options):
    with hopper_simulator.simulated(), compiling_for_hopper():
        assert_the_kernel_gives_the_reference(options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
def test_the_kernel_gives_the_reference_on_the_device(options):
    with jax.default_matmul_precision("float32"):
        assert_the_kernel_gives_the_reference(options)


@pytest.mark.parametrize(
    ("V", "options", "served"),
    [(1152, {}, True), (1152, {"logit_softcap": 30.0}, False), (1150, {}, False), (1152, {"logit_scale": -1.0}, False)],
)
def test_the_kernel_is_chosen_where_it_serves(V, options, served):
    gradient = jax.grad(lambda *a: linear_cross_entropy(*a, **options).loss, argnums=(0, 1))
    with compiling_for_hopper():
        text = compiled_for_hopper(gradient, *inputs(V=V)).as_text()
    assert ("hopper_cross_entropy" in text) == served
