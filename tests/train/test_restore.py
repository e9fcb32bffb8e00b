import dataclasses

import jax
import numpy as np
import pytest
from trained_run import VOCAB_SIZE, make_trained_run, params_of

from slmjax.parallel.mesh import make_mesh
from slmjax.train.checkpoint import CheckpointError, Restored
from slmjax.train.restore import load_run, require_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained_run(tmp_path_factory.mktemp("restore"))


def test_loads_the_newest_checkpoint_or_the_one_asked_for(run):
    for asked, step in ((None, 20), (20, 20), (10, 10)):
        loaded = load_run(run, step=asked)
        assert loaded.step == step
        assert loaded.tokenizer.vocab_size == VOCAB_SIZE
        assert loaded.model_config == run.model
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params_of(run, step))


@pytest.mark.multidevice
def test_loads_onto_a_mesh(run):
    mesh = make_mesh(run.mesh)
    loaded = load_run(run, mesh=mesh)
    table = loaded.params["embed_VD"]
    assert len(table.sharding.device_set) == 8
    assert table.addressable_shards[0].data.shape == (384, 4)
    np.testing.assert_array_equal(table, params_of(run, 20)["embed_VD"])


def test_a_run_that_was_never_trained_is_a_clear_error(run, tmp_path):
    untrained = dataclasses.replace(run, output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="no finished checkpoint; train it first"):
        load_run(untrained)
    with pytest.raises(CheckpointError, match="step 15"):
        load_run(run, step=15)


def test_a_tokenizer_that_was_replaced_is_noticed():
    class Another:
        sha256 = "b" * 64

    restored = Restored(7, {}, {"tokenizer_sha256": "a" * 64})
    with pytest.raises(ValueError, match=r"step 7 in runs/x was trained with the tokenizer aaaaaaaaaaaa"):
        require_tokenizer(restored, Another(), "runs/x")
    require_tokenizer(Restored(7, {}, {"tokenizer_sha256": "b" * 64}), Another(), "runs/x")
