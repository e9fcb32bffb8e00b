import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.generate.sampling import Sampling, filter_logits, sample

LOGITS_BV = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 2


def filtered_row(logits_V, temperature, top_k, top_p):
    """The definition, one row at a time."""
    logits_V = logits_V.astype(np.float64) / temperature
    order = np.argsort(-logits_V, kind="stable")[:top_k]
    probabilities = np.exp(logits_V[order] - logits_V[order[0]])
    probabilities /= probabilities.sum()
    keep, mass = [], 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if keep and mass >= top_p:
            break
        keep.append(token)
        mass += probability
    filtered_V = np.full_like(logits_V, -np.inf)
    filtered_V[keep] = logits_V[keep]
    return filtered_V


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 80])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 1.0])
def test_filter_is_the_definition(temperature, top_k, top_p):
    expected = [filtered_row(row, temperature, top_k, top_p) for row in LOGITS_BV]
    filtered = filter_logits(jnp.asarray(LOGITS_BV), Sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(filtered, expected, rtol=1e-6)


def test_equal_logits_keep_exactly_k():
    filtered = filter_logits(jnp.zeros((1, 6)), Sampling(1.0, 2, 1.0))
    assert np.isfinite(filtered).tolist() == [[True, True, False, False, False, False]]


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))
    for top_p, kept in ((0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4)):
        assert np.isfinite(filter_logits(logits, Sampling(1.0, None, top_p))).sum() == kept


def draw(sampling, seed, count=4000):
    probabilities = jnp.array([0.4, 0.3, 0.2, 0.1])
    keys = jax.random.split(jax.random.key(seed), count)
    tokens = sample(jnp.broadcast_to(jnp.log(probabilities), (count, 4)), keys, sampling)
    return np.bincount(tokens, minlength=4) / count


def test_frequencies_follow_the_filtered_distribution():
    # Four standard errors of a share near 1/2 of 4,000 draws.
    tolerance = 4 * 0.5 / 4000**0.5
    np.testing.assert_allclose(draw(Sampling(1.0, None, 1.0), 0), [0.4, 0.3, 0.2, 0.1], atol=tolerance)
    np.testing.assert_allclose(draw(Sampling(1.0, 2, 1.0), 1), [4 / 7, 3 / 7, 0, 0], atol=tolerance)
    squares = np.array([0.4, 0.3, 0.2, 0.1]) ** 2
    np.testing.assert_allclose(draw(Sampling(0.5, None, 1.0), 2), squares / squares.sum(), atol=tolerance)


def test_temperature_zero_and_top_1_are_greedy():
    keys = jax.random.split(jax.random.key(0), 4)
    best = LOGITS_BV.argmax(-1).tolist()
    assert sample(jnp.asarray(LOGITS_BV), keys, Sampling(0.0, None, 1.0)).tolist() == best
    assert sample(jnp.asarray(LOGITS_BV), keys, Sampling(2.0, 1, 1.0)).tolist() == best


def test_a_row_depends_on_its_own_key_only():
    keys = jax.random.split(jax.random.key(0), 4)
    together = sample(jnp.asarray(LOGITS_BV), keys, Sampling(1.0, None, 0.9))
    alone = [
        int(sample(jnp.asarray(LOGITS_BV[i : i + 1]), keys[i : i + 1], Sampling(1.0, None, 0.9))[0]) for i in range(4)
    ]
    assert together.tolist() == alone
