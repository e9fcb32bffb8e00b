"""The split backward of attention on Hopper: simulated on the CPU, compiled without a GPU, and run on one."""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys

import hopper_simulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.kernels.hopper import attention_backward_dkv, attention_backward_dq
from slmjax.kernels.hopper.attention_backward_pieces import CACHE_BYTES, PassTiling, work_list
from slmjax.kernels.hopper.attention_backward_split import SplitTiling, attention_backward_split, split_tilings
from slmjax.kernels.hopper.warpgroups import slices_together
from slmjax.kernels.targets import compile_for, hopper_devices
from slmjax.kernels.tiles import inner_tile_bounds, tile_bounds

PLAIN = SplitTiling(dq=PassTiling(tile=128, stages=2), dkv=PassTiling(tile=64, stages=2))
AHEAD = SplitTiling(
    dq=PassTiling(tile=64, stages=2, resident=True, lookahead=True),
    dkv=PassTiling(tile=64, stages=2, resident=True, lookahead=True),
)


def causal(T):
    """Ranges of causality alone, as constants."""
    index_1T = np.arange(T, dtype=np.int32)[None]
    return 0 * index_1T, index_1T + 1


def window(T, width):
    end_1T = causal(T)[1]
    return np.maximum(end_1T - width, 0), end_1T


def packed(B, T, *, seed=0, backwards=True, padding=50):
    """Ranges of packed documents, different for each row; the last row ends with padding, which sees nothing."""
    generator = np.random.default_rng(seed)
    documents_BT = np.sort(generator.integers(0, 5, (B, T)))
    start_BT = np.stack([np.searchsorted(row, row, side="left") for row in documents_BT]).astype(np.int32)
    end_BT = np.stack([np.searchsorted(row, row, side="right") for row in documents_BT]).astype(np.int32)
    if backwards:
        end_BT = np.minimum(end_BT, np.arange(1, T + 1, dtype=np.int32))
    start_BT[-1, T - padding :] = end_BT[-1, T - padding :] = 0
    return jnp.asarray(start_BT), jnp.asarray(end_BT)


def reference(q_BTNH, k_BSKH, v_BSKH, seen_BTS, scale, softcap):
    """Attention with every score at once, and the logarithm of its denominator, +infinity where nothing is seen."""
    G = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = jnp.repeat(k_BSKH, G, axis=2), jnp.repeat(v_BSKH, G, axis=2)
    s_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * scale
    if softcap is not None:
        s_BNTS = softcap * jnp.tanh(s_BNTS / softcap)
    seen_B1TS = seen_BTS[:, None]
    lse_BNT = jax.nn.logsumexp(jnp.where(seen_B1TS, s_BNTS, -1e30), axis=-1)
    lse_BNT = jnp.where(seen_B1TS.any(-1), lse_BNT, jnp.inf)
    p_BNTS = jnp.where(seen_B1TS, jnp.exp(s_BNTS - lse_BNT[..., None]), 0.0)
    return jnp.einsum("BNTS,BSNH->BTNH", p_BNTS, v_BSNH), lse_BNT


def compiled(f, *arrays):
    return jax.jit(f)(*arrays)


def check(start_XT, end_XT, *, H, tiling, S=None, heads=(2, 1), B=None, softcap=None, dtype=jnp.bfloat16, run=compiled):
    """Compares with the float32 reference; returns the kernel's gradients."""
    T = start_XT.shape[1]
    S, B, (N, K), scale = S or T, B or start_XT.shape[0], heads, H**-0.5
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dout = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    key_S = np.arange(S)
    seen_XTS = (key_S >= np.asarray(start_XT)[..., None]) & (key_S < np.asarray(end_XT)[..., None])
    seen_BTS = np.broadcast_to(seen_XTS, (B, T, S))
    with jax.default_matmul_precision("highest"):
        exact = tuple(x.astype(jnp.float32) for x in (q, k, v))
        attend = functools.partial(reference, seen_BTS=seen_BTS, scale=scale, softcap=softcap)
        (out, lse_BNT), pull = jax.vjp(attend, *exact)
        delta_BNT = jnp.einsum("BTNH,BTNH->BNT", out, dout.astype(jnp.float32))
        want = pull((dout.astype(jnp.float32), jnp.zeros_like(lse_BNT)))
    backward = functools.partial(attention_backward_split, scale=scale, softcap=softcap, tiling=tiling)
    got = run(backward, q, k, v, dout, lse_BNT, delta_BNT, start_XT, end_XT)
    for name, one, other in zip(("dq", "dk", "dv"), got, want, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other)
        # Softmax weights and score gradients are rounded before they are multiplied, and the results once more. These
        # errors, each at most half an epsilon of a term, are independent: their sum stays below one of the largest.
        tolerance = float(jnp.finfo(dtype).eps) * np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=name)
    unseen_BT, unseen_BS = ~seen_BTS.any(2), ~seen_BTS.any(1)
    assert not np.asarray(got[0], np.float32)[unseen_BT].any()
    assert not np.asarray(got[1], np.float32)[unseen_BS].any()
    assert not np.asarray(got[2], np.float32)[unseen_BS].any()
    return got


@pytest.mark.parametrize("ranges", [causal(512), window(512, 100), packed(3, 512), packed(2, 512, backwards=False)])
@pytest.mark.parametrize("warpgroups", [1, 2])
def test_work_is_all_there_is_and_the_most_comes_first(ranges, warpgroups):
    k_tile = 128
    outer, inner = (bounds(*ranges, q_tile=64, k_tile=k_tile) for bounds in (tile_bounds, inner_tile_bounds))
    work_XIC = np.asarray(work_list(outer, inner, warpgroups=warpgroups))
    assert work_XIC.shape == (ranges[0].shape[0], 512 // 64 // warpgroups, 32)
    key_S = np.arange(512)
    for start_T, end_T, work_IC in zip(*(np.asarray(each) for each in ranges), work_XIC, strict=True):
        assert sorted(work_IC[:, 0]) == list(range(len(work_IC)))
        assert np.all(np.diff(work_IC[:, 2]) <= 0)
        seen_TS = (key_S >= start_T[:, None]) & (key_S < end_T[:, None])
        for index, start, count, *bounds in work_IC:
            for w in range(warpgroups):
                first, last, inner_first, inner_last = np.array(bounds[4 * w : 4 * w + 4])
                assert 0 <= first <= last <= count
                row = (index * warpgroups + w) * 64
                seen_RS = seen_TS[row : row + 64]
                inside = (key_S >= (start + first) * k_tile) & (key_S < (start + last) * k_tile)
                assert not seen_RS[:, ~inside].any()
                some_R = seen_RS.any(1)
                whole = (key_S >= (start + inner_first) * k_tile) & (key_S < (start + inner_last) * k_tile)
                assert seen_RS[some_R][:, whole].all()


def test_slices_together_divide_the_heads_and_fit_the_cache():
    assert slices_together(48, bytes_each=1 << 19, cache_bytes=CACHE_BYTES) == 48
    assert slices_together(64, bytes_each=2 << 20, cache_bytes=CACHE_BYTES) == 8
    assert slices_together(7, bytes_each=8 << 20, cache_bytes=CACHE_BYTES) == 1
    assert slices_together(6, bytes_each=1 << 30, cache_bytes=CACHE_BYTES) == 1


@pytest.mark.skipif(not hopper_simulator.AVAILABLE, reason="the simulator of jax 0.10 knows too few operations")
class TestSimulated:
    def simulate(self, ranges, monkeypatch, capfd, **options):
        for module in (attention_backward_dq, attention_backward_dkv):
            monkeypatch.setattr(module, "sm_count", lambda: 2)  # several tiles for each block

        def run(backward, *arrays):
            with hopper_simulator.simulated():
                return jax.block_until_ready(backward(*arrays))

        check(*ranges, run=run, **options)
        assert "RACE" not in capfd.readouterr().out

    def test_packed_documents(self, monkeypatch, capfd):
        self.simulate(packed(2, 256), monkeypatch, capfd, H=64, tiling=PLAIN)

    def test_lookahead_from_registers_and_a_row_that_sees_nothing(self, monkeypatch, capfd):
        self.simulate(packed(2, 128, padding=128), monkeypatch, capfd, H=16, softcap=2.0, tiling=AHEAD)

    def test_every_key_with_fewer_queries_and_three_heads_a_key(self, monkeypatch, capfd):
        start_1T = np.zeros((1, 128), np.int32)
        options = dict(H=80, S=256, heads=(3, 1), dtype=jnp.float16, tiling=PLAIN)
        self.simulate((start_1T, start_1T + 256), monkeypatch, capfd, **options)

    def test_wide_head(self, monkeypatch, capfd):
        self.simulate(window(256, 70), monkeypatch, capfd, H=144, softcap=3.0, tiling=split_tilings(144)[0])

    @pytest.mark.slow
    @pytest.mark.parametrize("H", [64, 96, 128, 256])
    @pytest.mark.parametrize("choice", range(4))
    def test_everything(self, H, choice, monkeypatch, capfd):
        tilings = split_tilings(H)
        ranges = packed(1, 256, backwards=False) if choice % 2 else causal(256)
        options = dict(H=H, softcap=4.0 if choice > 1 else None, tiling=tilings[choice % len(tilings)])
        self.simulate(ranges, monkeypatch, capfd, **options)


def compile_in_turn(cases):
    """Compiles for an H100, and says before each case which it is."""
    for index, (H, choice, (N, K), dtype, softcap) in enumerate(cases):
        print(f"\n{_CASE}{index}", flush=True)
        B, T = 2, 1024
        q_BTNH, k_BSKH = (jax.ShapeDtypeStruct((B, T, n, H), jnp.dtype(dtype)) for n in (N, K))
        stats_BNT = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
        range_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
        backward = functools.partial(
            attention_backward_split, scale=H**-0.5, softcap=softcap, tiling=split_tilings(H)[choice]
        )
        jax.clear_caches()  # what is compiled already is not reported again
        arrays = (q_BTNH, k_BSKH, k_BSKH, q_BTNH, stats_BNT, stats_BNT, range_BT, range_BT)
        compile_for(hopper_devices(), backward, *arrays)


_CASE = "compiling case "


def assert_compile_without_spilling(*cases):
    """Each case is head_dim, number of the tiling, heads, dtype and softcap."""
    try:
        hopper_devices()
    except RuntimeError as error:
        pytest.skip(str(error))
    # In a process of its own, because compiling threads read the environment while a test would change it.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, __file__, json.dumps(cases)],
        env=os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    reports = result.stdout.split(_CASE)[1:]
    assert len(reports) == len(cases)
    for case, report in zip(cases, reports, strict=True):
        spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert len(spilled) >= 2, f"{case}: the assembler reported no two kernels: {report}"
        assert all(number == "0" for pair in spilled for number in pair), f"{case}: {report}"
        # C7512: products wait for each other, because registers are short. C7517: waits that nobody wrote.
        assert not re.search("C7512|C7517|serialized", report), f"{case}: {report}"


def test_defaults_compile_without_spilling():
    assert_compile_without_spilling(
        (64, 0, (6, 2), "bfloat16", None),
        (80, 0, (2, 2), "float16", 20.0),
        (96, 0, (6, 2), "bfloat16", None),
        (128, 0, (2, 2), "bfloat16", 20.0),
        (256, 0, (6, 2), "float16", 20.0),
    )


@pytest.mark.slow
@pytest.mark.parametrize("H", [64, 80, 96, 128, 256])
def test_defaults_compile_for_everything(H):
    options = itertools.product([(6, 2), (2, 2)], ["bfloat16", "float16"], [None, 20.0])
    assert_compile_without_spilling(*[(H, 0, *each) for each in options])


@pytest.mark.slow
def test_default_of_every_head_dim_compiles_without_spilling():
    assert_compile_without_spilling(*[(H, 0, (4, 1), "bfloat16", None) for H in range(16, 257, 16)])


@pytest.mark.slow
@pytest.mark.parametrize("H", [64, 80, 96, 128, 256])
def test_tilings_compile_without_spilling(H):
    for choice in range(len(split_tilings(H))):  # each in its own process: a pass they share is compiled only once
        assert_compile_without_spilling((H, choice, (4, 1), "bfloat16", None))


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 80, 96, 128, 256, 48, 112, 192])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_on_the_device(H, dtype):
    masks = {
        "causal": causal(1024),
        "window": window(1024, 200),
        "documents": packed(2, 1024, padding=300),
        "both ways": packed(2, 1024, backwards=False),
        "everything": (np.zeros((1, 1024), np.int32), np.full((1, 1024), 1024, np.int32)),
        "nothing": (np.zeros((1, 1024), np.int32),) * 2,
    }
    for tiling in split_tilings(H):
        for name, ranges in masks.items():
            for heads in ((6, 2), (2, 2)):
                softcap = 5.0 if name in ("window", "documents") else None
                options = dict(H=H, heads=heads, B=2, softcap=softcap, dtype=dtype, tiling=tiling)
                got, again = (check(*ranges, **options) for _ in range(2))
                for one, other in zip(got, again, strict=True):
                    np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_what_the_kernels_cannot_do_is_refused():
    def backward(*, T=128, S=128, H=64, dtype=jnp.bfloat16, tiling=PLAIN):
        q_BTNH, k_BSKH = jnp.zeros((1, T, 1, H), dtype), jnp.zeros((1, S, 1, H), dtype)
        stats_BNT = jnp.zeros((1, 1, T))
        return attention_backward_split(
            *(q_BTNH, k_BSKH, k_BSKH, q_BTNH, stats_BNT, stats_BNT, *causal(T)), scale=1.0, tiling=tiling
        )

    with pytest.raises(ValueError, match="expected bfloat16 or float16 for all, got float32"):
        backward(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"multiples of 128.*got T=192, S=128, head_dim=64; pad"):
        backward(T=192)
    with pytest.raises(ValueError, match="multiple of 16, got T=128, S=128, head_dim=72"):
        backward(H=72)
    with pytest.raises(ValueError, match=r"head_dim up to 256.*head_dim=272"):
        backward(H=272)
    with pytest.raises(ValueError, match="above a head_dim of 128 dkv takes two warpgroups"):
        backward(H=192, tiling=AHEAD)
    with pytest.raises(ValueError, match=r"at most 8 stages.*for dkv"):
        backward(tiling=dataclasses.replace(PLAIN, dkv=PassTiling(tile=64, stages=9)))
    with pytest.raises(ValueError, match="a stage, two with lookahead"):
        PassTiling(tile=64, stages=1, lookahead=True)
    with pytest.raises(ValueError, match="a tile of 64 or 128"):
        PassTiling(tile=96, stages=2)


if __name__ == "__main__":
    compile_in_turn(json.loads(sys.argv[1]))
