"""What the verbs share: arguments, configs, the start of JAX."""

import os
from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 75  # EX_TEMPFAIL: stopped by a signal, saved; the same command goes on

Files = Annotated[list[Path], typer.Argument(help="Gin files; later ones win.", metavar="CONFIG.gin")]
Overrides = Annotated[list[str], typer.Option("--set", help="Name.field=value, after the files.", metavar="BINDING")]
Step = Annotated[int | None, typer.Option(help="Checkpoint to use; the newest good one if not given.")]


def load(files: list[Path], overrides: list[str], root: type | None = None):
    """The config that the files and bindings describe, of the class `root` if one is wanted."""
    from slmjax.gin_loader import load

    return load(files, overrides, root=root)


def load_run(files: list[Path], overrides: list[str]):
    """The same, of a RunConfig."""
    from slmjax.config import RunConfig

    return load(files, overrides, root=RunConfig)


def start_jax() -> None:
    """Joins the other processes of the run, and turns the persistent compilation cache on."""
    import jax

    from slmjax.parallel.distributed import initialise

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "slmjax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    initialise()
