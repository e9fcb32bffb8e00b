"""What the pipeline with every kind of stage makes of its small corpus, made once."""

from pathlib import Path

import pytest
from all_stages import config_of, quiet, write_corpus


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    """The corpus; nobody changes it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(corpus_folder, tmp_path_factory) -> Path:
    """The output directory of a run that nothing stopped; nobody changes it."""
    root = tmp_path_factory.mktemp("finished") / "out"
    quiet(config_of(corpus_folder, root))
    return root
