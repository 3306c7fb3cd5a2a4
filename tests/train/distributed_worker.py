"""One process of a small run, under its supervisor: what test_distributed starts several of.

Usage: python distributed_worker.py JSON, an object of the arguments of ``run``.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from jaxgen.cli import supervise
from jaxgen.cli.errors import guarded


def model(kind="dense"):
    """Optimiser, start of a state, step and sampler of a small noise predictor of points."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxgen import share, train
    from jaxgen.core import keys

    optimizer = optax.adam(3e-3)
    draw = np.random.default_rng(4).normal
    sizes = ((2, 32), (32, 64), (64, 2))
    dense = [
        {"kernel": np.float32(draw(size=s) / s[0] ** 0.5), "bias": np.zeros(s[1:], np.float32)}
        for s in sizes
    ]
    layout = share.plan(dense, 1024) if kind == "shared" else None

    def network(params, x):
        layers = params if layout is None else share.expand(params, layout)
        for layer in layers[:-1]:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
        return x @ layers[-1]["kernel"] + layers[-1]["bias"][None]

    def loss_fn(key, params, batch):
        noise = keys.normal(key, batch["x"].shape)
        return jnp.sum((network(params, batch["x"] + noise) - noise) ** 2, axis=1)

    def start():
        params = dense if layout is None else share.compress(dense, layout)
        return train.TrainState.create(jax.random.key(3), params, optimizer)

    @jax.jit
    def sample(params):
        x = keys.normal(jax.random.key(5), (16, 2))
        return x - network(params, x)

    step = train.make_train_step(loss_fn, optimizer, ema=0.99)
    return start, step, sample, layout


def bits(state):
    """Every leaf of a state, on the host, its key as numbers."""
    import jax
    import numpy as np

    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def leaves(state):
    """The leaves that are not empty."""
    import jax

    return [leaf for leaf in jax.tree.leaves(state) if leaf.size]


def batches(pause=0.0, seen=None, size=16, process=0, processes=1):
    """The moons' batches for one process; ``seen`` gathers the examples it was given."""
    import numpy as np

    from jaxgen.train import data as datasets

    data = datasets.load("moons")
    # The label is what an example is known by: its number.
    data = datasets.Dataset("moons", data.x[:96], np.arange(96, dtype=np.int32))
    read = datasets.batches(data, size, seed=0, process=process, processes=processes)

    def paced(position):
        for batch in read(position):
            time.sleep(pause)
            if seen is not None:
                seen.extend(batch["label"].tolist())
            yield batch

    return paced


def run(
    out,
    coordinator=None,
    processes=None,
    process=None,
    steps=100,
    mesh="data=-1",
    kind="dense",
    pause=0.0,
    save_every=20,
    report_every=10,
    timeout=60.0,
    config=None,
    check=None,
):
    """Meet, train, and let process 0 write what came out; ``check`` holds what was saved before."""
    import jax
    import numpy as np

    from jaxgen import train
    from jaxgen.train import distributed, lock
    from jaxgen.train import mesh as meshes

    print("pid", os.getpid(), flush=True)
    supervise.tell("joining")
    distributed.initialize(coordinator, processes, process, timeout=timeout)
    supervise.tell("joined")
    supervise.tell(f"folder {out}")
    me, out = jax.process_index(), Path(out)
    distributed.agree(config or {})
    start, step, sample, layout = model(kind)
    seen = []
    with contextlib.ExitStack() as stack:
        distributed.first(lambda: stack.enter_context(lock.hold(out)))
        if check is not None:
            found = train.restore(
                out / "checkpoints",
                jax.eval_shape(start),
                sharding=meshes.state_shardings(jax.eval_shape(start), meshes.make_mesh(mesh)),
                layout=layout,
            )
            parts = {leaf.addressable_data(0).size / leaf.size for leaf in leaves(found)}
            assert parts == {0.5, 1.0}, parts
            with np.load(check, allow_pickle=False) as file:
                for a, name in zip(bits(meshes.gather(found)), file.files, strict=True):
                    assert a.tobytes() == file[name].tobytes(), name
        state = train.fit(
            start(),
            step,
            batches(pause, seen, process=me, processes=jax.process_count()),
            steps,
            out=out,
            config=config,
            progress=False,
            mesh=meshes.make_mesh(mesh),
            layout=layout,
            report_every=report_every,
            save_every=save_every,
            on_report=lambda line: print("step", line["step"], flush=True),
        )
        state = meshes.gather(state)
        distributed.barrier("end")
        np.save(out / f"seen-{me}.npy", np.array(seen, np.int32))
        distributed.part()
        if me == 0:
            np.savez(out / "end.npz", *bits(state), sample(state.ema))
    return 0


def main():
    if not supervise.is_worker():
        return supervise.supervise("worker", [sys.executable, __file__, *sys.argv[1:]])
    return supervise.work(
        "worker",
        lambda: run(**json.loads(sys.argv[1])),
        lambda action: guarded("worker", lambda _: action(), ()),
    )


if __name__ == "__main__":
    sys.exit(main())
