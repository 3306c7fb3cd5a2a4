"""Distillation of a run: its folder from start to end, going on, and what cannot be done."""

import json
import shutil

import jax
import numpy as np
import pytest
import yaml

from jaxgen import train
from jaxgen.cli import distill as command
from jaxgen.cli import evaluate, sample
from jaxgen.cli import train as training
from jaxgen.cli.errors import guarded
from jaxgen.solve.state import start
from jaxgen.train.recipes import distill
from jaxgen.train.recipes.config import ScoreConfig, write_yaml
from jaxgen.train.recipes.run import open_run, prepare

# A batch of 17 does not divide over the suite's eight devices, whose collectives take long.
SMALL = {"width": 8, "blocks": 1, "batch_size": 17, "eval_samples": 20, "classifier_steps": 3}
WORDS = ["--pairs", "140", "--reflow-steps", "6", "--distill-steps", "4", "--width", "6", "--quiet"]


def made(folder, **settings):
    """A run of no steps: its network is the Gaussian with the data's variance, exactly."""
    experiment = prepare(ScoreConfig(out=str(folder), **SMALL, **settings))
    folder.mkdir()
    write_yaml(folder / "config.yaml", experiment.config)
    layout = None if experiment.sharing is None else experiment.sharing.layouts
    train.save(folder / "checkpoints", experiment.state(), config={}, layout=layout)
    return folder


pytestmark = pytest.mark.usefixtures("compile_once")


def call(module, *words):
    name = module.__name__.rpartition(".")[2]
    return guarded(f"jaxgen {name}", module.run, [str(word) for word in words])


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs") / "moons", data="moons", process="edm")


@pytest.fixture(scope="module")
def one_step_moons(moons):
    with pytest.MonkeyPatch.context() as patch:
        # Each count of the teacher's is a compilation.
        patch.setattr(distill, "TEACHER_EVALUATIONS", (1, 50))
        assert call(command, moons, *WORDS) == 0
    return moons.with_name("moons-one-step")


def times(folder):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_folder_of_a_distilled_run(moons, one_step_moons):
    names = {p.name for p in one_step_moons.iterdir()}
    assert names == {
        "config.yaml", "distill.json", "pairs", "reflow", "naive", "checkpoints", "metrics.jsonl",
        "metrics.json", "samples.png", "curves.png",
    }  # fmt: skip
    config = yaml.safe_load((one_step_moons / "config.yaml").read_text())
    assert (config["process"], config["prediction"]) == ("rectified", "velocity")
    assert config["width"] == 6
    # The teacher's noise at sigma = 80 is handed on as standard noise, its data as they are.
    with np.load(one_step_moons / "pairs" / "chunk_00000000.npz") as pairs:
        sigma = open_run(moons).experiment.sigma_data
        np.testing.assert_allclose(pairs["x1"], sigma * pairs["x0"], rtol=2e-3, atol=2e-3)
    figures = json.loads((one_step_moons / "metrics.json").read_text())
    rows = figures["distilled"]["rows"]
    assert [(r["generator"], r["evaluations"]) for r in rows] == [
        ("teacher", 50), ("teacher", 1), ("one step", 1), ("one step, unguided", 1),
        ("flow, undistilled", 1),
    ]  # fmt: skip
    assert all(r["sliced_wasserstein"] > 0 for r in rows) and rows[0]["rmse"] == 0
    assert rows[2]["sliced_wasserstein"] == figures["sliced_wasserstein"]["model_to_data"]
    assert figures["parameters"] < figures["distilled"]["teacher_parameters"]


def test_samples_are_the_students_in_one_evaluation(one_step_moons, tmp_path, capsys):
    out = tmp_path / "x.npz"
    assert call(sample, one_step_moons, "--n", 3, "--seed", 5, "--out", out) == 0
    assert "euler_time on the time grid, 1 steps, 1 evaluations" in capsys.readouterr().out
    run = open_run(one_step_moons)
    # The sampler's own noise.
    z = start(jax.random.key(5), run.experiment.sde, (125, 2), None, "velocity", None, None, 0).x
    made = jax.jit(distill.student_sampler(run.experiment))(run.params, z)
    x = run.experiment.train.from_unit(np.asarray(made))
    np.testing.assert_allclose(np.load(out)["x"], x[:3], atol=1e-4)


def test_training_leaves_a_distilled_folder_alone(one_step_moons, capsys):
    config = (one_step_moons / "config.yaml").read_text()
    assert call(training, "--out", one_step_moons, "--steps", 99999) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "one-step generator" in line
    assert (one_step_moons / "config.yaml").read_text() == config


def test_the_same_command_goes_on(moons, one_step_moons, capsys, monkeypatch):
    before = times(one_step_moons)
    assert call(command, moons, *WORDS) == 0
    # From inside of the run too, where the folder's name is not in the words.
    monkeypatch.chdir(moons)
    assert call(command, ".", *WORDS) == 0
    assert "one step" in capsys.readouterr().out and times(one_step_moons) == before


def test_what_was_killed_goes_on_to_the_same_network(
    one_step_moons, moons, tmp_path, capsys, monkeypatch
):
    out = shutil.copytree(one_step_moons, tmp_path / "again")
    # As if killed in the last stage, with half a chunk of pairs to make again.
    (out / "metrics.json").unlink()
    (out / "pairs" / "chunk_00000125.npz").unlink()
    (out / "pairs" / "chunk_00000125.npz.tmp").write_bytes(b"half")
    shutil.rmtree(out / "checkpoints")
    kept = times(out / "reflow") | times(out / "naive")
    figures = json.loads((one_step_moons / "metrics.json").read_text())
    monkeypatch.setattr(distill, "_measure", lambda *given: figures)
    assert call(command, moons, *WORDS, "--out", out) == 0
    assert {p: t for p, t in times(out).items() if p in kept} == kept
    whole, again = (jax.tree.leaves(open_run(folder).params) for folder in (one_step_moons, out))
    assert all((a == b).all() for a, b in zip(whole, again, strict=True))
    # Other settings are another work.
    capsys.readouterr()
    assert call(command, moons, *WORDS, "--out", out, "--seed", "1") == 2
    assert "seed 0 there, 1 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--steps", "4"), "distilled to 1 step"),
        (("--pairs", "1"), "pairs is 1"),
        (("--teacher-steps", "2"), "teacher_steps is 2"),
        (("--anneal-share", "2"), "anneal_share is 2"),
        (("--first", "both"), "student"),
        (("--width", "0"), "width is 0"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--learning-rate", "-1"), "learning_rate is -1"),
        (("--out", "{run}"), "is the run itself"),
        (("--out", "{run}/.."), "holds no such work"),
    ],
)
def test_what_cannot_be_distilled(moons, capsys, words, part):
    before = times(moons)
    assert call(command, moons, *(w.format(run=moons) for w in words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line and times(moons) == before


def test_a_distilled_run_is_no_teacher_and_no_flow(one_step_moons, tmp_path, capsys):
    for module, words, part in (
        (command, (one_step_moons,), "takes one step already"),
        (command, (tmp_path,), "holds no run"),
        (evaluate, (one_step_moons,), "no flow any more"),
        (sample, (one_step_moons, "--steer", "anneal=2"), "takes one step"),
    ):
        assert call(module, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line


@pytest.mark.slow
def test_digits_with_labels_in_a_pool(tmp_path, capsys):
    run = made(tmp_path / "digits", labels=True, channel_mults=(1,), share=0.5)
    assert call(command, run, *WORDS[:-3], "--no-naive", "--first", "teacher") == 0
    figures = json.loads((tmp_path / "digits-one-step" / "metrics.json").read_text())
    rows = figures["distilled"]["rows"]
    assert len(rows) == 6 and all(row["frechet"] > 0 for row in rows)
    assert "frechet" in capsys.readouterr().out
    assert not (tmp_path / "digits-one-step" / "naive").exists()
    assert not open_run(tmp_path / "digits-one-step").experiment.config.labels
