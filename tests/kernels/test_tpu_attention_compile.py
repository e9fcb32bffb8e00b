"""The TPU's attention kernels through the TPU's own compiler, with no TPU: what compiles here fits the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slmjax.kernels.targets import compile_for, tpu_devices
from slmjax.kernels.tpu.attention import choose_tiling, tpu_attention

TARGETS = {"v5e:2x2": "TPU v5 lite", "v5p:2x2x1": "TPU v5", "v6e:2x2": "TPU v6 lite", "tpu7x:2x2x1": "TPU7x"}


@pytest.fixture(autouse=True)
def libtpu():
    pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu: pip install 'slmjax[compile]'")


def count(compiled, what):
    return (compiled.as_text() or "").count(what)


KERNEL = 'custom_call_target="tpu_custom_call"'


def compile_sharded(target, *, B, T, N, K, H, dtype=jnp.bfloat16):
    """Compiles attention and its gradients in a shard_map over two parts of the batch and two of the heads."""
    mesh = Mesh(np.array(tpu_devices(target)[:4]).reshape(2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    heads, rows = PartitionSpec("data", None, "heads"), PartitionSpec("data")

    def attend(q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, sinks_N):
        return tpu_attention(q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, sinks_N, scale=H**-0.5, softcap=30.0)

    in_specs = (heads, heads, heads, rows, rows, PartitionSpec("heads"))
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=heads)

    def gradients(q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, sinks_N):
        def loss(q_BTNH, k_BSKH, v_BSKH, sinks_N):
            return jnp.sum(sharded(q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, sinks_N).astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2, 3))(q_BTNH, k_BSKH, v_BSKH, sinks_N)

    shapes = [((B, T, x, H), dtype) for x in (N, K, K)] + [((B, T), jnp.int32)] * 2 + [((N,), jnp.float32)]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, in_specs, strict=True)
    ]
    return jax.jit(gradients).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


QUICK = [("v5e:2x2", 64), ("v6e:2x2", 128)]
ALL = [
    pytest.param(target, H, marks=() if (target, H) in QUICK else pytest.mark.slow)
    for target in TARGETS
    for H in (64, 128, 256)
]


@pytest.mark.parametrize(("target", "H"), ALL)
def test_forward_and_backward_compile_in_shard_map(target, H):
    """With softcap, sinks, groups of heads and ranges that follow the batch: two kernels, and none that XLA made."""
    compiled = compile_sharded(target, B=2, T=512, N=8, K=4, H=H)
    assert count(compiled, KERNEL) == 2
    assert count(compiled, "all-reduce(") == 1  # the sinks' gradient, summed over the parts of the batch


SIZES = {
    "SmolLM2-135M": (9, 3, 64, jnp.bfloat16),
    "Qwen3-0.6B": (16, 8, 128, jnp.bfloat16),
    "OLMoE in float32": (16, 16, 128, jnp.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize(("N", "K", "H", "dtype"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_realistic_sizes_compile(target, N, K, H, dtype):
    """Four rows of 4096 tokens on one device, causal, with the tiling of that device."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    tiling = choose_tiling(
        device_kind=TARGETS[target], head_dim=H, group=N // K, T=4096, S=4096, itemsize=jnp.dtype(dtype).itemsize
    )
    k_end_1T = np.arange(1, 4097, dtype=np.int32)[None]
    attend = functools.partial(tpu_attention, scale=H**-0.5, tiling=tiling)

    def gradients(q_BTNH, k_BSKH, v_BSKH, dout_BTNH):
        def causal(q_BTNH, k_BSKH, v_BSKH):
            return attend(q_BTNH, k_BSKH, v_BSKH, np.zeros_like(k_end_1T), k_end_1T)

        return jax.vjp(causal, q_BTNH, k_BSKH, v_BSKH)[1](dout_BTNH)

    q, k = shape((4, 4096, N, H)), shape((4, 4096, K, H))
    compiled = compile_for(tpu_devices(target), gradients, q, k, k, q)
    # The scores alone would be 1.1 GiB at N = 9 in bfloat16. A copy of each argument in another layout is allowed.
    size = sum(x.size * x.dtype.itemsize for x in (q, q, q, k, k, k, k))
    assert compiled.memory_analysis().temp_size_in_bytes < size  # pyright: ignore[reportOptionalMemberAccess]


def test_remat_that_saves_the_named_results_does_not_run_the_forward_kernel_again():
    def count_kernels(policy):
        def loss(q_BTNH, k_BSKH):
            @functools.partial(jax.checkpoint, policy=policy)
            def layer(q_BTNH, k_BSKH):
                return tpu_attention(q_BTNH, k_BSKH, k_BSKH, ends * 0, ends, scale=0.1, tiling=tiling)

            return jnp.sum(layer(q_BTNH, k_BSKH).astype(jnp.float32) ** 2)

        shape = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
        compiled = compile_for(tpu_devices("v5e:2x2"), jax.grad(loss, argnums=(0, 1)), shape, shape)
        return count(compiled, KERNEL)

    ends = np.arange(1, 129, dtype=np.int32)[None]
    tiling = choose_tiling(device_kind="TPU v5 lite", head_dim=64, group=1, T=128, S=128)
    assert count_kernels(jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")) == 2
    assert count_kernels(None) == 3
