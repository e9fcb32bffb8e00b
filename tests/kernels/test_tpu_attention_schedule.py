"""The list of tiles against a look at every pair of query and key."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.kernels.tpu.attention_schedule import BEGIN, EDGE, END, WORK, k_tile_of, make_schedule, q_tile_of


@st.composite
def ranges(draw):
    """Ranges of keys, and a number of keys that holds them; of one shape, so that jax compiles once."""
    X, T, S = 2, 13, 18
    bounds = draw(st.lists(st.tuples(*[st.integers(0, S)] * 2), min_size=X * T, max_size=X * T))
    return *np.sort(np.array(bounds, np.int32).reshape(X, T, 2), axis=-1).transpose(2, 0, 1), S


@functools.partial(jax.jit, static_argnames=("q_tile", "k_tile", "num_k_tiles"))
def make_traced_schedule(k_start_XT, k_end_XT, **tiles):
    return make_schedule(k_start_XT, k_end_XT, **tiles)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("q_tile", "k_tile"), [(4, 4), (8, 2), (1, 32)])
@settings(deadline=None, max_examples=20)
@given(case=ranges())
def test_steps_are_the_tiles_in_which_a_query_sees_a_key(static, q_tile, k_tile, case):
    k_start_XT, k_end_XT, S = case
    num_k_tiles = -(-S // k_tile)
    make = make_schedule if static else make_traced_schedule
    schedule = make(k_start_XT, k_end_XT, q_tile=q_tile, k_tile=k_tile, num_k_tiles=num_k_tiles)
    assert isinstance(schedule.steps, np.ndarray) == static
    key_1S = np.arange(num_k_tiles * k_tile)[None]
    longest = 0
    for row, (k_start_T, k_end_T) in enumerate(zip(k_start_XT, k_end_XT, strict=True)):
        want = []
        for i, first in enumerate(range(0, len(k_start_T), q_tile)):
            queries = slice(first, first + q_tile)
            seen_TS = (k_start_T[queries, None] <= key_1S) & (key_1S < k_end_T[queries, None])
            tiles = np.flatnonzero(seen_TS.any(0).reshape(-1, k_tile).any(-1))
            tiles = range(tiles[0], tiles[-1] + 1) if len(tiles) else []
            steps = [(i, j, WORK | EDGE * (not seen_TS[:, j * k_tile :][:, :k_tile].all())) for j in tiles]
            steps = steps or [(i, 0, 0)]
            last = len(steps) - 1
            want += [(i, j, flags | BEGIN * (n == 0) | END * (n == last)) for n, (i, j, flags) in enumerate(steps)]
        got = np.asarray(schedule.steps).reshape(len(k_start_XT), schedule.stride)[row]
        got = list(zip(q_tile_of(got).tolist(), k_tile_of(got).tolist(), (got & 15).tolist(), strict=True))
        # Whether a tile without work is an edge nobody asks.
        got = [(i, j, flags if flags & WORK else flags & ~EDGE) for i, j, flags in got]
        assert got[: len(want)] == want
        assert not any(flags & (BEGIN | END | WORK) for _, _, flags in got[len(want) :])
        longest = max(longest, len(want))
    assert schedule.num_steps == longest


@pytest.mark.parametrize(
    ("X", "T", "message"), [(1, 1 << 14, "use larger tiles"), (64, 1 << 12, "or fewer rows at a time")]
)
def test_more_tiles_than_fit_are_refused(X, T, message):
    ranges_XT = np.zeros((X, T), np.int32), np.ones((X, T), np.int32)
    with pytest.raises(ValueError, match=message):
        make_schedule(*ranges_XT, q_tile=1, k_tile=1, num_k_tiles=1)
