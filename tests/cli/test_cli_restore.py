"""``jaxgen restore`` on a run whose network is known: zero, so that the prior is N(0, d^2 I)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxgen.cli import restore
from jaxgen.cli.errors import guarded
from jaxgen.guide.restore import METHODS
from jaxgen.train import data as datasets
from jaxgen.train.recipes import inverse
from jaxgen.train.recipes.config import ScoreConfig, resolve
from jaxgen.train.recipes.run import Run
from jaxgen.train.recipes.score import build


class Zero:
    """EDM's preconditioning makes of it the denoiser of N(0, sigma_data^2 I)."""

    def apply(self, params, x, t, label=None, train=False, rngs=None):
        return 0 * x


def run_of(name, **changes):
    data = datasets.load(name)
    experiment = build(resolve(ScoreConfig(data=name), data.event), data)
    return Run(dataclasses.replace(experiment, net=Zero(), **changes), {}, 7)


@pytest.fixture(scope="module")
def digits():
    return run_of("digits")


@pytest.fixture
def folder(tmp_path, monkeypatch, digits):
    (tmp_path / "config.yaml").write_text("")
    monkeypatch.setattr("jaxgen.train.recipes.run.open_run", lambda out: digits)
    return tmp_path


def command(*words):
    return guarded("jaxgen restore", restore.run, [str(word) for word in words])


def refused(capsys, *words):
    assert command(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_images_noise_does_not_change_with_how_many_there_are(key, digits):
    what = inverse.task("deblur", (8, 8, 1), hide="random", factor=2, blur=1.0, seed=0)
    truth = digits.experiment.held_out.to_unit(digits.experiment.held_out.x[:3])
    measured = [
        inverse.restore_images(
            key, digits.experiment, {}, truth[:n], what, methods=(), noise=0.3
        ).measured
        for n in (1, 3)
    ]
    np.testing.assert_allclose(measured[0], measured[1][:1], atol=1e-6)
    assert abs(measured[1][0] - measured[1][1]).max() > 0.3


def test_a_picture_of_several_methods_and_keys(folder, capsys, monkeypatch):
    assert inverse.suiting("deblur") == tuple(METHODS)[:-1]
    assert inverse.suiting("inpaint") == tuple(METHODS)
    monkeypatch.setattr(inverse, "suiting", lambda task: ("red_diff", "repaint"))
    words = ["--method", "all", "--n", "4", "--keys", "2", "--steps", "10", "--noise", "0.05"]
    assert command(folder, *words) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == ["red_diff", "repaint"]
    for line in said[:-1]:
        assert "10 evaluations; mean of 2 keys" in line and "residual" in line and " dB" in line
    assert "4 held-out images, inpaint (half of the pixels hidden), noise 0.05" in said[-1]
    with Image.open(folder / "restored.png") as image:
        assert image.size[0] > 800 and image.size[1] > 2 * 300


def test_the_arrays_follow_the_prior(folder, digits):
    out = folder / "x.npz"
    words = ["--method", "projection", "--hide", "right", "--n", "100", "--steps", "50"]
    assert command(folder, *words, "--out", out) == 0
    arrays = np.load(out)
    assert set(arrays) == {"truth", "measured", "projection", "projection_std"}
    held_out = digits.experiment.held_out
    np.testing.assert_array_equal(arrays["truth"], held_out.x[:100])
    made = arrays["projection"][0]
    # In the data's own units: what is seen is the truth, what is hidden is the prior.
    np.testing.assert_array_equal(made[:, :, :4], held_out.x[:100, :, :4])
    np.testing.assert_array_equal(arrays["measured"][:, :, 4:], 0)
    hidden = held_out.to_unit(made[:, :, 4:]) / digits.experiment.sigma_data
    n = hidden.size
    # Cut at the range of grey: a normal's values beyond it stand at its ends.
    drawn = np.random.default_rng(0).normal(size=1_000_000) * digits.experiment.sigma_data
    truth = held_out.to_unit(held_out.from_unit(drawn)) / digits.experiment.sigma_data
    assert abs(hidden.mean() - truth.mean()) < 4 * truth.std() / np.sqrt(n)
    assert abs(hidden.std() - truth.std()) < 0.05 * truth.std()


@pytest.mark.parametrize("task", ["super-resolve", "deblur"])
def test_an_image_of_ones_own(folder, capsys, task):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(folder / "one.png")
    out = folder / "x.npz"
    words = [folder / "one.png", "--task", task, "--steps", "10", "--out", out]
    assert command(folder, *words) == 0
    arrays = np.load(out)
    seen = inverse.read_image(folder / "one.png", datasets.load("digits"))
    assert arrays["truth"].shape == (1, 8, 8, 1) and abs(seen).max() <= 255 / 256
    assert abs(seen[..., 0] - (pixels / 127.5 - 1)).max() < 0.01
    side = 4 if task == "super-resolve" else 8
    assert arrays["measured"].shape == (1, side, side, 1)
    np.testing.assert_allclose(arrays["measured"].mean(), seen.mean(), atol=1e-5)
    assert f"one.png, {task} (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--task", "inpaint", "large.png"], "16 x 10 pixels and the run's images 8 x 8"),
        (["text.png"], "cannot be read as an image"),
        (["no.png"], "is no file"),
        (["--task", "super-resolve", "--factor", "3"], "factor is 3"),
        (["--task", "deblur", "--method", "repaint"], "repaint is for --task inpaint"),
        (["--task", "sharpen"], "sharpen"),
        (["--method", "magic"], "magic"),
        (["--noise", "-1"], "--noise is -1"),
        (["--noise", "nan"], "--noise is nan"),
        (["--task", "deblur", "--blur", "inf"], "--blur inf"),
        (["--keys", "0"], "--keys"),
        (["--out", "x.jpg"], ".png or .npz"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, capsys, words, part):
    Image.new("RGB", (16, 10)).save(folder / "large.png")
    (folder / "text.png").write_text("no picture")
    words = [str(folder / w) if w in ("large.png", "text.png", "no.png") else w for w in words]
    assert part in refused(capsys, folder, *words)
    assert not (folder / "restored.png").exists()


def test_an_image_too_large_to_be_meant(folder, capsys, monkeypatch):
    Image.new("L", (16, 16)).save(folder / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "cannot be read as an image" in refused(capsys, folder, folder / "huge.png")


def test_runs_without_images_and_folders_without_runs(folder, tmp_path, capsys, monkeypatch):
    assert "holds no run" in refused(capsys, tmp_path / "none")
    moons = run_of("moons")
    monkeypatch.setattr("jaxgen.train.recipes.run.open_run", lambda out: moons)
    assert "holds no images" in refused(capsys, folder)
    floats = dataclasses.replace(datasets.load("digits"), levels=None)
    with pytest.raises(datasets.DataError, match="images of floats"):
        inverse.read_image(Path("x.png"), floats)
