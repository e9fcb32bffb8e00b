"""The TPU's attention kernels, interpreted on the CPU, against every score written out in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from slmjax.kernels.tpu.attention import TileSize, Tiling, choose_tiling, tpu_attention
from slmjax.ops.attention_reference import attention_reference
from slmjax.ops.mask import AttentionMask, ranges, static_ranges

B, T, S, H = 2, 19, 22, 8
SCALE = 0.3
TILING = Tiling(heads=2, forward=TileSize(q=8, k=8), backward=TileSize(q=4, k=8), resident_keys=32)


@pytest.fixture(autouse=True)
def strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def inputs(*, b=B, t=T, s=S, n=4, k=2, h=H, dtype=jnp.float32):
    """q, k, v, sinks and the output's gradient."""
    keys = jax.random.split(jax.random.key(0), 5)
    q_BTNH, dout_BTNH = (jax.random.normal(key, (b, t, n, h), dtype) for key in keys[:2])
    k_BSKH, v_BSKH = (jax.random.normal(key, (b, s, k, h), dtype) for key in keys[2:4])
    return q_BTNH, k_BSKH, v_BSKH, jax.random.normal(keys[4], (n,)), dout_BTNH


def written_out(q_BTNH, k_BSKH, v_BSKH, k_start_XT, k_end_XT, sinks_N=None, *, scale, softcap=None):
    """The definition, from ranges."""
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, group, axis=2) for x in (k_BSKH, v_BSKH))
    scores_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH)
    if softcap is not None:
        scores_BNTS = softcap * jnp.tanh(scores_BNTS / softcap)
    key_11S = jnp.arange(k_BSKH.shape[1])[None, None, :]
    seen_XTS = (k_start_XT[..., None] <= key_11S) & (key_11S < k_end_XT[..., None])
    seen_BNTS = jnp.broadcast_to(seen_XTS[:, None], scores_BNTS.shape)
    scores_BNTS = jnp.where(seen_BNTS, scores_BNTS, -1e30)
    column_BNT1 = jnp.full((*scores_BNTS.shape[:3], 1), -1e30)
    if sinks_N is not None:
        column_BNT1 = column_BNT1 * 0 + sinks_N[None, :, None, None]
    weights_BNTS = jax.nn.softmax(jnp.concatenate([scores_BNTS, column_BNT1], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("BNTS,BSNH->BTNH", jnp.where(seen_BNTS, weights_BNTS, 0.0), v_BSNH)


def value_and_gradients(function, arrays, k_start_XT, k_end_XT, *, sinks=False, **options):
    """Output and the gradients of q, k, v and, if they are used, the sinks."""
    *arguments, sinks_N, dout_BTNH = arrays
    arguments += [sinks_N] * sinks

    def call(q_BTNH, k_BSKH, v_BSKH, *sinks):
        return function(q_BTNH, k_BSKH, v_BSKH, k_start_XT, k_end_XT, *sinks, scale=SCALE, **options)

    out_BTNH, pullback = jax.vjp(call, *arguments)
    return out_BTNH, *pullback(dout_BTNH)


def assert_all_near(got, want):
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), got, want, strict=False):
        # float32 sums of at most 22 terms of size about 1, in another order; the sinks' of 38 rows.
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5, err_msg=name)
    assert len(got) == len(want)


fast = functools.partial(value_and_gradients, functools.partial(tpu_attention, tiling=TILING, interpret=True))
fast_traced, slow = jax.jit(fast), jax.jit(functools.partial(value_and_gradients, written_out))


@st.composite
def some_ranges(draw):
    """Any ranges, or those of a mask; whole rows may be empty."""
    if draw(st.booleans()):
        bounds = draw(st.lists(st.tuples(*[st.integers(0, S)] * 2), min_size=B * T, max_size=B * T))
        return tuple(np.sort(np.array(bounds, np.int32).reshape(B, T, 2), axis=-1).transpose(2, 0, 1))
    documents_BT = np.sort(np.array(draw(st.lists(st.integers(0, 4), min_size=B * T, max_size=B * T))).reshape(B, T))
    mask = AttentionMask(
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 5])),
        q_documents_BT=jnp.asarray(documents_BT),
        k_documents_BS=jnp.pad(jnp.asarray(documents_BT), [(0, 0), (0, S - T)]),
    )
    return ranges(mask, B, T, S)


@settings(deadline=None, max_examples=12)
@given(some_ranges())
def test_any_ranges(bounds):
    arrays = inputs()
    assert_all_near(fast_traced(arrays, *bounds), slow(arrays, *bounds))


def reference(mask):
    """attention_reference of this mask, with ranges that it does not need."""
    return lambda q_BTNH, k_BSKH, v_BSKH, *_, scale: attention_reference(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale)


@pytest.mark.parametrize("mask", [AttentionMask(window=6), AttentionMask(causal=False)], ids=["window", "full"])
def test_constant_ranges(mask):
    bounds = [x_T[None] for x_T in static_ranges(mask, T, S)]
    got = jax.jit(lambda arrays: fast(arrays, *bounds))(inputs())
    assert_all_near(got, jax.jit(functools.partial(value_and_gradients, reference(mask)))(inputs(), *bounds))


OPTIONS = {
    "one group of heads": ({"n": 3, "k": 1, "h": 16}, {"softcap": 1.5}),
    "two groups of heads": ({"n": 8, "k": 2, "h": 24}, {"softcap": 1.5, "sinks": True}),
}


@pytest.mark.parametrize(("shapes", "options"), OPTIONS.values(), ids=OPTIONS)
def test_options_and_shapes(shapes, options):
    """Softcap, sinks, groups of heads, widths that are filled up; keys in pieces; a range that is empty."""
    arrays = inputs(**shapes)
    group = arrays[0].shape[2] // arrays[1].shape[2]
    tiling = Tiling(
        heads=2 if group == 4 else group, forward=TileSize(q=8, k=4), backward=TileSize(q=8, k=4), resident_keys=8
    )
    k_start_XT, k_end_XT = (x_T[None] for x_T in static_ranges(AttentionMask(window=9), T, S))
    k_end_XT[:, 5:14] = k_start_XT[:, 5:14]
    fast = functools.partial(tpu_attention, tiling=tiling, interpret=True)
    got, want = (
        jax.jit(lambda arrays, f=f: value_and_gradients(f, arrays, k_start_XT, k_end_XT, **options))(arrays)
        for f in (fast, written_out)
    )
    assert_all_near(got, want)


def test_queries_that_see_nothing_get_zeros_and_give_no_gradient():
    nothing_BT = np.full((B, T), 11, np.int32)
    for array in fast_traced(inputs(), nothing_BT, nothing_BT):
        np.testing.assert_array_equal(array, np.zeros_like(array))


def test_tiles_that_nobody_sees_are_not_read():
    """Keys 8 to 15, a tile, are NaN and so are queries 8 to 15: nobody sees the ones, nothing is seen by the others."""
    q_BTNH, k_BSKH, v_BSKH, sinks_N, dout_BTNH = arrays = inputs()
    spoilt = [x.at[:, 8:16].set(jnp.nan) for x in (q_BTNH, k_BSKH, v_BSKH)]
    k_start_BT = np.array([[0] * 8 + [16] * 11] * B, np.int32)
    k_end_BT = np.array([[8] * 8 + [16] * 8 + [22] * 3] * B, np.int32)
    got = fast_traced((*spoilt, sinks_N, dout_BTNH), k_start_BT, k_end_BT)
    assert_all_near(got, slow(arrays, k_start_BT, k_end_BT))


def test_packed_documents_equal_documents_one_by_one():
    """Two documents in one row against the same two in rows of their own."""
    lengths = 7, 12
    *arrays, sinks_N, dout_BTNH = inputs()
    mask = AttentionMask(
        q_documents_BT=jnp.array([[1] * 7 + [2] * 12] * B), k_documents_BS=jnp.array([[1] * 7 + [2] * 12 + [0] * 3] * B)
    )
    packed = fast_traced((*arrays, sinks_N, dout_BTNH), *ranges(mask, B, T, S))

    def apart(x_BTNH):
        first, second = (jnp.pad(x, [(0, x_BTNH.shape[1] - len(x)), (0, 0), (0, 0)]) for x in split(x_BTNH))
        return jnp.stack([first, second])

    def split(x_BTNH):
        return x_BTNH[0, :7], x_BTNH[0, 7:19]

    query_1T, length_B1 = np.arange(T)[None], np.array(lengths)[:, None]
    k_end_BT = np.where(query_1T < length_B1, query_1T + 1, 0).astype(np.int32)
    alone = fast_traced((*map(apart, arrays), sinks_N, apart(dout_BTNH)), np.zeros_like(k_end_BT), k_end_BT)
    for a, b in zip(packed, alone, strict=True):
        for document, (part, length) in enumerate(zip(split(a), lengths, strict=True)):
            np.testing.assert_allclose(part, b[document, :length], atol=2e-6, rtol=1e-5)


def test_bfloat16_is_as_near_to_float32_as_the_reference():
    arrays, mask = inputs(dtype=jnp.bfloat16), AttentionMask(window=13)
    bounds = ranges(mask, B, T, S)
    plain = jax.jit(functools.partial(value_and_gradients, reference(mask)))
    exact = plain(jax.tree.map(lambda x: x.astype(jnp.float32), arrays), *bounds)
    for name, a, b, c in zip(
        ("out", "dq", "dk", "dv"), exact, plain(arrays, *bounds), fast_traced(arrays, *bounds), strict=True
    ):
        assert c.dtype == jnp.bfloat16
        reference_error, error = (float(jnp.linalg.norm((x.astype(jnp.float32) - a).ravel())) for x in (b, c))
        assert error < 1.5 * reference_error, name


def test_no_races_on_two_cores_with_memory_that_begins_as_nan(capfd):
    """Rows of the batch run in random order and on both cores, as the grid's parallel dimensions allow."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, random_seed=1)
    mask = AttentionMask(
        q_documents_BT=jnp.array([[1] * 7 + [2] * 12, [0] * 5 + [1] * 14]), k_documents_BS=jnp.ones((B, S), jnp.int32)
    )
    tiling = Tiling(heads=2, forward=TILING.forward, backward=TILING.backward, resident_keys=8)
    function = functools.partial(tpu_attention, tiling=tiling, interpret=params)
    got = jax.jit(functools.partial(value_and_gradients, function))(inputs(), *ranges(mask, B, T, S))
    assert_all_near(got, slow(inputs(), *ranges(mask, B, T, S)))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_remat_under_scan_changes_nothing():
    q_BTNH, k_BSKH, v_BSKH, _, dout_BTNH = inputs()
    k_start_1T, k_end_1T = (x_T[None] for x_T in static_ranges(AttentionMask(), T, S))

    def loss(q_BTNH, checkpoint):
        def layer(x_BTNH, _):
            out_BTNH = tpu_attention(
                x_BTNH, k_BSKH, v_BSKH, k_start_1T, k_end_1T, scale=SCALE, tiling=TILING, interpret=True
            )
            return out_BTNH, None

        return jnp.sum(jax.lax.scan(checkpoint(layer), q_BTNH, None, length=2)[0] * dout_BTNH)

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    remat = functools.partial(jax.checkpoint, policy=names)
    got, want = (jax.jit(jax.grad(functools.partial(loss, checkpoint=f)))(q_BTNH) for f in (remat, lambda f: f))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("ranges_too", [False, True])
def test_vmap(ranges_too):
    arrays = [inputs()[:3], tuple(x * 0.5 for x in inputs()[:3])]
    bounds = [ranges(AttentionMask(window=w), B, T, S) for w in ((3, 9) if ranges_too else (3, 3))]
    function = functools.partial(tpu_attention, scale=SCALE, tiling=TILING, interpret=True)
    arguments = [(*a, *b) for a, b in zip(arrays, bounds, strict=True)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *arguments)
    if not ranges_too:
        stacked = (*stacked[:3], *bounds[0])
    got = jax.jit(jax.vmap(function, in_axes=(0, 0, 0, *[0 if ranges_too else None] * 2)))(*stacked)
    want = jnp.stack([jax.jit(functools.partial(written_out, scale=SCALE))(*x) for x in arguments])
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.multidevice
def test_shard_map_over_batch_and_heads():
    """Without check_vma, which jax's interpreters of kernels do not know; compiled it is used."""
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    *arrays, dout_BTNH = inputs()
    documents_BT = jnp.array([[1] * 7 + [2] * 12, [1] * 19])
    mask = AttentionMask(q_documents_BT=documents_BT, k_documents_BS=jnp.pad(documents_BT, [(0, 0), (0, S - T)]))
    bounds = ranges(mask, B, T, S)
    tiling = Tiling(heads=1, forward=TileSize(q=8, k=8), backward=TileSize(q=8, k=8), resident_keys=32)
    heads, rows = PartitionSpec("data", None, "heads"), PartitionSpec("data")

    def attend(q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, sinks_N):
        return tpu_attention(
            q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, sinks_N, scale=SCALE, tiling=tiling, interpret=True
        )

    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows, rows, PartitionSpec("heads")),
        out_specs=heads,
        check_vma=False,
    )

    def function(q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, sinks_N, *, scale):
        return sharded(q_BTNH, k_BSKH, v_BSKH, k_start_BT, k_end_BT, sinks_N)

    got = jax.jit(functools.partial(value_and_gradients, function, sinks=True))((*arrays, dout_BTNH), *bounds)
    want = jax.jit(functools.partial(value_and_gradients, written_out, sinks=True))((*arrays, dout_BTNH), *bounds)
    assert_all_near(got, want)


def test_what_does_not_fit_is_refused():
    q_BTNH, k_BSKH, v_BSKH, sinks_N, _ = inputs()
    bounds = ranges(AttentionMask(), B, T, S)
    attend = functools.partial(tpu_attention, scale=1.0, tiling=TILING, interpret=True)
    with pytest.raises(ValueError, match="N a multiple of K"):
        attend(q_BTNH[:, :, :3], k_BSKH, v_BSKH, *bounds)
    with pytest.raises(ValueError, match="all bfloat16 or all float32"):
        attend(q_BTNH.astype(jnp.bfloat16), k_BSKH, v_BSKH, *bounds)
    with pytest.raises(ValueError, match="expected k_start and k_end of shape"):
        attend(q_BTNH, k_BSKH, v_BSKH, *(x_BT[:, 1:] for x_BT in bounds))
    with pytest.raises(ValueError, match="sinks_N should have the shape"):
        attend(q_BTNH, k_BSKH, v_BSKH, *bounds, sinks_N[1:])
    three = Tiling(heads=3, forward=TILING.forward, backward=TILING.backward, resident_keys=32)
    with pytest.raises(ValueError, match="3 heads of a tile do not divide"):
        attend(q_BTNH, k_BSKH, v_BSKH, *bounds, tiling=three)
    with pytest.raises(ValueError, match="multiples of 128"):
        attend(q_BTNH, k_BSKH, v_BSKH, *bounds, interpret=False)
    with pytest.raises(ValueError, match="resident_keys must be at least"):
        Tiling(heads=1, forward=TILING.forward, backward=TILING.backward, resident_keys=4)


@pytest.mark.parametrize("device_kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_tilings_are_whole_registers_that_cover_the_call(device_kind):
    for head_dim, group, t in [(64, 3, 4096), (128, 2, 640), (256, 1, 130), (320, 7, 1), (80, 71, 100_000)]:
        tiling = choose_tiling(device_kind=device_kind, head_dim=head_dim, group=group, T=t, S=t)
        assert group % tiling.heads == 0
        assert tiling.resident_keys % tiling.backward.k == 0
        for tile in (tiling.forward, tiling.backward):
            for size in (tile.q, tile.k):
                assert size % 128 == 0
                assert size <= 1024
                assert -t % size < 128 * -(-t // size)  # no more than a register is left over in each tile
