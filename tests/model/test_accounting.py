"""FLOPs, visible keys and cache bytes against the mask, the tree and the compiler. Parameters: tests/config."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import config as configs
from slmjax import model
from slmjax.model.accounting import cache_bytes_per_token, matmul_parameters
from slmjax.model.plan import LayerGroup, plan, stored_layers
from slmjax.ops.mask import AttentionMask, dense

MOE = configs.MoEConfig(num_experts=6, top_k=2, hidden=9, shared_hidden=5)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 20])
def test_visible_keys_are_those_of_the_mask(window):
    length = 8
    documents_BT = np.array([[1, 1, 1, 1, 1, 1, 2, 2], [1, 2, 2, 2, 2, 0, 0, 0]], np.int32)
    mask = AttentionMask(window=window)
    expected = np.sum(dense(mask, 1, length, length)) / length
    assert model.causal_visible_keys(length, window) == expected
    packed = dataclasses.replace(mask, q_documents_BT=documents_BT, k_documents_BS=documents_BT)
    assert model.packed_visible_keys(documents_BT, window) == np.sum(dense(packed, 2, length, length)) / (2 * length)


def test_matrix_weights_are_those_of_the_tree_for_each_execution(tiny_layer, tiny_model):
    biased = (tiny_layer(mixer={"qkv_bias": True}), tiny_layer(feed_forward={"bias": True}))
    config = tiny_model(*biased, block_repeats=3, prefix=(tiny_layer(),))
    paths, _ = jax.tree_util.tree_flatten_with_path(model.specs(config))
    in_layers = sum(math.prod(spec.shape) for path, spec in paths if path[-1].key.startswith("w_"))
    assert matmul_parameters(config) == 3 * in_layers + config.vocab_size * config.width
    shared = tiny_model(share_feed_forward=True)
    assert matmul_parameters(shared) == matmul_parameters(dataclasses.replace(shared, share_feed_forward=False))


def test_a_mixture_counts_the_experts_that_a_token_passes(tiny_layer, tiny_model):
    config = tiny_model(tiny_layer(feed_forward=MOE), repeats=1)
    dense_of = tiny_model(tiny_layer(feed_forward={"hidden": 2 * 9 + 5}), repeats=1)
    router = config.width * 6
    assert matmul_parameters(config) == matmul_parameters(dense_of) + router
    idle = 4 * 3 * config.width * 9
    count = model.count_parameters(config)
    assert count.total - count.active == idle


def test_flops_are_those_that_the_compiler_counts(tiny_model):
    config = tiny_model(width=64, vocab_size=512, repeats=1)
    length, rows = 64, 2
    tokens_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def forward(params, tokens_BT):
        out = model.apply(params, config, tokens_BT, execution=configs.ExecutionConfig(attention="reference"))
        return model.logits(params, config, out.hidden_BTD)

    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), model.specs(config))
    counted = jax.jit(forward).lower(params, tokens_BT).cost_analysis()["flops"]
    # The reference computes every score, seen or not; the forward pass is a third; norms and softmax are the rest.
    expected = model.flops_per_token(config, lambda window: length) / 3 * rows * length
    assert expected < counted < 1.1 * expected


def test_cache_bytes_are_those_of_the_cache(tiny_layer, tiny_model):
    config = tiny_model(tiny_layer(), tiny_layer(mixer={"num_kv_heads": 1}), prefix=(tiny_layer(),), block_repeats=2)
    cache = jax.eval_shape(lambda: model.make_cache(config, 3, 11, jnp.bfloat16))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert cache_bytes_per_token(config) == total / (3 * 11)


def test_plan_stacks_equal_layers_in_the_order_of_execution(tiny_layer, tiny_model):
    first, local, whole = tiny_layer(feed_forward={"hidden": 9}), tiny_layer(mixer={"window": 3}), tiny_layer()
    config = tiny_model(local, whole, repeats=4, prefix=(first, first, local))
    assert plan(config) == (LayerGroup((first,), 2), LayerGroup((local,), 1), LayerGroup((local, whole), 4))
    written_out = [layer for group in plan(config) for layer in group.unit * group.count]
    assert tuple(written_out) == stored_layers(config) == (first, first, local) + 4 * (local, whole)
    assert (config.num_stored_layers, config.num_layers) == (11, 11)
    assert dataclasses.replace(config, block_repeats=2).num_layers == 22
