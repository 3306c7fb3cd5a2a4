"""The scripts of examples/, made shorter: each does what its page says."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(name):
    path = EXAMPLES[0].parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_example_is_tested():
    names = [path.stem for path in EXAMPLES]
    assert names == ["blackjax_field", "shared_layer_nnx", "train_plain_jax"]


def test_training_in_plain_jax_comes_near_the_data(capsys):
    samples, other = load("train_plain_jax").main(steps=200, width=64, n=500)
    # Two sets of 500 points of one law lie about 0.1 apart; without training it would be 100.
    assert other < 0.15 and samples < 0.25
    assert "sliced Wasserstein distance to data" in capsys.readouterr().out


def test_blackjax_finds_the_masses_of_modes(capsys):
    pytest.importorskip("blackjax")
    truth, stuck, mean, error = load("blackjax_field").main(
        points=50, repeats=8, steps=100, n=250, levels=20, moves=1
    )
    assert np.all(error < 0.05)
    assert np.all(np.abs(mean - truth) < 4 * error), (mean, truth, error)
    # The chain that stays at home is wrong by many of these errors.
    assert stuck[0] > 0.99 and stuck[0] - truth[0] > 10 * error[0]
    assert "annealed HMC" in capsys.readouterr().out


def test_a_shared_layer_in_an_nnx_model(capsys):
    dense, shared = load("shared_layer_nnx").main(steps=40)
    assert dense[1] == 301_066 and shared[1] == 20_900
    assert dense[0] > 90 and shared[0] > 90
    assert capsys.readouterr().out.count("parameters") == 2
