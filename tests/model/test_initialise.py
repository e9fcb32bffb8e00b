"""The initialisation table, row by row, and that a weight's values depend on its own path and shape alone."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import config as configs
from slmjax import model
from slmjax.model.initialise import standard_deviation

MOE = configs.MoEConfig(num_experts=4, top_k=2, hidden=48, shared_hidden=48, balance_bias_rate=0.1)
# One weight of each row and what its standard deviation is a multiple of.
ROWS = {
    "embed_VD": "embedding",
    "unembed_VD": "embedding",
    "group_0/layer_0/mixer/w_q_DNH": "matrix",
    "group_0/layer_0/feed_forward/w_gate_DF": "matrix",
    "group_0/layer_1/feed_forward/router_DE": "matrix",
    "group_0/layer_1/feed_forward/shared/w_up_DF": "matrix",
    "group_0/layer_0/mixer/w_o_NHD": "output",
    "group_0/layer_0/feed_forward/w_down_FD": "output",
    "group_0/layer_1/feed_forward/w_down_EFD": "output",
    "group_0/layer_1/feed_forward/shared/w_down_FD": "output",
}
ONES = ["final_norm/gain_D", "group_0/layer_0/mixer_norm/gain_D", "group_0/layer_0/mixer/q_norm/gain_D"]
ZEROS = [
    "group_0/layer_1/mixer_norm/gain_offset_D",
    "group_0/layer_0/mixer/b_q_NH",
    "group_0/layer_0/mixer/sinks_N",
    "group_0/layer_0/feed_forward/b_down_D",
    "group_0/layer_1/feed_forward/balance_bias_E",
]


def flat(params):
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(part.key for part in path): np.asarray(leaf) for path, leaf in paths}


@pytest.fixture(scope="module")
def config(tiny_layer, tiny_model):
    mixer = {"num_heads": 8, "head_dim": 8, "qkv_bias": True, "sinks": True, "qk_norm": configs.RMSNormConfig()}
    return tiny_model(
        tiny_layer(mixer=mixer, feed_forward={"hidden": 96, "bias": True}),
        tiny_layer(feed_forward=MOE, norm=configs.RMSNormConfig(offset=True)),
        width=64,
        vocab_size=128,
        tied_embeddings=False,
    )


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (configs.InitConfig(), {"matrix": 0.02, "embedding": 0.02, "output": 0.02}),
        (configs.InitConfig(std=None), {"matrix": 64**-0.5, "embedding": 64**-0.5, "output": 64**-0.5}),
        (
            configs.InitConfig(std=0.1, embedding_std=0.7, scale_residual_outputs=True),
            {"matrix": 0.1, "embedding": 0.7, "output": 0.1 / (2 * 4) ** 0.5},
        ),
        (configs.InitConfig(zero_residual_outputs=True), {"matrix": 0.02, "embedding": 0.02, "output": 0.0}),
    ],
)
def test_each_row_of_the_table(config, init, expected):
    weights = flat(model.init(jax.random.key(3), dataclasses.replace(config, init=init)))
    for name, row in ROWS.items():
        # The smallest has 512 values, whose spread is known to 1 / sqrt(2 * 512) = 3 %.
        np.testing.assert_allclose(weights[name].std(), expected[row], rtol=0.1, err_msg=name)
        assert abs(weights[name].mean()) <= 5 * expected[row] / weights[name].size ** 0.5
    for name in ONES:
        assert (weights[name] == 1).all(), name
    for name in ZEROS:
        assert (weights[name] == 0).all(), name
    assert all(weight.dtype == np.float32 for weight in weights.values())


def test_executed_layers_count_in_the_scale_of_residual_outputs(config):
    init = configs.InitConfig(std=1.0, scale_residual_outputs=True)
    twice = dataclasses.replace(config, init=init, block_repeats=2)
    assert standard_deviation("w_o_NHD", twice) == (2 * 8) ** -0.5


def test_no_two_weights_are_equal_and_the_key_decides(config):
    first, second = (flat(model.init(jax.random.key(seed), config)) for seed in (0, 1))
    drawn = [name for name in first if first[name].std() > 0]
    heads = {name: first[name].ravel()[:8].tobytes() for name in drawn}
    assert len(set(heads.values())) == len(drawn)
    assert all((first[name] != second[name]).any() for name in drawn)
    for name in drawn:
        if name.startswith("group_0"):
            assert (first[name][0] != first[name][1]).any(), "stored layers differ"


def test_adding_parts_changes_no_other_weight(config, tiny_layer, tiny_model):
    layer = tiny_layer(mixer={"num_heads": 8, "head_dim": 8}, feed_forward={"hidden": 96})
    plain = tiny_model(layer, width=64, vocab_size=128)
    key = jax.random.key(0)
    before, after = flat(model.init(key, plain)), flat(model.init(key, config))
    assert set(before) < set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


def test_initial_logits_are_near_uniform(config):
    params = model.init(jax.random.key(0), config)
    tokens_BT = np.arange(16, dtype=np.int32)[None]
    logits_BTV = model.logits(params, config, model.apply(params, config, tokens_BT).hidden_BTD)
    entropy_BT = -jnp.sum(jax.nn.softmax(logits_BTV) * jax.nn.log_softmax(logits_BTV), axis=-1)
    np.testing.assert_allclose(entropy_BT, np.log(config.vocab_size), rtol=0.01)


def test_weight_that_the_table_does_not_know_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no initialisation is known for a weight called 'kernel'"):
        standard_deviation("kernel", tiny_model())


LOGICAL_AXES = {
    "D": {"embed", "norm"},
    "N": {"heads"},
    "K": {"kv_heads"},
    "H": {"head_dim"},
    "F": {"mlp"},
    "E": {"expert"},
    "V": {"vocab"},
}


def test_names_shapes_and_logical_axes_agree(config):
    sizes = {"D": {64, 8}, "N": {8, 4}, "K": {2}, "H": {8, 6}, "F": {96, 48}, "E": {4}, "V": {128}}
    paths, _ = jax.tree_util.tree_flatten_with_path(model.specs(config))
    assert len(paths) > 30
    for path, spec in paths:
        dims = re.fullmatch(r"[a-z_]+_([A-Z]+)", path[-1].key)[1]
        if path[0].key.startswith("group_"):
            assert (spec.shape[0], spec.logical_axes[0]) == (2, "layers")
            spec = dataclasses.replace(spec, shape=spec.shape[1:], logical_axes=spec.logical_axes[1:])
        assert len(dims) == len(spec.shape)
        for dim, size, axis in zip(dims, spec.shape, spec.logical_axes, strict=True):
            assert size in sizes[dim], path
            assert axis in LOGICAL_AXES[dim], path


def test_param_spec_wants_a_name_for_each_dimension():
    with pytest.raises(ValueError, match="other dimensions than logical axes"):
        model.ParamSpec((2, 3), ("embed",))
