"""One training run: model, data, optimizer and how it is executed, saved, watched and evaluated."""

import dataclasses
from typing import Literal

from slmjax.config.check import directory, fraction, not_negative, positive, require
from slmjax.config.model import ModelConfig
from slmjax.config.optim import OptimizerConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSourceConfig:
    """A token store (a directory that `slmjax data` wrote) as a source of training rows.

    Attributes:
      path: directory of the store; environment variables and ~ are expanded.
      weight: share of the tokens of a mixture; weights need not sum to one.
      rows: "stream" cuts the concatenated documents into rows of equal length, "whole" packs whole documents and never
        splits one (instruction data).
      max_epochs: training that would read the source more often, over all stages, is refused; None allows any number.
        Up to four are almost as good as new text (Muennighoff et al. 2023, arXiv:2305.16264).
    """

    path: str
    weight: float = 1.0
    rows: Literal["stream", "whole"] = "stream"
    max_epochs: float | None = None

    def __post_init__(self):
        positive(self, "weight", "max_epochs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureStageConfig:
    """The mixture in force from `start_step` until the next stage starts.

    Attributes:
      sources: what is mixed, by the weight of each.
      start_step: first step of the stage.
      temperature: multiplies every weight by tokens ** (1 / temperature) of its source: with equal weights, 1 mixes by
        size, more gives small sources a larger share (Arivazhagan et al. 2019, arXiv:1907.05019). None leaves the
        weights as they are.
    """

    sources: tuple[TokenSourceConfig, ...]
    start_step: int = 0
    temperature: float | None = None

    def __post_init__(self):
        not_negative(self, "start_step")
        positive(self, "temperature")
        require(len(self.sources) > 0, self, "sources needs at least one token source, got ()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What a training step reads: `batch_size` rows of `sequence_length` tokens over all devices.

    Attributes:
      tokenizer: path of the tokenizer model that wrote the stores; a mismatch is refused.
      stages: mixtures in order of start_step, the first at 0.
      document_isolation: whether packed documents are hidden from each other.
      prefetch_batches: batches that a background thread prepares ahead.
    """

    tokenizer: str
    stages: tuple[MixtureStageConfig, ...]
    batch_size: int
    sequence_length: int
    document_isolation: bool = True
    prefetch_batches: int = 4

    def __post_init__(self):
        positive(self, "batch_size", "sequence_length", "prefetch_batches")
        starts = [stage.start_step for stage in self.stages]
        require(
            len(starts) > 0 and starts[0] == 0 and starts == sorted(set(starts)),
            self,
            f"stages must start at step 0 and then at rising steps, got {starts}",
        )

    @property
    def tokens_per_step(self) -> int:
        """Positions in one global batch, padding included."""
        return self.batch_size * self.sequence_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Next-token cross-entropy over positions whose weight is not zero.

    `z_loss` is the weight of mean(logsumexp(logits)^2) (PaLM, arXiv:2204.02311, section 5).
    """

    z_loss: float = 0.0

    def __post_init__(self):
        not_negative(self, "z_loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How the same mathematics is run. Nothing here changes the function that is computed, only rounding and speed.

    Attributes:
      layers: "scan" compiles one layer and loops, "unroll" compiles each (faster on GPUs, slower to compile).
      remat: what the backward pass recomputes: "none" nothing, "activations" what the activation of a feed-forward
        gives, "full" whole layers, "dots" all but matrix products, "attention" whole layers but the attention's output
        and log-sum-exp.
      attention: implementation, or "auto" to choose by platform and mask.
      compute_dtype: of activations and of the weights as used; master weights are always float32.
      products: of activations with the projections of the layers: in `compute_dtype`, or in 8-bit floats with a scale
        for each operand (ops/float8.py), which pays on GPUs that have them (Hopper) for widths of 2048 and more. The
        loss falls behind somewhat (docs/guides/train.md). Not for experts, routers, embedding and loss.
      loss_chunk_tokens: tokens of a device whose logits exist at one time; 0 is its whole batch in one piece.
      logits_dtype: what the training loss rounds logits to before the softmax; "bfloat16" (as under PyTorch's autocast)
        moves half the bytes. Statistics are float32 in any case, and so are the logits of an evaluation.
      microbatches: pieces a batch is split into, gradients summed in float32.
    """

    layers: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "activations", "full", "dots", "attention"] = "none"
    attention: Literal["auto", "reference", "chunked", "hopper", "hopper_deterministic", "tpu", "cudnn"] = "auto"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    products: Literal["compute_dtype", "float8"] = "compute_dtype"
    loss_chunk_tokens: int = 4096
    logits_dtype: Literal["float32", "bfloat16"] = "float32"
    microbatches: int = 1

    def __post_init__(self):
        not_negative(self, "loss_chunk_tokens")
        positive(self, "microbatches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What to do with a step whose loss or gradient is not finite, or whose loss leaps.

    Attributes:
      on_bad_step: "skip" leaves parameters and optimizer as they were and counts it, "stop" ends the run with an error.
      spike_sigmas: a loss this many standard deviations over its running mean is bad; None turns the check off.
      window_steps: time constant of the running mean, and the steps before the spike check begins.
      max_consecutive_skips: this many bad steps in a row end the run.
    """

    on_bad_step: Literal["skip", "stop"] = "skip"
    spike_sigmas: float | None = None
    window_steps: int = 100
    max_consecutive_skips: int = 20

    def __post_init__(self):
        positive(self, "spike_sigmas", "window_steps", "max_consecutive_skips")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints go to <output_dir>/checkpoints.

    Attributes:
      every_steps: distance between saves; the last step is always saved.
      keep_last: newest checkpoints kept.
      keep_every_steps: checkpoints at multiples of this are kept for good; None keeps none.
      asynchronous: write in the background while training goes on.
    """

    every_steps: int
    keep_last: int = 2
    keep_every_steps: int | None = None
    asynchronous: bool = True

    def __post_init__(self):
        positive(self, "every_steps", "keep_last", "keep_every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """A held-out token store.

    Attributes:
      name: the metrics are called <name>/loss, <name>/perplexity, <name>/bits_per_byte.
      max_tokens: tokens read, from the start; None is all.
      stride: positions between the starts of overlapping rows, each token scored once, with the longer context; None is
        the row length, no overlap. Only for rows = "stream".
    """

    name: str
    source: TokenSourceConfig
    max_tokens: int | None = None
    stride: int | None = None

    def __post_init__(self):
        positive(self, "max_tokens", "stride")
        require(self.stride is None or self.source.rows == "stream", self, "stride needs a source with rows = 'stream'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during and after training. `every_steps = None` evaluates at the end only."""

    sets: tuple[EvalSetConfig, ...] = ()
    every_steps: int | None = None
    batch_size: int = 8

    def __post_init__(self):
        positive(self, "every_steps", "batch_size")
        names = [eval_set.name for eval_set in self.sets]
        require(len(names) == len(set(names)), self, f"names of sets must differ, got {names}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; "offline" needs no account and is uploaded later with `wandb sync`."""

    project: str
    entity: str | None = None
    mode: Literal["offline", "online"] = "offline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides <output_dir>/metrics.jsonl, which is always written.

    Attributes:
      log_every_steps: distance between logged steps.
      wandb: or None.
      profile_steps: first and last step (exclusive) of a profiler trace in <output_dir>/profile, or None; without
        Python's calls.
    """

    log_every_steps: int = 10
    console: bool = True
    wandb: WandbConfig | None = None
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self):
        positive(self, "log_every_steps")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            require(0 <= first < last, self, f"profile_steps must rise from 0 or more, got {self.profile_steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each mesh axis; one axis may be -1, which is whatever is left.

    `data` holds copies of the parameters, `fsdp` shards them (Zhao et al. 2023, arXiv:2304.11277). Both split batches.
    """

    data: int = 1
    fsdp: int = -1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        require(all(size == -1 or size > 0 for size in sizes), self, f"axis sizes must be positive or -1, got {sizes}")
        require(sizes.count(-1) <= 1, self, f"at most one axis may be -1, got {sizes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Defaults of `slmjax sample` and `slmjax chat`.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: only the k likeliest tokens; None is all.
      top_p: only the smallest set of likeliest tokens with this probability (Holtzman et al. 2019, arXiv:1904.09751).
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        positive(self, "max_new_tokens", "top_k", "top_p")
        not_negative(self, "temperature")
        fraction(self, "top_p")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Attributes:
      output_dir: everything the run writes; running the same config again resumes from it.
      steps: optimizer steps.
      seed: of initialisation, shuffling and everything else that is random.
      init_from: output_dir of a run whose newest checkpoint gives the initial parameters (instruction tuning, continued
        training), or None to start from random ones.
      clip_norm: largest global gradient norm; None does not clip.
    """

    output_dir: str
    steps: int
    model: ModelConfig
    input: InputConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    seed: int = 0
    init_from: str | None = None
    clip_norm: float | None = 1.0
    objective: ObjectiveConfig = ObjectiveConfig()
    execution: ExecutionConfig = ExecutionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    guard: GuardConfig = GuardConfig()
    mesh: MeshConfig = MeshConfig()
    generation: GenerationConfig = GenerationConfig()

    def __post_init__(self):
        positive(self, "steps", "clip_norm")
        not_negative(self, "seed")
        require(self.seed < 2**63, self, f"seed must be less than 2**63, got {self.seed}")
        directory(self, "output_dir")
        require(
            self.input.batch_size % self.execution.microbatches == 0,
            self,
            f"input.batch_size {self.input.batch_size} is not a multiple of "
            f"execution.microbatches {self.execution.microbatches}",
        )
        late = [stage.start_step for stage in self.input.stages if stage.start_step >= self.steps]
        require(not late, self, f"stages that start at or after the last step {self.steps}: {late}")
