"""Evaluates a trained run, prints the scores and keeps them in <output_dir>/evaluation.json."""

import json
import os
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slmjax import files
from slmjax.config import RunConfig
from slmjax.evaluate.baselines import run_baselines
from slmjax.evaluate.likelihood import evaluate_all
from slmjax.parallel.mesh import make_mesh
from slmjax.train.restore import load_run


def evaluate_run(
    run_config: RunConfig,
    *,
    step: int | None = None,
    baselines_dir: str | os.PathLike | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of the run on all of its evaluation sets, on the run's mesh.

    Args:
      run_config: a trained run.
      step: checkpoint to evaluate; None is the newest whole one.
      baselines_dir: evaluation sets in this directory are measured with compressors and a byte model, too.
      console: where to print.

    Returns:
      What evaluation.json holds: {"step": ..., "metrics": {"<set>/<score>": ...}, "baselines": {set: {name: bits per
      byte}}}.

    Raises:
      ValueError: the run has no checkpoint or no evaluation sets, or none of them lies in `baselines_dir`.
    """
    if not run_config.evaluation.sets:
        raise ValueError("the run has no evaluation sets; bind EvaluationConfig.sets")
    mesh = make_mesh(run_config.mesh)
    loaded = load_run(run_config, step=step, mesh=mesh)
    result = {
        "step": loaded.step,
        "metrics": evaluate_all(loaded.params, run_config, mesh=mesh, tokenizer_sha256=loaded.tokenizer.sha256),
        "baselines": {} if baselines_dir is None else run_baselines(run_config, loaded.tokenizer, Path(baselines_dir)),
    }
    if jax.process_index() == 0:
        path = Path(run_config.output_dir) / "evaluation.json"
        files.write_text(path, json.dumps(result, indent=1) + "\n")
        (console or Console(highlight=False)).print(_table(result))
    return result


def _table(result: dict[str, Any]) -> Table:
    table = Table("set", "", "bits per byte", "perplexity", "loss", title=f"Step {result['step']}")
    metrics = result["metrics"]
    for name in dict.fromkeys(metric.rpartition("/")[0] for metric in metrics):
        scores = [f"{metrics[f'{name}/{score}']:.4f}" for score in ("bits_per_byte", "perplexity", "loss")]
        table.add_row(escape(name), "this model", *scores, style="bold")
        for baseline, bits in result["baselines"].get(name, {}).items():
            table.add_row("", baseline, f"{bits:.4f}")
    return table
