"""The sources of a run, opened, and the mixture of their rows."""

from typing import NamedTuple

from slmjax.config import InputConfig, TokenSourceConfig
from slmjax.data.mixture import Mixture, Stage, row_shares, tempered_weights
from slmjax.data.packing import StreamRows, WholeRows
from slmjax.data.token_store import TokenStore, check_tokenizer

_MAX_ROWS = 1 << 32  # that the loader can shuffle


class Source(NamedTuple):
    """A token store and its rows.

    Attributes:
      path: as the config has it.
      max_epochs: the least of those of all stages that name the source; None where none does.
    """

    path: str
    rows: StreamRows | WholeRows
    max_epochs: float | None

    @property
    def num_tokens(self) -> int:
        """Positions, padding not counted, of all rows."""
        return int(self.rows.num_rows * self.rows.tokens_per_row)


class MixedSources(NamedTuple):
    """All sources of a run, each of which several stages may name.

    Attributes:
      sources: by the number that the mixture calls them.
      weights: of each stage: the share of its tokens that a source gives, by number; they sum to 1.
    """

    sources: list[Source]
    weights: list[dict[int, float]]
    mixture: Mixture


def open_mixture(config: InputConfig, *, seed: int, tokenizer_sha256: str | None) -> MixedSources:
    """Opens every source once.

    Raises:
      ValueError: a store is damaged, empty, or of another tokenizer, or a stage names a source twice.
    """
    numbers: dict[tuple[str, str], int] = {}
    sources: list[Source] = []
    weights, stages = [], []
    for stage in config.stages:
        names = [(source.path, source.rows) for source in stage.sources]
        if len(names) != len(set(names)):
            raise ValueError(f"a stage has the same source twice, got {names}; add up the weights instead")
        for name, source in zip(names, stage.sources, strict=True):
            if name not in numbers:
                numbers[name] = len(numbers)
                store = open_store(source, tokenizer_sha256)
                sources.append(Source(source.path, _training_rows(source, store, config.sequence_length, seed), None))
            caps = [cap for cap in (sources[numbers[name]].max_epochs, source.max_epochs) if cap is not None]
            sources[numbers[name]] = sources[numbers[name]]._replace(max_epochs=min(caps, default=None))
        used = [numbers[name] for name in names]
        wanted = [source.weight for source in stage.sources]
        if stage.temperature is not None:
            wanted = tempered_weights(wanted, [sources[number].num_tokens for number in used], stage.temperature)
        shares = row_shares(wanted, [sources[number].rows.tokens_per_row for number in used])
        weights.append({number: weight / sum(wanted) for number, weight in zip(used, wanted, strict=True)})
        stages.append(Stage(stage.start_step * config.batch_size, dict(zip(used, shares, strict=True))))
    return MixedSources(sources, weights, Mixture(stages))


def open_store(source: TokenSourceConfig, tokenizer_sha256: str | None) -> TokenStore:
    """Opens the store of one source. Raises ValueError where it is damaged or of another tokenizer."""
    store = TokenStore.open(source.path)
    if tokenizer_sha256 is not None:
        check_tokenizer(store, tokenizer_sha256)
    return store


def _training_rows(
    source: TokenSourceConfig, store: TokenStore, sequence_length: int, seed: int
) -> StreamRows | WholeRows:
    rows = (
        StreamRows(store, sequence_length) if source.rows == "stream" else WholeRows(store, sequence_length, seed=seed)
    )
    if rows.num_rows > _MAX_ROWS:
        raise ValueError(
            f"{store.path} has {rows.num_rows} rows, more than the {_MAX_ROWS} that can be shuffled; split it"
        )
    return rows
