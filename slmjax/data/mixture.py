"""Which source the n-th row of training comes from: random access, exact integers, no state."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

# A source, or (rows of the left branch, rows of both, left branch, right branch).
_Node = int | tuple[int, int, "_Node", "_Node"]


def row_shares(weights: Sequence[float], tokens_per_row: Sequence[Fraction]) -> list[int]:
    """Shares of rows, as whole numbers, with which sources have shares of tokens as `weights`.

    `tokens_per_row` is what survives packing: a source whose rows are half empty gets twice the rows.
    """
    # str: 0.1 is meant to be a tenth, not the binary fraction next to it.
    shares = [Fraction(str(weight)) / tokens for weight, tokens in zip(weights, tokens_per_row, strict=True)]
    scale = math.lcm(*(share.denominator for share in shares))
    return [int(share * scale) for share in shares]


def tempered_weights(weights: Sequence[float], num_tokens: Sequence[int], temperature: float) -> list[float]:
    """Weights times tokens ** (1 / temperature), the largest source having its own weight.

    Rounded, so that the last bit of a machine's logarithm does not change which rows a run reads.
    """
    largest = max(num_tokens)
    factors = [math.exp((math.log(tokens) - math.log(largest)) / temperature) for tokens in num_tokens]
    return [float(f"{weight * factor:.9g}") for weight, factor in zip(weights, factors, strict=True)]


class Interleaving:
    """An endless sequence of sources in given shares, spread as evenly as can be.

    A binary tree: at each branch the first n rows hold round(n * share) rows of the left side. Among the first n
    rows, a source has its exact share to within 1/2 for every level of the tree, ceil(log2(sources)) in all.
    """

    def __init__(self, shares: Mapping[int, int]):
        """Takes the share of each source, positive whole numbers that need not sum to anything."""
        self._root = _tree(sorted(shares.items()))[1]

    def locate(self, row: int) -> tuple[int, int]:
        """Source of one row, and how many rows of that source come before it."""
        node = self._root
        while not isinstance(node, int):
            share, total, left, right = node
            before = _rounded(row * share, total)
            if _rounded((row + 1) * share, total) > before:
                node, row = left, before
            else:
                node, row = right, row - before
        return node, row

    def counts(self, num_rows: int) -> dict[int, int]:
        """How many of the first `num_rows` rows each source has."""
        counts, pending = {}, [(self._root, num_rows)]
        while pending:
            node, num_rows = pending.pop()
            if isinstance(node, int):
                counts[node] = num_rows
            else:
                share, total, left, right = node
                in_left = _rounded(num_rows * share, total)
                pending += [(left, in_left), (right, num_rows - in_left)]
        return counts


@dataclasses.dataclass(frozen=True)
class Stage:
    """Shares of rows by source, in force from row `start` until the next stage."""

    start: int
    shares: Mapping[int, int]


class Mixture:
    """Stages of interleavings; at a change of stage every source goes on where it was."""

    def __init__(self, stages: Sequence[Stage]):
        """Takes the stages in order, the first one starting at row 0."""
        self._starts = [stage.start for stage in stages]
        self._interleavings = [Interleaving(stage.shares) for stage in stages]
        self._used: list[dict[int, int]] = [{}]  # rows of each source before each stage
        for stage, following in itertools.pairwise(stages):
            self._used.append(self._counts_in(len(self._used) - 1, following.start - stage.start))

    def _counts_in(self, stage: int, num_rows: int) -> dict[int, int]:
        counts = dict(self._used[stage])
        for source, count in self._interleavings[stage].counts(num_rows).items():
            counts[source] = counts.get(source, 0) + count
        return counts

    def locate(self, row: int) -> tuple[int, int]:
        """Source of one row of the whole training, and how many rows of that source come before it."""
        stage = bisect.bisect_right(self._starts, row) - 1
        source, index = self._interleavings[stage].locate(row - self._starts[stage])
        return source, self._used[stage].get(source, 0) + index

    def counts(self, num_rows: int) -> dict[int, int]:
        """How many of the first `num_rows` rows each source has."""
        stage = bisect.bisect_left(self._starts, num_rows, lo=1) - 1
        return self._counts_in(stage, num_rows - self._starts[stage])


def _tree(shares: Sequence[tuple[int, int]]) -> tuple[int, _Node]:
    if len(shares) == 1:
        return shares[0][1], shares[0][0]
    middle = len(shares) // 2
    (left_total, left), (right_total, right) = _tree(shares[:middle]), _tree(shares[middle:])
    return left_total + right_total, (left_total, left_total + right_total, left, right)


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
