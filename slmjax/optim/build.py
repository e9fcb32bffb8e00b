"""From a config to an optax gradient transformation. Clipping is the step's, which needs the norm for its metrics."""

from typing import Any

import jax
import optax

from slmjax.config import AdamWConfig, LionConfig, MuonConfig, OptimizerConfig
from slmjax.optim.groups import EMBEDDING, FROZEN, MATRIX, ROUTER, label_tree
from slmjax.optim.muon import scale_by_muon
from slmjax.optim.schedule import Schedule


def make_optimizer(config: OptimizerConfig, schedule: Schedule, specs: Any) -> optax.GradientTransformation:
    """Returns the optimizer for the parameters that `specs` (a tree of ParamSpec) describes. Its state is float32.

    `schedule` is that of `config.peak_lr`; Muon's AdamW part follows it times adamw.peak_lr / peak_lr. The state counts
    its own updates: one that is thrown away (state and all, by the guard) does not advance the schedule.
    """
    labels = label_tree(specs)
    match config:
        case AdamWConfig():
            rules, trained = {"adamw": _adamw(config, schedule, labels)}, lambda label: "adamw"
        case LionConfig():
            lion = optax.chain(optax.scale_by_lion(config.b1, config.b2), *_decay_and_scale(config, schedule, labels))
            rules, trained = {"lion": lion}, lambda label: "lion"
        case MuonConfig():
            ratio = config.adamw.peak_lr / config.peak_lr
            muon = optax.chain(
                scale_by_muon(
                    jax.tree.map(lambda label, spec: spec if label == MATRIX else optax.MaskedNode(), labels, specs),
                    momentum=config.momentum,
                    nesterov=config.nesterov,
                    steps=config.newton_schulz_steps,
                ),
                optax.add_decayed_weights(config.weight_decay),
                optax.scale_by_learning_rate(schedule),
            )
            rules = {"muon": muon, "adamw": _adamw(config.adamw, lambda step: ratio * schedule(step), labels)}
            trained = lambda label: "muon" if label == MATRIX else "adamw"  # noqa: E731
    rule_of = jax.tree.map(lambda label: "frozen" if label == FROZEN else trained(label), labels)
    return optax.partition({**rules, "frozen": optax.set_to_zero()}, rule_of)


def _adamw(config: AdamWConfig, schedule: Schedule, labels: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps), *_decay_and_scale(config, schedule, labels)
    )


def _decay_and_scale(
    config: AdamWConfig | LionConfig, schedule: Schedule, labels: Any
) -> list[optax.GradientTransformation]:
    """Decoupled weight decay on the groups that have it, then the learning rate, which multiplies both."""
    decayed = {MATRIX, ROUTER, EMBEDDING} if config.decay_embeddings else {MATRIX, ROUTER}
    rules = [optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(lambda label: label in decayed, labels))]
    if isinstance(config, AdamWConfig) and config.embedding_lr_factor != 1:
        tables = jax.tree.map(lambda label: label == EMBEDDING, labels)
        rules.append(optax.masked(optax.scale(config.embedding_lr_factor), tables))
    return [*rules, optax.scale_by_learning_rate(schedule)]
