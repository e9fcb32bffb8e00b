"""What the benchmarks of kernels share: random operands, the time of a call, the difference from a reference."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def seconds(
    function: Callable[..., Any],
    *arrays: Any,
    calls: int,
    repetitions: int,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> float:
    """Returns the median over repetitions of the mean of several calls, each repetition waited for; one call before."""
    wait(function(*arrays))
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        for _ in range(calls):
            result = function(*arrays)
        wait(result)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Returns bfloat16 numbers, made on the device."""
    return jax.jit(lambda key: scale * jax.random.normal(key, shape, jnp.bfloat16))(jax.random.key(seed))


@jax.jit
def difference(got: Any, want: Any) -> jax.Array:
    """Returns the norm of the difference over the norm of what is wanted; of trees the largest."""

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x)))

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
    return jnp.max(jnp.stack([norm(a - b) / norm(b) for a, b in wide]))
