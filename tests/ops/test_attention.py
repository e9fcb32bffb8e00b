"""Every implementation of attention against the definition: values, gradients, masks, dispatch."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.kernels import targets
from slmjax.ops import attention as dispatch
from slmjax.ops.attention import attention, choose_implementation, why_not_cudnn
from slmjax.ops.attention_chunked import Tiling, attention_chunked, choose_tiling
from slmjax.ops.attention_reference import attention_reference
from slmjax.ops.mask import AttentionMask
from slmjax.parallel import on_mesh

B, T, H = 2, 14, 8

UNROLLED = Tiling(q_tile=8, k_tile=8, unrolled=True, by_row=False)
LOOPED = Tiling(q_tile=8, k_tile=4, unrolled=False, by_row=False)
UNROLLED_ROWS = Tiling(q_tile=8, k_tile=8, unrolled=True, by_row=True)
LOOPED_ROWS = Tiling(q_tile=4, k_tile=8, unrolled=False, by_row=True)

# Rows of three documents; the last tile of the first is all padding.
DOCUMENTS = jnp.array([[1] * 3 + [2] * 4 + [3] + [0] * 6, [1] * 7 + [2] * 3 + [3] * 4], jnp.int32)
MASKS = {
    "full": AttentionMask(causal=False),
    "causal": AttentionMask(),
    "window": AttentionMask(window=5),
    "two-sided window": AttentionMask(causal=False, window=5),
    "documents": AttentionMask(q_documents_BT=DOCUMENTS, k_documents_BS=DOCUMENTS),
    "documents and window": AttentionMask(window=4, q_documents_BT=DOCUMENTS, k_documents_BS=DOCUMENTS),
    "two-sided documents": AttentionMask(causal=False, q_documents_BT=DOCUMENTS, k_documents_BS=DOCUMENTS),
}


@pytest.fixture(autouse=True)
def strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def inputs(*, t=T, s=T, n=4, k=2, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    q_BTNH, dout_BTNH = (jax.random.normal(key, (B, t, n, H), dtype) for key in keys[:2])
    k_BSKH, v_BSKH = (jax.random.normal(key, (B, s, k, H), dtype) for key in keys[2:4])
    return q_BTNH, k_BSKH, v_BSKH, jax.random.normal(keys[4], (n,)), dout_BTNH


@functools.partial(jax.jit, static_argnames=("function", "options"))
def value_and_gradients(function, arrays, mask, options=()):
    """Output and the gradients of q, k, v and (where the function is given them) the sinks."""
    *arguments, dout_BTNH = arrays
    options = dict(options)
    with_sinks = options.pop("sinks", False)

    def call(q_BTNH, k_BSKH, v_BSKH, sinks_N):
        sinks = {"sinks_N": sinks_N} if with_sinks else {}
        return function(q_BTNH, k_BSKH, v_BSKH, mask, scale=0.3, **sinks, **options)

    out_BTNH, pullback = jax.vjp(call, *arguments)
    return out_BTNH, *pullback(dout_BTNH)


def assert_equal_to_reference(mask, tiling, arrays, **options):
    want = value_and_gradients(attention_reference, arrays, mask, tuple(options.items()))
    got = value_and_gradients(attention_chunked, arrays, mask, (*options.items(), ("tiling", tiling)))
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), got, want, strict=True):
        # float32 sums of at most 14 terms of size about 1, in another order.
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("tiling", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_chunked_equals_reference(mask, tiling):
    assert_equal_to_reference(mask, tiling, inputs())


@pytest.mark.parametrize("tiling", [UNROLLED_ROWS, LOOPED_ROWS], ids=["unrolled", "looped"])
def test_chunked_row_by_row_equals_reference(tiling):
    assert_equal_to_reference(MASKS["documents and window"], tiling, inputs())


@pytest.mark.parametrize("tiling", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
@pytest.mark.parametrize(
    ("n", "k", "options"),
    [(3, 3, {"softcap": 1.5}), (3, 1, {"sinks": True}), (8, 1, {"softcap": 1.5, "sinks": True})],
    ids=["softcap", "sinks", "both"],
)
def test_options_and_groups_equal_reference(tiling, n, k, options):
    assert_equal_to_reference(MASKS["documents"], tiling, inputs(n=n, k=k), **options)


@pytest.mark.parametrize("t", [1, 5])
def test_cached_queries_equal_reference(t):
    """Queries at indices of their own, keys beyond them, and rows of different length, as in decoding."""
    k_documents_BS = jnp.array([[1] * 11 + [0] * 3, [0] * 3 + [1] * 11], jnp.int32)
    mask = AttentionMask(
        q_documents_BT=jnp.ones((B, t), jnp.int32),
        k_documents_BS=k_documents_BS,
        q_index_BT=jnp.array([[9], [5]], jnp.int32) + jnp.arange(t, dtype=jnp.int32)[None],
    )
    assert_equal_to_reference(mask, LOOPED, inputs(t=t), sinks=True)


def test_tiling_follows_mask_length_and_devices():
    choose = functools.partial(choose_tiling, platform="cpu", num_devices=1)
    assert choose(AttentionMask(), T=512) == Tiling(q_tile=64, k_tile=64, unrolled=True, by_row=True)
    assert not choose(AttentionMask(), T=513).unrolled
    assert not choose_tiling(AttentionMask(), T=512, platform="cpu", num_devices=8).by_row
    assert not choose_tiling(AttentionMask(), T=512, platform="gpu", num_devices=1).by_row
    mask = AttentionMask(q_index_BT=jnp.zeros((B, T), jnp.int32))
    assert not choose(mask, T=T).unrolled
    with pytest.raises(ValueError, match="q_index_BT is None"):
        attention_chunked(*inputs()[:3], mask, scale=1.0, tiling=UNROLLED)


@pytest.mark.parametrize("tiling", [UNROLLED, LOOPED_ROWS], ids=["unrolled", "looped_rows"])
def test_bfloat16_is_as_near_to_float32_as_the_reference(tiling):
    arrays = inputs(dtype=jnp.bfloat16)
    options = (("softcap", 2.0),)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    exact = value_and_gradients(attention_reference, wide, MASKS["documents"], options)
    reference = value_and_gradients(attention_reference, arrays, MASKS["documents"], options)
    chunked = value_and_gradients(attention_chunked, arrays, MASKS["documents"], (*options, ("tiling", tiling)))
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), exact[:4], reference, chunked, strict=False):
        assert c.dtype == jnp.bfloat16
        reference_error, error = (float(jnp.linalg.norm((x - a).ravel())) for x in (b, c))
        assert error < 1.5 * reference_error, name


@pytest.mark.parametrize("tiling", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
def test_packed_documents_equal_documents_one_by_one(tiling):
    documents_BT = jnp.array([[1] * 7 + [2] * 7] * B, jnp.int32)
    mask = AttentionMask(q_documents_BT=documents_BT, k_documents_BS=documents_BT)
    arrays = inputs()[:3]
    packed_BTNH = jax.jit(functools.partial(attention_chunked, scale=0.3, tiling=tiling))(*arrays, mask)
    split = [x.reshape(2 * B, 7, -1, H) for x in arrays]
    split_BTNH = jax.jit(functools.partial(attention_reference, scale=0.3))(*split, AttentionMask())
    np.testing.assert_allclose(packed_BTNH, split_BTNH.reshape(packed_BTNH.shape), atol=1e-6)


@pytest.mark.parametrize("tiling", [UNROLLED, LOOPED], ids=["unrolled", "looped"])
def test_no_gradient_flows_from_later_keys(tiling):
    q_BTNH, k_BSKH, v_BSKH, _, dout_BTNH = inputs()
    early_BTNH = dout_BTNH.at[:, 6:].set(0.0)
    dq, dk, dv, *_ = value_and_gradients(
        attention_chunked, (q_BTNH, k_BSKH, v_BSKH, jnp.zeros(4), early_BTNH), AttentionMask(), (("tiling", tiling),)
    )[1:]
    for gradient in (dq, dk, dv):
        assert not np.any(gradient[:, 6:])
        assert np.all(np.any(np.asarray(gradient[:, 1:6]), axis=(-1, -2)))


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_window_off_by_one_is_noticed(off_by):
    """The comparison with the reference is sharp enough to see one key too many or too few."""
    want = value_and_gradients(attention_reference, inputs(), AttentionMask(window=5))
    got = value_and_gradients(attention_chunked, inputs(), AttentionMask(window=5 + off_by), (("tiling", LOOPED),))
    for a, b in zip(got[:4], want, strict=False):
        assert float(jnp.max(jnp.abs(a - b))) > 0.1


def test_remat_that_saves_output_and_lse_does_not_run_the_forward_pass_again():
    q_BTNH, k_BSKH, v_BSKH, _, dout_BTNH = inputs()
    mask = MASKS["documents"]

    def dots_and_gradient(policy):
        def call(q_BTNH):
            # Something before and after, as in a layer, so that both depend on what is saved.
            return 2 * attention_chunked(jnp.sin(q_BTNH), k_BSKH, v_BSKH, mask, scale=0.3, tiling=LOOPED) ** 2

        if policy is not None:
            call = jax.checkpoint(call, policy=policy)

        def value_and_gradient(q_BTNH):
            value_BTNH, pullback = jax.vjp(call, q_BTNH)
            return value_BTNH, pullback(dout_BTNH)[0]

        compiled = jax.jit(value_and_gradient).lower(q_BTNH).compile()
        return compiled.as_text().count(" dot("), compiled(q_BTNH)[1]

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    dots, gradient_BTNH = dots_and_gradient(None)
    dots_saved, gradient_saved_BTNH = dots_and_gradient(names)
    dots_all, _ = dots_and_gradient(jax.checkpoint_policies.nothing_saveable)
    assert dots_saved == dots == 7  # two forward, five backward
    assert dots_all == 9
    np.testing.assert_array_equal(gradient_BTNH, gradient_saved_BTNH)


def test_memory_of_the_chunked_form_is_linear_in_length():
    def temporary_bytes(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

        def loss(q_BTNH, k_BSKH, v_BSKH):
            return attention(q_BTNH, k_BSKH, v_BSKH, AttentionMask(), scale=1.0, implementation="chunked").sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 2.5 * temporary_bytes(4096)


def test_auto_agrees_with_the_reference_and_logs_each_choice_once(caplog):
    dispatch._log_once.cache_clear()
    arrays = inputs(t=80, s=80)[:3]
    window = AttentionMask(window=30)

    def call(arrays, mask, implementation="auto"):
        return attention(*arrays, mask, scale=0.3, implementation=implementation)

    with caplog.at_level(logging.INFO, logger="slmjax.attention"):
        out_BTNH = jax.jit(call)(arrays, window)
        for length in (80, 4, 1, 80):
            out = jax.eval_shape(call, [x[:, :length] for x in arrays], AttentionMask())
            assert out.shape == (B, length, 4, H)
    want_BTNH = jax.jit(functools.partial(call, implementation="reference"))(arrays, window)
    np.testing.assert_allclose(out_BTNH, want_BTNH, atol=1e-5)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "attention on cpu: chunked",
        "attention on cpu: reference",
    ]


def test_cudnn_is_chosen_only_where_it_is_exact():
    q_BTNH, k_BSKH, *_ = inputs(t=80, s=80, dtype=jnp.bfloat16)
    choose = functools.partial(choose_implementation, softcap=None, sinks=False, scale=1.0, platform="gpu")
    assert choose(q_BTNH, k_BSKH, AttentionMask()) == "cudnn"
    assert choose(q_BTNH, k_BSKH, AttentionMask(window=9)) == "cudnn"
    assert choose(q_BTNH, k_BSKH, AttentionMask(causal=False)) == "cudnn"
    documents_BT = jnp.ones((B, 80), jnp.int32)
    inexact = {
        "documents apart": (AttentionMask(q_documents_BT=documents_BT, k_documents_BS=documents_BT), {}),
        "given indices": (AttentionMask(q_index_BT=documents_BT), {}),
        "together with causality": (AttentionMask(causal=False, window=9), {}),
        "softcap": (AttentionMask(), {"softcap": 30.0}),
        "sinks": (AttentionMask(), {"sinks": True}),
    }
    for reason, (mask, options) in inexact.items():
        options = {"softcap": None, "sinks": False, **options}
        assert reason in why_not_cudnn(q_BTNH, k_BSKH, mask, **options)
        assert choose(q_BTNH, k_BSKH, mask, **options) == "chunked"
    assert "bfloat16" in why_not_cudnn(q_BTNH.astype(jnp.float32), k_BSKH, AttentionMask(), softcap=None, sinks=False)
    assert "head_dim" in why_not_cudnn(q_BTNH[..., :7], k_BSKH, AttentionMask(), softcap=None, sinks=False)
    assert "as many queries" in why_not_cudnn(q_BTNH[:, :7], k_BSKH, AttentionMask(), softcap=None, sinks=False)
    with pytest.raises(ValueError, match="'cudnn' has no softcap; use 'chunked' or 'auto'"):
        attention(q_BTNH, k_BSKH, k_BSKH, AttentionMask(), scale=1.0, softcap=30.0, implementation="cudnn")


def test_hopper_is_chosen_where_it_is_built():
    q_BTNH, k_BSKH, *_ = inputs(t=80, s=80, dtype=jnp.bfloat16)
    documents_BT = jnp.ones((B, 80), jnp.int32)
    documents = AttentionMask(q_documents_BT=documents_BT, k_documents_BS=documents_BT)
    choose = functools.partial(choose_implementation, softcap=None, sinks=True, platform="hopper")
    assert choose(q_BTNH, k_BSKH, documents, scale=1.0) == "hopper"
    assert choose(q_BTNH, k_BSKH, documents, scale=-1.0) == "chunked"
    assert choose(q_BTNH.astype(jnp.float32), k_BSKH, documents, scale=1.0) == "chunked"
    assert choose(jnp.zeros((B, 80, 4, 512), jnp.bfloat16), k_BSKH, documents, scale=1.0) == "chunked"
    assert choose(q_BTNH[:, :1], k_BSKH, AttentionMask(), scale=1.0) == "reference"
    with pytest.raises(ValueError, match="'hopper' needs bfloat16 or float16, got float32; use 'chunked' or 'auto'"):
        attention(
            *(x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, k_BSKH)), documents, scale=1.0, implementation="hopper"
        )


def test_tpu_is_chosen_where_it_is_built():
    q_BTNH, k_BSKH, *_ = inputs(t=80, s=80, dtype=jnp.bfloat16)
    choose = functools.partial(choose_implementation, softcap=3.0, sinks=True, scale=1.0, platform="tpu")
    assert choose(q_BTNH, k_BSKH, AttentionMask(window=9)) == "tpu"
    assert choose(q_BTNH.astype(jnp.float16), k_BSKH, AttentionMask()) == "chunked"
    with pytest.raises(ValueError, match="'tpu' needs bfloat16 or float32, got float16; use 'chunked' or 'auto'"):
        attention(
            *(x.astype(jnp.float16) for x in (q_BTNH, k_BSKH, k_BSKH)), AttentionMask(), scale=1.0, implementation="tpu"
        )


def test_tpu_attention_compiles_for_a_tpu_over_its_devices():
    try:
        devices = targets.tpu_devices("v5e:2x2")
    except RuntimeError as error:
        pytest.skip(str(error))
    mesh = jax.sharding.Mesh(
        np.array(devices).reshape(2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    q, k = (jax.ShapeDtypeStruct((4, 256, heads, 64), jnp.bfloat16, sharding=rows) for heads in (3, 1))
    documents_BT = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=rows)

    def loss(q_BTNH, k_BSKH, documents_BT):
        mask = AttentionMask(q_documents_BT=documents_BT, k_documents_BS=documents_BT)
        return attention(q_BTNH, k_BSKH, k_BSKH, mask, scale=0.1, implementation="tpu").astype(jnp.float32).sum()

    gradients = on_mesh(mesh, jax.grad(loss, argnums=(0, 1)))
    compiled = jax.jit(gradients).trace(q, k, documents_BT).lower(lowering_platforms=("tpu",)).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 2


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_equals_reference(causal, window):
    if window is not None and not causal:
        pytest.skip("not offered")
    arrays = inputs(t=80, s=80, dtype=jnp.bfloat16)
    mask = AttentionMask(causal=causal, window=window)
    want = value_and_gradients(attention_reference, jax.tree.map(lambda x: x.astype(jnp.float32), arrays), mask)
    got = value_and_gradients(attention, arrays, mask, (("implementation", "cudnn"),))
    for a, b in zip(got[:4], want, strict=False):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05)  # bfloat16 has 8 bits


def test_wrong_shapes_are_named():
    q_BTNH, k_BSKH, v_BSKH, _, _ = inputs()
    with pytest.raises(ValueError, match="N a multiple of K"):
        attention(q_BTNH[:, :, :3], k_BSKH, v_BSKH, AttentionMask(), scale=1.0)
    with pytest.raises(ValueError, match="differ in dtype"):
        attention(q_BTNH.astype(jnp.bfloat16), k_BSKH, v_BSKH, AttentionMask(), scale=1.0)
    with pytest.raises(ValueError, match=r"sinks_N should have the shape \(4,\)"):
        attention(q_BTNH, k_BSKH, v_BSKH, AttentionMask(), scale=1.0, sinks_N=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"mask\.q_index_BT should have the shape"):
        attention(q_BTNH, k_BSKH, v_BSKH, AttentionMask(q_index_BT=jnp.zeros((B, 3), jnp.int32)), scale=1.0)
