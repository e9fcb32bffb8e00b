"""The parts of a layer. Modules hold weights and apply themselves; they know logical axis names, never a mesh.

Flax NNX is used as a class system only (docs/decisions/0001): modules are built abstractly for their structure, and
given values by `nnx.merge` inside the forward pass, so that every transformation is JAX's own.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax import axes
from slmjax.config import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LayerNormConfig,
    MoEConfig,
    NormConfig,
    RMSNormConfig,
)
from slmjax.model.cache import LayerCache, update
from slmjax.ops.attention import Implementation, attention
from slmjax.ops.gated import gated_feed_forward
from slmjax.ops.linear import Products, Projected, project, project_activated
from slmjax.ops.mask import AttentionMask
from slmjax.ops.mixture import moe_feed_forward
from slmjax.ops.norm import PendingNorm, layer_norm, norm_branch, rms_norm
from slmjax.ops.rope import apply_rope, rope_frequencies
from slmjax.ops.routing import route


def param(shape: tuple[int, ...], *logical_axes: str) -> nnx.Param:
    """A weight to be: its values come from model/initialise.py or a checkpoint."""
    return nnx.Param(jnp.zeros(shape), logical_axes=logical_axes)


class Context(NamedTuple):
    """What every layer of one forward pass shares.

    Attributes:
      positions_BT: position of each token in its document (or, with a cache, in the sequence), for RoPE.
      documents_BT: document of each token, 0 for padding; None is one document a row.
      implementation: of attention.
      cached: whether layers read and write a cache.
      products: how the large projections multiply.
      recompute_activations: whether feed-forwards do so in the backward pass.
    """

    positions_BT: jax.Array
    documents_BT: jax.Array | None
    implementation: Implementation | Literal["auto"]
    cached: bool
    products: Products
    recompute_activations: bool


class Routing(NamedTuple):
    """What a mixture of experts reports: its weighted auxiliary loss (a mean over tokens) and tokens per expert."""

    loss: jax.Array
    load_E: jax.Array


class Norm(nnx.Module):
    """RMS norm or layer norm over the last dimension."""

    def __init__(self, config: NormConfig, width: int):
        self.config = config
        if config.learned:
            # A gain stored as offset from one starts at zero; its name tells the initialiser.
            if isinstance(config, RMSNormConfig) and config.offset:
                self.gain_offset_D = param((width,), axes.NORM)
            else:
                self.gain_D = param((width,), axes.NORM)
        if isinstance(config, LayerNormConfig) and config.bias:
            self.b_D = param((width,), axes.NORM)

    @jax.named_scope("norm")
    def __call__(self, x_D: jax.Array) -> jax.Array:
        """Normalises `x_D`; statistics in float32."""
        if isinstance(self.config, LayerNormConfig):
            gain_D = self.gain_D[...] if self.config.learned else None
            return layer_norm(x_D, gain_D, self.b_D[...] if self.config.bias else None, eps=self.config.eps)
        return rms_norm(x_D, self._gain(self.config), eps=self.config.eps)

    def branch(self, x_D: jax.Array) -> tuple[jax.Array, jax.Array | PendingNorm]:
        """Returns x for the residual stream, and what `ops.linear.project` takes for the normalised x of a branch."""
        if isinstance(self.config, LayerNormConfig):
            return x_D, self(x_D)
        return norm_branch(x_D, self._gain(self.config), eps=self.config.eps)

    def _gain(self, config: RMSNormConfig) -> jax.Array | None:
        if not config.learned:
            return None
        return self.gain_offset_D[...] + 1.0 if config.offset else self.gain_D[...]


class Attention(nnx.Module):
    """Grouped-query attention with RoPE, QK-norm, window, softcap and sinks as its config says."""

    def __init__(self, config: AttentionConfig, width: int):
        self.config = config
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        self.w_q_DNH = param((width, N, H), axes.EMBED, axes.HEADS, axes.HEAD_DIM)
        self.w_k_DKH = param((width, K, H), axes.EMBED, axes.KV_HEADS, axes.HEAD_DIM)
        self.w_v_DKH = param((width, K, H), axes.EMBED, axes.KV_HEADS, axes.HEAD_DIM)
        self.w_o_NHD = param((N, H, width), axes.HEADS, axes.HEAD_DIM, axes.EMBED)
        if config.qkv_bias:
            self.b_q_NH = param((N, H), axes.HEADS, axes.HEAD_DIM)
            self.b_k_KH = param((K, H), axes.KV_HEADS, axes.HEAD_DIM)
            self.b_v_KH = param((K, H), axes.KV_HEADS, axes.HEAD_DIM)
        if config.out_bias:
            self.b_o_D = param((width,), axes.NORM)
        if config.qk_norm is not None:
            full = config.qk_norm_over == "full"
            self.q_norm = Norm(config.qk_norm, N * H if full else H)
            self.k_norm = Norm(config.qk_norm, K * H if full else H)
        if config.sinks:
            self.sinks_N = param((N,), axes.HEADS)

    def __call__(
        self, x_BTD: jax.Array | PendingNorm, context: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Returns the branch's output and the cache with this call's keys and values in it."""
        config = self.config
        weights = (self.w_q_DNH[...], self.w_k_DKH[...], self.w_v_DKH[...])
        projected = project(x_BTD, weights, products=context.products)
        q_BTNH, k_BTKH, v_BTKH = projected.take_apart([weight.shape[1:] for weight in weights])
        if config.qkv_bias:
            q_BTNH = q_BTNH + self.b_q_NH[...].astype(q_BTNH.dtype)[None, None]
            k_BTKH = k_BTKH + self.b_k_KH[...].astype(k_BTKH.dtype)[None, None]
            v_BTKH = v_BTKH + self.b_v_KH[...].astype(v_BTKH.dtype)[None, None]
        if config.qk_norm is not None:
            q_BTNH, k_BTKH = self._normalise(self.q_norm, q_BTNH), self._normalise(self.k_norm, k_BTKH)
        if config.rope is not None:
            frequencies = rope_frequencies(config.head_dim, config.rope)
            q_BTNH = apply_rope(q_BTNH, context.positions_BT, frequencies)
            k_BTKH = apply_rope(k_BTKH, context.positions_BT, frequencies)
        if cache is None:
            mask = AttentionMask(
                causal=True,
                window=config.window,
                q_documents_BT=context.documents_BT,
                k_documents_BS=context.documents_BT,
            )
            k_BSKH, v_BSKH = k_BTKH, v_BTKH
        else:
            cache = update(cache, k_BTKH, v_BTKH, context.positions_BT)
            mask = AttentionMask(causal=True, window=config.window, q_index_BT=context.positions_BT)
            k_BSKH, v_BSKH = cache.k_BSKH, cache.v_BSKH
        y_BTNH = attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask,
            scale=config.head_dim**-0.5 if config.scale is None else config.scale,
            softcap=config.softcap,
            sinks_N=self.sinks_N[...] if config.sinks else None,
            implementation=context.implementation,
        )
        w_o_FD = self.w_o_NHD[...].reshape(-1, self.w_o_NHD.shape[-1])
        y_BTD = project(y_BTNH.reshape(*y_BTNH.shape[:2], -1), [w_o_FD], products=context.products).finished()
        if config.out_bias:
            y_BTD = y_BTD + self.b_o_D[...].astype(y_BTD.dtype)[None, None]
        return y_BTD, cache

    def _normalise(self, norm: Norm, x_BTNH: jax.Array) -> jax.Array:
        if self.config.qk_norm_over == "head":
            return norm(x_BTNH)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)


class FeedForward(nnx.Module):
    """Gated or plain two-matrix feed-forward."""

    def __init__(self, config: FeedForwardConfig, width: int):
        self.config = config
        F = config.hidden
        self.w_up_DF = param((width, F), axes.EMBED, axes.MLP)
        self.w_down_FD = param((F, width), axes.MLP, axes.EMBED)
        if config.gated:
            self.w_gate_DF = param((width, F), axes.EMBED, axes.MLP)
        if config.bias:
            self.b_up_F = param((F,), axes.MLP)
            self.b_down_D = param((width,), axes.NORM)
            if config.gated:
                self.b_gate_F = param((F,), axes.MLP)

    def __call__(self, x_BTD: jax.Array | PendingNorm, context: Context) -> tuple[jax.Array, None]:
        """Returns the branch's output; the second value is a mixture's report, None here."""
        config = self.config
        how = {"recompute": context.recompute_activations, "products": context.products}
        if config.gated and not config.bias:
            weights = (self.w_gate_DF[...], self.w_up_DF[...], self.w_down_FD[...])
            return gated_feed_forward(x_BTD, *weights, activation=config.activation, **how), None
        first = ("gate", "up") if config.gated else ("up",)
        h = project(x_BTD, [getattr(self, f"w_{name}_DF")[...] for name in first], products=context.products)
        if config.bias:
            b_F = jnp.concatenate([getattr(self, f"b_{name}_F")[...] for name in first])
            h = Projected(h.finished() + b_F.astype(h.values_BTF.dtype)[None, None], None)
        y_BTD = project_activated(h, self.w_down_FD[...], activation=config.activation, gated=config.gated, **how)
        return (y_BTD + self.b_down_D[...].astype(y_BTD.dtype)[None, None] if config.bias else y_BTD), None


class MoE(nnx.Module):
    """Dropless top-k mixture of experts, with an expert shared by all tokens if the config asks for one."""

    def __init__(self, config: MoEConfig, width: int):
        self.config = config
        E, F = config.num_experts, config.hidden
        self.router_DE = param((width, E), axes.EMBED, axes.EXPERT)
        self.w_up_EDF = param((E, width, F), axes.EXPERT, axes.EMBED, axes.MLP)
        self.w_down_EFD = param((E, F, width), axes.EXPERT, axes.MLP, axes.EMBED)
        if config.gated:
            self.w_gate_EDF = param((E, width, F), axes.EXPERT, axes.EMBED, axes.MLP)
        if config.balance_bias_rate:
            self.balance_bias_E = param((E,), axes.EXPERT)
        if config.shared_hidden:
            shared = FeedForwardConfig(hidden=config.shared_hidden, activation=config.activation, gated=config.gated)
            self.shared = FeedForward(shared, width)

    def __call__(self, x_BTD: jax.Array | PendingNorm, context: Context) -> tuple[jax.Array, Routing]:
        """Returns the branch's output, and the router's auxiliary loss and load."""
        config = self.config
        x_BTD = x_BTD.applied() if isinstance(x_BTD, PendingNorm) else x_BTD
        x_XD = x_BTD.reshape(-1, x_BTD.shape[-1])
        # The router runs in float32: a rounded score picks another expert (Switch Transformer, section 2.4).
        # Accelerators multiply float32 matrices in bfloat16 or TF32 if not told otherwise.
        logits_XE = jnp.matmul(x_XD.astype(jnp.float32), self.router_DE[...], precision=jax.lax.Precision.HIGHEST)
        routed = route(
            logits_XE,
            config,
            balance_bias_E=self.balance_bias_E[...] if config.balance_bias_rate else None,
            valid_X=None if context.documents_BT is None else context.documents_BT.reshape(-1) > 0,
        )
        y_XD = moe_feed_forward(
            x_XD,
            routed.ids_XK,
            routed.weights_XK,
            w_up_EDF=self.w_up_EDF[...],
            w_gate_EDF=self.w_gate_EDF[...] if config.gated else None,
            w_down_EFD=self.w_down_EFD[...],
            activation=config.activation,
        )
        y_BTD = y_XD.reshape(x_BTD.shape) * config.routed_scale
        if config.shared_hidden:
            y_BTD = y_BTD + self.shared(x_BTD, context)[0]
        loss = config.balance_loss * routed.balance_loss + config.router_z_loss * routed.router_z
        return y_BTD, Routing(loss, routed.load_E)


def feed_forward(config: FeedForwardConfig | MoEConfig, width: int) -> FeedForward | MoE:
    """Builds the module that `config` describes."""
    return MoE(config, width) if isinstance(config, MoEConfig) else FeedForward(config, width)


class Block(nnx.Module):
    """One layer: attention and feed-forward on the residual stream.

    With `own_feed_forward = False` the feed-forward is another module, shared by all layers, and is given to the call.
    """

    def __init__(self, config: LayerConfig, width: int, *, own_feed_forward: bool = True):
        self.config = config
        self.mixer = Attention(config.mixer, width)
        if own_feed_forward:
            self.feed_forward = feed_forward(config.feed_forward, width)
        if config.norm_placement in ("pre", "sandwich"):
            self.mixer_norm = Norm(config.norm, width)
            if not config.parallel:
                self.feed_forward_norm = Norm(config.norm, width)
        if config.norm_placement in ("post", "sandwich"):
            self.mixer_out_norm = Norm(config.norm, width)
            self.feed_forward_out_norm = Norm(config.norm, width)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: Context,
        cache: LayerCache | None = None,
        shared_feed_forward: FeedForward | MoE | None = None,
    ) -> tuple[jax.Array, LayerCache | None, Routing | None]:
        """Returns the residual stream after the layer, the updated cache and the mixture's report."""
        config = self.config
        feed_forward = shared_feed_forward or self.feed_forward
        before, after = config.norm_placement in ("pre", "sandwich"), config.norm_placement in ("post", "sandwich")
        x_BTD, h_BTD = self.mixer_norm.branch(x_BTD) if before else (x_BTD, x_BTD)
        with jax.named_scope("mixer"):
            y_BTD, cache = self.mixer(h_BTD, context, cache)
        y_BTD = (self.mixer_out_norm(y_BTD) if after else y_BTD) * config.residual_scale
        if not config.parallel:
            x_BTD = x_BTD + y_BTD
            x_BTD, h_BTD = self.feed_forward_norm.branch(x_BTD) if before else (x_BTD, x_BTD)
        with jax.named_scope("feed_forward"):
            z_BTD, routing = feed_forward(h_BTD, context)
        z_BTD = (self.feed_forward_out_norm(z_BTD) if after else z_BTD) * config.residual_scale
        return (x_BTD + y_BTD + z_BTD if config.parallel else x_BTD + z_BTD), cache, routing
