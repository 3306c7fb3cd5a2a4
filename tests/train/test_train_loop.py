"""The loop: exact resumption, reports, signals, divergence, and what it refuses."""

import itertools
import json
import signal
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import train
from jaxgen.train import loop, manifest
from jaxgen.train.signals import Signals

N = 4
OPTIMIZER = optax.adam(1e-2)
ORDER = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)


def loss_fn(key, params, x):
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))(
        jnp.arange(x.shape[0])
    )
    return jnp.sum((x @ params["w"] - noise) ** 2, axis=1)


STEP = train.make_train_step(loss_fn, OPTIMIZER)


def start():
    return train.TrainState.create(jax.random.key(1), {"w": jnp.eye(3)}, OPTIMIZER)


def batches(examples):
    for i in itertools.count(examples, N):
        yield ORDER[np.arange(i, i + N) % len(ORDER)]


def fit(steps, out=None, state=None, source=batches, **options):
    options = {"progress": False, "report_every": 4, **options}
    return train.fit(start() if state is None else state, STEP, source, steps, out=out, **options)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(x, y)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def by_hand():
    """Twenty steps of the bare loop: every state and every metric."""
    state, states, metrics = start(), [], []
    for x, _ in zip(batches(0), range(20), strict=False):
        state, m = STEP(state, x)
        states.append(jax.tree.map(jnp.copy, state))
        metrics.append(jax.device_get(m))
    return states, metrics


def test_equals_the_bare_loop(by_hand):
    assert_same_bits(fit(20), by_hand[0][-1])
    # A plain iterable is read as it comes.
    assert_same_bits(fit(20, source=list(itertools.islice(batches(0), 20))), by_hand[0][-1])
    assert_same_bits(fit(20, state=fit(7)), by_hand[0][-1])


def test_reports(by_hand, tmp_path, capsys):
    reported = []
    fit(18, tmp_path, on_report=reported.append, progress=True)
    found = lines(tmp_path)
    assert found == reported
    assert [line["step"] for line in found] == [4, 8, 12, 16, 18]
    metrics = by_hand[1]
    for line, first in zip(found, range(0, 20, 4), strict=True):
        window = metrics[first : line["step"]]
        np.testing.assert_allclose(line["loss"], np.mean([m.loss for m in window]), rtol=1e-6)
        np.testing.assert_allclose(
            line["grad_norm"], np.mean([m.grad_norm for m in window]), rtol=1e-6
        )
        assert line["skipped"] == 0 and line["examples_per_second"] > 0
    wall = [line["wall_seconds"] for line in found]
    assert wall == sorted(wall)
    shown = capsys.readouterr().err
    assert "18/18 steps" in shown and "loss" in shown and "examples/s" in shown and "left" in shown


def test_figures_are_read_while_the_next_step_runs():
    events = []

    def step(state, batch):
        events.append("step")
        return STEP(state, batch)

    train.fit(
        start(),
        step,
        batches,
        8,
        progress=False,
        report_every=4,
        on_report=lambda line: events.append(line["step"]),
    )
    assert events == ["step"] * 5 + [4] + ["step"] * 3 + [8]


@pytest.mark.parametrize("stop", [6, 8])
def test_going_on_is_exact(by_hand, tmp_path, stop):
    fit(stop, tmp_path, save_every=4)
    state = fit(20, tmp_path, save_every=4)
    assert_same_bits(state, by_hand[0][-1])
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == 20
    # A finished run comes back as it is, and reads no data.
    assert_same_bits(fit(20, tmp_path, source=lambda examples: 1 / 0), by_hand[0][-1])
    assert train.saved_steps(tmp_path / "checkpoints") == [12, 16, 20]


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    fit(8, tmp_path, save_every=8)
    before = lines(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**before[-1], "step": 12, "loss": -1.0}) + '\n{"step": 16, "lo')
    fit(16, tmp_path, save_every=8)
    after = lines(tmp_path)
    assert after[:2] == before
    assert [line["step"] for line in after] == [4, 8, 12, 16]
    assert after[2]["loss"] > 0
    assert after[2]["wall_seconds"] >= before[-1]["wall_seconds"]


def test_the_data_position_goes_on(tmp_path):
    asked = []

    def source(examples):
        asked.append(examples)
        return batches(examples)

    fit(6, tmp_path, source=source)
    fit(9, tmp_path, source=source)
    assert asked == [0, 6 * N]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_and_saves(by_hand, tmp_path, name):
    def source(examples):
        for i, x in enumerate(batches(examples)):
            # Counted from 0: it is read two steps ahead, while step 10 runs.
            if examples == 0 and i == 11:
                signal.raise_signal(signal.Signals[name])
            yield x

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(train.Interrupted, match=f"{name} at step 10 of 20.*go on") as error:
        fit(20, tmp_path, source=source)
    assert str(tmp_path) in str(error.value) and error.value.signal == name
    assert_same_bits(error.value.state, by_hand[0][9])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert train.latest_valid(tmp_path / "checkpoints") == 10
    assert_same_bits(fit(20, tmp_path, source=source), by_hand[0][-1])


def test_a_second_signal_acts_at_once():
    def source(examples):
        for x in batches(examples):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            yield x

    # A shell starts its background jobs with SIGINT ignored; here it is to act.
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(20, source=source)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outer)


def test_outside_the_main_thread_signals_are_left_alone(by_hand):
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(20)))
    thread.start()
    thread.join()
    assert_same_bits(found[0], by_hand[0][-1])


def test_divergence_stops_with_the_last_good_state(by_hand, tmp_path):
    def source(examples):
        for i, x in enumerate(batches(examples)):
            yield x if i < 5 else np.full_like(x, np.nan)

    with pytest.raises(train.Diverged, match=r"NaN or infinite.*saved in") as error:
        fit(1000, tmp_path, source=source, max_skipped=6)
    good = by_hand[0][4]
    folder = tmp_path / "checkpoints"
    for state in (error.value.state, train.restore(folder, jax.eval_shape(start))):
        assert_same_bits(
            (state.params, state.ema, state.opt_state), (good.params, good.ema, good.opt_state)
        )
        assert 6 <= int(state.skipped_in_a_row) < 20
    line = lines(tmp_path)[-1]
    assert line["loss"] is None and line["skipped"] >= 6


def test_the_last_good_state_is_saved_before_it_is_said(tmp_path, monkeypatch):
    def slowly(*args):
        time.sleep(0.5)
        write(*args)

    write = manifest.write_manifest
    monkeypatch.setattr(manifest, "write_manifest", slowly)
    # Several processes wait for nothing after an error.
    monkeypatch.setattr(train.Saver, "__exit__", lambda *args: None)
    bad = (np.full((N, 3), np.nan, np.float32) for _ in itertools.count())
    with pytest.raises(train.Diverged):
        fit(20, tmp_path, source=bad, max_skipped=2)
    assert train.saved_steps(tmp_path / "checkpoints")


def devices(*processes):
    return np.array([types.SimpleNamespace(process_index=process) for process in processes])


@pytest.mark.parametrize(
    ("sizes", "processes", "fits"),
    [
        ({"data": 4}, (0, 0, 1, 1), True),
        ({"data": 2, "fsdp": 2}, (0, 1, 2, 3), True),
        ({"data": 2, "tensor": 2}, (0, 0, 1, 1), True),
        ({"tensor": 4}, (0, 0, 0, 0), True),
        ({"tensor": 2}, (0, 1), False),
        ({"tensor": 2, "data": 2}, (0, 0, 1, 1), False),
        ({"data": 2, "tensor": 2}, (0, 1, 2, 3), False),
    ],
)
def test_no_two_processes_share_a_part_of_the_batch(sizes, processes, fits, monkeypatch):
    mesh = types.SimpleNamespace(
        devices=devices(*processes).reshape(*sizes.values()),
        axis_names=tuple(sizes),
        shape=sizes,
        size=len(processes),
    )
    monkeypatch.setattr(jax, "device_count", lambda: len(processes))
    if fits:
        loop.check_mesh(mesh)
        return
    with pytest.raises(ValueError, match="several processes would share a part of the batch"):
        loop.check_mesh(mesh)


def test_a_few_bad_steps_are_lived_through(tmp_path):
    def source(examples):
        for i, x in enumerate(batches(examples)):
            yield np.full_like(x, np.nan) if i % 3 == 0 else x

    state = fit(12, tmp_path, source=source, max_skipped=2)
    assert int(state.skipped) == 4
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path))
    assert lines(tmp_path)[-1]["skipped"] == 4


def test_on_a_mesh_and_back(by_hand, tmp_path):
    mesh = train.data_mesh(batch=N)
    state = fit(8, tmp_path, mesh=mesh)
    assert state.params["w"].sharding.is_fully_replicated
    assert len(state.params["w"].sharding.device_set) == 4
    for here in (train.data_mesh(batch=2), None):
        state = fit(int(state.step) + 4, tmp_path, mesh=here)
    np.testing.assert_allclose(state.params["w"], by_hand[0][15].params["w"], rtol=1e-5)


def test_saves_by_time(tmp_path):
    fit(6, tmp_path, save_seconds=0.0, keep=None)
    assert train.saved_steps(tmp_path / "checkpoints") == [1, 2, 3, 4, 5, 6]


def test_the_config_of_a_run_is_kept_to(tmp_path):
    fit(2, tmp_path, config={"lr": 0.01, "steps": 2})
    with pytest.raises(train.CheckpointMismatch, match=r"lr: 0.01 there, 0.02 now"):
        fit(4, tmp_path, config={"lr": 0.02, "steps": 4})
    state = fit(4, tmp_path, config={"lr": 0.01, "steps": 4})
    assert int(state.step) == 4
    assert train.read_manifest(tmp_path / "checkpoints")["config"]["steps"] == 4


def test_a_damaged_checkpoint_stops_the_run_and_nothing_is_lost(tmp_path):
    fit(8, tmp_path, save_every=4)
    folder = tmp_path / "checkpoints" / "step_00000008"
    victim = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-1] ^= 4
    victim.write_bytes(data)
    with pytest.raises(train.CheckpointDamaged, match="newest step that holds is 4"):
        fit(12, tmp_path)
    folder.rename(tmp_path / "aside")
    assert int(fit(12, tmp_path).step) == 12


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="batches ended after step 3, before step 5"):
        fit(5, tmp_path, source=lambda examples: itertools.islice(batches(examples), 3))
    # What was done is saved.
    assert train.latest_valid(tmp_path / "checkpoints") == 3
    with pytest.raises(ValueError, match="not a plain iterable"):
        fit(5, tmp_path, source=list(itertools.islice(batches(0), 5)))
    with pytest.raises(train.CheckpointExists, match="step 3"):
        fit(5, tmp_path, resume=False)
    with pytest.raises(ValueError, match="report_every is 0"):
        fit(5, report_every=0)
    with pytest.raises(ValueError, match="steps is -1"):
        fit(-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit(5, tmp_path / "file")
    late = start().replace(examples=jnp.uint32(2**32 - 10))
    with pytest.raises(ValueError, match="largest data position"):
        fit(5, state=late)


def test_an_error_of_the_users_comes_through_and_the_saved_step_stays(tmp_path):
    def source(examples):
        yield from itertools.islice(batches(examples), 5)
        raise RuntimeError("no such image")

    with pytest.raises(RuntimeError, match="no such image"):
        fit(9, tmp_path, source=source, save_every=4)
    assert train.latest_valid(tmp_path / "checkpoints") == 4


def test_waiting_for_input_is_told(tmp_path):
    def source(examples):
        for x in batches(examples):
            time.sleep(0.02)
            yield x

    lines = []
    fit(20, tmp_path, source=source, report_every=10, on_report=lines.append)
    # Reading takes far longer than a step, so that 17 reads are waited for on an idle machine; the
    # first batch and the two read beside the first step do not count.
    waited = sum(line["input_wait_seconds"] for line in lines)
    assert 0.02 * 8 <= waited <= lines[-1]["wall_seconds"]


def test_nothing_is_transferred_within_a_compiled_step():
    def leaky(state, batch):
        # A host's array that slips into the step goes to the device at each one.
        return STEP(state, batch * np.float32([1, 1, 1])[None])

    leaky.lower = None
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        fit_with(leaky, 3)
    del leaky.lower
    # A step that is not compiled as a whole may do what it likes.
    assert int(fit_with(leaky, 3).step) == 3


def fit_with(step, steps):
    return train.fit(start(), step, batches, steps, progress=False)


def test_the_first_line_tells_the_time_to_the_first_step(tmp_path):
    fit(8, tmp_path)
    fit(16, tmp_path)
    told = ["first_step_seconds" in line for line in lines(tmp_path)]
    assert told == [True, False, True, False]
    assert 0 < lines(tmp_path)[0]["first_step_seconds"] < 60


def test_a_signal_that_comes_twice_at_once_is_one():
    with Signals(grace=10.0) as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert (signals.received, signals.number) == ("SIGTERM", int(signal.SIGTERM))
        # Another one is a second wish, and acts.
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
