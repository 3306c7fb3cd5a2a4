"""A run killed at any moment and started again ends in the same bits as one left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxgen import train

RUN = """
import itertools, sys, time
import jax, jax.numpy as jnp, numpy as np, optax
from jaxgen import train
from jaxgen.core import keys

out, steps, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
optimizer = optax.adam(3e-3)

def init():
    draw = np.random.default_rng(4).normal
    return {"a": np.float32(draw(size=(3, 32))), "b": np.float32(draw(size=(32, 2)) / 6)}

def network(params, x):
    return jnp.tanh(x @ params["a"][:2] + params["a"][2:]) @ params["b"]

def loss_fn(key, params, x):
    noise = keys.normal(key, x.shape)
    return jnp.sum((network(params, x + noise) - noise) ** 2, axis=1)

def batches(examples):
    data = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    for i in itertools.count(examples, 8):
        # Time to be killed in, where a step takes none.
        time.sleep(pause)
        if i > examples:
            print(i // 8, flush=True)
        yield data[np.arange(i, i + 8) % 100]

state = train.TrainState.create(jax.random.key(3), init(), optimizer)
step = train.make_train_step(loss_fn, optimizer, ema=0.99)
try:
    state = train.fit(
        state, step, batches, steps, out=out, save_every=20, report_every=5, progress=False,
        config={"lr": 3e-3},
    )
except train.Interrupted as stopped:
    print("stopped:", stopped, flush=True)
    sys.exit(3)

@jax.jit
def sample(key):
    x = keys.normal(key, (16, 2))
    return x - network(state.ema, x)

leaves = jax.tree.leaves((state.params, state.ema, state.opt_state, state.step, state.examples))
np.savez(f"{out}/end.npz", *leaves, jax.random.key_data(state.key),
         sample(jax.random.key(5)))
"""


def launch(out, steps, pause):
    root = str(Path(train.__file__).parents[2])
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    command = [sys.executable, "-c", RUN, str(out), str(steps), str(pause)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def finish(process):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return output


def end(out):
    with np.load(out / "end.npz", allow_pickle=False) as file:
        return [file[name] for name in file.files]


def unfinished(out):
    """Step folders without a manifest: saves under way."""
    folder = out / "checkpoints"
    found = folder.glob("step_*") if folder.exists() else ()
    return {p.name for p in found if not (p / "manifest.json").exists()}


def kill_in_a_save(process, out, rng):
    """Kill as soon as a save has begun, or a little later; gives whether it was under way."""
    before = unfinished(out)
    while process.poll() is None and not unfinished(out) - before:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    process.kill()
    process.wait()
    return bool(unfinished(out) - before)


def kill_at_random(process, rng, longest):
    """Kill some time after the first step; gives nothing away about saves."""
    process.stdout.readline()
    time.sleep(rng.uniform(0, longest))
    process.kill()
    process.wait()


def check_kills(tmp_path, *, kills, steps, pause, longest, seed):
    alone = launch(tmp_path / "alone", steps, 0.0)
    out, rng, in_a_save, killed = tmp_path / "killed", random.Random(seed), 0, 0
    for i in range(kills):
        process = launch(out, steps, pause)
        if i % 2 == 0:
            in_a_save += kill_in_a_save(process, out, rng)
        else:
            kill_at_random(process, rng, longest)
        killed += process.returncode == -signal.SIGKILL
        process.communicate()
    reached = train.saved_steps(out / "checkpoints")
    finish(alone)
    finish(launch(out, steps, 0.0))
    assert killed == kills, "the run was over before it could be killed: give it more steps"
    assert in_a_save >= 1
    assert not reached or reached[-1] < steps
    for a, b in zip(end(out), end(tmp_path / "alone"), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
    found, expected = (
        [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (out, tmp_path / "alone")
    )
    same = ("step", "loss", "grad_norm", "skipped")
    assert [[x[k] for k in same] for x in found] == [[x[k] for k in same] for x in expected]
    assert train.latest_valid(out / "checkpoints") == steps
    assert not unfinished(out)


def test_two_kills(tmp_path):
    check_kills(tmp_path, kills=2, steps=160, pause=0.005, longest=0.4, seed=0)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    check_kills(tmp_path, kills=20, steps=3000, pause=0.005, longest=1.0, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_from_outside(tmp_path, name):
    out = tmp_path / "stopped"
    process = launch(out, 300, 0.01)
    process.stdout.readline()
    process.send_signal(signal.Signals[name])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert f"stopped by {name} at step" in output and "go on" in output
    assert train.latest_valid(out / "checkpoints") is not None
    finish(launch(out, 300, 0.0))
    finish(launch(tmp_path / "alone", 300, 0.0))
    for a, b in zip(end(out), end(tmp_path / "alone"), strict=True):
        assert a.tobytes() == b.tobytes()
