"""Whole optimizers against transcriptions in numpy, group by group."""

from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

from slmjax.config import AdamWConfig, LionConfig, MuonConfig, WarmupConfig, WSDScheduleConfig
from slmjax.optim import make_optimizer, make_schedule


class Spec(NamedTuple):
    shape: tuple[int, ...]
    logical_axes: tuple[str, ...]


SPECS = {
    "embed_VD": Spec((7, 4), ("vocab", "embed")),
    "layers": {
        "w_q_DNH": Spec((2, 4, 2, 3), ("layers", "embed", "heads", "head_dim")),
        "b_q_NH": Spec((2, 2, 3), ("layers", "heads", "head_dim")),
        "router_DE": Spec((2, 4, 2), ("layers", "embed", "expert")),
        "balance_bias_E": Spec((2, 2), ("layers", "expert")),
    },
    "final_norm": {"gain_D": Spec((4,), ("norm",))},
}
STEPS = 6
LR = np.array([0.5, 1, 1, 1, 1, 0.5]) * 0.01


def random_tree(seed):
    leaves, structure = jax.tree.flatten(SPECS, is_leaf=lambda x: type(x) is Spec)
    rng = np.random.default_rng(seed)
    return structure.unflatten([rng.normal(size=spec.shape).astype(np.float32) for spec in leaves])


def leaf_dict(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def run(config):
    """Parameters after each of STEPS updates, and the gradients that were given."""
    schedule = make_schedule(
        WSDScheduleConfig(warmup=WarmupConfig(steps=2), decay_fraction=1 / 3),
        peak_lr=config.peak_lr,
        steps=STEPS,
        tokens_per_step=1,
    )
    optimizer = make_optimizer(config, schedule, SPECS)
    params = random_tree(0)
    state = optimizer.init(params)
    assert all(leaf.dtype in (np.float32, np.int32) for leaf in jax.tree.leaves(state))
    update = jax.jit(optimizer.update)
    trajectory, gradients = [leaf_dict(params)], []
    for step in range(STEPS):
        gradient = random_tree(step + 1)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(leaf_dict(params))
        gradients.append(leaf_dict(gradient))
    return trajectory, gradients


def adamw_numpy(trajectory, gradients, name, *, lr, weight_decay, b1=0.9, b2=0.95, eps=1e-8):
    """Loshchilov & Hutter 2017, algorithm 2, in float64."""
    p = trajectory[0][name].astype(np.float64)
    m = v = np.zeros_like(p)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient[name].astype(np.float64)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p = p - lr[t - 1] * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + weight_decay * p)
    return p


@pytest.mark.parametrize("decay_embeddings", [True, False])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_adamw_is_the_paper_in_every_group(decay_embeddings, factor):
    trajectory, gradients = run(
        AdamWConfig(peak_lr=0.01, weight_decay=0.2, decay_embeddings=decay_embeddings, embedding_lr_factor=factor)
    )
    decay = {"embed_VD": 0.2 * decay_embeddings, "layers/w_q_DNH": 0.2, "layers/router_DE": 0.2}
    for name in trajectory[0]:
        if name != "layers/balance_bias_E":
            lr = LR * factor if name == "embed_VD" else LR
            expected = adamw_numpy(trajectory, gradients, name, lr=lr, weight_decay=decay.get(name, 0.0))
            np.testing.assert_allclose(trajectory[-1][name], expected, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_lion_is_the_paper_in_every_group(decay_embeddings):
    trajectory, gradients = run(LionConfig(peak_lr=0.01, weight_decay=0.2, decay_embeddings=decay_embeddings))
    decay = {"embed_VD": 0.2 * decay_embeddings, "layers/w_q_DNH": 0.2, "layers/router_DE": 0.2}
    for name in trajectory[0]:
        if name != "layers/balance_bias_E":
            p = trajectory[0][name].astype(np.float64)
            m = np.zeros_like(p)
            for lr, gradient in zip(LR, gradients, strict=True):
                g = gradient[name].astype(np.float64)
                p = p - lr * (np.sign(0.9 * m + 0.1 * g) + decay.get(name, 0.0) * p)
                m = 0.99 * m + 0.01 * g
            np.testing.assert_allclose(trajectory[-1][name], p, rtol=2e-5, atol=2e-6, err_msg=name)


def newton_schulz_float64(g):
    x = g / np.linalg.norm(g)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    adamw = AdamWConfig(peak_lr=0.002, weight_decay=0.3)
    trajectory, gradients = run(MuonConfig(peak_lr=0.01, adamw=adamw, weight_decay=0.2))
    for name, decay in [("embed_VD", 0.3), ("layers/router_DE", 0.3), ("layers/b_q_NH", 0), ("final_norm/gain_D", 0)]:
        expected = adamw_numpy(trajectory, gradients, name, lr=LR / 5, weight_decay=decay)
        np.testing.assert_allclose(trajectory[-1][name], expected, rtol=2e-5, atol=2e-6, err_msg=name)
    p = trajectory[0]["layers/w_q_DNH"].astype(np.float64).reshape(2, 4, 6)
    m = np.zeros_like(p)
    for lr, gradient in zip(LR, gradients, strict=True):
        g = gradient["layers/w_q_DNH"].astype(np.float64).reshape(2, 4, 6)
        m = 0.95 * m + 0.05 * g
        step = np.stack([newton_schulz_float64(matrix) for matrix in 0.95 * m + 0.05 * g])
        p = p - lr * (0.2 * np.sqrt(6) * step + 0.2 * p)
    np.testing.assert_allclose(trajectory[-1]["layers/w_q_DNH"], p.reshape(2, 4, 2, 3), atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [AdamWConfig(peak_lr=0.01), LionConfig(peak_lr=0.01), MuonConfig(peak_lr=0.01, adamw=AdamWConfig(peak_lr=0.01))],
    ids=["adamw", "lion", "muon"],
)
def test_the_balance_bias_is_left_alone_and_everything_else_moves(config):
    trajectory, _ = run(config)
    for name, first in trajectory[0].items():
        moved = not np.array_equal(first, trajectory[1][name])
        assert moved == (name != "layers/balance_bias_E"), name


def test_the_state_of_each_parameter_can_be_found_for_sharding():
    optimizer = make_optimizer(MuonConfig(peak_lr=1.0, adamw=AdamWConfig(peak_lr=1.0)), lambda step: 1.0, SPECS)
    state = optimizer.init(random_tree(0))
    marked = optax.tree.map_params(
        optimizer, lambda leaf: "like a parameter", state, transform_non_params=lambda leaf: "scalar"
    )
    # one momentum for the matrix, two for the other four trained leaves
    assert jax.tree.leaves(marked).count("like a parameter") == 1 + 2 * 4


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="'layers/strange_D' must match exactly one rule"):
        make_optimizer(AdamWConfig(peak_lr=1.0), lambda step: 1.0, {"layers": {"strange_D": Spec((4,), ("embed",))}})
