"""Muon against Newton-Schulz written out in float64, and what the iteration promises."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.optim.muon import matrix_shape, orthogonalise, scale_by_muon


class Spec(NamedTuple):
    shape: tuple[int, ...]
    logical_axes: tuple[str, ...]


def newton_schulz_float64(g, steps=5):
    """Jordan et al. 2024 on one matrix, without transposing."""
    x = np.asarray(g, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 20), (20, 6)])
def test_orthogonalise_is_the_float64_iteration_per_matrix(rows, columns):
    x = jax.random.normal(jax.random.key(0), (3, rows, columns))
    out = jax.jit(lambda x: orthogonalise(x, steps=5))(x)
    expected = np.stack([newton_schulz_float64(matrix) for matrix in x])
    # five float32 iterations of a map with slope up to 3.4 amplify rounding of 1e-7 by some hundred
    np.testing.assert_allclose(out, expected, atol=5e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_singular_values_come_near_one_whatever_the_scale(dtype):
    x = jax.random.normal(jax.random.key(1), (2, 16, 48)) * np.array([1e-12, 1e6], np.float32)[:, None, None]
    out = np.asarray(orthogonalise(x, steps=5, dtype=dtype))
    assert out.dtype == np.float32
    values = np.linalg.svd(out, compute_uv=False)
    assert values.min() > 0.6  # the iteration's own band is about [0.7, 1.2]; bfloat16 widens it a little
    assert values.max() < 1.3
    # the singular vectors stay: U^T out V is diagonal
    u, _, vt = np.linalg.svd(np.asarray(x[1]), full_matrices=False)
    middle = u.T @ out[1] @ vt.T
    assert np.abs(middle - np.diag(np.diag(middle))).max() < (1e-3 if dtype == "float32" else 0.1)


def test_a_zero_matrix_stays_zero():
    np.testing.assert_array_equal(orthogonalise(jnp.zeros((1, 4, 8)), steps=5), 0)


def test_matrix_shape():
    assert matrix_shape((3, 16, 4, 8), ("layers", "embed", "heads", "head_dim")) == (3, 16, 32)
    assert matrix_shape((3, 4, 8, 16), ("layers", "heads", "head_dim", "embed")) == (3, 32, 16)
    assert matrix_shape((3, 5, 16, 7), ("layers", "expert", "embed", "mlp")) == (15, 16, 7)
    assert matrix_shape((16, 7), ("embed", "mlp")) == (1, 16, 7)
    for axes in [("layers", "embed"), ("embed", "layers", "mlp"), ("embed", "mlp", "vocab")]:
        with pytest.raises(ValueError, match="two sides"):
            matrix_shape((2,) * len(axes), axes)


@pytest.mark.parametrize("nesterov", [True, False])
def test_batched_heads_and_experts_are_a_loop_over_matrices(nesterov):
    specs = {
        "w_o_NHD": Spec((2, 3, 4, 6), ("layers", "heads", "head_dim", "embed")),
        "w_up_EDF": Spec((2, 2, 6, 5), ("layers", "expert", "embed", "mlp")),
    }
    rng = np.random.default_rng(0)
    gradients = [
        {name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in specs.items()} for _ in range(3)
    ]
    muon = scale_by_muon(specs, momentum=0.9, nesterov=nesterov, steps=5)
    state = muon.init(gradients[0])
    update = jax.jit(muon.update)
    average = {name: np.zeros(spec.shape) for name, spec in specs.items()}
    for gradient in gradients:
        out, state = update(gradient, state)
        for name, batch, shape in [("w_o_NHD", (2,), (12, 6)), ("w_up_EDF", (2, 2), (6, 5))]:
            g = np.asarray(gradient[name], np.float64)
            average[name] = 0.9 * average[name] + 0.1 * g
            mixed = 0.9 * average[name] + 0.1 * g if nesterov else average[name]
            expected = np.empty(batch + shape)
            for index in np.ndindex(*batch):
                expected[index] = 0.2 * np.sqrt(max(shape)) * newton_schulz_float64(mixed[index].reshape(shape))
            np.testing.assert_allclose(out[name], expected.reshape(g.shape), atol=1e-4)
