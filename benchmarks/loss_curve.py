"""The loss of a run on its own tokens in several variants, from the same start over the same batches, documents apart.

    python benchmarks/loss_curve.py my_run.gin --steps 120 --variant "" --variant products=float8

Variants are those of train_step.py. The schedule is the run's, for so many steps; nothing is saved. The table has the
mean loss of every tenth part (of a multiple of ten steps), in nats a token, and the tokens a second of the last half,
with the time of loading.
"""

import argparse
import dataclasses
import multiprocessing
import time

import train_step


def losses(run, variant: dict) -> tuple[list[float], float]:
    """Returns the loss of each step, and tokens a second."""
    import jax

    from slmjax.data.loader import make_loader
    from slmjax.parallel.mesh import make_mesh
    from slmjax.parallel.rules import host_batch_to_global

    run = train_step.configured(run, variant, documents=0)
    mesh = make_mesh(run.mesh)
    prepared = train_step.prepare(run, variant, documents=0)
    state, found, began = prepared.state, [], time.perf_counter()
    for step, batch in enumerate(make_loader(run.input, seed=run.seed, start_step=0, steps=run.steps)):
        if step == run.steps // 2:
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, metrics = prepared.step(state, host_batch_to_global(batch, mesh))
        found.append(metrics["loss"])
    jax.block_until_ready(state)
    tokens = (run.steps - run.steps // 2) * run.input.batch_size * run.input.sequence_length
    return [float(loss) for loss in found], tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--variant", action="append", default=[], help="as for train_step.py")
    args = parser.parse_args()

    from slmjax.gin_loader import load

    run = dataclasses.replace(load([args.config]).config, steps=args.steps)
    defaults = {"batch": run.input.batch_size, "length": run.input.sequence_length}
    tenth = max(1, args.steps // 10)
    steps = [f"to {end}" for end in range(tenth, args.steps + 1, tenth)]
    print(f"| {args.config} | tokens/s | {' | '.join(steps)} |\n|{'---|' * (len(steps) + 2)}", flush=True)
    # A process each, so that memory and allocators do not meet.
    context = multiprocessing.get_context("spawn")
    for text in args.variant or [""]:
        with context.Pool(1) as pool:
            found, rate = pool.apply(losses, (run, defaults | train_step.parse_variant(text)))
        means = [sum(found[end - tenth : end]) / tenth for end in range(tenth, args.steps + 1, tenth)]
        print(
            f"| {text or 'as configured'} | {rate:,.0f} | {' | '.join(f'{mean:.3f}' for mean in means)} |", flush=True
        )


if __name__ == "__main__":
    main()
