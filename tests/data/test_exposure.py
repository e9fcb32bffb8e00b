"""What a run will see of every source: exact counts, caps of epochs, temperatures, and the verb that shows them."""

import collections
import dataclasses

import pytest
from tiny_run import write_tiny_run
from typer.testing import CliRunner

from slmjax import cli
from slmjax.config import InputConfig, MixtureStageConfig, TokenSourceConfig
from slmjax.data.exposure import exposure, require_epochs, spell_exposure
from slmjax.data.loader import make_loader
from slmjax.data.mixture import tempered_weights
from slmjax.data.sources import open_mixture
from slmjax.data.token_store import TokenStoreWriter

SIZES = {"web": 4000, "code": 1000, "chat": 300}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores whose tokens tell their source: web has ids from 10, code from 20,000, chat from 40,000."""
    root = tmp_path_factory.mktemp("stores")
    for i, (name, size) in enumerate(SIZES.items()):
        with TokenStoreWriter(root / name, tokenizer_sha256="t", vocab_size=60_000, config_sha256="c") as writer:
            for start in range(0, size, 50):
                writer.add(list(range(20_000 * i + 10 + start, 20_000 * i + 10 + start + 50)), 100)
    return {name: str(root / name) for name in SIZES}


def config_of(stores, *, temperature=None, caps=(None, None, None)):
    web, code, chat = (
        TokenSourceConfig(path=stores[name], weight=weight, max_epochs=cap, rows=rows)
        for name, weight, cap, rows in zip(SIZES, (0.5, 0.3, 0.2), caps, ("stream", "stream", "whole"), strict=True)
    )
    return InputConfig(
        tokenizer="unused",
        stages=(
            MixtureStageConfig(sources=(web, code), temperature=temperature),
            MixtureStageConfig(start_step=10, sources=(web, code, chat), temperature=temperature),
        ),
        batch_size=4,
        sequence_length=60,
    )


def exposure_of(config, steps=30):
    return exposure(open_mixture(config, seed=0, tokenizer_sha256=None), config, steps=steps)


def test_the_preview_is_what_the_loader_reads(stores):
    config = config_of(stores, caps=(9, 9, 9))
    seen = collections.Counter()
    stages = exposure_of(config)
    for step, batch in enumerate(make_loader(config, seed=0, start_step=0, steps=30)):
        learned = batch.tokens[batch.documents > 0]
        for i, name in enumerate(SIZES):
            seen[step >= 10, name] += int((learned // 20_000 == i).sum())
    for late, stage in enumerate(stages):
        assert (stage.start_step, stage.end_step) == ((0, 10), (10, 30))[late]
        for source, name in zip(stage.sources, SIZES, strict=False):
            # Rows are shuffled, so that which of them is the short last one differs: one row more or less.
            assert source.tokens_seen == pytest.approx(seen[bool(late), name], abs=60)
            assert source.epochs == pytest.approx(source.tokens_seen / source.tokens_available, rel=1e-3)
    first, second = ({source.path: source for source in stage.sources} for stage in stages)
    for name, share in (("web", 0.5), ("code", 0.3), ("chat", 0.2)):
        source = second[stores[name]]
        assert source.weight == pytest.approx(share)
        earlier = first[stores[name]].epochs if stores[name] in first else 0
        assert source.epochs_so_far == pytest.approx(earlier + source.epochs)
    assert first[stores["web"]].weight == pytest.approx(0.5 / 0.8)


def test_a_source_beyond_its_cap_is_refused_before_training(stores):
    epochs = {source.path: source.epochs_so_far for source in exposure_of(config_of(stores))[-1].sources}
    enough = tuple(epochs[stores[name]] for name in SIZES)
    config = config_of(stores, caps=enough)
    require_epochs(exposure_of(config))
    next(make_loader(config, seed=0, start_step=0, steps=30))
    less = config_of(stores, caps=(enough[0], enough[1] * 0.9, enough[2] - 0.01))
    with pytest.raises(ValueError, match=r"code would be read .* times by step 30, its max_epochs is .*; .*chat would"):
        make_loader(less, seed=0, start_step=20, steps=30)
    with pytest.raises(ValueError, match="give the source a smaller weight, train fewer steps, or raise max_epochs"):
        require_epochs(exposure_of(less))
    require_epochs(exposure_of(less, steps=20))


def test_the_least_cap_of_all_stages_is_in_force(stores):
    config = config_of(stores)
    first, second = config.stages
    capped = dataclasses.replace(first.sources[0], max_epochs=0.25)
    stages = (dataclasses.replace(first, sources=(capped, *first.sources[1:])), second)
    with pytest.raises(ValueError, match=r"web would be read .* by step 30, its max_epochs is 0.25"):
        require_epochs(exposure_of(dataclasses.replace(config, stages=stages)))


def test_temperature_mixes_by_size(stores):
    assert tempered_weights([1, 1, 1], [100, 400, 1600], 1) == [0.0625, 0.25, 1]
    assert tempered_weights([1, 1, 1], [100, 400, 1600], 2) == [0.25, 0.5, 1]
    assert tempered_weights([2, 1], [100, 400], 1e9) == pytest.approx([2, 1])

    def weights(temperature):
        return [source.weight for source in exposure_of(config_of(stores, temperature=temperature))[1].sources]

    sizes = [weight * tokens for weight, tokens in zip((0.5, 0.3, 0.2), (4000, 1000, 294), strict=True)]
    assert weights(1) == pytest.approx([size / sum(sizes) for size in sizes], rel=1e-3)
    assert weights(1)[2] < weights(3)[2] < weights(None)[2]
    assert "tokens, temperature 3\n" in spell_exposure(exposure_of(config_of(stores, temperature=3.0)))
    assert "temperature" not in spell_exposure(exposure_of(config_of(stores)))


def test_the_verb_shows_stages_and_notes_and_refuses(tmp_path):
    path = str(write_tiny_run(tmp_path))

    def run(*arguments):
        return CliRunner().invoke(cli.app, ["data", "mix", path, *arguments])

    shown = run("--preview", "--set", "RunConfig.steps=12")
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert lines[1].startswith("steps 0 to 5: ")
    assert lines[4].startswith("steps 5 to 12: ")
    spelled = [int(line.split()[4].replace(",", "")) for line in (lines[1], lines[4])]
    assert sum(spelled) == int(lines[6].split()[0].replace(",", ""))
    assert [line.split()[0] for line in (lines[2], lines[3], lines[5])] == [f"{tmp_path}/{name}" for name in "abb"]
    assert lines[2].split()[1] == "0.6667"
    assert "tokens in 12 steps" in lines[6]
    assert "note:" not in shown.output
    assert "note: " in run("--preview", "--set", "RunConfig.steps=300").output
    assert run().output == ""
    refused = run("--set", "b/TokenSourceConfig.max_epochs=1.0")
    assert refused.exit_code == 1
    assert "b would be read" in str(refused.exception)


def test_the_table_has_a_line_for_every_source_of_every_stage(stores):
    text = spell_exposure(exposure_of(config_of(stores, caps=(2, None, None)), steps=60))
    assert [len(line.split()) for line in text.splitlines() if stores["web"] in line] == [7, 7]
    assert text.splitlines()[2].endswith("  2")
    assert "note: " + stores["chat"] in text
