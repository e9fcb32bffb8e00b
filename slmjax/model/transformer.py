"""The decoder: embedding, layers, final norm. The file to read first.

    x = embed[tokens] * embedding_scale
    for each layer:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))
    hidden = norm(x);  logits = softcap(logit_scale * hidden @ table.T)

Parameters are a plain nested dict of float32 arrays:

    embed_VD, unembed_VD (unless tied), final_norm/...,
    group_<i>/layer_<j>/{mixer, feed_forward, mixer_norm, ...}/<weight>, each stacked over the group's L layers,
    shared_feed_forward/<weight> (MobiLlama)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax import axes
from slmjax.config import ExecutionConfig, ModelConfig
from slmjax.model import spec
from slmjax.model.layers import Block, Context, Norm, Routing, feed_forward
from slmjax.model.plan import LayerGroup, plan

Params = dict[str, Any]


class Output(NamedTuple):
    """Result of a forward pass.

    Attributes:
      hidden_BTD: after the final norm; `logits` or ops.loss turn it into predictions.
      cache: with this call's keys and values, or None.
      router_loss: sum over layers of the weighted auxiliary losses of mixtures of experts; 0 without any.
      expert_load: {group: {layer: tokens per expert (L, E)}} of the layers that are mixtures.
    """

    hidden_BTD: jax.Array
    cache: list | None
    router_loss: jax.Array
    expert_load: dict[str, dict[str, jax.Array]]


class Ends(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, config: ModelConfig):
        self.embed_VD = nnx.Param(jnp.zeros((config.vocab_size, config.width)), logical_axes=(axes.VOCAB, axes.EMBED))
        if not config.tied_embeddings:
            self.unembed_VD = nnx.Param(
                jnp.zeros((config.vocab_size, config.width)), logical_axes=(axes.VOCAB, axes.EMBED)
            )
        self.final_norm = Norm(config.final_norm, config.width)
        if config.share_feed_forward:
            self.shared_feed_forward = feed_forward(config.pattern[0].feed_forward, config.width)


class Structure(NamedTuple):
    """Module structures without values: the ends, and per group the blocks of its unit."""

    ends: nnx.GraphDef
    blocks: tuple[tuple[nnx.GraphDef, ...], ...]
    specs: dict


@functools.cache
def structure(config: ModelConfig) -> Structure:
    """Returns the structure of the model; cheap, no arrays."""
    ends, specs = spec.abstract(lambda: Ends(config))
    blocks = []
    for i, group in enumerate(plan(config)):
        defs, members = [], {}
        for j, layer in enumerate(group.unit):
            own = not config.share_feed_forward
            graph, layer_specs = spec.abstract(
                lambda layer=layer, own=own: Block(layer, config.width, own_feed_forward=own)
            )
            defs.append(graph)
            members[f"layer_{j}"] = spec.stack(layer_specs, group.count)
        blocks.append(tuple(defs))
        specs[f"group_{i}"] = members
    return Structure(ends, tuple(blocks), specs)


def specs(config: ModelConfig) -> dict:
    """Returns the tree of parameters as `ParamSpec`s."""
    return structure(config).specs


def table(params: Params) -> jax.Array:
    """Returns the (V, D) output table: the embedding where it is tied."""
    return params.get("unembed_VD", params["embed_VD"])


def logits(params: Params, config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
    """Returns float32 logits (B, T, V). For training use ops.loss, which never holds all of them."""
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", hidden_BTD, table(params).astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )
    logits_BTV = logits_BTV * config.logit_scale
    if config.logit_softcap is not None:
        logits_BTV = config.logit_softcap * jnp.tanh(logits_BTV / config.logit_softcap)
    return logits_BTV


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Returns matrices in `dtype`; gains, biases, routers and the embedding to look up in stay float32.

    The lookup is cast after it is made, so that its gradient is summed in float32.
    """

    def one(path, leaf):
        return leaf.astype(dtype) if path[-1].key.startswith("w_") else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def _identity(x: jax.Array, logical_axes: tuple[str, ...]) -> jax.Array:
    return x


def apply(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    *,
    documents_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    cache: list | None = None,
    execution: ExecutionConfig | None = None,
    constrain: Callable[[jax.Array, tuple[str, ...]], jax.Array] = _identity,
) -> Output:
    """Runs the decoder.

    Args:
      params: float32 master weights; cast to `execution.compute_dtype` here.
      config: the model.
      tokens_BT: int32 token ids.
      documents_BT: document of each token, non-decreasing along a row, 0 for padding; None is one document a row.
      positions_BT: position of each token; None counts from 0 along the row. With a cache, the slots to write.
      cache: from `make_cache`; then `documents_BT` must be None.
      execution: how to run it; the default is float32, scanned, without remat.
      constrain: pins the sharding of an activation, given its logical axes (parallel/rules.py); default does nothing.
    """
    if cache is not None and documents_BT is not None:
        raise ValueError("a cache holds one document a row: documents_BT must be None with a cache")
    execution = execution or ExecutionConfig()
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    dtype = jnp.dtype(execution.compute_dtype)
    params = cast(params, dtype)
    shape = structure(config)
    group_names = [f"group_{i}" for i in range(len(shape.blocks))]
    ends = nnx.merge(shape.ends, {name: value for name, value in params.items() if name not in group_names})
    context = Context(
        positions_BT,
        documents_BT,
        execution.attention,
        cache is not None,
        execution.products,
        execution.remat == "activations",
    )
    shared = ends.shared_feed_forward if config.share_feed_forward else None
    residual_axes = (axes.BATCH, axes.LENGTH, axes.ACT_EMBED)

    with jax.named_scope("embed"):
        x_BTD = ends.embed_VD[...][tokens_BT].astype(dtype) * jnp.asarray(config.embedding_scale, dtype)
    x_BTD = constrain(x_BTD, residual_axes)
    new_cache, expert_load, router_loss = [], {}, jnp.zeros((), jnp.float32)
    for i, (group, blockdefs) in enumerate(zip(plan(config), shape.blocks, strict=True)):

        def unit(x_BTD, weights_and_cache, blockdefs=blockdefs):
            weights, unit_cache = weights_and_cache
            caches, routings = [], []
            for j, blockdef in enumerate(blockdefs):
                block = nnx.merge(blockdef, weights[f"layer_{j}"])
                x_BTD, layer_cache, routing = _repeat(
                    block, x_BTD, context, None if unit_cache is None else unit_cache[j], shared, config.block_repeats
                )
                x_BTD = constrain(x_BTD, residual_axes)
                caches.append(layer_cache)
                routings.append(routing)
            return x_BTD, (None if unit_cache is None else caches, routings)

        x_BTD, (unit_cache, routings) = _run(
            unit, x_BTD, params[group_names[i]], None if cache is None else cache[i], group, execution
        )
        new_cache.append(unit_cache)
        for j, routing in enumerate(routings):
            if routing is not None:
                router_loss = router_loss + jnp.sum(routing.loss)
                expert_load.setdefault(group_names[i], {})[f"layer_{j}"] = routing.load_E
    hidden_BTD = ends.final_norm(x_BTD)
    return Output(hidden_BTD, None if cache is None else new_cache, router_loss, expert_load)


def _repeat(block: Block, x_BTD, context, layer_cache, shared, times: int):
    """Executes one stored layer `times` in a row (MobileLLM-LS); caches are stacked (R, ...), reports are summed."""
    caches, routings = [], []
    for r in range(times):
        step_cache = None if layer_cache is None else jax.tree.map(lambda leaf, r=r: leaf[r], layer_cache)
        x_BTD, step_cache, routing = block(x_BTD, context, step_cache, shared)
        caches.append(step_cache)
        routings.append(routing)
    layer_cache = None if layer_cache is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    routing = None if routings[0] is None else jax.tree.map(lambda *leaves: sum(leaves), *routings)
    return x_BTD, layer_cache, routing


def _run(unit, x_BTD, weights_L, cache_L, group: LayerGroup, execution: ExecutionConfig):
    """Runs `unit` over the stacked weights: one compiled body in a loop, or each repetition by itself."""
    scanned = execution.layers == "scan" and group.count > 1
    body = _rematerialised(unit, execution, in_scan=scanned)
    if scanned:
        return jax.lax.scan(body, x_BTD, (weights_L, cache_L))
    # lax.split, not indexing: its transpose is one concatenation, where indexing would add `count` padded arrays.
    slices = jax.tree.map(
        lambda leaf: [piece[0] for piece in jax.lax.split(leaf, (1,) * group.count)], (weights_L, cache_L)
    )
    outer = jax.tree.structure((weights_L, cache_L))
    pieces = [jax.tree.unflatten(outer, leaves) for leaves in zip(*outer.flatten_up_to(slices), strict=True)]
    collected = []
    for piece in pieces:
        x_BTD, ys = body(x_BTD, piece)
        collected.append(ys)
    return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)


def _rematerialised(unit, execution: ExecutionConfig, *, in_scan: bool):
    """Wraps `unit` so that the backward pass recomputes what the policy does not save."""
    policies = {
        "full": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    }
    if execution.remat in ("none", "activations"):  # the latter is the feed-forwards' own affair
        return unit
    # Inside a loop XLA cannot undo the recomputation by common-subexpression elimination, so it need not be fenced.
    return jax.checkpoint(unit, policy=policies[execution.remat], prevent_cse=not in_scan)


__all__ = ["Output", "Params", "Routing", "apply", "cast", "logits", "specs", "structure", "table"]
