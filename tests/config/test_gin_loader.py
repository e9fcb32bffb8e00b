"""Every mistake in a config is refused with a message that names the place, the field, what was expected and got."""

import json
import pickle
import re
import sys
from pathlib import Path

import gin
import pytest
from gin import config as gin_config
from typer.testing import CliRunner

from slmjax import cli
from slmjax import config as configs
from slmjax.config.resolved import from_json, to_json
from slmjax.gin_loader import ConfigError, load

# 28 lines, the first of which is line 1.
BASE = """\
RunConfig.output_dir = "out"
RunConfig.steps = 10
RunConfig.model = @ModelConfig()
RunConfig.input = @InputConfig()
RunConfig.optimizer = @AdamWConfig()
RunConfig.schedule = @WSDScheduleConfig()
RunConfig.checkpoint = @CheckpointConfig()
CheckpointConfig.every_steps = 5
AdamWConfig.peak_lr = 1e-3
InputConfig.tokenizer = "t"
InputConfig.stages = (@MixtureStageConfig(),)
InputConfig.batch_size = 2
InputConfig.sequence_length = 8
MixtureStageConfig.sources = (@TokenSourceConfig(),)
TokenSourceConfig.path = "p"
ModelConfig.vocab_size = 64
ModelConfig.width = 16
ModelConfig.repeats = 2
ModelConfig.pattern = (@LayerConfig(),)
ModelConfig.final_norm = @RMSNormConfig()
LayerConfig.mixer = @AttentionConfig()
LayerConfig.feed_forward = @FeedForwardConfig()
LayerConfig.norm = @RMSNormConfig()
FeedForwardConfig.hidden = 32
AttentionConfig.num_heads = 4
AttentionConfig.num_kv_heads = 2
AttentionConfig.head_dim = 4
AttentionConfig.rope = @RopeConfig()
"""


@pytest.fixture(autouse=True)
def in_folder_with_base(tmp_path, monkeypatch):
    """Each test runs beside base.gin; whatever it does, gin's registry must be empty afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.gin").write_text(BASE)
    yield
    assert gin_config._CONFIG == {}
    assert gin_config._OPERATIVE_CONFIG == {}


def write(folder, text, name="run.gin"):
    """Writes a file whose third line is the first of `text`."""
    (folder / name).write_text(f'# a comment\ninclude "base.gin"\n{text}\n')
    return [name]


REFUSED = {
    "unknown class": ("AtentionConfig.window = 3", "run.gin:3", "'AtentionConfig'", "did you mean 'AttentionConfig'"),
    "unknown field": ("AttentionConfig.windw = 3", "run.gin:3", "'windw'", "did you mean 'window'"),
    "unknown field, far": ("WandbConfig.zzz = 3", "run.gin:3", "'zzz'", "known are project, entity, mode"),
    "unknown reference": ("LayerConfig.mixer = @AtentionConfig()", "run.gin:3", "did you mean 'AttentionConfig'"),
    "function of gin": ("RunConfig.model = @gin.singleton()", "run.gin:3", "no config class 'gin.singleton'"),
    "string for int": ('AttentionConfig.num_heads = "four"', "run.gin:3", "num_heads: expected int, got 'four' (str)"),
    "float for int": ("AttentionConfig.num_heads = 1e3", "run.gin:3", "num_heads: expected int, got 1000.0 (float)"),
    "bool for int": ("AttentionConfig.num_heads = True", "run.gin:3", "num_heads: expected int, got True (bool)"),
    "int for bool": ("AttentionConfig.qkv_bias = 1", "run.gin:3", "qkv_bias: expected bool, got 1 (int)"),
    "infinity": ("RopeConfig.theta = 1e999", "run.gin:3", "RopeConfig.theta: expected float, got inf"),
    "bool for float": ("RopeConfig.theta = True", "run.gin:3", "RopeConfig.theta: expected float, got True"),
    "None for int": ("RunConfig.steps = None", "run.gin:3", "RunConfig.steps: expected int, got None"),
    "unknown literal": ("FeedForwardConfig.activation = 'swish'", "run.gin:3", "'relu' or 'relu2', got 'swish'"),
    "list for tuple": ("ModelConfig.pattern = [@LayerConfig()]", "run.gin:3", "expected a tuple of LayerConfig"),
    "item for tuple": ("ModelConfig.pattern = (@LayerConfig())", "run.gin:3", "(item,), got LayerConfig"),
    "long value": ("RunConfig.steps = " + repr("x" * 500), "run.gin:3", "expected int, got 'xxx", "... (str)"),
    "tuple of another length": (
        "RunConfig.tracking = @TrackingConfig()\nTrackingConfig.profile_steps = (1, 2, 3)",
        "run.gin:4",
        "TrackingConfig.profile_steps: expected a tuple (int, int) or None, got (1, 2, 3)",
    ),
    "class without ()": (
        "LayerConfig.mixer = @AttentionConfig",
        "run.gin:3",
        "LayerConfig.mixer",
        "@Name() with paren",
    ),
    "another class": ("LayerConfig.mixer = @RopeConfig()", "run.gin:3", "expected AttentionConfig, got RopeConfig"),
    "dict": ("LayerConfig.norm = {'eps': 1}", "run.gin:3", "expected RMSNormConfig or LayerNormConfig, got {'eps': 1}"),
    "a class in itself": ("LayerConfig.mixer = @LayerConfig()", "run.gin", "contains itself"),
    "required": ("AttentionConfig.num_heads = %gin.REQUIRED", "run.gin:3", "%gin.REQUIRED has no value"),
    "undefined macro": ("heads = 4\nAttentionConfig.num_heads = %hads", "run.gin:4", "%hads", "did you mean 'heads'"),
    "unused macro": ("heads = 4", "run.gin:3", "the macro heads is never used"),
    "unused class": ("LionConfig.b1 = 0.5", "run.gin:3", "LionConfig is bound but nothing"),
    "unused scope": ("local/AttentionConfig.window = 2", "run.gin:3", "local/AttentionConfig is bound but nothing"),
    "arithmetic": ("AttentionConfig.num_heads = 4 * 2", "run.gin:3", "without arithmetic", "4 * 2"),
    "power": ("RunConfig.steps = 2**4", "run.gin:3", "without arithmetic", "2**4"),
    "lower-case true": ("AttentionConfig.qkv_bias = true", "run.gin:3", "Python literal", "'true'"),
    "unquoted string": ("RunConfig.output_dir = out", "run.gin:3", "Python literal", "'out'"),
    "not a binding": ("just some words", "run.gin:3", "expected Name.field = value", "just some words"),
    "unclosed bracket": ("ModelConfig.pattern = (@LayerConfig(),", "run.gin:", "expected Name.field = value"),
    "not divisible": ("AttentionConfig.num_heads = 5", "run.gin:3, base.gin:26: AttentionConfig: num_heads 5 is not"),
    "scaling that splits a group": (
        "ModelConfig.scaling = @LayerwiseScalingConfig()\nLayerwiseScalingConfig.query_multipliers = (0.5, 1.0)\n"
        "LayerwiseScalingConfig.feed_forward_multipliers = (0.5, 1.0)\nLayerwiseScalingConfig.heads_divisor = 3",
        "run.gin:3: ModelConfig: scaling.heads_divisor 3 is not a multiple of the query heads that share a",
    ),
    "negative": ("AttentionConfig.num_heads = -4", "run.gin:3: ", "num_heads must be greater than 0, got -4"),
    "error in a block": ("AttentionConfig:\n  num_heads = 8\n  windw = 4", "run.gin:5", "no field 'windw'"),
    "type in a block": (
        "AttentionConfig:\n  num_heads = 8\n  window = 'x'",
        "run.gin:5",
        "window: expected int or None",
    ),
    "after several lines": ("ModelConfig.pattern = (\n  @LayerConfig(),\n)\nRunConfig.steps = 'x'", "run.gin:6"),
    "import": ("import os", "run.gin:3", "imports are not allowed", "import os"),
    "import after a tab": ("import\tos", "run.gin:3", "imports are not allowed"),
    "from import": ("from os import path", "run.gin:3", "imports are not allowed"),
    "missing include": ('include "nowhere.gin"', "nowhere.gin", "cannot be read (included by run.gin)"),
    "includes itself": ('include "run.gin"', "run.gin: includes itself, by way of run.gin"),
    "includes itself, spelled otherwise": ('include "./run.gin"', "includes itself, by way of run.gin"),
    "a long line": ("RunConfig.steps = " + "9" * 5000, "run.gin:3", "got 'RunConfig.steps = " + "9" * 82 + "' ("),
    "two roots": ("PipelineConfig.output_dir = 'x'", "exactly one of RunConfig or PipelineConfig"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistake_is_refused_with_its_place(tmp_path, name):
    text, *expected = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("RunConfig.model = @ModelConfig()", "run.gin: RunConfig: no value for model; bind RunConfig.model"),
        ("AttentionConfig.head_dim = 4", "base.gin:21: AttentionConfig: no value for head_dim"),
        ("CheckpointConfig.every_steps = 5", "base.gin:7: CheckpointConfig: no value for every_steps"),
    ],
)
def test_missing_field_is_refused_where_its_class_is_named(tmp_path, removed, message):
    (tmp_path / "base.gin").write_text(BASE.replace(removed, ""))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(write(tmp_path, ""))


@pytest.mark.parametrize("spelling", ['"""other.gin"""', '"oth" "er.gin"', '  "other.gin"  # why'])
def test_include_cannot_hide_an_import(tmp_path, spelling):
    (tmp_path / "other.gin").write_text("import this\n")
    with pytest.raises(ConfigError, match=r"other\.gin:1: imports are not allowed"):
        load(write(tmp_path, f"include {spelling}"))
    assert "this" not in sys.modules


def test_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "run.gin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.gin: cannot be read"):
        load(["run.gin"])


def test_include_is_found_beside_the_including_file(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.gin").write_text('include "b.gin"\n')
    (tmp_path / "parts" / "b.gin").write_text("RunConfig.steps = 77\n")
    assert load(write(tmp_path, 'include "parts/a.gin"')).config.steps == 77


def test_last_binding_wins_and_files_come_before_overrides(tmp_path):
    files = write(tmp_path, "RunConfig.steps = 20\nRunConfig.steps = 30")
    assert load(files).config.steps == 30
    (tmp_path / "more.gin").write_text("RunConfig.steps = 40\n")
    assert load([*files, "more.gin"]).config.steps == 40
    assert load([*files, "more.gin"], ["RunConfig.steps=50"]).config.steps == 50


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("RunConfig.steps=5", "steps", 5),
        ("RunConfig.steps = 5", "steps", 5),
        ("slmjax.RunConfig.steps=5", "steps", 5),
        ("RunConfig.clip_norm=None", "clip_norm", None),
        ("RunConfig.output_dir='a b'", "output_dir", "a b"),
        ("RunConfig.output_dir=runs/a=b", "output_dir", "runs/a=b"),
        ("RunConfig.output_dir=~/it's", "output_dir", "~/it's"),
    ],
)
def test_override(override, field, value):
    assert getattr(load(["base.gin"], [override]).config, field) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("AttentionConfig.num_head=8", "did you mean 'num_heads'"),
        ("AttentionConfig.num_heads=eight", "expected int, got 'eight' (str)"),
        ("AttentionConfig.num_heads=5", "num_heads 5 is not a multiple of num_kv_heads 2"),
        ("RunConfig.output_dir=3", "expected str, got 3 (int)"),
        ("RunConfig.model=@Model()", "no config class 'Model'"),
        ("RunConfig.steps", "expected Name.field = value"),
        ("RunConfig.steps=", "expected Name.field = value"),
        ("include 'base.gin'", "expected Name.field=value"),
        ("RunConfig.steps=3\nimport this", "expected Name.field=value"),
        ("LionConfig.b1=0.5", "nothing in this config uses it"),
    ],
)
def test_refused_override_is_named(override, message):
    with pytest.raises(ConfigError) as caught:
        load(["base.gin"], [override])
    assert str(caught.value).startswith(f"--set {override}")
    assert message in str(caught.value)


SCOPED = """
ModelConfig.pattern = (@local/LayerConfig(), @LayerConfig())
local/AttentionConfig.window = 4
local/RopeConfig.theta = 100.0
"""


def test_scope_changes_one_of_two_instances(tmp_path):
    local, whole = load(write(tmp_path, SCOPED)).config.model.pattern
    assert (local.mixer.window, local.mixer.rope.theta) == (4, 100.0)
    assert (whole.mixer.window, whole.mixer.rope.theta) == (None, 10_000.0)
    assert local.mixer.num_heads == whole.mixer.num_heads == 4
    assert local.feed_forward == whole.feed_forward


def test_error_in_a_scope_names_the_binding_in_force_there(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, SCOPED + "local/AttentionConfig.num_heads = 3"))
    assert str(caught.value).startswith("run.gin:7, base.gin:26: AttentionConfig: num_heads 3 is not")


def test_macro_gives_two_fields_one_value(tmp_path):
    model = load(write(tmp_path, "wide = 24\nModelConfig.width = %wide\nFeedForwardConfig.hidden = %wide")).config.model
    assert model.width == model.pattern[0].feed_forward.hidden == 24


def test_config_of_another_command_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.gin: binds a RunConfig, but this command needs a PipelineConfig"):
        load(write(tmp_path, ""), root=configs.PipelineConfig)


def test_any_class_can_be_the_root(tmp_path):
    (tmp_path / "part.gin").write_text(
        "AttentionConfig:\n  num_heads = 4\n  num_kv_heads = 4\n  head_dim = 8\n  rope = None\n"
    )
    config = load(["part.gin"], root=configs.AttentionConfig).config
    assert config == configs.AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8, rope=None)


def test_file_of_a_model_alone_can_be_shown():
    path = Path(__file__).parents[2] / "configs" / "model" / "smollm2_135m.gin"
    assert type(load([path]).config) is configs.ModelConfig
    shown = CliRunner().invoke(cli.app, ["show", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "ModelConfig.width = 576" in shown.output
    assert "# parameters        134,515,008 " in shown.output


def test_result_is_a_plain_value(tmp_path):
    config = load(write(tmp_path, SCOPED)).config
    assert type(config) is configs.RunConfig
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(load(["run.gin"]).config)


def test_saved_text_loads_again_to_an_equal_config(tmp_path):
    path = "a 'quoted' \"path\" " + "of many words " * 20
    macro = f"{SCOPED}wide = 24\nModelConfig.width = %wide\nTokenSourceConfig.path = {path!r}"
    first = load(write(tmp_path, macro), ["RunConfig.output_dir=runs/x", "RunConfig.clip_norm=None"])
    (tmp_path / "base.gin").unlink()
    (tmp_path / "saved.gin").write_text(first.text)
    second = load(["saved.gin"])
    assert second.config == first.config
    assert second.text == first.text
    assert second.config.input.stages[0].sources[0].path == path


def test_json_round_trip(tmp_path):
    config = load(write(tmp_path, SCOPED)).config
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "Rope"}, "unknown class 'Rope'"),
        ({"bias": 1.0}, "does not know: ['bias']"),
        ({"theta": "big"}, "RopeConfig.theta: expected float, got 'big'"),
        ({"theta": -1.0}, "theta must be greater than 0"),
    ],
)
def test_json_that_is_no_config_is_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_json(to_json(configs.RopeConfig()) | change)


def test_registry_is_cleared_and_a_failure_leaves_nothing_behind(tmp_path):
    gin.parse_config("stale = 3")
    with pytest.raises(ConfigError):
        load(write(tmp_path, "RunConfig.steps = 99\nAttentionConfig.num_heads = 5"))
    assert load(["base.gin"]).config.steps == 10
    assert not gin.config_is_locked()


def test_a_part_that_is_there_by_default_can_be_bound_without_being_named():
    path = Path(__file__).parents[2] / "configs" / "quickstart.gin"
    run = load(
        [path], ["GuardConfig.window_steps = 7", "WandbConfig.project = 'x'", "TrackingConfig.wandb = @WandbConfig()"]
    ).config
    assert run.guard == configs.GuardConfig(window_steps=7)
    assert run.tracking.wandb == configs.WandbConfig(project="x")
    assert load([path]).config.guard == configs.GuardConfig()
