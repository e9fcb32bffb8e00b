"""How much of every source a run will see, how often, and in which stage: exact, before anything is trained."""

from collections.abc import Sequence
from typing import NamedTuple

from slmjax.config import InputConfig
from slmjax.data.sources import MixedSources

# Repeating text more often is worth visibly less than new text (Muennighoff et al. 2023, arXiv:2305.16264, figure 1).
_UNTROUBLED_EPOCHS = 4.0


class SourceExposure(NamedTuple):
    """What one stage reads of one source.

    Attributes:
      path: of its store.
      weight: share of the stage's tokens.
      tokens_available: in one epoch, padding not counted.
      tokens_seen: in this stage.
      epochs: in this stage.
      epochs_so_far: at the end of this stage, with those of the stages before.
      max_epochs: the cap, or None.
    """

    path: str
    weight: float
    tokens_available: int
    tokens_seen: int
    epochs: float
    epochs_so_far: float
    max_epochs: float | None


class StageExposure(NamedTuple):
    """The steps [start_step, end_step) and what they read; the temperature is part of the weights."""

    start_step: int
    end_step: int
    sources: tuple[SourceExposure, ...]
    temperature: float | None


def exposure(mixed: MixedSources, config: InputConfig, *, steps: int) -> tuple[StageExposure, ...]:
    """What a run of `steps` steps reads, by stage; stages that start later are left out."""
    starts = [stage.start_step for stage in config.stages if stage.start_step < steps]
    stages = []
    for stage, start, end, weights in zip(config.stages, starts, [*starts[1:], steps], mixed.weights, strict=False):
        before, after = (mixed.mixture.counts(step * config.batch_size) for step in (start, end))
        sources = []
        for number, weight in weights.items():
            source, seen = mixed.sources[number], after.get(number, 0) - before.get(number, 0)
            sources.append(
                SourceExposure(
                    path=source.path,
                    weight=weight,
                    tokens_available=source.num_tokens,
                    tokens_seen=round(seen * source.rows.tokens_per_row),
                    epochs=seen / source.rows.num_rows,
                    epochs_so_far=after.get(number, 0) / source.rows.num_rows,
                    max_epochs=source.max_epochs,
                )
            )
        stages.append(StageExposure(start, end, tuple(sources), stage.temperature))
    return tuple(stages)


def require_epochs(stages: Sequence[StageExposure]) -> None:
    """Raises ValueError naming every source that is read more often than its max_epochs, and by when."""
    problems = {}
    for stage in stages:
        for source in stage.sources:
            if source.max_epochs is not None and source.epochs_so_far > source.max_epochs:
                problems[source.path] = (
                    f"{source.path} would be read {source.epochs_so_far:.2f} times by step {stage.end_step}, its "
                    f"max_epochs is {source.max_epochs:g}"
                )
    if problems:
        raise ValueError(
            f"{'; '.join(problems.values())}: give the source a smaller weight, train fewer steps, or raise max_epochs"
        )


def spell_exposure(stages: Sequence[StageExposure]) -> str:
    """A table for the terminal, with a note on whatever is repeated often."""
    header = ("source", "weight", "available", "to be seen", "epochs", "in all", "cap")
    rows: list[tuple[str, ...]] = [header]
    titles: dict[int, str] = {}
    for stage in stages:
        tokens = sum(source.tokens_seen for source in stage.sources)
        tempered = "" if stage.temperature is None else f", temperature {stage.temperature:g}"
        titles[len(rows)] = f"steps {stage.start_step:,} to {stage.end_step:,}: {tokens:,} tokens{tempered}"
        for source in stage.sources:
            cap = "-" if source.max_epochs is None else f"{source.max_epochs:g}"
            rows.append(
                (
                    source.path,
                    f"{source.weight:.4f}",
                    f"{source.tokens_available:,}",
                    f"{source.tokens_seen:,}",
                    f"{source.epochs:.2f}",
                    f"{source.epochs_so_far:.2f}",
                    cap,
                )
            )
    last = {source.path: source for stage in stages for source in stage.sources}
    notes = [
        f"note: {source.path} is read {source.epochs_so_far:.1f} times; beyond {_UNTROUBLED_EPOCHS:g} epochs repeated "
        "text teaches visibly less than new text; a cap is TokenSourceConfig.max_epochs"
        for source in last.values()
        if source.max_epochs is None and source.epochs_so_far > _UNTROUBLED_EPOCHS
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for number, row in enumerate(rows):
        lines += [titles[number]] if number in titles else []
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(["", *cells]).rstrip())
    total = sum(source.tokens_seen for stage in stages for source in stage.sources)
    return "\n".join([*lines, f"{total:,} tokens in {stages[-1].end_step:,} steps", *notes])
