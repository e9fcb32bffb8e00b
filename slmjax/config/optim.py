"""Optimizers and learning-rate schedules. `steps` of a schedule comes from the run; warm-up is in steps or tokens."""

import dataclasses
from typing import Literal

from slmjax.config.check import fraction, not_negative, positive, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """Linear rise from zero to the peak; give either `steps` or `tokens` (0 and 0 is none)."""

    steps: int = 0
    tokens: int = 0

    def __post_init__(self):
        not_negative(self, "steps", "tokens")
        require(
            self.steps == 0 or self.tokens == 0,
            self,
            f"give steps or tokens, not both: steps {self.steps}, tokens {self.tokens}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSDScheduleConfig:
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): the last `decay_fraction` of the run falls to the final.

    Attributes:
      decay_fraction: share of all steps spent decaying.
      decay_shape: "linear", or "1-sqrt", 1 - sqrt(progress) (Hägele et al. 2024, arXiv:2405.18392).
      final_fraction: learning rate at the end of the run, after the last update, as a share of the peak.
    """

    warmup: WarmupConfig = WarmupConfig()
    decay_fraction: float = 0.2
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    final_fraction: float = 0.0

    def __post_init__(self):
        fraction(self, "decay_fraction", "final_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineScheduleConfig:
    """Half a cosine from the peak to `final_fraction` of it (Loshchilov & Hutter 2016, arXiv:1608.03983)."""

    warmup: WarmupConfig = WarmupConfig()
    final_fraction: float = 0.1

    def __post_init__(self):
        fraction(self, "final_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScheduleConfig:
    """A straight line from the peak to `final_fraction` of it."""

    warmup: WarmupConfig = WarmupConfig()
    final_fraction: float = 0.0

    def __post_init__(self):
        fraction(self, "final_fraction")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrtScheduleConfig:
    """peak * sqrt(timescale / (timescale + step - warmup)); the timescale is `timescale_steps`, or else the warm-up."""

    warmup: WarmupConfig = WarmupConfig()
    timescale_steps: int | None = None

    def __post_init__(self):
        positive(self, "timescale_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantScheduleConfig:
    """The peak, after the warm-up."""

    warmup: WarmupConfig = WarmupConfig()


ScheduleConfig = (
    WSDScheduleConfig | CosineScheduleConfig | LinearScheduleConfig | InverseSqrtScheduleConfig | ConstantScheduleConfig
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101).

    Weight decay applies to matrices; norms, biases and router biases have none, embeddings as `decay_embeddings` says.
    `embedding_lr_factor` multiplies the learning rate of embedding and output tables.
    """

    peak_lr: float
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    embedding_lr_factor: float = 1.0

    def __post_init__(self):
        positive(self, "peak_lr", "eps", "embedding_lr_factor")
        fraction(self, "b1", "b2")
        not_negative(self, "weight_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LionConfig:
    """Sign of interpolated momentum (Chen et al. 2023, arXiv:2302.06675). Decay groups as for AdamW."""

    peak_lr: float
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1
    decay_embeddings: bool = True

    def __post_init__(self):
        positive(self, "peak_lr")
        fraction(self, "b1", "b2")
        not_negative(self, "weight_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Orthogonalised momentum for hidden matrices (Jordan et al. 2024), `adamw` for everything else.

    The update of a matrix is scaled as Moonlight does (Liu et al. 2025, arXiv:2502.16982), 0.2 * sqrt(max(in, out)), so
    that AdamW's learning rates and weight decays carry over, and peak_lr is on AdamW's scale.
    """

    peak_lr: float
    adamw: AdamWConfig
    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    weight_decay: float = 0.1

    def __post_init__(self):
        positive(self, "peak_lr", "newton_schulz_steps")
        fraction(self, "momentum")
        not_negative(self, "weight_decay")


OptimizerConfig = AdamWConfig | MuonConfig | LionConfig
