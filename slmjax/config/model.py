"""What a decoder is: widths, layers, attention, feed-forward, experts. No number here depends on a machine."""

import dataclasses
from typing import Literal

from slmjax.config.check import fraction, not_negative, positive, require

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNormConfig:
    """Root-mean-square norm, Zhang & Sennrich 2019, arXiv:1910.07467.

    Attributes:
      eps: added to the mean square.
      learned: whether there is a gain; nanochat has none.
      offset: whether the gain is stored as its difference from one (Gemma).
    """

    eps: float = 1e-6
    learned: bool = True
    offset: bool = False

    def __post_init__(self):
        positive(self, "eps")
        require(self.learned or not self.offset, self, "offset needs learned = True, got learned = False")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormConfig:
    """Layer norm, Ba et al. 2016, arXiv:1607.06450; `learned = False` is OLMo's non-parametric one."""

    eps: float = 1e-5
    learned: bool = True
    bias: bool = False

    def __post_init__(self):
        positive(self, "eps")
        require(self.learned or not self.bias, self, "bias needs learned = True, got learned = False")


NormConfig = RMSNormConfig | LayerNormConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScalingConfig:
    """Frequency scaling of Llama 3.1 and 3.2: low ones are divided by `factor`, high ones kept, a ramp between."""

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
        positive(self, "factor", "low_frequency_factor", "original_length")
        require(
            self.high_frequency_factor > self.low_frequency_factor,
            self,
            f"high_frequency_factor {self.high_frequency_factor} must exceed "
            f"low_frequency_factor {self.low_frequency_factor}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, Su et al. 2021, arXiv:2104.09864, in the half-split layout of Llama.

    Attributes:
      theta: base of the geometric series of wavelengths.
      rotated_fraction: leading share of each head that is rotated (StableLM 0.25, Phi-4-mini 0.75).
      scaling: change of frequencies for longer contexts, or None.
    """

    theta: float = 10_000.0
    rotated_fraction: float = 1.0
    scaling: Llama3RopeScalingConfig | None = None

    def __post_init__(self):
        positive(self, "theta", "rotated_fraction")
        fraction(self, "rotated_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head, grouped-query or multi-query attention, Ainslie et al. 2023, arXiv:2305.13245.

    Attributes:
      num_heads: query heads N.
      num_kv_heads: key/value heads K; K = N is multi-head, K = 1 multi-query.
      head_dim: width H of one head.
      rope: rotary embedding, or None for a layer without positions (NoPE).
      window: how many keys a query sees, itself included; None is all.
      qk_norm: norm of queries and keys before RoPE, or None.
      qk_norm_over: "head" normalises each head (Qwen3), "full" all heads together (OLMo 2).
      softcap: c in c * tanh(scores / c), or None (Gemma 2: 50).
      scale: factor of the scores; None is head_dim ** -0.5.
      qkv_bias: bias on the query, key and value projections (Qwen2.5).
      out_bias: bias on the output projection.
      sinks: one learned logit per head that takes attention away (gpt-oss).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    window: int | None = None
    qk_norm: RMSNormConfig | LayerNormConfig | None = None
    qk_norm_over: Literal["head", "full"] = "head"
    softcap: float | None = None
    scale: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False

    def __post_init__(self):
        positive(self, "num_heads", "num_kv_heads", "head_dim", "window", "softcap", "scale")
        require(
            self.num_heads % self.num_kv_heads == 0,
            self,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        if self.rope is not None:
            rotated = self.head_dim * self.rope.rotated_fraction
            require(
                rotated == int(rotated) and int(rotated) % 2 == 0,
                self,
                f"RoPE needs an even number of rotated channels; head_dim {self.head_dim} times "
                f"rotated_fraction {self.rope.rotated_fraction} is {rotated}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """Position-wise feed-forward. Gated forms: Shazeer 2020, arXiv:2002.05202; relu2: So et al. 2021, arXiv:2109.08668.

    silu + gated is SwiGLU, gelu + gated GeGLU, relu + gated ReGLU.
    """

    hidden: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self):
        positive(self, "hidden")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Dropless mixture of experts with top-k routing (Shazeer et al. 2017, arXiv:1701.06538; OLMoE, arXiv:2409.02060).

    Attributes:
      num_experts: routed experts E.
      top_k: experts a token is sent to.
      hidden: hidden width of one routed expert.
      shared_hidden: hidden width of the expert every token passes, 0 for none (DeepSeekMoE, arXiv:2401.06066).
      scoring: "softmax" over all experts, or "sigmoid" of each (DeepSeek-V3).
      normalise_top_k: whether the k chosen scores are divided by their sum.
      routed_scale: factor of the routed experts' output.
      balance_loss: weight of the load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4, for top-k).
      router_z_loss: weight of mean(logsumexp(router logits)^2) (Zoph et al. 2022, arXiv:2202.08906).
      balance_bias_rate: step of the loss-free balancing bias, 0 for none (Wang et al. 2024, arXiv:2408.15664).
    """

    num_experts: int
    top_k: int
    hidden: int
    activation: Activation = "silu"
    gated: bool = True
    shared_hidden: int = 0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise_top_k: bool = True
    routed_scale: float = 1.0
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
    balance_bias_rate: float = 0.0

    def __post_init__(self):
        positive(self, "num_experts", "top_k", "hidden", "routed_scale")
        not_negative(self, "shared_hidden", "balance_loss", "router_z_loss", "balance_bias_rate")
        require(
            self.top_k <= self.num_experts, self, f"top_k {self.top_k} is larger than num_experts {self.num_experts}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One decoder layer: a token mixer, a feed-forward, their norms and how they join the residual stream.

    Attributes:
      norm_placement: "pre" x + f(norm(x)); "post" x + norm(f(x)), OLMo 2's; "sandwich" x + norm(f(norm(x))), Gemma's.
      residual_scale: factor of each branch before it is added (Granite 0.22, MiniCPM 1.4 / sqrt(layers)).
      parallel: mixer and feed-forward read the same normalised input and are added together (Phi).
    """

    mixer: AttentionConfig
    feed_forward: FeedForwardConfig | MoEConfig
    norm: RMSNormConfig | LayerNormConfig
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    residual_scale: float = 1.0
    parallel: bool = False

    def __post_init__(self):
        require(self.residual_scale != 0, self, "residual_scale must not be 0: the layer would do nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerwiseScalingConfig:
    """Heads and feed-forward width that grow with depth, OpenELM (Mehta et al. 2024, arXiv:2404.14619).

    Layer i of n takes the multiplier at i / (n - 1) of each range, rounded to two places as the released code does:
    query width = width * multiplier, to the nearest multiple of `heads_divisor * head_dim`; feed-forward likewise, to
    the nearest multiple of `hidden_divisor`. Key/value heads keep the ratio that the layer's config states.
    """

    query_multipliers: tuple[float, float]
    feed_forward_multipliers: tuple[float, float]
    heads_divisor: int = 4
    hidden_divisor: int = 256

    def __post_init__(self):
        positive(self, "heads_divisor", "hidden_divisor")
        require(
            min(*self.query_multipliers, *self.feed_forward_multipliers) > 0, self, "multipliers must be greater than 0"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How weights start (the table of which weight gets what is in model/initialise.py).

    Attributes:
      std: standard deviation of matrices; None is width ** -0.5, as in the SmolLM configurations.
      embedding_std: of the embedding and output tables; None is the same as `std`.
      scale_residual_outputs: divide the std of the projections back into the residual stream by
        sqrt(2 * layers), GPT-2's rule.
      zero_residual_outputs: start those projections at zero instead, so that each layer begins as the identity.
    """

    std: float | None = 0.02
    embedding_std: float | None = None
    scale_residual_outputs: bool = False
    zero_residual_outputs: bool = False

    def __post_init__(self):
        positive(self, "std", "embedding_std")
        require(
            not (self.scale_residual_outputs and self.zero_residual_outputs),
            self,
            "scale_residual_outputs and zero_residual_outputs exclude each other",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model: a width, a vocabulary and a layer plan.

    The plan is `prefix`, then `pattern` repeated `repeats` times.

    Attributes:
      prefix: layers before the repeated ones (DeepSeek's dense first layer).
      pattern: the unit that repeats: one layer, or for example five local layers and a global one.
      block_repeats: how often in a row each stored layer is executed (MobileLLM-LS, arXiv:2402.14905: 2).
      share_feed_forward: one feed-forward for all layers (MobiLlama, arXiv:2402.16840).
      scaling: heads and widths that grow with depth, or None.
      embedding_scale: factor of the embeddings (Gemma sqrt(width), Granite 12).
      logit_scale: factor of the logits (Granite 1 / 6, MiniCPM 256 / width).
      logit_softcap: c in c * tanh(logits / c), or None (Gemma 2: 30).
    """

    vocab_size: int
    width: int
    pattern: tuple[LayerConfig, ...]
    repeats: int
    final_norm: RMSNormConfig | LayerNormConfig
    prefix: tuple[LayerConfig, ...] = ()
    block_repeats: int = 1
    share_feed_forward: bool = False
    scaling: LayerwiseScalingConfig | None = None
    tied_embeddings: bool = True
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    init: InitConfig = InitConfig()

    def __post_init__(self):
        positive(self, "vocab_size", "width", "repeats", "block_repeats", "embedding_scale", "logit_scale")
        positive(self, "logit_softcap")
        require(len(self.pattern) > 0, self, "pattern needs at least one layer, got ()")
        layers = self.prefix + self.pattern
        if self.share_feed_forward:
            require(
                len({layer.feed_forward for layer in layers}) == 1,
                self,
                "share_feed_forward needs the same feed_forward in every layer of prefix and pattern",
            )
            require(
                isinstance(layers[0].feed_forward, FeedForwardConfig),
                self,
                "share_feed_forward applies to a dense feed-forward only, got a mixture of experts",
            )
            require(self.scaling is None, self, "share_feed_forward and scaling exclude each other")
        if self.scaling is not None:
            require(
                all(isinstance(layer.feed_forward, FeedForwardConfig) for layer in layers),
                self,
                "scaling applies to dense feed-forwards only, got a mixture of experts",
            )
            groups = {layer.mixer.num_heads // layer.mixer.num_kv_heads for layer in layers}
            require(
                all(self.scaling.heads_divisor % group == 0 for group in groups),
                self,
                f"scaling.heads_divisor {self.scaling.heads_divisor} is not a multiple of the query heads that share a "
                f"key/value head, {sorted(groups)}",
            )

    @property
    def num_stored_layers(self) -> int:
        """Layers that have weights of their own."""
        return len(self.prefix) + len(self.pattern) * self.repeats

    @property
    def num_layers(self) -> int:
        """Layers that are executed."""
        return self.num_stored_layers * self.block_repeats
