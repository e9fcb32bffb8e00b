"""The command line passes on what it was given, and says what is wrong in one line."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_run import write_config

from slmjax import cli, model
from slmjax.config import PipelineConfig
from slmjax.config.resolved import from_json
from slmjax.gin_loader import load
from slmjax.train.loop import Outcome

ROOT = Path(__file__).parents[1]
VERBS = ("data", "train", "eval", "sample", "chat", "report", "show")


@pytest.fixture
def slmjax(monkeypatch, capsys):
    """Runs the command line in this process; returns status, stdout and stderr."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    monkeypatch.setattr(logging.Logger, "setLevel", lambda *_: None)

    def slmjax(*arguments):
        monkeypatch.setattr(sys, "argv", ["slmjax", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return slmjax


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def called(monkeypatch):
    """Puts a recorder in the place of a function of the library; returns the arguments that it was called with."""

    def called(name, result=None):
        calls = []
        monkeypatch.setattr(name, lambda *args, **kwargs: calls.append((args, kwargs)) or result)
        return calls

    return called


def test_help(slmjax):
    status, out, _ = slmjax("--help")
    assert status == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(slmjax, verb):
    status, out, err = slmjax(verb, "--help")
    assert (status, err) == (0, "")
    assert f"slmjax {verb}" in out
    assert all(word in out for word in (("--output",) if verb == "report" else ("--set", "CONFIG.gin")))


def test_as_a_module_and_show_needs_no_device(config):
    """In a process of its own, with a device that no machine has."""
    shown = subprocess.run(
        [sys.executable, "-m", "slmjax", "show", config],
        env=os.environ | {"JAX_PLATFORMS": "no_such_device"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "# parameters " in shown.stdout
    assert shown.stderr == ""


def test_show(slmjax, config, tmp_path):
    status, out, _ = slmjax("show", config, "--set", "RunConfig.steps=30")
    assert status == 0
    run = load([config], ["RunConfig.steps=30"]).config
    again = tmp_path / "again.gin"
    again.write_text(out)
    assert load([again]).config == run
    count = model.count_parameters(run.model)
    size = f"{count.total:,} (embedding {count.embedding:,}, active per token {count.total:,})"
    assert f"# parameters        {size}" in out
    assert "# layers            2 executed, 2 stored" in out
    assert "# tokens            256 a step, 7,680 in 30 steps" in out


def test_show_json(slmjax, config):
    status, out, _ = slmjax("show", "--json", config)
    assert status == 0
    assert from_json(json.loads(out)) == load([config]).config


def test_show_of_a_pipeline(slmjax):
    status, out, _ = slmjax("show", ROOT / "configs" / "quickstart_data.gin")
    assert status == 0
    assert "PipelineConfig.output_dir" in out
    assert "# parameters" not in out


def test_set_in_all_its_forms(slmjax, config, tmp_path):
    more = tmp_path / "more.gin"
    more.write_text("RunConfig.steps = 40\nRunConfig.seed = 7\n")
    bindings = {
        "RunConfig.steps=50": lambda run: run.steps == 50,  # after the files
        "AdamWConfig.peak_lr = 1e-4": lambda run: run.optimizer.peak_lr == 1e-4,
        "RunConfig.clip_norm=None": lambda run: run.clip_norm is None,
        "RunConfig.output_dir=runs/a b/c=d": lambda run: run.output_dir == "runs/a b/c=d",  # the shell took the quotes
        "RunConfig.init_from='runs/7'": lambda run: run.init_from == "runs/7",
        "TrackingConfig.profile_steps=(2, 4)": lambda run: run.tracking.profile_steps == (2, 4),
        "RunConfig.evaluation=@EvaluationConfig()": lambda run: run.evaluation.every_steps == 4,
        "CheckpointConfig.keep_last=3": lambda run: run.checkpoint.keep_last == 5,
        "CheckpointConfig.keep_last=5": lambda run: True,  # the last one counts
        "a/TokenSourceConfig.weight=5": lambda run: run.input.stages[0].sources[0].weight == 5,
        "GuardConfig.window_steps=9": lambda run: run.guard.window_steps == 9,  # a part that is there by default
    }
    status, out, err = slmjax("show", "--json", config, more, *(word for each in bindings for word in ("--set", each)))
    assert status == 0, err
    run = from_json(json.loads(out))
    assert run.seed == 7
    assert [binding for binding, holds in bindings.items() if not holds(run)] == []


@pytest.fixture
def files(config, tmp_path):
    """run.gin and files that are no configs."""
    for name, content in (
        ("binary.gin", b"\xff\xfe\x00"),
        ("colon.gin", b"steps: 3\n"),
        ("typo.gin", b"\nRunConfig.stepz = 3\n"),
        ("heads.gin", b"include 'run.gin'\nAttentionConfig.num_heads = 3\nAttentionConfig.num_kv_heads = 2\n"),
    ):
        (tmp_path / name).write_bytes(content)
    return tmp_path


ERRORS = {
    "show nowhere.gin": "nowhere.gin: cannot be read",
    "show .": "cannot be read: [Errno 21] Is a directory",
    "show binary.gin": "binary.gin: cannot be read",
    "show colon.gin": "colon.gin:1: expected Name.field = value",
    "show typo.gin": "typo.gin:2: RunConfig has no field 'stepz'; did you mean 'steps'?",
    "train heads.gin": "heads.gin:2, heads.gin:3: AttentionConfig: num_heads 3 is not a multiple of num_kv_heads 2",
    "show run.gin --set RunConfig.steps=many": "steps=many: RunConfig.steps: expected int, got 'many' (str)",
    "show run.gin --set steps": "--set steps: expected Name.field",
    "data run.gin": "run.gin: binds a RunConfig, but this command needs a PipelineConfig",
    "train run.gin": "tokenizer.model': No such file or directory",
    "eval run.gin": "tokenizer.model': No such file or directory",
    "report nowhere": "no such directory",
}


@pytest.mark.parametrize(("command", "message"), ERRORS.items(), ids=ERRORS)
def test_an_error_is_one_line_and_status_1(slmjax, files, monkeypatch, command, message):
    monkeypatch.chdir(files)
    status, out, err = slmjax(*command.split())
    assert (status, out) == (1, "")
    assert err.startswith("slmjax: ")
    assert err.count("\n") == 1
    assert message in err


def test_an_error_with_its_place(slmjax, tmp_path, monkeypatch):
    monkeypatch.setenv("SLMJAX_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["slmjax", "show", str(tmp_path / "nowhere.gin")])
    with pytest.raises(ValueError, match="cannot be read"):
        cli.main()


@pytest.mark.parametrize("command", ["sing", "show", "show a.gin --sett b", "eval a.gin --step x"])
def test_usage_is_status_2(slmjax, command):
    status, _, err = slmjax(*command.split())
    assert status == 2
    assert "Usage: " in err


@pytest.mark.parametrize(("interrupted", "expected"), [(False, 0), (True, 75)])
def test_train(slmjax, config, called, interrupted, expected):
    calls = called("slmjax.train.loop.train", Outcome(7, interrupted, {}))
    assert slmjax("train", config, "--set", "RunConfig.steps=7")[0] == expected
    loaded = load([config], ["RunConfig.steps=7"])
    (((run,), rest),) = calls
    assert run == loaded.config
    assert rest["config_text"] == loaded.text
    assert from_json(rest["config_json"]) == loaded.config


def test_data(slmjax, called):
    calls = called("data_pipelines.run.run")
    assert slmjax("data", ROOT / "configs" / "quickstart_data.gin")[0] == 0
    (((pipeline,), _),) = calls
    assert isinstance(pipeline, PipelineConfig)


def test_eval(slmjax, config, called):
    calls = called("slmjax.evaluate.run.evaluate_run")
    assert slmjax("eval", config, "--step", "40", "--baselines", "data")[0] == 0
    assert slmjax("eval", config)[0] == 0
    run = load([config]).config
    assert calls == [
        ((run,), {"step": 40, "baselines_dir": Path("data")}),
        ((run,), {"step": None, "baselines_dir": None}),
    ]


def test_sample(slmjax, config, called):
    calls = called("slmjax.generate.sample.sample")
    options = "--prompt a --prompt b --instruct --seed 3 --step 4"
    assert slmjax("sample", config, *options.split())[0] == 0
    assert slmjax("sample", config)[0] == 0
    run = load([config]).config
    assert calls == [
        ((run, ["a", "b"]), {"instruct": True, "seed": 3, "step": 4}),
        ((run, [""]), {"instruct": False, "seed": 0, "step": None}),
    ]


def test_chat(slmjax, config, called):
    calls = called("slmjax.generate.chat.chat")
    assert slmjax("chat", config, "--seed", "3")[0] == 0
    assert calls == [((load([config]).config,), {"seed": 3, "step": None})]


def test_report(slmjax, called):
    calls = called("slmjax.report.report.write_report", Path("out.html"))
    assert slmjax("report", "a", "b", "--output", "out.html", "--data", "d")[:2] == (0, "out.html\n")
    assert calls == [(([Path("a"), Path("b")], Path("out.html")), {"data_dirs": [Path("d")]})]


@pytest.mark.parametrize("chosen", [None, "/elsewhere"])
def test_the_compilation_cache_is_on(monkeypatch, chosen):
    """In the user's cache directory, unless JAX was told of another."""
    settings = {}
    monkeypatch.setattr(type(jax.config), "update", lambda _, name, value: settings.update({name: value}))
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    if chosen is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
    cli.start_jax()
    assert settings.get("jax_compilation_cache_dir") == (None if chosen else "/cache/slmjax/xla")
