import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from slmjax import axes
from slmjax.config import MeshConfig
from slmjax.parallel import (
    ACTIVATION_RULES,
    FALLBACK_ORDER,
    PARAMETER_RULES,
    batch_sharding,
    constrain,
    host_batch_to_global,
    make_mesh,
    process_rows,
    sharding_for,
    tree_shardings,
)

pytestmark = pytest.mark.multidevice


class Spec(NamedTuple):
    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=4))


def test_every_logical_axis_has_one_rule_and_every_mesh_axis_is_in_the_mesh(mesh):
    mesh_axes = {axes.DATA, axes.FSDP}
    logical = {value for name, value in vars(axes).items() if name.isupper() and isinstance(value, str)} - mesh_axes
    assert set(PARAMETER_RULES) | set(ACTIVATION_RULES) == logical
    assert not set(PARAMETER_RULES) & set(ACTIVATION_RULES)
    assert set(FALLBACK_ORDER) < set(PARAMETER_RULES)
    named = {axis for rule in (*PARAMETER_RULES.values(), *ACTIVATION_RULES.values()) for axis in rule}
    assert named == mesh_axes == set(mesh.axis_names)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Spec((32, 8), (axes.VOCAB, axes.EMBED)), P(None, "fsdp")),
        (Spec((3, 8, 2, 4), (axes.LAYERS, axes.EMBED, axes.HEADS, axes.HEAD_DIM)), P(None, "fsdp")),
        (Spec((3, 12, 8), (axes.LAYERS, axes.MLP, axes.EMBED)), P(None, None, "fsdp")),
        (Spec((3, 8), (axes.LAYERS, axes.NORM)), P()),
        (Spec((8, 5), (axes.EMBED, None)), P("fsdp")),
        (Spec((), ()), P()),
    ],
)
def test_embed_lies_on_fsdp(mesh, caplog, spec, expected):
    with caplog.at_level(logging.INFO):
        assert sharding_for(spec, mesh).spec == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("spec", "expected", "said"),
    [
        (Spec((32, 6), (axes.VOCAB, axes.EMBED)), P("fsdp"), "vocab is sharded"),
        (Spec((6, 3, 8), (axes.EMBED, axes.HEADS, axes.HEAD_DIM)), P(None, None, "fsdp"), "head_dim is sharded"),
        (Spec((6, 4, 8), (axes.EMBED, axes.HEADS, axes.HEAD_DIM)), P(None, "fsdp"), "heads is sharded"),
        (Spec((4, 6), (axes.LAYERS, axes.EMBED)), P(), "replicated"),
        (Spec((5, 6), (axes.MLP, axes.EMBED)), P(), "replicated"),
    ],
)
def test_a_size_that_does_not_divide_falls_back_and_says_so_once(mesh, caplog, spec, expected, said):
    assert sharding_for(spec, mesh, name="blocks/w").spec == expected
    (record,) = caplog.records
    assert record.getMessage().startswith("blocks/w: embed of size 6 is not a multiple of the 4 devices")
    assert said in record.getMessage()


def test_two_dims_on_one_mesh_axis_are_refused_by_name(mesh):
    specs = {"layers": [{"mixer": Spec((8, 8), (axes.EMBED, axes.EMBED))}]}
    with pytest.raises(ValueError, match=r"layers/0/mixer.*'embed', 'embed'.*mesh axis 'fsdp'"):
        tree_shardings(specs, mesh)


def test_unknown_axes_and_wrong_lengths_are_refused_by_name(mesh):
    with pytest.raises(ValueError, match=r"w_q: no rule for logical axes \['emebd'\]; known are .*'embed'"):
        sharding_for(Spec((8,), ("emebd",)), mesh, name="w_q")
    with pytest.raises(ValueError, match=r"w_q: shape \(8, 8\) and logical axes \('embed',\) differ in length"):
        sharding_for(Spec((8, 8), (axes.EMBED,)), mesh, name="w_q")


def test_tree_keeps_its_structure_and_places_arrays(mesh):
    specs = {"embed": Spec((32, 8), (axes.VOCAB, axes.EMBED)), "norm": {"gain": Spec((8,), (axes.NORM,))}}
    shardings = tree_shardings(specs, mesh)
    params = {"embed": np.ones((32, 8), np.float32), "norm": {"gain": np.ones((8,), np.float32)}}
    placed = jax.device_put(params, shardings)
    assert {shard.data.shape for shard in placed["embed"].addressable_shards} == {(32, 2)}
    assert {shard.data.shape for shard in placed["norm"]["gain"].addressable_shards} == {(8,)}


def test_host_batch_becomes_global_rows_in_order(mesh):
    assert process_rows(16, mesh) == tuple(range(16))
    batch = {"tokens": np.arange(48, dtype=np.int32).reshape(16, 3)}
    tokens_BT = host_batch_to_global(batch, mesh)["tokens"]
    assert tokens_BT.sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in tokens_BT.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(tokens_BT, batch["tokens"])


def test_a_batch_that_does_not_divide_names_both_numbers(mesh):
    with pytest.raises(ValueError, match=r"batch_size 12 is not a multiple of the 8 devices on mesh axes"):
        process_rows(12, mesh)


def test_constrain_shards_rows_and_is_the_identity_on_one_device(mesh):
    x_BTD = jnp.ones((8, 2, 4))
    logical = (axes.BATCH, axes.LENGTH, axes.ACT_EMBED)
    constrained = jax.jit(lambda x_BTD: constrain(mesh)(x_BTD * 2, logical))(x_BTD)
    assert {shard.data.shape for shard in constrained.addressable_shards} == {(1, 2, 4)}
    assert constrain(make_mesh(MeshConfig(), jax.devices()[:1]))(x_BTD, logical) is x_BTD
    with pytest.raises(ValueError, match="activation: no rule for logical axes"):
        constrain(mesh)(x_BTD, (axes.EMBED, None, None))


def test_sharded_loss_and_gradients_equal_one_device(mesh):
    """A two-layer loss with weights on fsdp and rows on both axes; float32 sums differ only in their order."""
    rng = np.random.default_rng(0)
    specs = {"w_in": Spec((8, 12), (axes.EMBED, axes.MLP)), "w_out": Spec((12, 8), (axes.MLP, axes.EMBED))}
    params = {name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()}
    x_BTD = rng.normal(size=(8, 3, 8)).astype(np.float32)

    def loss_and_gradients(mesh):
        place = constrain(mesh)

        def loss(params, x_BTD):
            h_BTF = jax.nn.relu(x_BTD @ params["w_in"])
            return jnp.mean(place(h_BTF @ params["w_out"], (axes.BATCH, axes.LENGTH, axes.ACT_EMBED)) ** 2)

        shardings = tree_shardings(specs, mesh)
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        return step(jax.device_put(params, shardings), host_batch_to_global(x_BTD, mesh))

    one = loss_and_gradients(make_mesh(MeshConfig(), jax.devices()[:1]))
    eight = loss_and_gradients(mesh)
    assert eight[1]["w_in"].addressable_shards[0].data.shape == (2, 12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, eight)
