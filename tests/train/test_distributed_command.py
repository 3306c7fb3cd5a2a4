"""The folder's lock, and the flags of jaxgen train that say where and with whom it runs."""

import json
import os
import subprocess
import sys

import jax
import pytest

from jaxgen import train
from jaxgen.cli import main
from jaxgen.cli.train import Train
from jaxgen.train import lock
from jaxgen.train.recipes import run as runs
from jaxgen.train.recipes.config import ConfigError

SMALL = (
    *("train", "--quiet", "--data", "moons", "--width", "8", "--blocks", "1", "--steps", "2"),
    *("--batch-size", "16", "--warmup-steps", "2", "--eval-samples", "20", "--solver", "ddim"),
    *("--eval-likelihood", "4", "--classifier-steps", "20", "--solver-steps", "3"),
)


def refused(capsys, *words, code=2):
    assert main([*SMALL, *map(str, words)]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


# --- the lock -------------------------------------------------------------------------------------


def test_a_folder_has_one_run_at_a_time(tmp_path, capsys):
    out = tmp_path / "a" / "run"
    with lock.hold(out):
        with pytest.raises(lock.FolderBusy) as busy, lock.hold(out):
            pass
        said = str(busy.value)
        assert str(out) in said and f"process {os.getpid()} on " in said and ", since 20" in said
        assert "is in use by another run" in refused(capsys, "--out", out)
        # Who was turned away took nothing with him.
        with pytest.raises(lock.FolderBusy), lock.hold(out):
            pass
    assert not (tmp_path / "a").exists()
    with lock.hold(out):
        (out / "config.yaml").touch()
    assert [path.name for path in out.iterdir()] == ["config.yaml"]


def test_the_lock_of_a_process_that_was_killed_is_no_lock(tmp_path):
    code = (
        "import sys, pathlib, os, signal; sys.path.insert(0, sys.argv[2]);"
        # The file alone, without the room's other imports.
        "import importlib.util as u; s = u.spec_from_file_location('lock', sys.argv[3]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        "h = m.hold(pathlib.Path(sys.argv[1])); h.__enter__();"
        "print('held', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path), lock.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(lock.FolderBusy, match=f"process {other.pid} on"), lock.hold(tmp_path):
            pass
        other.kill()
        other.wait()
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] == other.pid
    assert lock.is_empty(tmp_path)
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    assert not (tmp_path / lock.NAME).exists()


def test_a_folder_that_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), lock.hold(tmp_path / "file" / "run"):
        pass


# --- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mesh", "data=3"), "multiplies to 3, and there are 8 devices"),
        (("--mesh", "data"), "expected name=size"),
        (("--mesh", "data=8", "--rule", "kernel"), "is not PATTERN=PLACEMENT"),
        (("--mesh", "data=8", "--rule", "kernel=-,model"), "names the axis 'model'"),
        (("--mesh", "data=8", "--rule", "no_such=replicate"), "matches none of the"),
        (("--rule", "kernel=replicate"), "give --mesh too"),
        (("--mesh", "data=8", "--batch-size", "12"), "does not divide over the 8 parts"),
        (("--mesh", "data=8", "--batch-size", "32", "--accumulate", "8"), "leaves 4 examples"),
        (("--coordinator", "localhost:1"), "--coordinator belong to --distributed"),
        (("--processes", "2", "--process-id", "0"), "--processes and --process-id belong to"),
    ],
)
def test_what_train_refuses(tmp_path, capsys, words, message):
    out = tmp_path / "run"
    assert message in refused(capsys, *words, "--out", out)
    assert not out.exists()


def test_the_coordinator_of_a_command_that_does_not_answer(tmp_path):
    words = ("--distributed", "--coordinator", "localhost:1", "--processes", "2")
    command = [sys.executable, "-m", "jaxgen.cli", *SMALL, *words, "--process-id", "1"]
    command += ["--wait-seconds", "1", "--out", str(tmp_path / "run")]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("jaxgen train: the coordinator localhost:1 did not answer")
    assert found.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_on_a_mesh_goes_on_on_another(tmp_path, capsys, compile_once):
    out = ("--out", str(tmp_path / "run"), "--width", "64")
    mesh = ("--mesh", "data=4,fsdp=2", "--rule", "bias=replicate")
    assert main([*SMALL, *out, *mesh]) == 0
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert figures["seconds"]["first_step"] > 0
    assert main([*SMALL, *out, "--mesh", "fsdp=-1", "--steps", "4"]) == 0
    assert main([*SMALL, *out, "--steps", "6"]) == 0
    assert train.saved_steps(tmp_path / "run" / "checkpoints")[-1] == 6
    capsys.readouterr()


def test_the_compilation_cache_is_filled(tmp_path, monkeypatch):
    from jaxgen.cli import train as command

    wanted = {}
    monkeypatch.setattr(jax.config, "update", wanted.__setitem__)
    folder = tmp_path / "compiled"
    command._set_up(Train(run=command.ScoreConfig(), compilation_cache=folder))
    assert wanted["jax_compilation_cache_dir"] == str(folder) and folder.is_dir()


def test_a_folder_that_is_another_one_here(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_SEEN", 0.3)
    with lock.hold(tmp_path):
        held = lock.text(tmp_path)
        with pytest.raises(ConfigError, match="does not see the"):
            runs._check_seen(tmp_path, held)
        (tmp_path / "config.yaml").touch()
        runs._check_seen(tmp_path, held)
        # A run of this host's own.
        with pytest.raises(ConfigError, match="choose a folder that all hosts share"):
            runs._check_seen(tmp_path, held.replace(str(os.getpid()), "another"))
