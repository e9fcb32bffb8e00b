"""Fused attention on Hopper: simulated on the CPU, compiled without a GPU, and run on one."""

import functools
import re

import hopper_simulator
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_compiler import compiled_for_hopper, text_of_assembler
from hypothesis import HealthCheck, given, settings

from slmjax.config import MeshConfig
from slmjax.kernels.hopper.attention import hopper_attention
from slmjax.kernels.hopper.attention_backward_fused import FusedTiling, attention_backward_fused
from slmjax.kernels.hopper.attention_forward import ForwardTiling, attention_forward
from slmjax.kernels.hopper.attention_tiling import default_tiling
from slmjax.kernels.targets import on_hopper
from slmjax.ops.attention import AttentionMask, attention
from slmjax.ops.attention_reference import attention_reference
from slmjax.ops.mask import ranges
from slmjax.parallel import batch_sharding, make_mesh, on_mesh


def packed(lengths, T):
    """A row of documents of these lengths, then padding."""
    ids = np.repeat(np.arange(len(lengths)) + 1, lengths)[:T]
    documents_1T = jnp.asarray(np.pad(ids, (0, T - len(ids)))[None], jnp.int32)
    return AttentionMask(q_documents_BT=documents_1T, k_documents_BS=documents_1T)


def arrays_of(T, *, N, K, H, B=1, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(T), 4)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))


def exact(mask, q, k, v, dout, sinks_N=None, *, softcap=None):
    """Output, gradients and log-sum-exp of the reference in float32."""
    scale = q.shape[-1] ** -0.5

    def attend(q, k, v, sinks_N):
        return attention_reference(q, k, v, mask, scale=scale, softcap=softcap, sinks_N=sinks_N)

    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(attend, *(x.astype(jnp.float32) for x in (q, k, v)), sinks_N)
        return out, pull(dout.astype(jnp.float32))


def assert_close(got, want, *, dtype=jnp.bfloat16, name=""):
    # Weights and score gradients are rounded before they are multiplied, and results once more: errors of at most half
    # an epsilon of independent terms, whose sum stays below one of the largest.
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    atol = float(jnp.finfo(dtype).eps) * max(np.abs(want).max(), 1e-3)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


TILINGS = {
    "neighbours": ForwardTiling(k_tile=64, stages=3),
    "three together": ForwardTiling(warpgroups=3, heads_together=True),
    "two together, free": ForwardTiling(heads_together=True, turns=False),
}


@pytest.mark.skipif(not hopper_simulator.AVAILABLE, reason="the simulator of jax 0.10 knows too few operations")
class TestSimulated:
    """On jax's simulator, one block at a time; see `hopper_simulator` for what that does not notice."""

    @pytest.mark.parametrize("tiling", TILINGS)
    @pytest.mark.parametrize("softcap", [None, 3.0])
    def test_forward(self, tiling, softcap, capfd, monkeypatch):
        monkeypatch.setattr("slmjax.kernels.hopper.attention_forward.sm_count", lambda: 2)
        mask, (q, k, v, dout) = packed([70, 5, 120], 256), arrays_of(256, N=3, K=1, H=64)
        sinks_N = None if softcap is None else jnp.array([0.5, -1.0, 2.0])
        want, _ = exact(mask, q, k, v, dout, sinks_N, softcap=softcap)
        with hopper_simulator.simulated(detect_races=False):
            out, lse_BNT = attention_forward(
                *(q, k, v, *ranges(mask, 1, 256, 256), sinks_N),
                **dict(scale=0.125, softcap=softcap, tiling=TILINGS[tiling]),
            )
        assert_close(out, want)
        assert not np.asarray(out, np.float32)[:, 195:].any()
        assert np.isposinf(lse_BNT[:, :, 195:]).all()
        assert np.isfinite(lse_BNT[:, :, :195]).all()
        assert "Error" not in capfd.readouterr().err


def loss_of(implementation, softcap=None, sinks_N=None):
    def loss(q, k, v, documents_BT):
        mask = AttentionMask(q_documents_BT=documents_BT, k_documents_BS=documents_BT)
        out = attention(q, k, v, mask, scale=0.1, softcap=softcap, sinks_N=sinks_N, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))


def shapes_of(H, *, T=500, dtype=jnp.bfloat16):
    like = jax.ShapeDtypeStruct
    return like((2, T, 6, H), dtype), like((2, T, 2, H), dtype), like((2, T, 2, H), dtype), like((2, T), jnp.int32)


@pytest.mark.parametrize("H", [64, 128])
def test_compiles_for_hopper_with_its_products_in_flight(H, capfd, monkeypatch):
    text = text_of_assembler(loss_of("hopper"), *shapes_of(H), capfd=capfd, monkeypatch=monkeypatch)
    assert text.count("Compiling entry function") == 2
    assert "serialized" not in text
    spilled = [int(size) for size in re.findall(r"(\d+) bytes spill stores", text)]
    assert max(spilled) <= 64  # bytes of a thread: addresses, outside of the loops that multiply


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("H", [16, 48, 64, 80, 96, 128, 200, 256])
@pytest.mark.parametrize("implementation", ["hopper", "hopper_deterministic"])
def test_compiles_for_every_head_dim(H, dtype, implementation):
    compiled_for_hopper(loss_of(implementation, softcap=30.0, sinks_N=jnp.zeros(6)), *shapes_of(H, dtype=dtype))


def test_equal_layers_are_lowered_once_and_saved_ones_not_run_again():
    def loss(q, k, v):
        def layer(q, k, v):
            return attention(q, k, v, AttentionMask(), scale=0.1, implementation="hopper")

        saved = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
        for _ in range(3):
            q = jax.checkpoint(layer, policy=saved)(q, k, v)
        return jnp.sum(q.astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss)).trace(*shapes_of(64)[:3]).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 2


@pytest.mark.multidevice
def test_each_device_attends_to_its_own_rows():
    mesh = make_mesh(MeshConfig(data=8, fsdp=1))
    rows = batch_sharding(mesh)
    like = [jax.ShapeDtypeStruct((16, *x.shape[1:]), x.dtype, sharding=rows) for x in shapes_of(64, T=128)]
    text = jax.jit(on_mesh(mesh, loss_of("hopper"))).trace(*like).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 2
    assert all("tensor<2x128x6x64xbf16>" in call for call in calls)


def test_tilings_that_do_not_fit_are_refused():
    q, k, v, dout = arrays_of(128, N=2, K=1, H=96)
    start_1T, end_1T = ranges(AttentionMask(), 1, 128, 128)
    with pytest.raises(ValueError, match="head_dim=96 do not fit"):
        attention_backward_fused(
            *(q, k, v, dout, jnp.zeros((1, 2, 128)), jnp.zeros((1, 2, 128)), start_1T, end_1T),
            **dict(scale=1.0, tiling=FusedTiling(q_tile=64)),
        )
    with pytest.raises(ValueError, match="T=100, S=128 do not fit"):
        attention_forward(
            *(q[:, :100], k, v, start_1T[:, :100], end_1T[:, :100], None),
            **dict(scale=1.0, softcap=None, tiling=ForwardTiling()),
        )
    with pytest.raises(ValueError, match="more barriers than the hardware has"):
        ForwardTiling(stages=5)


needs_hopper = pytest.mark.skipif(
    jax.default_backend() != "gpu" or not on_hopper(), reason="needs a GPU with Hopper's instructions"
)


@pytest.mark.gpu
@needs_hopper
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_on_the_device(data):
    H = data.draw(st.sampled_from([64, 128, 64, 128, 80, 96, 256, 40]))
    K, G, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(65, 700))
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    mask = packed(lengths, T) if data.draw(st.booleans()) else AttentionMask(causal=data.draw(st.booleans()))
    softcap = data.draw(st.sampled_from([None, 5.0]))
    sinks_N = data.draw(st.sampled_from([None, jnp.linspace(-2.0, 3.0, K * G)]))
    implementation = data.draw(st.sampled_from(["hopper", "hopper_deterministic"]))
    q, k, v, dout = arrays_of(T, N=K * G, K=K, H=H)

    def attend(q, k, v, sinks_N):
        return attention(
            *(q, k, v, mask), scale=H**-0.5, softcap=softcap, sinks_N=sinks_N, implementation=implementation
        )

    out, pull = jax.vjp(jax.jit(attend), q, k, v, sinks_N)
    want_out, want = exact(mask, q, k, v, dout, sinks_N, softcap=softcap)
    assert_close(out, want_out, name="out")
    for name, one, other in zip(("dq", "dk", "dv"), pull(dout), want, strict=False):
        assert_close(one, other, name=name)


def out_and_gradients(q, k, v, dout, mask, tiling):
    run = functools.partial(hopper_attention, scale=q.shape[-1] ** -0.5, tiling=tiling)
    T = q.shape[1]
    out, pull = jax.vjp(lambda q, k, v: run(q, k, v, *ranges(mask, 1, T, T)), q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *pull(dout))]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("deterministic", [False, True])
def test_packed_equals_documents_one_by_one(H, deterministic):
    lengths, T = [130, 70, 300], 512
    arrays = arrays_of(T, N=6, K=2, H=H)
    tiling = default_tiling(H, heads_per_group=3, deterministic=deterministic)
    together = out_and_gradients(*arrays, packed(lengths, T), tiling)
    for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        own = slice(start, start + length)
        alone = out_and_gradients(*(x[:, own] for x in arrays), AttentionMask(), tiling)
        for one, other in zip(together, alone, strict=True):
            assert_close(one[:, own], other)
    if deterministic:
        for one, other in zip(together, out_and_gradients(*arrays, packed(lengths, T), tiling), strict=True):
            np.testing.assert_array_equal(one, other)
