"""``jaxgen train`` in two processes: one run, killed, gone on with, and refused what differs."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_distributed import ROOT, free_port

from jaxgen import train
from jaxgen.cli import main

WORDS = (
    *("train", "--quiet", "--data", "moons", "--width", "8", "--blocks", "1", "--batch-size", "16"),
    *(
        "--warmup-steps",
        "2",
        "--schedule",
        "constant",
        "--save-every",
        "20",
        "--report-every",
        "20",
    ),
    *("--eval-samples", "20", "--eval-likelihood", "4", "--solver", "ddim", "--solver-steps", "3"),
)


def start(out, steps, extra=((), ())):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    where = ("--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2")
    where = (*where, "--out", str(out), "--steps", str(steps), "--process-id")
    command, pipe = (sys.executable, "-m", "jaxgen.cli", *WORDS, *where), subprocess.PIPE
    return [
        subprocess.Popen(
            [*command, str(i), *extra[i]], stdout=pipe, stderr=pipe, text=True, env=env
        )
        for i in range(2)
    ]


def finish(started):
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def wait_for(out, step, process):
    """Wait for a checkpoint of that step or a later one."""
    while not any(saved >= step for saved in train.saved_steps(out / "checkpoints")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_of_the_command(tmp_path, capsys):
    out, alone = tmp_path / "two", tmp_path / "one"
    started = start(out, 100_000)
    wait_for(out, 100, started[0])
    assert main([*WORDS, "--out", str(out), "--steps", "100000"]) == 2
    assert "is in use by another run" in capsys.readouterr().err
    started[1].kill()
    codes, said = finish(started)
    assert codes == [75, -signal.SIGKILL]
    newest = train.saved_steps(out / "checkpoints")[-1]
    assert said[0][1] == (
        "jaxgen train: a process of the run has gone; start the same command again to go on from "
        f"step {newest}\n"
    )

    steps = newest + 40
    codes, said = finish(start(out, steps))
    assert codes == [0, 0], said
    assert "likelihood" in said[0][0] and said[1] == ("", "")
    assert json.loads((out / "metrics.json").read_text())["step"] == steps
    assert train.latest_valid(out / "checkpoints") == steps
    # Another share of the examples would show in the second digit, rounding after the fifth.
    assert main([*WORDS, "--out", str(alone), "--steps", str(steps)]) == 0
    (numbers, found), (expected_numbers, expected) = losses(out), losses(alone)
    assert numbers == expected_numbers == list(range(20, steps + 1, 20))
    np.testing.assert_allclose(found[:5], expected[:5], rtol=0, atol=1e-4)

    codes, said = finish(start(out, steps))
    assert codes == [0, 0] and f"has finished at step {steps}" in said[0][0]
    assert said[1] == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "own", "code", "message"),
    [
        ((), ("--learning-rate", "0.5"), 2, "process 1 has learning_rate 0.5 for 0.001 in process"),
        ((), ("--processes", "3"), 2, "the processes were told of 2, 3 processes"),
        (("--mesh", "tensor=2"), (), 2, "several processes would share a part of the batch"),
        (("--learning-rate", "1e30", "--warmup-steps", "0"), (), 1, "steps in a row gave a loss"),
    ],
)
def test_what_both_end_with(tmp_path, words, own, code, message):
    out = tmp_path / "run"
    codes, said = finish(start(out, 200, extra=(words, (*words, *own))))
    assert codes == [code, code]
    for _, line in said:
        assert message in line and line.count("\n") == 1
    # What is said to be saved is.
    assert out.exists() == (code == 1)
    if code == 1:
        assert train.latest_valid(out / "checkpoints") is not None
