"""Runs that learn a log-density: the untrained network's Gaussian, the figures, what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxgen.cli.report import figures_text
from jaxgen.train.data import load
from jaxgen.train.recipes import evaluate as evaluation
from jaxgen.train.recipes.config import ConfigError, ScoreConfig, resolve
from jaxgen.train.recipes.run import open_run, prepare, train_run
from jaxgen.train.recipes.score import build

CONFIG = ScoreConfig(data="moons", fokker_planck=0.1, width=8, blocks=1)


def experiment(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    data = load(config.data)
    return build(resolve(config, data.event), data)


@pytest.fixture(scope="module")
def made():
    return experiment()


@pytest.fixture(scope="module")
def zeros(made):
    """Parameters of a network that vanishes: the log-density is that of Gaussian data."""
    return jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(made.init, jax.random.key(0))
    )


def test_loss_is_the_denoising_loss_where_the_residual_vanishes_and_more_elsewhere(made, zeros):
    key, x = jax.random.key(1), made.train.x[:16]
    plain = experiment(fokker_planck=0.0)
    both = jax.jit(lambda p: [e.loss(key, p, {"x": x}) for e in (plain, made)])
    known, with_penalty = both(zeros)
    np.testing.assert_allclose(with_penalty, known, rtol=1e-4)
    bent = jax.tree.map(lambda leaf: leaf + 0.3, zeros)
    known, with_penalty = both(bent)
    extra = np.asarray(with_penalty - known)
    assert extra.min() > 1e-3
    np.testing.assert_allclose(extra, extra[0], rtol=1e-3)


def test_the_two_samplers_of_a_gaussian_have_its_deviation(made, zeros, monkeypatch):
    monkeypatch.setattr(evaluation, "_GAP_SAMPLES", 300)
    monkeypatch.setattr(evaluation, "_GAP_STEPS", 60)
    figures, clouds = evaluation.two_samplers(jax.random.key(2), made, zeros)
    gap = figures["ode_sde_gap"]
    assert gap["residual_rms"] < 1e-3 and gap["weight"] == 0.1 and gap["count"] == 300
    assert gap["steps"] == 60 and gap["evaluations"] == 60 + 90
    for cloud in clouds:
        # 600 numbers, and Euler's rule: its variance is off by some per cent at 60 steps.
        np.testing.assert_allclose(cloud.std(), made.sigma_data, rtol=0.12)
    for distances in (gap["w2"], gap["sliced_wasserstein"]):
        # The moons are no Gaussian: the clouds are further from them than from each other.
        assert distances["data_to_data"] < distances["ode_to_data"]
        assert distances["ode_to_sde"] < distances["sde_to_data"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "digits"}, r"fokker_planck is for points of at most 10 numbers.*digits holds"),
        ({"prediction": "noise"}, "prediction is noise; with fokker_planck a log-density"),
        ({"labels": True}, "labels is True, which does not go with fokker_planck"),
        ({"dropout": 0.1}, r"dropout is 0\.1, which does not go"),
        ({"precision": "bfloat16"}, "precision is bfloat16, which does not go"),
        ({"fokker_planck": -0.1}, r"fokker_planck is -0\.1; expected a weight of at least 0"),
        ({"fokker_planck": float("nan")}, "fokker_planck is nan"),
    ],
)
def test_what_does_not_go_with_a_log_density_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        experiment(**changes)


@pytest.mark.slow
def test_a_run_writes_its_figures_and_the_picture_of_both_samplers(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_GAP_SAMPLES", 60)
    monkeypatch.setattr(evaluation, "_GAP_STEPS", 12)
    config = dataclasses.replace(
        CONFIG, out=str(tmp_path / "run"), steps=3, eval_samples=8, eval_likelihood=2,
        solver_steps=3, times="stratified",
    )  # fmt: skip
    figures = train_run(prepare(config))
    assert figures["ode_sde_gap"]["count"] == 60
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert stored["ode_sde_gap"] == figures["ode_sde_gap"]
    assert (tmp_path / "run" / "gap.png").stat().st_size > 5000
    text = figures_text(figures)
    assert "ODE-SDE gap     W2" in text and "between probability flow and reverse SDE" in text
    run = open_run(tmp_path / "run")
    drawn = evaluation.draw(jax.random.key(0), run.experiment, run.params, 4, steps=3)
    assert drawn.x.shape == (4, 2) and np.isfinite(drawn.x).all() and drawn.clouds is None
