"""Each device its own rows: what the function sees, and the same numbers and gradients as without a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from slmjax import axes
from slmjax.config import MeshConfig
from slmjax.ops.partition import over_batch
from slmjax.parallel import batch_sharding, make_mesh, on_mesh

pytestmark = pytest.mark.multidevice

B, D = 16, 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=4))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@jax.custom_vjp
def product(x_BD, w_DD):
    return x_BD @ w_DD


product.defvjp(
    lambda x_BD, w_DD: (x_BD @ w_DD, (x_BD, w_DD)), lambda saved, dy_BD: (dy_BD @ saved[1].T, saved[0].T @ dy_BD)
)


def rank_of_rows(x_B, tree, nothing, shift_1):
    """Depends on which rows the function sees together, unlike what the library computes."""
    assert nothing is None
    return {"rank": jnp.argsort(x_B) + shift_1, "rows": jnp.full_like(x_B, len(tree["x"]))}


def test_a_device_sees_its_own_rows_and_all_that_is_replicated(mesh):
    x_B = -jnp.arange(B, dtype=jnp.float32)

    def ranked(x_B):
        return over_batch(rank_of_rows, (x_B, {"x": x_B}, None), (jnp.ones(1, jnp.int32),))

    whole, divided = jax.jit(ranked)(x_B), jax.jit(on_mesh(mesh, ranked))(jax.device_put(x_B, batch_sharding(mesh)))
    np.testing.assert_array_equal(whole["rank"], np.arange(B)[::-1] + 1)
    np.testing.assert_array_equal(divided["rank"], np.tile([2, 1], B // 2))
    np.testing.assert_array_equal(divided["rows"], np.full(B, B / 8))
    assert divided["rank"].sharding.spec == batch_sharding(mesh).spec


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_equal_those_without_a_mesh_in_scan_and_remat(mesh, dtype):
    def loss(x_BD, w_DD, gain_D):
        def layer(x_BD, _):
            def function(x_BD, nothing, w_DD, gain_D):
                return jnp.tanh(product(x_BD, w_DD) * gain_D[None])

            return over_batch(function, (x_BD, None), (w_DD, gain_D)), None

        return jnp.sum(jnp.square(jax.lax.scan(jax.checkpoint(layer), x_BD, None, length=2)[0].astype(jnp.float32)))

    # Numbers of few bits, so that bfloat16 rounds only in the gradients' sums.
    arrays = [
        jnp.round(4 * normal(seed, *shape)).astype(dtype) / 8 for seed, shape in enumerate([(B, D), (D, D), (D,)])
    ]
    both = jax.value_and_grad(loss, argnums=(0, 1, 2))
    want = jax.jit(both)(*arrays)
    got = jax.jit(on_mesh(mesh, both))(jax.device_put(arrays[0], batch_sharding(mesh)), *arrays[1:])
    tolerance = 1e-6 if dtype == jnp.float32 else 2.0**-6  # sums of up to 16 terms, in another order
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_inside_a_shard_map_and_on_one_device_it_is_a_plain_call(mesh):
    seen = []

    def function(x_B):
        seen.append(x_B.shape[0])
        return x_B * 2

    spec = PartitionSpec(axes.BATCH_MESH_AXES)
    mapped = jax.shard_map(lambda x_B: over_batch(function, (x_B,)), mesh=mesh, in_specs=spec, out_specs=spec)
    alone = on_mesh(make_mesh(MeshConfig(), jax.devices()[:1]), functools.partial(over_batch, function))
    np.testing.assert_array_equal(jax.jit(mapped)(jnp.arange(B)), 2 * jnp.arange(B))
    np.testing.assert_array_equal(alone((jnp.arange(B),)), 2 * jnp.arange(B))
    assert seen == [B // 8, B]


def test_rows_that_do_not_divide_or_differ_are_refused(mesh):
    on_eight = on_mesh(mesh, functools.partial(over_batch, lambda *arrays: arrays[0]))
    with pytest.raises(ValueError, match=r"a multiple of the 8 devices on mesh axes \('data', 'fsdp'\), got \[12\]"):
        on_eight((jnp.ones(12),))
    with pytest.raises(ValueError, match=r"got \[1, 16\]; .* pass what has no rows as replicated"):
        on_eight((jnp.ones(B), jnp.ones(1)))
