"""From logits to a token: temperature, top-k, top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.config import GenerationConfig


class Sampling(NamedTuple):
    """The part of `GenerationConfig` that a compiled program depends on."""

    temperature: float
    top_k: int | None
    top_p: float

    @classmethod
    def of(cls, config: GenerationConfig) -> "Sampling":
        """Takes the fields from `config`."""
        return cls(config.temperature, config.top_k, config.top_p)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns one int32 token a row, drawn with that row's key; the likeliest one at temperature 0."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, sampling)).astype(jnp.int32)


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns logits / temperature, with -inf for tokens outside the top k or the top p. Needs temperature > 0.

    top-k comes first (Fan et al. 2018, arXiv:1805.04833): exactly k tokens, of equal logits the lower ids. top-p
    (Holtzman et al. 2019, arXiv:1904.09751) keeps the likeliest of those until their probability reaches p, one at
    least.
    """
    logits_BV = logits_BV.astype(jnp.float32) / sampling.temperature
    V = logits_BV.shape[-1]
    k = V if sampling.top_k is None else min(sampling.top_k, V)
    if k == V and sampling.top_p >= 1:
        return logits_BV
    kept_BK, ids_BK = jax.lax.top_k(logits_BV, k)
    probabilities_BK = jax.nn.softmax(kept_BK, axis=-1)
    before_BK = jnp.cumsum(probabilities_BK, axis=-1) - probabilities_BK  # of all likelier tokens
    if sampling.top_p < 1:
        # The likeliest stays even where a tiny p is below rounding.
        outside_BK = (before_BK >= sampling.top_p).at[:, 0].set(False)
        kept_BK = jnp.where(outside_BK, -jnp.inf, kept_BK)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.full_like(logits_BV, -jnp.inf).at[rows_B1, ids_BK].set(kept_BK)
