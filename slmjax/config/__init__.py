"""Every configuration dataclass: frozen, typed, validated, standard library only. Anyone may import this package."""

from slmjax.config.model import (
    Activation,
    AttentionConfig,
    FeedForwardConfig,
    InitConfig,
    LayerConfig,
    LayerNormConfig,
    LayerwiseScalingConfig,
    Llama3RopeScalingConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RMSNormConfig,
    RopeConfig,
)
from slmjax.config.optim import (
    AdamWConfig,
    ConstantScheduleConfig,
    CosineScheduleConfig,
    InverseSqrtScheduleConfig,
    LinearScheduleConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    ScheduleConfig,
    WarmupConfig,
    WSDScheduleConfig,
)
from slmjax.config.run import (
    CheckpointConfig,
    EvalSetConfig,
    EvaluationConfig,
    ExecutionConfig,
    GenerationConfig,
    GuardConfig,
    InputConfig,
    MeshConfig,
    MixtureStageConfig,
    ObjectiveConfig,
    RunConfig,
    TokenSourceConfig,
    TrackingConfig,
    WandbConfig,
)

__all__ = [name for name in dir() if name[0].isupper()]
