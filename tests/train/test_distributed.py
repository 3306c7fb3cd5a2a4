"""Several processes over loopback: one run's numbers, any of them killed, and what they refuse."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker as worker
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import train
from jaxgen.train import distributed

STEPS, LONG = 100, 320
ROOT = Path(train.__file__).parents[2]
FLAGS = "--xla_backend_optimization_level=0"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(count, out, **options):
    """``count`` processes of one run, each with its supervisor."""
    coordinator = f"127.0.0.1:{free_port()}"
    env = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = []
    for i in range(count):
        own = {k: v[i] if isinstance(v, tuple) else v for k, v in options.items()}
        words = {"out": str(out), "coordinator": coordinator, "processes": count, "process": i}
        command = [sys.executable, worker.__file__, json.dumps({**words, **own})]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env))
    return started


def finish(started, codes=0, seconds=240):
    """Wait for all; what each said on standard error."""
    end, said = time.monotonic() + seconds, []
    for process in started:
        try:
            said.append(process.communicate(timeout=max(end - time.monotonic(), 0.1))[1])
        finally:
            process.kill()
    found = [process.returncode for process in started]
    assert found == ([codes] * len(started) if isinstance(codes, int) else codes), said
    return said


def after(process, word):
    """Read on to a line of the worker's that begins so, and give the rest of it."""
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise AssertionError(f"no {word!r} from the worker: {process.communicate()[1]}")


def end(out):
    with np.load(out / "end.npz", allow_pickle=False) as file:
        return [file[name] for name in file.files]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [[line[k] for k in ("step", "loss", "grad_norm", "skipped")] for line in lines(out)]


def alone(state, steps=STEPS):
    """The losses of each step on one device of one process, and its samples."""
    _, step, sample, _ = worker.model()
    found = []
    for batch, _ in zip(worker.batches()(0), range(steps), strict=False):
        state, metrics = step(state, batch)
        found.append(float(metrics.loss))
    return np.array(found), np.asarray(sample(state.ema)), state


@pytest.fixture(scope="module")
def reference():
    """One device's losses and samples, and what rounding may make of them.

    Several devices add the gradient's parts in another order: an ulp or so in each step. What one
    ulp in every starting parameter makes of a loss (or a sample), a hundred times over, bounds it.
    """
    start = worker.model()[0]
    found, drawn, _ = alone(start())
    rng = np.random.default_rng(0)
    state = start()
    sign = [np.float32(rng.choice([-1, 1], leaf.shape)) for leaf in jax.tree.leaves(state.params)]
    signs = jax.tree.unflatten(jax.tree.structure(state.params), sign)
    nudged = jax.tree.map(lambda p, s: jnp.nextafter(p, p + s), state.params, signs)
    moved, moved_drawn, _ = alone(state.replace(params=nudged))
    bound = STEPS * np.abs(moved - found).max(), STEPS * np.abs(moved_drawn - drawn).max()
    return found, drawn, bound


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of two processes that nothing befell."""
    out = tmp_path_factory.mktemp("uninterrupted")
    finish(launch(2, out, steps=LONG))
    return out


def check_same_run(out, count, reference):
    found, drawn, (loss_bound, sample_bound) = reference
    assert loss_bound < 1e-3 and sample_bound < 1e-2
    windows = found.reshape(-1, 10).mean(axis=1)
    reported = [line["loss"] for line in lines(out)][: len(windows)]
    np.testing.assert_allclose(reported, windows, rtol=0, atol=loss_bound)
    seen = [np.load(out / f"seen-{i}.npy").reshape(-1, 16 // count) for i in range(count)]
    read = worker.batches()(0)
    for parts in zip(*seen, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), next(read)["label"])
    return drawn, sample_bound


def test_two_and_four_processes_are_one_run(uninterrupted, tmp_path, reference):
    check_same_run(uninterrupted, 2, reference)
    finish(launch(4, tmp_path, mesh="data=2,fsdp=2", steps=STEPS))
    drawn, bound = check_same_run(tmp_path, 4, reference)
    np.testing.assert_allclose(end(tmp_path)[-1], drawn, rtol=0, atol=bound)


def folders(out):
    """The finished steps, and the step folders of saves under way."""
    names = [p for p in (out / "checkpoints").glob("step_*") if not (p / "manifest.json").exists()]
    return train.saved_steps(out / "checkpoints"), {p.name for p in names}


def await_a_save(out, process):
    """Wait until another step has been saved, and the save after it has begun."""
    before = folders(out)[0]
    while process.poll() is None:
        saved, under_way = folders(out)
        if saved[-1:] != before[-1:] and any(int(n[5:]) > saved[-1] for n in under_way):
            return
        time.sleep(0.001)


def stop_one(out, rng, *, steps, how, when):
    """Start two and stop one in a save or after its first report; what the other did."""
    started = launch(2, out, steps=steps, pause=0.01)
    victim = rng.randrange(2)
    other = started[1 - victim]
    pid = int(after(started[victim], "pid"))
    after(started[victim], "step")
    if when == "save":
        await_a_save(out, started[victim])
    time.sleep(rng.uniform(0, 0.05 if when == "save" else 0.3))
    if how == "signal":
        started[victim].send_signal(signal.SIGTERM)
    else:
        # With its supervisor gone a worker goes too.
        os.kill(started[victim].pid if how == "supervisor" else pid, signal.SIGKILL)
    stopped = time.monotonic()
    try:
        said = other.communicate(timeout=60)[1]
        seconds = time.monotonic() - stopped
        own = started[victim].communicate(timeout=60)[1]
    finally:
        for process in started:
            process.kill()
    newest = (train.saved_steps(out / "checkpoints") or [None])[-1]
    if how == "signal":
        assert other.returncode == started[victim].returncode == 128 + signal.SIGTERM
        assert said == own
        step = int(re.search(rf"stopped by SIGTERM at step (\d+) of {steps}; saved in", said)[1])
        assert newest == step < steps
        return seconds, newest
    where = "" if newest is None else f" to go on from step {newest}"
    go_on = f"start the same command again{where}\n"
    assert said == f"worker: a process of the run has gone; {go_on}"
    assert other.returncode == 75
    if how == "worker":
        assert own == f"worker: the worker was killed, for want of memory perhaps; {go_on}"
        assert started[victim].returncode == 128 + signal.SIGKILL
    return seconds, newest or 0


def check_kills(out, alone, hows, *, steps, seed):
    rng, found = random.Random(seed), []
    for i, how in enumerate(hows):
        when = "any time" if i % 2 else "save"
        found.append(stop_one(out, rng, steps=steps, how=how, when=when))
    reached = [newest for _, newest in found]
    assert reached == sorted(reached) and reached[0] > 0 and reached[-1] < steps
    finish(launch(2, out, steps=steps))
    for a, b in zip(end(out), end(alone), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert train.latest_valid(out / "checkpoints") == steps
    return found


def test_three_kills_and_a_signal(tmp_path, uninterrupted):
    hows = ("worker", "supervisor", "worker", "signal")
    check_kills(tmp_path, uninterrupted, hows, steps=LONG, seed=0)
    # The signal cut a report in two; up to it and from the next one on they are those of one run.
    expected = losses(uninterrupted)
    found = [line for line in losses(tmp_path) if line[0] % 10 == 0]
    assert [line[0] for line in found] == [line[0] for line in expected]
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    steps = 1500
    finish(launch(2, tmp_path / "alone", steps=steps))
    hows = [("worker", "worker", "supervisor")[i % 3] for i in range(20)]
    found = check_kills(tmp_path / "run", tmp_path / "alone", hows, steps=steps, seed=1)
    print("seconds until the other stopped, and the step saved:", found)


@pytest.mark.slow
def test_a_process_that_stands_still_counts_as_gone(tmp_path):
    started = launch(2, tmp_path, steps=100_000, pause=0.01)
    pid = int(after(started[1], "pid"))
    after(started[1], "step")
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    try:
        said = started[0].communicate(timeout=90)[1]
        seconds = time.monotonic() - start
    finally:
        # Its worker dies with it, standing still or not.
        for process in started:
            process.kill()
    assert started[0].returncode == 75 and "a process of the run has gone" in said
    assert said.count("\n") == 1
    # Thirty seconds without a sign of life, and what it takes to notice.
    assert 20 < seconds < 60


@pytest.mark.slow
def test_processes_that_do_not_come(tmp_path):
    (first, other) = launch(2, tmp_path / "run", timeout=5)
    other.kill()
    (said,) = finish([first], 2)
    assert "not all processes of the run came together" in said and said.count("\n") == 1


def test_different_configurations_are_refused(tmp_path):
    configs = ({"lr": 0.1, "width": 8}, {"lr": 0.2, "width": 8})
    said = finish(launch(2, tmp_path / "run", config=configs), 2)
    assert said[0] == said[1]
    assert "process 1 has lr 0.2 for 0.1 in process 0" in said[0]
    assert said[0].count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_coordinator_that_does_not_answer():
    start = time.monotonic()
    with pytest.raises(distributed.DistributedError, match=r"did not answer within 1 s .*refused"):
        distributed.initialize(f"127.0.0.1:{free_port()}", 2, 1, timeout=1)
    assert 0.9 < time.monotonic() - start < 10


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(distributed.DistributedError, match=f"port {port} cannot be opened"):
            distributed.initialize(f"127.0.0.1:{port}", 2, 0, timeout=1)


def test_what_initialize_refuses(monkeypatch):
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        distributed.initialize("somewhere", 2, 1)
    for port in ("0", "99999", "\u00b2"):
        with pytest.raises(ValueError, match="expected HOST:PORT"):
            distributed.initialize(f"127.0.0.1:{port}", 2, 0)
    with pytest.raises(ValueError, match="timeout is nan"):
        distributed.initialize("127.0.0.1:1", 2, 0, timeout=float("nan"))
    with pytest.raises(ValueError, match="process is 2 of 2"):
        distributed.initialize("127.0.0.1:1", 2, 2)
    with pytest.raises(ValueError, match="processes is 0"):
        distributed.initialize("127.0.0.1:1", 0, 0)
    with pytest.raises(ValueError, match="timeout is 0"):
        distributed.initialize("127.0.0.1:1", 2, 0, timeout=0)
    with pytest.raises(distributed.DistributedError, match=r"no cluster was found.*--coordinator"):
        distributed.initialize()


def test_slurm_is_detected(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "4200",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_NODES": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(distributed.DistributedError, match=r"localhost:\d+ did not answer"):
        distributed.initialize(timeout=1)


def test_one_process_needs_nothing():
    distributed.agree({"a": 1})
    distributed.barrier("none")
    distributed.part()
    assert distributed.choose(7) == 7
    assert distributed.first(lambda: 3) == 3
    with pytest.raises(OSError, match="full"):
        distributed.join_errors(OSError("full"))
    assert distributed.Agreement().look(1, stop=15, save=True) == (15, True)
