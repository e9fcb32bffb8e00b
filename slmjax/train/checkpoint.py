"""Checkpoints that know whether they are whole. The only importer of orbax.

One directory per step, written by orbax under a temporary name and renamed when it is complete, so that a killed
process leaves nothing that looks finished. Beside the arrays (state/) lie record/, with the shape, dtype and checksum
of every leaf and whatever the caller wants to keep (config, data position), and files.json, with the size of every file
and the CRC-32 of its first MiB. files.json tells most damage without reading the arrays; their checksums tell the rest.
"""

import contextlib
import json
import logging
import os
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from slmjax.config import CheckpointConfig

logger = logging.getLogger(__name__)

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that exist can be read."""


class Restored(NamedTuple):
    """What `Checkpointer.restore` found: the step, the state on its devices, and the caller's `extra`."""

    step: int
    state: Any
    extra: dict


class Checkpointer:
    """Saves and restores training states in `directory`. Every process calls every method."""

    def __init__(self, directory: os.PathLike | str, config: CheckpointConfig):
        self._directory = _absolute(directory)
        self._config = config
        # Compressing float32 noise saves a tenth of the space and costs a core that a CPU run needs for training.
        handler = ocp.CompositeCheckpointHandler(
            state=ocp.PyTreeCheckpointHandler(use_compression=False), record=ocp.JsonCheckpointHandler()
        )
        self._orbax = ocp.AsyncCheckpointer(
            handler, async_options=ocp.options.AsyncOptions(post_finalization_callback=self._before_rename)
        )
        self._saving: epath.Path | None = None

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, whole or not, in rising order."""
        return _finished_steps(self._directory)

    def save(self, step: int, state: Any, extra: dict) -> None:
        """Writes `state`, a tree of jax arrays, and `extra`, JSON values, as the checkpoint of `step`.

        Returns once the arrays are copied to the host; the state may be donated at once. With `asynchronous` the rest
        happens in the background, and an error there is raised by the next call of any method.

        Raises:
          CheckpointError: this save or the one before it failed. Finished checkpoints are not touched by that.
        """
        self.wait()
        path = self._directory / str(step)
        if path.exists():
            self._set_aside(path)
        leaves = _flatten(state)
        record = {"format": FORMAT, "leaves": _describe(leaves), "extra": extra}
        self._saving = path
        with self._errors_named():
            self._orbax.save(
                path,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), record=ocp.args.JsonSave(record)),
            )
        if not self._config.asynchronous:
            self.wait()

    def restore(self, abstract_state: Any, *, step: int | None = None) -> Restored | None:
        """Returns the newest whole checkpoint, or the one of `step`, or None if there is no finished checkpoint.

        Newer ones that are damaged are reported as warnings and renamed <step>.bad, so that training can pass their
        step again.

        Args:
          abstract_state: the tree to restore, of `ShapeDtypeStruct`s; each sharding may differ from the saved one.
          step: the checkpoint to read; a damaged one is then an error.

        Raises:
          CheckpointError: checkpoints exist but none is whole.
          ValueError: a checkpoint is whole but holds another tree: another model or optimizer.
        """
        self.wait()
        found = _read_newest(self._directory, abstract_state, step=step)
        if found is None:
            return None
        for bad_step in [each for each in self.steps() if each > found.step] if step is None else []:
            self._set_aside(self._directory / str(bad_step))
        return found

    def wait(self) -> None:
        """Returns when no save is under way, then removes checkpoints that are no longer to be kept.

        Raises:
          CheckpointError: the save failed.
        """
        if self._saving is not None:
            with self._errors_named():
                self._orbax.wait_until_finished()
            self._saving = None
            self._prune()

    def close(self) -> None:
        """Waits and releases orbax's threads. Raises like `wait`."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _before_rename(self) -> None:
        """Runs in orbax's background thread, on one process, when every file but its commit marks is written."""
        assert self._saving is not None
        temporary = self._saving.parent / (self._saving.name + ocp.utils.TMP_DIR_SUFFIX)
        # On object stores, which cannot rename, orbax writes in place and then a commit mark.
        directory = temporary if temporary.exists() else self._saving
        (directory / "files.json").write_text(json.dumps(_list_files(directory), indent=1))

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turns whatever orbax raises while it writes into one error that names the path and what is left."""
        try:
            yield
        except Exception as error:
            path, self._saving = self._saving, None
            raise CheckpointError(
                f"could not write the checkpoint {path}: {_first_line(error)}; finished checkpoints are intact: "
                f"{self.steps() or 'none'}. Is the disk full, or the directory read-only?"
            ) from error

    def _prune(self) -> None:
        steps = self.steps()
        every = self._config.keep_every_steps
        for step in steps[: -self._config.keep_last]:
            if jax.process_index() == 0 and not (every and step % every == 0):
                try:
                    (self._directory / str(step)).rmtree()
                except OSError as error:
                    logger.warning("cannot remove the old checkpoint %s: %s", self._directory / str(step), error)

    def _set_aside(self, path: epath.Path) -> None:
        """Renames a checkpoint that stands in the way; nothing here deletes data that may still be worth a look."""
        _barrier("set_aside:before")
        if jax.process_index() == 0:
            aside = path.parent / f"{path.name}.bad"
            number = 2
            while aside.exists():
                aside = path.parent / f"{path.name}.bad-{number}"
                number += 1
            path.rename(aside)
            logger.warning("renamed the checkpoint %s to %s", path, aside.name)
        _barrier("set_aside:after")


def restore_params(directory: os.PathLike | str, abstract_params: Any, *, step: int | None = None) -> Restored:
    """Returns the newest whole checkpoint, or that of `step`, with {"params": ...} as its state; reads nothing else.

    Raises:
      FileNotFoundError: there is no finished checkpoint.
      CheckpointError, ValueError: as for `Checkpointer.restore`.
    """
    return restore_part(directory, {"params": abstract_params}, step=step)


def restore_part(directory: os.PathLike | str, abstract_part: Any, *, step: int | None = None) -> Restored:
    """The same for other parts of the state: `abstract_part` is the tree without those that are not wanted."""
    found = _read_newest(_absolute(directory), abstract_part, step=step, partial=True)
    if found is None:
        raise FileNotFoundError(f"no finished checkpoint in {directory}; is it the checkpoints/ directory of a run?")
    return found


def _absolute(directory: os.PathLike | str) -> epath.Path:
    path = os.fspath(directory)
    return epath.Path(path if "://" in path else os.path.abspath(os.path.expanduser(path)))


def _finished_steps(directory: epath.Path) -> list[int]:
    if not directory.exists():
        return []
    named = [path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(int(path.name) for path in named if ocp.utils.is_checkpoint_finalized(path))


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns {"params/embed_VD": leaf, ...}: what is on disk depends on names, not on the kind of container."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _describe(leaves: dict[str, jax.Array]) -> dict[str, dict]:
    sums = jax.device_get(_checksums(leaves))
    return {
        name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "checksum": int(sums[name])}
        for name, leaf in leaves.items()
    }


def _list_files(directory: epath.Path) -> dict[str, list[int]]:
    """Returns {path: [bytes, CRC-32 of the first MiB]} of what was written for `directory`."""
    listing, folders = {}, [directory / "record", directory / "state"]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            else:
                with path.open("rb") as file:
                    head = file.read(1 << 20)
                listing[str(path.relative_to(directory))] = [path.stat().length, zlib.crc32(head)]
    return listing


def _require_same_files(directory: epath.Path) -> None:
    written = json.loads((directory / "files.json").read_text())
    found = _list_files(directory)
    for name, (size, crc) in written.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name][0] != size:
            raise ValueError(f"{name} has {found[name][0]} bytes, {size} were written")
        if found[name][1] != crc:
            raise ValueError(f"{name} has changed since it was written")


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """Returns a uint32 of the bits of `x` and their positions, the same however `x` is sharded.

    The sum modulo 2^32 over all words w_i of mix(w_i + i * 0x9E3779B9), where mix is MurmurHash3's 32-bit finaliser
    (Appleby 2011). mix is a bijection, so a change of one word always shows; any other change is missed once in 2^32.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32))
    words = words.astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    words = words + index * np.uint32(0x9E3779B9)
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # One program, not one a leaf: XLA's CPU client deadlocks with more than 32 programs in flight on several devices.
    return {name: checksum(leaf) for name, leaf in leaves.items()}


def _read_newest(
    directory: epath.Path, abstract_tree: Any, *, step: int | None, partial: bool = False
) -> Restored | None:
    """Tries finished checkpoints from the newest, or only that of `step`. The same outcome on every process."""
    steps = _finished_steps(directory)
    if step is not None and step not in steps:
        raise CheckpointError(f"no finished checkpoint of step {step} in {directory}; there are {steps or 'none'}")
    _warn_of_unfinished(directory)
    abstract = _flatten(abstract_tree)
    reasons = []
    for candidate in reversed(steps) if step is None else [step]:
        path = directory / str(candidate)
        reason, leaves, record = _read(path, abstract, partial=partial)
        if reason is None:
            state = jax.tree.unflatten(jax.tree.structure(abstract_tree), leaves)
            return Restored(candidate, state, record["extra"])
        logger.warning("the checkpoint %s is damaged and is not used: %s", path, reason)
        reasons.append(f"{path}: {reason}")
    if reasons:
        raise CheckpointError(
            "no checkpoint can be read, and training anew would hide that; repair them or use another directory:\n  "
            + "\n  ".join(reasons)
        )
    return None


def _warn_of_unfinished(directory: epath.Path) -> None:
    if directory.exists():
        for path in sorted(directory.iterdir()):
            if path.is_dir() and ocp.utils.is_tmp_checkpoint(path):
                logger.warning("the checkpoint %s was never finished and is not used", path)


def _read(path: epath.Path, abstract: dict, *, partial: bool) -> tuple[str | None, list[jax.Array], dict]:
    """Returns (None, leaves, record), or what is wrong with the checkpoint, on any process, and nothing else."""
    # The handler instead of a Checkpointer: that one waits for all processes at its end, and a process that failed
    # before would never come.
    handler = ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(), record=ocp.JsonCheckpointHandler())
    leaves, record, reason = {}, {}, None
    try:
        _require_same_files(path)
        record = handler.restore(path, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
    except Exception as error:  # whatever a damaged file makes a reader raise
        reason = _first_line(error)
    if _any_process(reason is not None):
        return reason or "another process could not read it", [], {}
    _require_same_tree(path, record["leaves"], abstract, partial=partial)
    try:
        targets = {name: _with_sharding(leaf) for name, leaf in abstract.items()}
        args = ocp.args.PyTreeRestore(
            item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets), partial_restore=True
        )
        leaves = handler.restore(path, args=ocp.args.Composite(state=args)).state
    except Exception as error:
        reason = f"its arrays cannot be read, {_first_line(error)}"
    if _any_process(reason is not None):
        return reason or "another process could not read it", [], {}
    sums = jax.device_get(_checksums(leaves))
    wrong = [name for name in abstract if int(sums[name]) != record["leaves"][name]["checksum"]]
    if wrong:
        return (
            f"{len(wrong)} of {len(abstract)} arrays have changed since they were saved, among them {wrong[0]}",
            [],
            {},
        )
    return None, [leaves[name] for name in abstract], record


def _require_same_tree(path: epath.Path, saved: dict, abstract: dict, *, partial: bool) -> None:
    """Tells another model or optimizer, which no older checkpoint would cure, from damage."""
    missing = sorted(abstract.keys() - saved.keys())
    surplus = [] if partial else sorted(saved.keys() - abstract.keys())
    if missing or surplus:
        raise ValueError(
            f"the checkpoint {path} was saved by another model or optimizer: it lacks {missing[:3] or 'nothing'} and "
            f"has {surplus[:3] or 'nothing'} too much ({len(missing)} and {len(surplus)} arrays in all)"
        )
    for name, leaf in abstract.items():
        have = (tuple(saved[name]["shape"]), saved[name]["dtype"])
        want = (tuple(leaf.shape), jnp.dtype(leaf.dtype).name)
        if have != want:
            raise ValueError(f"the checkpoint {path} was saved by another model: {name} is {have}, expected {want}")


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:300]


def _any_process(flag: bool) -> bool:
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
