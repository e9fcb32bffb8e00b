"""Trains a quality model and measures it on held-out texts. One process, the same result every time."""

from typing import Any

from rich.console import Console

from data_pipelines.quality import count_training, linear_training, model_files
from data_pipelines.quality.examples import DataHash, Reader
from slmjax.config import (
    QualityTrainingConfig,
    TrainClassifierConfig,
    TrainImportanceConfig,
    TrainNgramModelConfig,
    TrainPreferenceConfig,
    TrainRegressionConfig,
)
from slmjax.config.resolved import to_json
from slmjax.data.exclusive import only_user


def train(config: QualityTrainingConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Trains the model of `config`, writes it to output_dir and returns what model.json says of it.

    Raises:
      ValueError: too little to learn from or to measure with, or another process writes there.
      OSError: the model cannot be written.
    """
    console = console or Console(highlight=False)
    directory = model_files.expand(config.output_dir)
    reader, data = Reader(config.normalise), DataHash()
    with only_user(directory), console.status(f"training {directory}"):
        match config.model:
            case TrainClassifierConfig():
                model, held_out = linear_training.train_classifier(config, config.model, reader, data)
            case TrainRegressionConfig():
                model, held_out = linear_training.train_regression(config, config.model, reader, data)
            case TrainPreferenceConfig():
                model, held_out = linear_training.train_preference(config, config.model, reader, data)
            case TrainNgramModelConfig():
                model, held_out = count_training.train_ngram_model(config, config.model, reader, data)
            case TrainImportanceConfig():
                model, held_out = count_training.train_importance(config, config.model, reader, data)
        content = to_json(config)
        about = {
            "config": {name: content[name] for name in content if name != "output_dir"},
            "data_sha256": data.hexdigest(),
            "rejected": dict(sorted(reader.rejected.items())),
            "held_out": held_out,
        }
        model_files.save(model, directory, about=about)
    console.print(f"{directory}: {type(config.model).__name__}", markup=False)
    for name, value in held_out.items():
        if not isinstance(value, list):
            console.print(f"  {name:<28} {value:,}" if isinstance(value, int) else f"  {name:<28} {value:.4f}")
    for reason, number in reader.rejected.most_common():
        console.print(f"  records that could not be used: {number:,} {reason}")
    return about
