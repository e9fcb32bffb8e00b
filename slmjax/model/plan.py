"""The layer plan: which layers a config stores, and how equal ones are stacked so that a loop can run over them."""

import dataclasses
import itertools

from slmjax.config import LayerConfig, LayerwiseScalingConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """`count` repetitions of `unit`, whose weights are stacked along a leading dimension of `count`."""

    unit: tuple[LayerConfig, ...]
    count: int


def plan(config: ModelConfig) -> tuple[LayerGroup, ...]:
    """Returns the groups in order of execution; runs of equal layers share a group."""
    if config.scaling is not None:
        return _runs(stored_layers(config))
    return (*_runs(config.prefix), LayerGroup(config.pattern, config.repeats))


def stored_layers(config: ModelConfig) -> tuple[LayerConfig, ...]:
    """Returns every layer that has weights, in order, with layer-wise scaling applied."""
    layers = config.prefix + config.pattern * config.repeats
    if config.scaling is None:
        return layers
    last = max(len(layers) - 1, 1)
    return tuple(_scaled(layer, config.width, config.scaling, index / last) for index, layer in enumerate(layers))


def _runs(layers: tuple[LayerConfig, ...]) -> tuple[LayerGroup, ...]:
    return tuple(LayerGroup((layer,), len(list(run))) for layer, run in itertools.groupby(layers))


def _scaled(layer: LayerConfig, width: int, scaling: LayerwiseScalingConfig, depth: float) -> LayerConfig:
    def multiplier(limits: tuple[float, float]) -> float:
        return round(limits[0] + (limits[1] - limits[0]) * depth, 2)

    mixer = layer.mixer
    group = mixer.num_heads // mixer.num_kv_heads
    query_width = _nearest_multiple(
        width * multiplier(scaling.query_multipliers), scaling.heads_divisor * mixer.head_dim
    )
    num_heads = query_width // mixer.head_dim
    hidden = _nearest_multiple(width * multiplier(scaling.feed_forward_multipliers), scaling.hidden_divisor)
    return dataclasses.replace(
        layer,
        mixer=dataclasses.replace(mixer, num_heads=num_heads, num_kv_heads=num_heads // group),
        feed_forward=dataclasses.replace(layer.feed_forward, hidden=hidden),
    )


def _nearest_multiple(value: float, divisor: int) -> int:
    """Rounds to the nearest multiple, but never down by more than a tenth (MobileNet's `make_divisible`)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
