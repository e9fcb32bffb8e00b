"""Parameters, FLOPs and bytes from the config alone; nothing is built."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from slmjax.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LayerNormConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
)
from slmjax.model.plan import stored_layers


class ParameterCount(NamedTuple):
    """Number of parameters.

    Attributes:
      total: all that are stored.
      embedding: input and output tables (once where tied).
      active: those that one token uses, in stored layers: of the routed experts only the top k.
    """

    total: int
    embedding: int
    active: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts what model.init would make."""
    embedding = config.vocab_size * config.width * (1 if config.tied_embeddings else 2)
    total = active = embedding + _norm(config.final_norm, config.width)
    for index, layer in enumerate(stored_layers(config)):
        shared_earlier = config.share_feed_forward and index > 0
        common = _attention(layer.mixer, config.width) + _norms(layer, config.width)
        total += common + (0 if shared_earlier else _feed_forward(layer.feed_forward, config.width))
        active += common + (0 if shared_earlier else _feed_forward(layer.feed_forward, config.width, active=True))
    return ParameterCount(total, embedding, active)


def matmul_parameters(config: ModelConfig) -> int:
    """Counts weights that multiply every token, once for each execution, the output table included."""
    per_pass = 0
    for layer in stored_layers(config):
        heads = layer.mixer
        per_pass += 2 * config.width * heads.head_dim * (heads.num_heads + heads.num_kv_heads)
        per_pass += _feed_forward_matrices(layer.feed_forward, config.width)
    return per_pass * config.block_repeats + config.vocab_size * config.width


def flops_per_token(config: ModelConfig, visible_keys: Callable[[int | None], float]) -> float:
    """Returns the training FLOPs of one token: 6 per matrix weight, 12 * N * H per visible key and layer.

    2 a weight forward, 4 backward; scores and their product with the values are 2 * N * H each forward. Recomputation
    is not counted, after PaLM (arXiv:2204.02311, appendix B).

    Args:
      config: the model.
      visible_keys: the mean number of keys a query sees under a window (None: no window) in the real mask; see
        `causal_visible_keys` for whole causal rows, `packed_visible_keys` for packed documents.
    """
    attention = sum(
        12 * layer.mixer.num_heads * layer.mixer.head_dim * visible_keys(layer.mixer.window)
        for layer in stored_layers(config)
    )
    return 6 * matmul_parameters(config) + attention * config.block_repeats


def causal_visible_keys(length: int, window: int | None) -> float:
    """Returns the mean number of keys a query sees, itself included, in a causal document of `length` tokens."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def packed_visible_keys(documents_BT: np.ndarray, window: int | None) -> float:
    """Returns the same for rows of packed documents (0 is padding, which sees nothing), over all positions."""
    index_T = np.arange(documents_BT.shape[1])
    starts_BT = np.diff(documents_BT, axis=1, prepend=-1) != 0
    start_BT = np.maximum.accumulate(np.where(starts_BT, index_T[None], 0), axis=1)
    visible_BT = index_T[None] - start_BT + 1
    if window is not None:
        visible_BT = np.minimum(visible_BT, window)
    return float(np.mean(np.where(documents_BT > 0, visible_BT, 0)))


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Returns the bytes that one token of context takes in the key/value cache, windows not taken off."""
    values = sum(2 * layer.mixer.num_kv_heads * layer.mixer.head_dim for layer in stored_layers(config))
    return values * config.block_repeats * bytes_per_value


def _norm(config: NormConfig, width: int) -> int:
    bias = isinstance(config, LayerNormConfig) and config.bias
    return width * (int(config.learned) + int(bias))


def _norms(layer: LayerConfig, width: int) -> int:
    before = {"pre": 2, "sandwich": 2, "post": 0}[layer.norm_placement]
    if before and layer.parallel:
        before = 1
    after = 0 if layer.norm_placement == "pre" else 2
    return (before + after) * _norm(layer.norm, width)


def _attention(config: AttentionConfig, width: int) -> int:
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    count = 2 * width * H * (N + K)
    if config.qkv_bias:
        count += (N + 2 * K) * H
    if config.out_bias:
        count += width
    if config.qk_norm is not None:
        widths = (N * H, K * H) if config.qk_norm_over == "full" else (H, H)
        count += sum(_norm(config.qk_norm, width) for width in widths)
    return count + (N if config.sinks else 0)


def _feed_forward_matrices(config: FeedForwardConfig | MoEConfig, width: int) -> int:
    matrices = 3 if config.gated else 2
    if isinstance(config, MoEConfig):
        return width * (config.num_experts + matrices * (config.top_k * config.hidden + config.shared_hidden))
    return width * matrices * config.hidden


def _feed_forward(config: FeedForwardConfig | MoEConfig, width: int, *, active: bool = False) -> int:
    matrices = 3 if config.gated else 2
    if isinstance(config, MoEConfig):
        experts = config.top_k if active else config.num_experts
        count = width * (config.num_experts + matrices * (experts * config.hidden + config.shared_hidden))
        return count + (config.num_experts if config.balance_bias_rate else 0)
    bias = width + config.hidden * (matrices - 1) if config.bias else 0
    return width * matrices * config.hidden + bias
