"""One optimizer step as a pure function (state, batch) -> (state, metrics)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from slmjax import axes, model
from slmjax.config import ModelConfig, MoEConfig, RunConfig
from slmjax.data.batch import Batch
from slmjax.model.plan import plan
from slmjax.ops.loss import linear_cross_entropy
from slmjax.optim.schedule import Schedule
from slmjax.train.guard import guard_update
from slmjax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    run: RunConfig,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    constrain: Callable[[jax.Array, Sequence[str | None]], jax.Array] = lambda x, _: x,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the step function, not yet jitted.

    The loss is the sum over learned tokens divided by the number of learned tokens of the whole batch, so it does not
    depend on `microbatches`, nor on how the batch is spread over devices.
    """
    execution = run.execution

    def loss_fn(params: model.Params, batch: Batch, learned_tokens: jax.Array):
        output = model.apply(
            params,
            run.model,
            batch.tokens,
            documents_BT=batch.documents,
            positions_BT=batch.positions,
            execution=execution,
            constrain=constrain,
        )
        with jax.named_scope("loss"):
            sums = linear_cross_entropy(
                output.hidden_BTD,
                model.table(params),
                batch.targets,
                batch.weights,
                logit_scale=run.model.logit_scale,
                logit_softcap=run.model.logit_softcap,
                z_loss=run.objective.z_loss,
                chunk_tokens=execution.loss_chunk_tokens,
                logits_dtype=execution.logits_dtype,
            )
        loss = sums.loss / learned_tokens + output.router_loss / execution.microbatches
        return loss, (sums.nll / learned_tokens, output.router_loss / execution.microbatches, output.expert_load)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def gradients(params: model.Params, batch: Batch):
        learned_tokens = jnp.maximum(jnp.sum(batch.weights), 1.0)
        if execution.microbatches == 1:
            return grad_fn(params, batch, learned_tokens)
        pieces = jax.tree.map(lambda x: _split_rows(x, execution.microbatches), batch)
        pieces = jax.tree.map(lambda x: constrain(x, (None, axes.BATCH, axes.LENGTH)), pieces)

        def add(total, piece):
            return jax.tree.map(jnp.add, total, grad_fn(params, piece, learned_tokens)), None

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], pieces), learned_tokens),
        )
        return jax.lax.scan(add, zeros, pieces)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (loss, (nll, router_loss, expert_load)), grads = gradients(state.params, batch)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            guard, accepted = guard_update(state.guard, loss, grad_norm, run.guard)
            if run.clip_norm is not None:
                factor = jnp.minimum(1.0, run.clip_norm / jnp.maximum(grad_norm, 1e-12))
                grads = jax.tree.map(lambda grad: grad * factor, grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params = _balance_experts(params, run.model, expert_load)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(accepted, new, old), (params, opt_state), (state.params, state.opt_state)
            )
        metrics = {
            "loss": nll,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.guard.total_skips),  # the optimizer counts accepted steps
            "learned_tokens": jnp.sum(batch.weights),
            "accepted": accepted,
            "consecutive_skips": guard.consecutive_skips,
            "total_skips": guard.total_skips,
        }
        if expert_load:
            metrics["router_loss"] = router_loss
            metrics["max_expert_load"] = _max_load(expert_load)
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    return train_step


def _split_rows(x_BT: jax.Array, pieces: int) -> jax.Array:
    """Returns (pieces, B / pieces, T), taking every pieces-th row, so that each device keeps rows of its own."""
    return x_BT.reshape(-1, pieces, *x_BT.shape[1:]).swapaxes(0, 1)


def _balance_experts(params: Any, config: ModelConfig, expert_load: dict) -> model.Params:
    """Moves the balancing bias of each expert by its rate towards an even load (Wang et al. 2024, arXiv:2408.15664)."""
    for i, group in enumerate(plan(config)):
        for j, layer in enumerate(group.unit):
            rate = layer.feed_forward.balance_bias_rate if isinstance(layer.feed_forward, MoEConfig) else 0.0
            if not rate:
                continue
            load_LE = expert_load[f"group_{i}"][f"layer_{j}"]
            error_LE = jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE
            keys = (f"group_{i}", f"layer_{j}", "feed_forward", "balance_bias_E")
            params = _add_at(params, keys, rate * jnp.sign(error_LE))
    return params


def _add_at(tree: dict, keys: tuple[str, ...], value: jax.Array) -> dict:
    first, *rest = keys
    return {**tree, first: _add_at(tree[first], tuple(rest), value) if rest else tree[first] + value}


def _max_load(expert_load) -> jax.Array:
    """Returns the fullest expert's load over the mean load, the largest of all layers; 1 is perfect balance."""
    ratios = [
        jnp.max(jnp.max(load_LE, axis=-1) / jnp.maximum(jnp.mean(load_LE, axis=-1), 1e-9))
        for load_LE in jax.tree.leaves(expert_load)
    ]
    return jnp.max(jnp.stack(ratios))
