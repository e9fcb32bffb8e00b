"""A checkpoint comes back bit for bit, or is known to be damaged."""

import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slmjax.config import CheckpointConfig
from slmjax.train.checkpoint import Checkpointer, CheckpointError, checksum, restore_params

CONFIG = CheckpointConfig(every_steps=1, keep_last=10)
EXTRA = {"config": "ä = 0.1", "data_position": {"next_batch": 17, "sizes": [1, 2**40]}, "loss": 0.1}


def load_params(directory, abstract_params, **kwargs):
    return restore_params(directory, abstract_params, **kwargs).state["params"]


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: Any
    key: jax.Array


def make_state(seed: int, size: int = 24) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "embed_VD": jnp.asarray(rng.normal(size=(size, 16)), jnp.float32),
        "layers": {"gain_D": jnp.asarray(rng.normal(size=16), jnp.bfloat16)},
    }
    optimizer = optax.masked(optax.adam(1.0), {"embed_VD": True, "layers": False})
    key = jax.random.key_data(jax.random.key(seed))
    return State(jnp.asarray(seed, jnp.int32), params, optimizer.init(params), key)


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding), state
    )


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", CONFIG)
    yield checkpointer
    checkpointer.close()


def save(checkpointer, *steps):
    for step in steps:
        checkpointer.save(step, make_state(step), {**EXTRA, "step": step})
    checkpointer.wait()


def save_and_wait(checkpointer, step, state):
    checkpointer.save(step, state, {})
    checkpointer.wait()


def test_round_trip(checkpointer):
    save(checkpointer, 3, 5)
    for step in (None, 3):
        found = checkpointer.restore(abstract(make_state(0)), step=step)
        assert found.step == (step or 5)
        assert found.extra == {**EXTRA, "step": found.step}
        assert_same_bits(found.state, make_state(found.step))


def test_nothing_there(tmp_path, checkpointer):
    assert checkpointer.restore(abstract(make_state(0))) is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpointer.restore(abstract(make_state(0))) is None
    assert checkpointer.steps() == []
    with pytest.raises(FileNotFoundError, match="no finished checkpoint in"):
        load_params(tmp_path / "checkpoints", {})
    with pytest.raises(CheckpointError, match="no finished checkpoint of step 7"):
        checkpointer.restore(abstract(make_state(0)), step=7)


def test_the_state_may_be_donated_at_once(checkpointer):
    state = jax.jit(lambda: {"w": jnp.arange(3_000_000, dtype=jnp.float32)})()
    shapes = abstract(state)
    checkpointer.save(1, state, {})
    jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)(state)
    np.testing.assert_array_equal(checkpointer.restore(shapes).state["w"], np.arange(3_000_000))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_keeps_the_last_and_every_nth(tmp_path, asynchronous):
    config = CheckpointConfig(every_steps=1, keep_last=2, keep_every_steps=4, asynchronous=asynchronous)
    checkpointer = Checkpointer(tmp_path, config)
    for step in (2, 4, 6, 8, 10):
        checkpointer.save(step, {"w": jnp.ones(3)}, {})
        if not asynchronous:
            assert checkpointer.steps()[-1] == step
    checkpointer.close()
    assert checkpointer.steps() == [4, 8, 10]


def test_only_params(tmp_path, checkpointer):
    save(checkpointer, 1)
    state = make_state(1)
    assert_same_bits(load_params(tmp_path / "checkpoints", abstract(state.params)), state.params)
    without_sharding = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.params)
    assert_same_bits(load_params(tmp_path / "checkpoints", without_sharding, step=1), state.params)


@pytest.mark.multidevice
def test_another_mesh(tmp_path, checkpointer):
    devices = np.array(jax.devices())
    assert len(devices) == 8
    wide = Mesh(devices.reshape(2, 4), ("data", "fsdp"))
    narrow = Mesh(devices[:3], ("fsdp",))
    state = {
        "params": {
            "w": jax.device_put(
                np.arange(24 * 16, dtype=np.float32).reshape(24, 16), NamedSharding(wide, PartitionSpec("fsdp"))
            ),
            "g": jax.device_put(np.arange(16, dtype=np.float32), NamedSharding(wide, PartitionSpec())),
        }
    }
    checkpointer.save(1, state, {})
    for sharding in (
        NamedSharding(narrow, PartitionSpec()),
        NamedSharding(Mesh(devices, ("fsdp",)), PartitionSpec("fsdp")),
        NamedSharding(wide, PartitionSpec(("fsdp", "data"))),
    ):
        found = checkpointer.restore(abstract(state, sharding)).state
        assert found["params"]["w"].sharding == sharding
        assert_same_bits(found, state)


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 0)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "flipped first byte": lambda path: flip(path, 0),
    "flipped middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "flipped last byte": lambda path: flip(path, -1),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    checkpointer = Checkpointer(directory, CONFIG)
    save(checkpointer, 1, 2)
    checkpointer.close()
    return directory


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_noticed_or_harmless(two_checkpoints, tmp_path, caplog, damage):
    files = [path.relative_to(two_checkpoints) for path in files_of(two_checkpoints / "2")]
    assert len(files) >= 5
    for number, file in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(two_checkpoints, directory)
        DAMAGE[damage](directory / file)
        caplog.clear()
        checkpointer = Checkpointer(directory, CONFIG)
        found = checkpointer.restore(abstract(make_state(0)))
        checkpointer.close()
        # Never wrong numbers: this checkpoint exactly, or the one before it exactly.
        assert_same_bits(found.state, make_state(found.step))
        assert found.extra == {**EXTRA, "step": found.step}
        assert found.step == 1 or file.parts[1] not in ("state", "record")
        if found.step == 1:
            assert "2 is damaged and is not used: " in caplog.text
            assert checkpointer.steps() == [1]
            assert (directory / "2.bad").is_dir()


def test_a_bit_that_flipped_deep_in_a_large_file_is_noticed(tmp_path, caplog):
    """The file's head and size are right, so only the arrays' checksums can tell."""
    checkpointer = Checkpointer(tmp_path, CONFIG)
    states = [{"a": jnp.arange(8), "w": jax.random.normal(jax.random.key(step), (1 << 19,))} for step in range(3)]
    for step in (1, 2):
        save_and_wait(checkpointer, step, states[step])
    largest = max(files_of(tmp_path / "2"), key=lambda path: path.stat().st_size)
    flip(largest, (1 << 20) + 12345)
    found = checkpointer.restore(abstract(states[0]))
    assert found.step == 1
    assert_same_bits(found.state, states[1])
    assert "1 of 2 arrays have changed since they were saved, among them w" in caplog.text
    # training passes step 2 again
    save_and_wait(checkpointer, 2, states[2])
    assert checkpointer.restore(abstract(states[0])).step == 2
    checkpointer.close()


def test_all_damaged_is_an_error_and_nothing_is_moved(two_checkpoints, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, directory)
    for step in (1, 2):
        (directory / str(step) / "record" / "metadata").write_text("{")
    checkpointer = Checkpointer(directory, CONFIG)
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read(.|\n)*/2: .*(.|\n)*/1: "):
        checkpointer.restore(abstract(make_state(0)))
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        load_params(directory, abstract(make_state(0).params))
    assert checkpointer.steps() == [1, 2]
    checkpointer.close()


def test_an_unfinished_checkpoint_is_reported_and_its_step_can_be_saved(two_checkpoints, tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, directory)
    (directory / "2").rename(directory / "2.orbax-checkpoint-tmp")
    checkpointer = Checkpointer(directory, CONFIG)
    assert checkpointer.restore(abstract(make_state(0))).step == 1
    assert "2.orbax-checkpoint-tmp was never finished" in caplog.text
    save(checkpointer, 2)
    assert checkpointer.steps() == [1, 2]
    checkpointer.close()


def test_another_model_is_not_taken_for_damage(tmp_path, checkpointer):
    save(checkpointer, 1, 2)
    with pytest.raises(ValueError, match=r"params/embed_VD is \(\(24, 16\), 'float32'\), expected \(\(25, 16\)"):
        checkpointer.restore(abstract(make_state(0, size=25)))
    other = make_state(0)._replace(params={"unembed_VD": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"lacks \['params/unembed_VD'\] and has \['params/embed_VD'"):
        checkpointer.restore(abstract(other))
    assert checkpointer.steps() == [1, 2]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_write_names_the_path_and_spares_the_rest(tmp_path, caplog, asynchronous):
    caplog.set_level(logging.CRITICAL)  # orbax prints the traceback too
    config = CheckpointConfig(every_steps=1, asynchronous=asynchronous)
    checkpointer = Checkpointer(tmp_path, config)
    checkpointer.save(1, {"w": jnp.arange(5)}, {})
    checkpointer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file may not grow over 64 KiB: to the writer the same as a full disk, without needing one.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"could not write the checkpoint {tmp_path}/2: .*intact: \[1\]"):
            save_and_wait(checkpointer, 2, {"w": jnp.arange(500_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = checkpointer.restore({"w": jax.ShapeDtypeStruct((5,), jnp.int32)})
    assert found.step == 1
    # and once there is room again, the same step can be saved
    checkpointer.save(2, {"w": jnp.arange(500_000)}, {})
    checkpointer.close()
    assert checkpointer.steps() == [1, 2]


SAVE_FOREVER = """
    import itertools, sys
    import jax.numpy as jnp
    from slmjax.config import CheckpointConfig
    from slmjax.train.checkpoint import Checkpointer

    checkpointer = Checkpointer(sys.argv[1], CheckpointConfig(every_steps=1, keep_last=3))
    for step in itertools.count(1):
        checkpointer.save(step, {f"w{i}": jnp.full((300, 500), step * 10 + i, jnp.float32) for i in range(5)}, {})
        print(step, flush=True)
"""


def test_kill_during_a_save_leaves_only_whole_checkpoints(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(3):
        child.stdout.readline()
    time.sleep(random.random() * 0.1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    checkpointer = Checkpointer(tmp_path, CONFIG)
    steps = checkpointer.steps()
    assert len(steps) >= 1
    for step in steps:
        found = checkpointer.restore(
            {f"w{i}": jax.ShapeDtypeStruct((300, 500), jnp.float32) for i in range(5)}, step=step
        )
        assert all(np.all(found.state[f"w{i}"] == step * 10 + i) for i in range(5))
    checkpointer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_checksum_sees_bits_and_positions(dtype):
    x = np.array([[1, 0, 3], [4, 5, 0]]).astype(jnp.dtype(dtype))
    swapped = x[:, ::-1].copy()
    sums = {int(checksum(jnp.asarray(each))) for each in (x, swapped, x.T.copy().reshape(2, 3), np.zeros_like(x))}
    assert len(sums) == 4
    assert int(checksum(jnp.asarray(x))) == int(checksum(jnp.asarray(x.copy())))


def test_checksum_sees_the_sign_of_zero_and_every_single_bit():
    x = np.linspace(-1, 1, 7, dtype=np.float32)
    sums = {int(checksum(jnp.asarray(x)))}
    for index in range(x.size):
        for bit in range(32):
            changed = x.copy()
            changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
            sums.add(int(checksum(jnp.asarray(changed))))
    assert len(sums) == 1 + 7 * 32
    assert int(checksum(jnp.zeros(3))) != int(checksum(-jnp.zeros(3)))


@pytest.mark.multidevice
def test_checksum_does_not_depend_on_the_sharding():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    x = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    expected = int(checksum(jnp.asarray(x)))
    for spec in (PartitionSpec("a", "b"), PartitionSpec(None, "b"), PartitionSpec(("a", "b")), PartitionSpec()):
        assert int(checksum(jax.device_put(x, NamedSharding(mesh, spec)))) == expected
