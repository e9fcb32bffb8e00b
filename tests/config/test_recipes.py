"""Every shipped config loads, is as its golden text says, and describes a model of the published size.

`python tests/config/test_recipes.py` writes the golden texts: each config resolved, defaults included, a value a line.
A text changes when its config does, or a default; the diff shows which runs that touches.
"""

import math
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import pytest

from slmjax import config as configs
from slmjax import model
from slmjax.config.resolved import to_json
from slmjax.gin_loader import load

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
ARCHITECTURES = ROOT / "tests" / "config" / "architectures"


def shipped() -> list[str]:
    """Returns the paths, relative to the repository, of all configs that a user runs as they are."""
    files = [*ROOT.glob("configs/recipes/*.gin"), *ROOT.glob("configs/quickstart*.gin")]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def golden_path(config: str) -> Path:
    """Returns where the text of `config` is kept."""
    return GOLDEN / f"{Path(config).stem}.txt"


def resolved(config: str) -> str:
    """Returns `config` as lines "field.field[0].field = value"; a class in use is a line of its own."""
    lines: list[str] = []

    def walk(path: str, node) -> None:
        if isinstance(node, dict):
            lines.append(f"{path}: {node['class']}")
            for name, value in node.items():
                if name != "class":
                    walk(f"{path}.{name}" if path != "config" else name, value)
        elif isinstance(node, list) and node:
            for index, value in enumerate(node):
                walk(f"{path}[{index}]", value)
        else:
            lines.append(f"{path} = {node!r}")

    walk("config", to_json(load([ROOT / config]).config))
    return "\n".join(lines) + "\n"


# total, and where they are fewer those that one token uses
PARAMETERS = {
    "smollm2_135m": (134_515_008, None),
    "smollm2_360m": (361_821_120, None),
    "smollm2_1_7b": (1_711_376_384, None),
    "llama3_2_1b": (1_235_814_400, None),
    "qwen3_0_6b": (596_049_920, None),
    "olmoe_small": (925_041_664, 220_398_592),
}

# Published models that are not shipped, in architectures/: each a short file on the shipped parts.
ELSEWHERE = {
    "olmoe_1b_7b": 6_919_161_856,
    "openelm_270m": 271_527_168,
    "openelm_450m": 457_179_136,
    "mobilellm_ls_125m": 124_635_456,
    "mobillama_0_5b": 534_865_920,
    "gemma_2_2b": 2_614_341_888,
    "gemma_3_1b": 999_885_952,
    "smollm3_3b": 3_075_098_624,
    "qwen2_5_0_5b": 494_032_768,
    "olmo_1b": 1_176_764_416,
    "stablelm_2_1_6b": 1_644_515_328,
}


def count(config: configs.ModelConfig) -> int:
    """Counts the parameters that `model.init` would make, from the tree itself."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(model.specs(config)))


def test_there_are_recipes():
    assert {Path(config).stem for config in shipped()} >= set(PARAMETERS)


@pytest.mark.parametrize("config", shipped())
def test_config_is_as_its_golden_text_says(config):
    expected = golden_path(config)
    message = (
        f"{config} resolves to another text than {expected.relative_to(ROOT)}. If that is meant, write the new text "
        "with `python tests/config/test_recipes.py` and look at the diff: it shows every run that the change touches."
    )
    assert expected.exists(), message
    assert resolved(config) == expected.read_text(encoding="utf-8"), message


def test_every_golden_text_has_its_config():
    assert sorted(GOLDEN.glob("*.txt")) == sorted(map(golden_path, shipped()))


@pytest.mark.parametrize("config", shipped())
def test_accounting_is_the_tree_of_every_shipped_config(config):
    run = load([ROOT / config]).config
    if isinstance(run, configs.RunConfig):
        assert model.count_parameters(run.model).total == count(run.model)


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe_has_the_published_size(name):
    total, active = PARAMETERS[name]
    counted = model.count_parameters(load([ROOT / f"configs/recipes/{name}.gin"]).config.model)
    assert (counted.total, counted.active) == (total, active or total)


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_part_stands_alone_and_names_its_size(name):
    path = ROOT / f"configs/model/{name}.gin"
    config = load([path], root=configs.ModelConfig).config
    total, active = PARAMETERS[name]
    assert model.count_parameters(config).total == total
    for number in filter(None, (total, active)):
        assert f"{number:,}" in path.read_text().partition("include")[0]


@pytest.mark.parametrize(
    "part",
    ["optim/adamw", "optim/muon", "optim/wsd", "optim/cosine", "execution/cpu", "execution/gpu", "execution/tpu"],
)
def test_part_joins_a_recipe(part):
    optimizer = "MuonConfig" if part == "optim/muon" else "AdamWConfig"
    bind = {
        "optim/muon": ["MuonConfig.peak_lr=1e-3", "AdamWConfig.peak_lr=1e-3"],
        "optim/adamw": ["AdamWConfig.peak_lr=1e-3"],
    }.get(part, [])
    base = "llama3_2_1b" if part == "optim/cosine" else "smollm2_135m"
    run = load([ROOT / f"configs/recipes/{base}.gin", ROOT / f"configs/{part}.gin"], bind).config
    assert type(run.optimizer).__name__ == optimizer
    assert part != "execution/tpu" or (run.execution.layers, run.execution.remat) == ("scan", "attention")
    assert part != "execution/cpu" or run.execution.compute_dtype == "float32"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_published_architecture_is_a_short_file(name):
    config = load([ARCHITECTURES / f"{name}.gin"], root=configs.ModelConfig).config
    assert model.count_parameters(config).total == count(config) == ELSEWHERE[name]


def test_openelm_has_the_published_heads_and_widths():
    config = load([ARCHITECTURES / "openelm_270m.gin"], root=configs.ModelConfig).config
    specs = model.specs(config)
    query_heads, hidden = [], []
    for group in range(len([name for name in specs if name.startswith("group_")])):
        layer = specs[f"group_{group}"]["layer_0"]
        stored, _, heads, _ = layer["mixer"]["w_q_DNH"].shape
        assert layer["mixer"]["w_k_DKH"].shape[2] == heads // 4
        query_heads += [heads] * stored
        hidden += [layer["feed_forward"]["w_up_DF"].shape[2]] * stored
    assert query_heads == [12] * 5 + [16] * 7 + [20] * 4
    assert hidden == [768, 1024, 1280, 1536, 1792, 2048, 2560, 2816, 3072, 3328, 3584, 3840, 4352, 4608, 4864, 5120]


@pytest.mark.parametrize("guide", ["config", "models"])
def test_program_in_the_guide_runs(guide, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / f"docs/guides/{guide}.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(program, guide, "exec"), {})


norms = st.one_of(
    st.builds(configs.RMSNormConfig, learned=st.just(True), offset=st.booleans()),
    st.just(configs.RMSNormConfig(learned=False)),
    st.builds(configs.LayerNormConfig, learned=st.just(True), bias=st.booleans()),
    st.just(configs.LayerNormConfig(learned=False)),
)
mixers = st.builds(
    lambda kv, group, **fields: configs.AttentionConfig(num_heads=kv * group, num_kv_heads=kv, **fields),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6]),
    rope=st.one_of(st.none(), st.just(configs.RopeConfig())),
    qk_norm=st.one_of(st.none(), norms),
    qk_norm_over=st.sampled_from(["head", "full"]),
    qkv_bias=st.booleans(),
    out_bias=st.booleans(),
    sinks=st.booleans(),
)
dense = st.builds(configs.FeedForwardConfig, hidden=st.integers(1, 40), gated=st.booleans(), bias=st.booleans())
mixtures = st.integers(1, 5).flatmap(
    lambda experts: st.builds(
        configs.MoEConfig,
        num_experts=st.just(experts),
        top_k=st.integers(1, experts),
        hidden=st.integers(1, 9),
        gated=st.booleans(),
        shared_hidden=st.integers(0, 5),
        balance_bias_rate=st.sampled_from([0.0, 0.01]),
    )
)


def layers(feed_forwards):
    return st.builds(
        configs.LayerConfig,
        mixer=mixers,
        feed_forward=feed_forwards,
        norm=norms,
        norm_placement=st.sampled_from(["pre", "post", "sandwich"]),
        parallel=st.booleans(),
    )


def plans(feed_forwards, **fields):
    return st.builds(
        configs.ModelConfig,
        vocab_size=st.integers(1, 70),
        width=st.integers(1, 30),
        pattern=st.lists(layers(feed_forwards), min_size=1, max_size=2).map(tuple),
        repeats=st.integers(1, 3),
        prefix=st.lists(layers(feed_forwards), max_size=2).map(tuple),
        final_norm=norms,
        block_repeats=st.integers(1, 2),
        tied_embeddings=st.booleans(),
        **fields,
    )


ranges = st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.5, 1.0, 4.0]))
scalings = st.builds(
    configs.LayerwiseScalingConfig,
    query_multipliers=ranges,
    feed_forward_multipliers=ranges,
    heads_divisor=st.just(6),  # a multiple of every group size above
    hidden_divisor=st.integers(1, 16),
)
models = st.one_of(
    plans(st.one_of(dense, mixtures)),
    plans(dense, scaling=scalings),
    dense.flatmap(lambda one: plans(st.just(one), share_feed_forward=st.just(True))),
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(models)
def test_accounting_is_the_tree_of_any_config(config):
    counted = model.count_parameters(config)
    specs = model.specs(config)
    assert counted.total == count(config)
    assert counted.embedding == sum(
        math.prod(specs[name].shape) for name in ("embed_VD", "unembed_VD") if name in specs
    )
    assert counted.active <= counted.total


if __name__ == "__main__":
    for stale in GOLDEN.glob("*.txt"):
        stale.unlink()
    for name in shipped():
        golden_path(name).write_text(resolved(name), encoding="utf-8")
