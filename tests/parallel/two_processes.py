"""Run by test_distributed.py, alone and as two processes: three steps of gradient descent on rows that each reads."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import axes
from slmjax.config import MeshConfig
from slmjax.parallel import constrain, host_batch_to_global, initialise, make_mesh, process_rows, sharding_for


class Weight:
    shape = (16, 8)
    logical_axes = (axes.MLP, axes.EMBED)


def main(directory):
    initialise()
    initialise()  # the second call does nothing
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1))
    sharding = sharding_for(Weight, mesh)
    start_FD = np.random.default_rng(0).normal(size=Weight.shape).astype(np.float32)
    w_FD = jax.make_array_from_callback(Weight.shape, sharding, lambda index: start_FD[index])
    rows = process_rows(8, mesh)
    place = constrain(mesh)

    def loss(w_FD, x_BF):
        return jnp.mean(place(jnp.tanh(x_BF @ w_FD), (axes.BATCH, axes.ACT_EMBED)) ** 2)

    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, sharding))
    losses = []
    for index in range(3):
        x_BF = np.random.default_rng([1, index]).normal(size=(8, 16)).astype(np.float32)
        value, gradient_FD = step(w_FD, host_batch_to_global(x_BF[list(rows)], mesh))
        w_FD = w_FD - 0.5 * gradient_FD
        losses.append(float(value))

    shapes = sorted({shard.data.shape for shard in w_FD.addressable_shards})
    result = {"processes": jax.process_count(), "rows": rows, "shard_shapes": shapes, "losses": losses}
    with open(f"{directory}/{jax.process_index()}.json", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1])
