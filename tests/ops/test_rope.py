"""Rotary embedding: its formula, what it leaves invariant, Llama 3's scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config import Llama3RopeScalingConfig, RopeConfig
from slmjax.ops.rope import apply_rope, rope_frequencies


@pytest.fixture(autouse=True)
def strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_rotates_channel_pairs_as_complex_numbers():
    frequencies = rope_frequencies(8, RopeConfig(theta=100.0))
    np.testing.assert_allclose(frequencies, 100.0 ** (-np.arange(4) / 4), rtol=1e-6)
    x_BTNH, positions_BT = normal(0, 2, 3, 2, 8), jnp.array([[0, 1, 2], [5, 6, 300]])
    x = np.asarray(x_BTNH, np.float64)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
        1j * np.asarray(positions_BT)[..., None, None] * frequencies.astype(np.float64)
    )
    want_BTNH = np.concatenate((turned.real, turned.imag), axis=-1)
    np.testing.assert_allclose(apply_rope(x_BTNH, positions_BT, frequencies), want_BTNH, atol=1e-4)


def test_scores_depend_on_distances_alone():
    frequencies = rope_frequencies(8, RopeConfig())
    q_BTNH, k_BTNH = normal(0, 1, 5, 1, 8), normal(1, 1, 5, 1, 8)

    def scores(shift):
        positions_BT = jnp.arange(5)[None] + shift
        q, k = (apply_rope(x, positions_BT, frequencies) for x in (q_BTNH, k_BTNH))
        return jnp.einsum("BTNH,BSNH->BNTS", q, k)

    np.testing.assert_allclose(scores(0), scores(1000), atol=1e-3)  # angles of 1000 radians in float32
    assert float(jnp.max(jnp.abs(scores(0) - jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH)))) > 0.1


def test_partial_rotation_leaves_the_rest():
    frequencies = rope_frequencies(8, RopeConfig(rotated_fraction=0.5))
    assert frequencies.shape == (2,)
    x_BTNH, positions_BT = normal(0, 1, 3, 2, 8), jnp.arange(3)[None]
    y_BTNH = apply_rope(x_BTNH, positions_BT, frequencies)
    np.testing.assert_array_equal(y_BTNH[..., 4:], x_BTNH[..., 4:])
    np.testing.assert_allclose(y_BTNH[..., :4], apply_rope(x_BTNH[..., :4], positions_BT, frequencies))


def test_bfloat16_heads_are_turned_by_float32_angles():
    """Position 257 is 256 in bfloat16."""
    frequencies = rope_frequencies(8, RopeConfig())
    x_BTNH, positions_BT = normal(0, 1, 1, 2, 8).astype(jnp.bfloat16), jnp.array([[257]])
    y_BTNH = apply_rope(x_BTNH, positions_BT, frequencies)
    assert y_BTNH.dtype == jnp.bfloat16
    want_BTNH = apply_rope(x_BTNH.astype(jnp.float32), positions_BT, frequencies)
    np.testing.assert_allclose(y_BTNH.astype(jnp.float32), want_BTNH, rtol=2.0**-8, atol=1e-6)


def test_llama3_scaling():
    """Written out as in Llama 3.2's release: by wavelength, with the thresholds original_length / factor."""
    scaling = Llama3RopeScalingConfig(factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0)
    frequencies = rope_frequencies(64, RopeConfig(theta=500_000.0))
    want = []
    for frequency in frequencies.astype(np.float64):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            want.append(frequency)
        elif wavelength > 8192 / 1:
            want.append(frequency / 32)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * frequency / 32 + smooth * frequency)
    got = rope_frequencies(64, RopeConfig(theta=500_000.0, scaling=scaling))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert got.dtype == np.float32
    kinds = np.isclose(got, frequencies).sum(), np.isclose(got, frequencies / 32).sum()
    assert min(kinds) > 0
    assert sum(kinds) < 32  # all three cases occur
