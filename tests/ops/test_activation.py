"""Activations at points whose values are known."""

import math
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config import Activation
from slmjax.ops.activation import activate


def _gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}


@pytest.mark.parametrize("name", get_args(Activation))
def test_activation_equals_its_formula(name):
    points = [-3.0, -0.5, 0.0, 0.5, 3.0]
    np.testing.assert_allclose(
        activate(name, jnp.array(points)), [FORMULAS[name](x) for x in points], rtol=1e-5, atol=1e-6
    )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        activate("swish", jnp.zeros(1))  # pyright: ignore[reportArgumentType]
