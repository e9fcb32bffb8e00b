"""Top-k routing of tokens to experts: which, with what weight, and how even the load is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.config import MoEConfig


class Routed(NamedTuple):
    """The router's decision for X tokens.

    Attributes:
      ids_XK: int32, the k experts of each token, best first.
      weights_XK: float32 factors of their outputs.
      load_E: float32, tokens that each expert received.
      balance_loss: E * sum_e(share of assignments to e * mean probability of e); 1 when even.
      router_z: mean of logsumexp(logits)^2.
    """

    ids_XK: jax.Array
    weights_XK: jax.Array
    load_E: jax.Array
    balance_loss: jax.Array
    router_z: jax.Array


def route(
    logits_XE: jax.Array,
    config: MoEConfig,
    *,
    balance_bias_E: jax.Array | None = None,
    valid_X: jax.Array | None = None,
) -> Routed:
    """Sends every token to its top k experts (Shazeer et al. 2017, arXiv:1701.06538).

    The balancing loss is that of Fedus et al. 2021 (arXiv:2101.03961, eq. 4) with top-k assignments, the z-loss that of
    Zoph et al. 2022 (arXiv:2202.08906, eq. 5).

    Args:
      logits_XE: float32 router outputs.
      config: how to score and choose.
      balance_bias_E: added to the scores for the choice only, not for the weights (Wang et al. 2024, arXiv:2408.15664).
      valid_X: False for padding, which counts neither for the load nor for the losses; None counts all.
    """
    E, k = config.num_experts, config.top_k
    if config.scoring == "softmax":
        scores_XE = jax.nn.softmax(logits_XE, axis=-1)
        probabilities_XE = scores_XE
    else:
        scores_XE = jax.nn.sigmoid(logits_XE)
        probabilities_XE = scores_XE / jnp.sum(scores_XE, axis=-1, keepdims=True)
    chosen_by_XE = scores_XE if balance_bias_E is None else scores_XE + balance_bias_E[None]
    _, ids_XK = jax.lax.top_k(jax.lax.stop_gradient(chosen_by_XE), k)
    weights_XK = jnp.take_along_axis(scores_XE, ids_XK, axis=-1)
    if config.normalise_top_k:
        weights_XK = weights_XK / jnp.maximum(jnp.sum(weights_XK, axis=-1, keepdims=True), 1e-20)
    counted_X = jnp.ones(logits_XE.shape[0], jnp.float32) if valid_X is None else valid_X.astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(counted_X), 1.0)
    # Comparisons that XLA sums without storing them; whole numbers, so that the order of the sum does not matter.
    assigned_XKE = ids_XK[:, :, None] == jnp.arange(E)[None, None]
    load_E = jnp.sum(jnp.where(assigned_XKE, counted_X[:, None, None], 0.0), axis=(0, 1))
    mean_probability_E = jnp.sum(probabilities_XE * counted_X[:, None], axis=0) / tokens
    balance_loss = E * jnp.sum(load_E / (tokens * k) * mean_probability_E)
    router_z = jnp.sum(jnp.square(jax.nn.logsumexp(logits_XE, axis=-1)) * counted_X) / tokens
    return Routed(ids_XK.astype(jnp.int32), weights_XK, load_E, balance_loss, router_z)
