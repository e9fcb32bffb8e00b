"""Tiny models whose dimensions all differ, so that a confusion of two of them cannot pass."""

import jax
import numpy as np
import pytest

from slmjax import config as configs
from slmjax import model

VOCAB, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 37, 16, 20, 4, 2, 6


def tiny_layer(*, mixer=None, feed_forward=None, **layer):
    """Returns a layer; `mixer` and `feed_forward` are fields that differ (the latter may be a config)."""
    if not isinstance(feed_forward, configs.MoEConfig):
        feed_forward = configs.FeedForwardConfig(**{"hidden": HIDDEN, **(feed_forward or {})})
    heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "rope": configs.RopeConfig(theta=50.0)}
    return configs.LayerConfig(
        mixer=configs.AttentionConfig(**{**heads, **(mixer or {})}),
        feed_forward=feed_forward,
        **{"norm": configs.RMSNormConfig(), **layer},
    )


def tiny_model(*pattern, **fields):
    """Returns a model of two layers unless `repeats` says otherwise."""
    fields = {"vocab_size": VOCAB, "width": WIDTH, "repeats": 2, "final_norm": configs.RMSNormConfig()} | fields
    return configs.ModelConfig(pattern=pattern or (tiny_layer(),), **fields)


def random_params(config, seed=0):
    """Returns parameters none of which is constant, large enough that softmaxes are not flat; nothing is compiled."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: jax.device_put(rng.normal(scale=0.4, size=spec.shape).astype(np.float32)), model.specs(config)
    )


@pytest.fixture(autouse=True, scope="package")
def _fast_compilation():
    """Nearly all of the time here is compilation, and optimising tiny models is twice as long as not."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(name="tiny_layer", scope="session")
def _tiny_layer():
    return tiny_layer


@pytest.fixture(name="tiny_model", scope="session")
def _tiny_model():
    return tiny_model


@pytest.fixture(name="random_params", scope="session")
def _random_params():
    return random_params
