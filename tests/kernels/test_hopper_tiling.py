"""The table of measured tilings: what is found there, and what is not."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.kernels.hopper import attention_tiling
from slmjax.kernels.hopper.attention_backward_fused import FusedTiling
from slmjax.kernels.hopper.attention_backward_split import split_tilings
from slmjax.kernels.hopper.attention_forward import ForwardTiling
from slmjax.kernels.hopper.attention_tiling import Measured, choose_tiling, default_tiling, mask_kind
from slmjax.ops.attention import AttentionMask
from slmjax.ops.mask import static_ranges


def row(length, **fields):
    return Measured(
        **dict(head_dim=64, mask="causal", length=length),
        **{
            "heads_per_group": 4,
            "forward": ForwardTiling(warpgroups=3),
            "backward": FusedTiling(),
            "deterministic": split_tilings(64)[1],
            **fields,
        },
    )


ROWS = (row(2048), row(8192, backward=split_tilings(64)[2]))
CASE = dict(head_dim=64, heads_per_group=3, mask="causal")


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(attention_tiling, "measured", lambda kind: ROWS if kind == "NVIDIA H200" else ())


@pytest.mark.parametrize(("length", "expected"), [(128, 0), (2048, 0), (2049, 1), (8192, 1), (65536, 1)])
@pytest.mark.usefixtures("table")
def test_the_next_length_up_is_found_and_the_longest_beyond(length, expected):
    tiling = choose_tiling(device_kind="NVIDIA H200", length=length, **CASE)
    assert (tiling.forward, tiling.backward) == (ROWS[expected].forward, ROWS[expected].backward)
    steady = choose_tiling(device_kind="NVIDIA H200", length=length, deterministic=True, **CASE)
    assert steady.backward == ROWS[expected].deterministic


@pytest.mark.parametrize(
    "other", [{"device_kind": "NVIDIA H100"}, {"head_dim": 128}, {"heads_per_group": 1}, {"mask": "window"}]
)
@pytest.mark.usefixtures("table")
def test_what_nobody_measured_has_the_default(other):
    case = CASE | {"device_kind": "NVIDIA H200"} | other
    for deterministic in (False, True):
        assert choose_tiling(length=2048, deterministic=deterministic, **case) == default_tiling(
            case["head_dim"], heads_per_group=case["heads_per_group"], deterministic=deterministic
        )


@pytest.mark.parametrize(("heads", "expected"), [(2, 4), (3, 4), (4, 4), (5, 4), (8, 9), (9, 9), (18, 9)])
def test_the_nearest_number_of_heads_in_a_group_is_found(heads, expected, monkeypatch):
    rows = (row(2048), row(2048, heads_per_group=9, forward=ForwardTiling(k_tile=64)))
    monkeypatch.setattr(attention_tiling, "measured", lambda _kind: rows)
    tiling = choose_tiling(device_kind="NVIDIA H200", length=2048, **CASE | {"heads_per_group": heads})
    assert tiling.forward == {each.heads_per_group: each.forward for each in rows}[expected]


@pytest.mark.parametrize("written", ROWS)
def test_a_row_is_read_as_it_was_written(written):
    assert Measured.from_json(json.loads(json.dumps(written.to_json()))) == written


def test_every_shipped_row_can_be_read_and_names_a_case_once():
    text = (attention_tiling.importlib.resources.files("slmjax.kernels.hopper") / "attention_tilings.json").read_text()
    for kind in json.loads(text):
        cases = [(r.head_dim, r.heads_per_group, r.mask, r.length) for r in attention_tiling.measured(kind)]
        assert len(cases) == len(set(cases))


def test_ranges_tell_the_kind_of_mask():
    kinds = {"causal": AttentionMask(), "window": AttentionMask(window=3)}
    for kind, mask in kinds.items():
        assert mask_kind(static_ranges(mask, 8, 8)[0][None]) == kind
    assert mask_kind(jnp.zeros((2, 8), jnp.int32)) == "documents"
    assert mask_kind(np.zeros((1, 8), np.int32)) == "causal"
