"""What a parameter is before it has values: its shape and the logical name of each dimension."""

import dataclasses

import jax
from flax import nnx

from slmjax import axes


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape and logical axis names (slmjax/axes.py) of one float32 parameter. A leaf to JAX's tree functions."""

    shape: tuple[int, ...]
    logical_axes: tuple[str, ...]

    def __post_init__(self):
        if len(self.shape) != len(self.logical_axes):
            raise ValueError(f"shape {self.shape} has other dimensions than logical axes {self.logical_axes}")

    def stacked(self, count: int) -> "ParamSpec":
        """The same parameter for `count` layers, with a leading dimension L."""
        return ParamSpec((count, *self.shape), (axes.LAYERS, *self.logical_axes))


def abstract(build) -> tuple[nnx.GraphDef, dict]:
    """Returns the structure of the module that `build()` gives, and a nested dict of its `ParamSpec`s; no memory."""
    graph, state = nnx.split(nnx.eval_shape(build))
    specs: dict = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, name = map(str, path)
        node = specs
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = ParamSpec(tuple(variable.shape), variable.get_metadata("logical_axes"))
    return graph, specs


def stack(specs: dict, count: int) -> dict:
    """Returns `specs` for `count` layers stacked along a leading dimension L."""
    return jax.tree.map(lambda spec: spec.stacked(count), specs)
