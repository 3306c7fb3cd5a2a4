"""The supervisor of a worker: what it says of each end, and that neither outlives the other."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jaxgen.cli import supervise

FATAL = "F client.h] Terminating process because the JAX distributed service detected fatal errors"
# A worker without jax: it takes up the pipes and does what the test asks for.
ATTACH = "import os, signal, sys, time; from jaxgen.cli import supervise; supervise._attach();"
STACK = f"os.write(2, b'{FATAL}\\n*** Check failure stack trace: ***\\n    @ 0x7f ...\\n');"


def supervised(capfd, body, name="run"):
    """Exit code, standard output and standard error of a worker with this body."""
    code = supervise.supervise(name, [sys.executable, "-c", ATTACH + textwrap.dedent(body)])
    said = capfd.readouterr()
    return code, said.out, said.err


def saved(tmp_path, *steps):
    for step in steps:
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step_00000099").mkdir(parents=True)
    return f"supervise.tell('folder {tmp_path}');"


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_what_a_worker_prints_and_returns_comes_through(capfd, code):
    body = "os.write(1, b'[Gloo] talk\\n'); print('figures'); print('why', file=sys.stderr);"
    body += f"supervise.tell('training'); supervise.end({code})"
    assert supervised(capfd, body) == (code, "figures\n", "why\n")


def test_an_abort_because_of_a_peer_is_one_line(capfd, tmp_path):
    body = saved(tmp_path, 40, 80) + "supervise.tell('training');" + STACK + "os.abort()"
    line = "run: a process of the run has gone; start the same command again to go on from step 80"
    assert supervised(capfd, body) == (75, "", line + "\n")


def test_a_collective_error_is_one_line(capfd):
    line = "run: a process of the run has gone; start the same command again\n"
    assert supervised(capfd, "supervise.end(supervise.LOST)") == (75, "", line)


def test_an_unknown_fault_shows_what_the_runtime_said(capfd):
    code, _, said = supervised(capfd, "os.write(2, b'F some check failed\\n'); os.abort()")
    assert code == 128 + signal.SIGABRT
    assert "F some check failed\n" in said and "the worker died of SIGABRT" in said


def test_a_worker_that_cannot_start_is_heard(capfd):
    assert supervise.supervise("run", [sys.executable, "-c", "import no_such_module"]) == 1
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_peers_that_do_not_come(capfd):
    body = "supervise.tell('joining'); os.write(2, b'DEADLINE_EXCEEDED\\n'); os.abort()"
    code, _, said = supervised(capfd, body)
    assert code == 2 and "not all processes of the run came together" in said
    assert said.count("\n") == 1


def test_a_worker_killed_from_outside(capfd):
    code, _, said = supervised(capfd, "os.kill(os.getpid(), signal.SIGKILL)")
    assert code == 137 and said.startswith("run: the worker was killed")


def test_a_worker_that_hangs_after_a_failure_is_killed(capfd, monkeypatch):
    monkeypatch.setattr(supervise, "_GRACE", 0.3)
    start = time.monotonic()
    code, _, said = supervised(capfd, STACK + "time.sleep(60)")
    assert code == 75 and said.startswith("run: a process of the run has gone;")
    assert time.monotonic() - start < 20


def test_a_worker_whose_steps_stop_coming_is_killed(capfd, monkeypatch):
    monkeypatch.setattr(supervise, "_STALL", 0.3)
    reports = "supervise.tell('report 10'); time.sleep(0.01); supervise.tell('report 20');"
    body = reports + "time.sleep(60)"
    code, _, said = supervised(capfd, body)
    assert (code, said) == (
        75,
        "run: no step has come for too long; start the same command again\n",
    )
    # What comes after the training has no steps.
    body = reports + "supervise.tell('measuring'); time.sleep(1)"
    assert supervised(capfd, body) == (0, "", "")
    # One report says nothing of how far it is to the next.
    assert supervised(capfd, "supervise.tell('report 10'); time.sleep(1)") == (0, "", "")


def start_outside(body):
    command = [sys.executable, "-c", ATTACH + body]
    code = f"from jaxgen.cli import supervise; supervise.end(supervise.supervise('run', {command}))"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_are_handed_on(name):
    body = (
        "h = lambda n, f: (os.write(sys.stdout.fileno(), b'%d\\n' % n), supervise.end(9));"
        "signal.signal(signal.SIGINT, h); signal.signal(signal.SIGTERM, h);"
        "print('ready', flush=True); time.sleep(60)"
    )
    process = start_outside(body)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[name])
    out, said = process.communicate(timeout=20)
    # A worker knows nothing of a terminal that has hung up.
    assert int(out) == (signal.SIGINT if name == "SIGINT" else signal.SIGTERM)
    assert (process.returncode, said) == (9, "")


DEAF = (
    "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN);"
)


INTERRUPT = "os.kill(os.getppid(), signal.SIGINT);"


@pytest.mark.parametrize(("stage", "count"), [("joining", 1), ("training", 1), ("training", 2)])
def test_a_worker_that_hears_no_signal_is_killed(capfd, monkeypatch, stage, count):
    """Python's handlers do not run while the runtime waits."""
    monkeypatch.setattr(supervise, "_JOINING_GRACE", 0.3)
    monkeypatch.setattr(supervise, "_GRACE", 0.3)
    body = DEAF + f"supervise.tell('{stage}');" + (INTERRUPT + "time.sleep(1.5);") * count
    stopped = 130, "", "run: stopped by SIGINT; the same command goes on\n"
    # One signal lets a worker that trains finish its step and save, however long that takes.
    assert supervised(capfd, body) == (
        (0, "", "") if (stage, count) == ("training", 1) else stopped
    )


def test_a_signal_before_the_worker_can_hear_it(capfd):
    body = "signal.signal(signal.SIGTERM, signal.SIG_DFL); os.kill(os.getppid(), signal.SIGTERM);"
    code, _, said = supervised(capfd, body + "time.sleep(60)")
    assert (code, said) == (143, "run: stopped by SIGTERM; the same command goes on\n")


def test_a_worker_dies_with_its_supervisor():
    process = start_outside("print(os.getpid(), flush=True); time.sleep(60)")
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            break
        with open(f"/proc/{worker}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                break
        time.sleep(0.05)
    else:
        raise AssertionError("the worker is still there")
    process.communicate()
