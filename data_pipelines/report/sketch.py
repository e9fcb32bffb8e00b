"""Counts of numbers in bins that fit any numbers, so that those of shards add up to those of the corpus."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

_STEPS = 64  # bins between a power of two and the next
_LEAST = 1075  # below the exponents of all numbers


@dataclasses.dataclass(frozen=True)
class Sketch:
    """How many numbers lie in each bin: the sixty-fourth part of what lies between two powers of two.

    Attributes:
      bins: by number; those of positive numbers are positive, 0 is that of zero.
      missing: what is no finite number.
      low, high: the least and the greatest.
      whole: whether all are whole numbers.
    """

    bins: dict[int, int] = dataclasses.field(default_factory=dict)
    missing: int = 0
    low: float = math.inf
    high: float = -math.inf
    whole: bool = True

    @classmethod
    def of(cls, numbers: np.ndarray) -> "Sketch":
        """Counts numbers."""
        numbers = numbers.astype(np.float64)
        finite = numbers[np.isfinite(numbers)]
        if len(finite) == 0:
            return cls(missing=len(numbers))
        mantissas, exponents = np.frexp(np.abs(finite))
        places = ((mantissas - 0.5) * 2 * _STEPS).astype(np.int64)
        keys = np.where(finite == 0, 0, np.sign(finite) * (1 + places + _STEPS * (exponents + _LEAST))).astype(np.int64)
        found, counts = np.unique(keys, return_counts=True)
        return cls(
            bins=dict(zip(found.tolist(), counts.tolist(), strict=True)),
            missing=len(numbers) - len(finite),
            low=float(finite.min()),
            high=float(finite.max()),
            whole=bool((finite == np.floor(finite)).all()),
        )

    @classmethod
    def load(cls, content: dict[str, Any]) -> "Sketch":
        """What `content` gave."""
        if not content["bins"]:
            return cls(missing=content["missing"])
        return cls(**{**content, "bins": dict(content["bins"])})

    def content(self) -> dict[str, Any]:
        """As JSON values."""
        bins = sorted(self.bins.items())
        return {"bins": bins, "missing": self.missing, "low": self.low, "high": self.high, "whole": self.whole}

    def __add__(self, other: "Sketch") -> "Sketch":
        bins = dict(self.bins)
        for key, count in other.bins.items():
            bins[key] = bins.get(key, 0) + count
        return Sketch(
            bins=bins,
            missing=self.missing + other.missing,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            whole=self.whole and other.whole,
        )

    @property
    def count(self) -> int:
        """How many numbers were counted."""
        return sum(self.bins.values())

    @functools.cached_property
    def middles(self) -> tuple[np.ndarray, np.ndarray]:
        """A number in the middle of each bin, in order, and the counts of the bins."""
        keys, counts = np.array(sorted(self.bins.items()), np.int64).reshape(-1, 2).T
        exponents, places = np.divmod(np.abs(keys) - 1, _STEPS)
        sizes = np.ldexp(0.5 + (places + 0.5) / (2 * _STEPS), exponents - _LEAST)
        return np.where(keys == 0, 0.0, np.copysign(sizes, keys)), counts

    def quantile(self, share: float) -> float:
        """A number that `share` of them lie below, to a sixty-fourth; of whole numbers a whole one."""
        left = share * self.count
        for middle, count in zip(*(each.tolist() for each in self.middles), strict=True):
            left -= count
            if left <= 0:
                value = round(middle) if self.whole else middle
                return min(max(value, self.low), self.high)
        return self.high
