"""The ranges and tile bounds of a mask against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.kernels.tiles import inverse_tile_bounds, tile_bounds
from slmjax.ops.mask import AttentionMask, dense, ranges, static_ranges


@pytest.fixture(autouse=True)
def strict_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@st.composite
def documents(draw, length):
    """Runs of rising document ids with padding between, before and after some of them."""
    runs = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=6))
    row, document = [0] * draw(st.integers(0, 2)), 0
    for run, padding in runs:
        document += draw(st.integers(1, 2))
        row += [document] * run + [0] * padding
    return (row + [0] * length)[:length]


@st.composite
def masks(draw):
    """A mask of two rows with random documents, window, causality and query indices; and its B, T, S."""
    B = 2
    T, S = draw(st.sampled_from([(11, 11), (1, 11), (7, 11)]))  # few shapes, because each is compiled
    window = draw(st.none() | st.integers(1, 6))
    mask = {"causal": draw(st.booleans()), "window": window}
    if draw(st.booleans()):
        mask["q_documents_BT"] = jnp.array([draw(documents(T)) for _ in range(B)], jnp.int32)
        mask["k_documents_BS"] = jnp.array([draw(documents(S)) for _ in range(B)], jnp.int32)
    if draw(st.booleans()):
        index = st.lists(st.integers(0, S + 2), min_size=T, max_size=T)
        mask["q_index_BT"] = jnp.array([draw(index) for _ in range(B)], jnp.int32)
    return AttentionMask(**mask), B, T, S


def ranges_as_dense(k_start_BT, k_end_BT, S):
    s_S = np.arange(S)
    return (np.asarray(k_start_BT)[..., None] <= s_S) & (s_S < np.asarray(k_end_BT)[..., None])


@settings(max_examples=150, deadline=None)
@given(masks())
def test_ranges_equal_the_definition(case):
    mask, B, T, S = case
    k_start_BT, k_end_BT = ranges(mask, B, T, S)
    assert k_start_BT.shape == k_end_BT.shape == (B, T)
    assert k_start_BT.dtype == k_end_BT.dtype == jnp.int32
    assert bool(jnp.all((k_start_BT >= 0) & (k_start_BT <= k_end_BT) & (k_end_BT <= S)))
    np.testing.assert_array_equal(ranges_as_dense(k_start_BT, k_end_BT, S), dense(mask, B, T, S))
    if mask.q_documents_BT is None and mask.q_index_BT is None:
        np.testing.assert_array_equal(np.stack(static_ranges(mask, T, S)), [k_start_BT[0], k_end_BT[0]])


@settings(max_examples=100, deadline=None)
@given(masks(), st.sampled_from([(1, 1), (3, 4), (4, 2), (16, 16)]))
def test_tile_bounds_are_the_tightest_that_cover(case, tiles):
    mask, B, T, S = case
    q_tile, k_tile = tiles
    seen_BTS = np.asarray(dense(mask, B, T, S))
    num_q_tiles, num_k_tiles = -(-T // q_tile), -(-S // k_tile)
    first_BI, last_BI = tile_bounds(*ranges(mask, B, T, S), q_tile=q_tile, k_tile=k_tile)
    first_BJ, last_BJ = inverse_tile_bounds(first_BI, last_BI, num_k_tiles=num_k_tiles)
    assert first_BI.shape == last_BI.shape == (B, num_q_tiles)
    assert first_BJ.shape == last_BJ.shape == (B, num_k_tiles)
    first_BI, last_BI, first_BJ, last_BJ = map(np.asarray, (first_BI, last_BI, first_BJ, last_BJ))
    for b in range(B):
        visited_IJ = np.zeros((num_q_tiles, num_k_tiles), bool)
        for i in range(num_q_tiles):
            keys = np.flatnonzero(seen_BTS[b, i * q_tile : (i + 1) * q_tile].any(0))
            want = (keys[0] // k_tile, keys[-1] // k_tile + 1) if len(keys) else (0, 0)
            assert (first_BI[b, i], last_BI[b, i]) == want
            visited_IJ[i, want[0] : want[1]] = True
        for j in range(num_k_tiles):
            needed_by = np.flatnonzero(visited_IJ[:, j])
            want = (needed_by[0], needed_by[-1] + 1) if len(needed_by) else (0, 0)
            assert (first_BJ[b, j], last_BJ[b, j]) == want


def test_tile_bounds_of_a_static_mask_are_numpy_and_equal_those_of_its_rows():
    mask = AttentionMask(window=5)
    static = tile_bounds(*static_ranges(mask, 13, 13), q_tile=4, k_tile=4)
    assert all(isinstance(bound_I, np.ndarray) for bound_I in static)
    rows = tile_bounds(*ranges(mask, 1, 13, 13), q_tile=4, k_tile=4)
    np.testing.assert_array_equal(static, [bound_BI[0] for bound_BI in rows])
    np.testing.assert_array_equal(
        inverse_tile_bounds(*static, num_k_tiles=4),
        [bound_BJ[0] for bound_BJ in inverse_tile_bounds(*rows, num_k_tiles=4)],
    )


def test_mask_is_a_pytree_whose_causality_and_window_are_static():
    documents_BT = jnp.ones((2, 3), jnp.int32)
    mask = AttentionMask(window=2, q_documents_BT=documents_BT, k_documents_BS=documents_BT)
    assert len(jax.tree.leaves(mask)) == 2
    assert len(jax.tree.leaves(AttentionMask())) == 0
    traced = jax.jit(lambda mask: ranges(mask, 2, 3, 3))(mask)
    np.testing.assert_array_equal(traced, ranges(mask, 2, 3, 3))


def test_half_given_documents_and_empty_windows_are_refused():
    with pytest.raises(ValueError, match="k_documents_BS is None"):
        AttentionMask(q_documents_BT=jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="window must be at least 1"):
        AttentionMask(window=0)
