import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmjax.data.mixture import Interleaving, Mixture, Stage, row_shares

shares_lists = st.lists(st.integers(1, 10**9), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(shares=shares_lists)
def test_every_source_is_read_in_order_and_any_prefix_has_the_exact_share(shares):
    interleaving, total = Interleaving(dict(enumerate(shares))), sum(shares)
    bound = Fraction(math.ceil(math.log2(len(shares))), 2)
    seen = [0] * len(shares)
    for row in range(200):
        assert interleaving.counts(row) == dict(enumerate(seen))
        assert all(
            abs(count - Fraction(row * share, total)) <= bound for count, share in zip(seen, shares, strict=True)
        )
        source, index = interleaving.locate(row)
        assert index == seen[source]
        seen[source] += 1


@settings(max_examples=60, deadline=None)
@given(shares=shares_lists, row=st.integers(10**12, 10**12 + 10**6))
def test_exact_at_a_million_million_rows(shares, row):
    interleaving, total = Interleaving(dict(enumerate(shares))), sum(shares)
    counts, after = interleaving.counts(row), interleaving.counts(row + 1)
    bound = Fraction(math.ceil(math.log2(len(shares))), 2)
    assert all(abs(counts[i] - Fraction(row * share, total)) <= bound for i, share in enumerate(shares))
    source, index = interleaving.locate(row)
    assert index == counts[source]
    assert after == {**counts, source: index + 1}


def test_stages_continue_every_source_where_it_was():
    mixture = Mixture([Stage(0, {0: 3, 1: 1}), Stage(101, {2: 1, 1: 1}), Stage(150, {0: 1, 2: 5})])
    seen = {}
    for row in range(400):
        assert {source: count for source, count in mixture.counts(row).items() if count} == seen
        source, index = mixture.locate(row)
        assert source in ({0, 1} if row < 101 else {1, 2} if row < 150 else {0, 2})
        assert index == seen.get(source, 0)
        seen[source] = index + 1
    assert seen[1] == pytest.approx(101 / 4 + 49 / 2, abs=1)


def test_weights_are_of_tokens_not_rows():
    shares = row_shares([0.1, 0.3], [Fraction(100), Fraction(25)])
    assert Fraction(shares[0] * 100, shares[1] * 25) == Fraction(1, 3)
    assert row_shares([2, 1e-3], [Fraction(1), Fraction(1)]) == [2000, 1]
