import dataclasses
import io
import json

import pytest
from rich.console import Console
from trained_run import make_trained_run, params_of

from slmjax import config as c
from slmjax.evaluate.likelihood import evaluate_all
from slmjax.evaluate.run import evaluate_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained_run(tmp_path_factory.mktemp("evaluate"))


@pytest.mark.multidevice
def test_scores_and_baselines_are_kept_and_shown(run, tmp_path_factory):
    screen = io.StringIO()
    corpus = run.input.stages[0].sources[0].path.removesuffix("/train")
    result = evaluate_run(run, step=10, baselines_dir=corpus, console=Console(file=screen, width=100))
    with open(f"{run.output_dir}/evaluation.json", encoding="utf-8") as file:
        assert json.load(file) == result
    assert result["step"] == 10
    expected = evaluate_all(params_of(run, 10), run)
    assert result["metrics"] == pytest.approx(expected, rel=1e-5)  # eight devices against one
    assert list(result["baselines"]) == ["text"]
    assert set(result["baselines"]["text"]) == {"gzip -9", "zstd -19", "xz -9", "order-4 bytes"}
    shown = screen.getvalue()
    for number in (result["metrics"]["talk/loss"], result["baselines"]["text"]["xz -9"]):
        assert f"{number:.4f}" in shown


def test_a_run_without_evaluation_sets_is_an_error(run):
    with pytest.raises(ValueError, match=r"bind EvaluationConfig\.sets"):
        evaluate_run(dataclasses.replace(run, evaluation=c.EvaluationConfig()))


def test_scores_that_cannot_be_kept_are_an_error_that_names_the_file(run, tmp_path):
    here = dataclasses.replace(run, output_dir=str(tmp_path))
    (tmp_path / "checkpoints").symlink_to(f"{run.output_dir}/checkpoints")
    (tmp_path / "evaluation.json").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*evaluation\.json: Is a directory"):
        evaluate_run(here, console=Console(file=io.StringIO()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "evaluation.json"]
