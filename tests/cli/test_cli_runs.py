"""Runs from the command line: a small one from start to end, and everything that can go wrong."""

import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxgen import train
from jaxgen.cli import main
from jaxgen.train.recipes import pictures
from jaxgen.train.recipes.run import open_run
from jaxgen.train.recipes.statistics import _digest, _found
from jaxgen.train.report import read_lines

SETTINGS = {
    "width": 8,
    "blocks": 1,
    "batch-size": 16,
    "warmup-steps": 2,
    "report-every": 2,
    "eval-samples": 20,
    "eval-likelihood": 4,
    "classifier-steps": 20,
    "solver": "ddim",
    "solver-steps": 3,
}
SMALL = ("--quiet", *(str(w) for name, value in SETTINGS.items() for w in (f"--{name}", value)))
MOONS = ("train", "--data", "moons", *SMALL)
POOL = ("train", "--data", "moons", *SMALL, "--width", "24", "--share", "0.25")
DIGITS = ("train", "--labels", "--channel-mults", "1", "--steps", "4", *SMALL)


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "moons"
    assert main([*MOONS, "--steps", "6", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main([*DIGITS, "--out", str(out)]) == 0
    return out


def refused(capsys, *words):
    """The one line on standard error of a command that cannot be carried out."""
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    return lines[0]


def snapshot(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def bits(out):
    """The bytes of everything that a run's newest checkpoint holds."""
    run = open_run(out)
    like = jax.eval_shape(run.experiment.state)
    state = train.restore(out / "checkpoints", like)
    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def figures_of(out):
    return json.loads((out / "metrics.json").read_text())


def losses(out):
    return [(line["step"], line["loss"]) for line in read_lines(out / "metrics.jsonl")]


# --- a run's folder -----------------------------------------------------------------------------


def test_the_folder_of_a_run(moons, digits):
    for out in (moons, digits):
        names = {p.name for p in out.iterdir()}
        assert names == {
            "config.yaml",
            "metrics.jsonl",
            "metrics.json",
            "samples.png",
            "curves.png",
            "checkpoints",
        }
        for picture in ("samples.png", "curves.png"):
            assert (out / picture).read_bytes().startswith(b"\x89PNG")
        assert yaml.safe_load((out / "config.yaml").read_text())["width"] == 8
    assert [step for step, _ in losses(moons)] == [2, 4, 6]


def test_the_figures_say_what_they_were_computed_with(moons, digits):
    toy, image = figures_of(moons), figures_of(digits)
    for figures, step in ((toy, 6), (image, 4)):
        made = figures["samples"]
        assert figures["step"] == step and figures["likelihood"]["examples"] == 4
        assert (made["count"], made["ema"], made["solver"], made["steps"]) == (20, 0.999, "ddim", 3)
        assert (made["grid"], made["last_step"], made["evaluations"]) == ("log_snr", "solver", 3)
        assert figures["seconds"]["training"] > 0 and figures["seconds"]["evaluation"] > 0
    assert toy["likelihood"]["levels"] is None and toy["sliced_wasserstein"]["count"] == 20
    # After four steps the network is nearly the Gaussian of the data's root mean square d = 0.75:
    # log2(17/2) + log2(d sqrt(2 pi e)) = 4.72 bits.
    assert image["likelihood"]["levels"] == 17 and abs(image["bits_per_dim"] - 4.72) < 0.5
    assert image["frechet"]["count"] == 20 and len(image["classifier"]["class_shares"]) == 10


def test_a_finished_run_prints_its_figures_and_changes_nothing(moons, capsys):
    before = snapshot(moons)
    assert main([*MOONS, "--out", str(moons)]) == 0
    said = capsys.readouterr().out
    assert "has finished at step 6" in said and "nats per dim" in said
    assert snapshot(moons) == before


def test_an_extension_ends_in_the_bits_of_one_long_run(moons, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*MOONS, "--steps", "2", "--out", str(out)]) == 0
    assert figures_of(out)["step"] == 2
    # Settings that are not given are the run's own.
    assert main(["train", "--out", str(out), "--steps", "6"]) == 0
    assert "going on with" in capsys.readouterr().err
    assert bits(out) == bits(moons) and losses(out) == losses(moons)
    ours, theirs = figures_of(out), figures_of(moons)
    assert ours.pop("seconds") and theirs.pop("seconds")
    assert ours == theirs
    assert yaml.safe_load((out / "config.yaml").read_text())["steps"] == 6


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_goes_on(moons, tmp_path, capsys, name, code):
    out = tmp_path / "run"
    words = [*MOONS, "--steps", "6", "--out", str(out)]

    def interrupt():
        while not read_lines(out / "metrics.jsonl"):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.Signals[name])

    # Reports are read a step late, so the signal comes before the last step or not at all;
    # a run that long is never over in time.
    long = [*MOONS, "--steps", "100000", "--out", str(out)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(long) == code
    thread.join()
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert name in line and "start it again in the same way" in line
    step = train.saved_steps(out / "checkpoints")[-1]
    assert step >= 2 and not (out / "metrics.json").exists()
    # To the end of the short plan if the signal came that early, else refused: past it.
    if step <= 6:
        assert main(words) == 0 and bits(out) == bits(moons)
    else:
        assert f"at step {step}, past 6" in refused(capsys, *words)


# --- a run in a pool ----------------------------------------------------------------------------


def plan_of(capsys, *words):
    capsys.readouterr()
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A run in the default folder below a folder of its own, under a falling rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shared"))
        assert main([*POOL, "--schedule", "cosine", "--steps", "4"]) == 0
        return Path("runs/moons-vp-share0.25").resolve()


def test_a_run_in_a_pool(pool, tmp_path, capsys):
    config = yaml.safe_load((pool / "config.yaml").read_text())
    assert (config["share"], config["share_scheme"]) == (0.25, "stable")
    body = train.read_manifest(pool / "checkpoints")
    sizes = [int(np.prod(leaf["shape"])) for leaf in body["leaves"].values()]
    figures = figures_of(pool)
    (layout,) = train.read_layouts(pool / "checkpoints")
    # The largest shared layer is (24, 48); the pool is a quarter of all of them.
    assert figures["share"]["slots"] == [layout.m] and max(sizes) == layout.m < layout.n / 3
    assert figures["parameters"] < figures["share"]["weights"] / 2
    assert figures["share"]["fingerprints"] == [layout.fingerprint]
    out = tmp_path / "x.npz"
    words = ["--n", "5", "--solver", "ddim", "--steps", "3", "--out", str(out)]
    assert main(["sample", str(pool), *words]) == 0
    assert np.isfinite(np.load(out)["x"]).all()
    # The layout that was planned beforehand, by shapes alone.
    words = ["--data", "moons", "--width", "24", "--blocks", "1", "--share", "0.25"]
    assert f"m = {layout.m:,} slots" in (said := plan_of(capsys, *words))
    assert f"fingerprint {layout.fingerprint}" in said


def test_a_run_in_a_pool_is_kept_to_its_layout(pool, tmp_path, capsys):
    assert "step 4 has this layout" in plan_of(capsys, pool)
    assert "has another layout" in plan_of(capsys, pool, "--share", "0.5")
    assert "share 0.25 there, 0.5 now" in refused(
        capsys, "train", "--out", pool, "--share", "0.5", "--steps", "4"
    )
    out = shutil.copytree(pool, tmp_path / "run")
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    line = refused(capsys, "sample", out)
    assert "seed: 0 there, 1 asked for" in line
    assert train.read_layout(pool / "checkpoints").fingerprint in line


def test_a_plan_makes_no_folder_and_nothing_of_the_networks_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = plan_of(capsys, "--share", "0.05", "--width", "1024")
    assert "in all: 383,883,265 weights" in said and "1.536 GB" in said and "pool 2" in said
    assert max(map(len, said.splitlines())) <= 100 and not list(tmp_path.iterdir())
    assert max((x.size for x in jax.live_arrays()), default=0) < 1e6


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "give --share, such as"),
        (("--share", "0"), "share is 0"),
        (("--share", "1.5"), "whole number of slots"),
        (("--share", "1e9"), "the weights that are shared"),
        (("--share", "tenth"), "--share"),
        (("no/such/run",), "holds no run"),
        (("--share", "0.1", "--share-scheme", "rost"), "'roast'"),
    ],
)
def test_plans_that_cannot_be_made(capsys, words, part):
    assert part in refused(capsys, "plan", *words)


@pytest.mark.slow
def test_digits_in_a_pool(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--width", "24", "--share", "0.1", "--precision", "bfloat16", "--out", str(out)]
    assert main([*DIGITS, *words]) == 0
    assert len(train.read_layouts(out / "checkpoints")) == 2
    assert main(["train", "--out", str(out), "--steps", "6"]) == 0
    assert figures_of(out)["step"] == 6
    small = ["--n", "3", "--solver", "ddim", "--steps", "3", "--label", "3", "--guidance", "2"]
    assert main(["sample", str(out), *small]) == 0
    assert main(["inpaint", str(out), "--n", "2", "--steps", "20"]) == 0
    assert main(["evaluate", str(out)]) == 0
    assert "weights in" in capsys.readouterr().out


# --- commands on a run --------------------------------------------------------------------------


def test_sample_writes_pictures_and_arrays(moons, tmp_path, capsys):
    assert main(["sample", str(moons), "--n", "5", "--solver", "ddim", "--steps", "3"]) == 0
    assert "3 evaluations" in capsys.readouterr().out
    assert (moons / "sampled.png").read_bytes().startswith(b"\x89PNG")
    (moons / "sampled.png").unlink()
    out = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for path, n in zip(out, (4, 9), strict=True):
        words = ["--n", str(n), "--solver", "ddim", "--steps", "3", "--seed", "2"]
        assert main(["sample", str(moons), *words, "--out", str(path)]) == 0
    a, b = (np.load(path, allow_pickle=False)["x"] for path in out)
    assert a.shape == (4, 2) and b.shape == (9, 2)
    np.testing.assert_allclose(a, b[:4], atol=1e-5)
    # In the data's own units: the untrained Gaussian lies about the data's mean.
    assert abs(b.mean() - 0.38) < 1.5 and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.npz",
        "b.npz",
    ]


def test_sample_with_statistics_that_are_kept(moons, tmp_path, capsys):
    moons = shutil.copytree(moons, tmp_path / "run")
    words = ["sample", str(moons), "--solver", "dpmv3", "--steps", "4", "--n", "3", "--out"]
    assert main([*words, str(tmp_path / "a.npz")]) == 0
    assert "dpmv3 on the log_snr grid, 4 steps, 4 evaluations" in capsys.readouterr().out
    kept = snapshot(moons / "statistics")
    assert kept
    assert main([*words, str(tmp_path / "b.npz")]) == 0
    assert snapshot(moons / "statistics") == kept
    first, again = (np.load(tmp_path / name)["x"] for name in ("a.npz", "b.npz"))
    assert np.isfinite(first).all() and (first == again).all()
    # Those of other parameters at the same step do not serve.
    about = json.loads((moons / "statistics" / "statistics.json").read_text())["made"]
    wanted = {"step": about["step"], "params": about["params"]}
    assert _found(moons / "statistics", wanted) is not None
    params = open_run(moons).params
    assert _digest(params) == about["params"]
    other = _digest(jax.tree.map(lambda v: v + 1e-6, params))
    assert _found(moons / "statistics", {**wanted, "params": other}) is None


def test_compare_goes_on_with_the_rows_it_has(moons, tmp_path, capsys):
    out = tmp_path / "compare.png"
    words = [
        "compare",
        str(moons),
        "--evaluations",
        "4",
        "--n",
        "2",
        "--out",
        str(out),
        "--solvers",
    ]
    assert main([*words, "heun", "dpmpp_2m_sde"]) == 0
    first = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [(r["solver"], r["steps"], r["evaluations"]) for r in first] == [
        ("heun", 2, 4),
        ("dpmpp_2m_sde", 4, 4),
    ]
    assert first[0]["rmse"] > 0 and first[1]["rmse"] is None
    assert all(r["sliced_wasserstein"] > 0 for r in first)
    assert out.stat().st_size > 0 and "sliced_wasserstein" in capsys.readouterr().out
    kept = out.with_suffix(".json").read_text()
    assert main([*words, "heun", "dpmpp_2m_sde"]) == 0
    assert out.with_suffix(".json").read_text() == kept
    capsys.readouterr()
    assert main([*words, "dpm_3m", "--evaluations", "2"]) == 2
    assert "no solver can do with so few" in capsys.readouterr().err


def searched(run, found, *more):
    words = ["search", str(run), "--nfe", "3", "--samples", "8", "--out", str(found)]
    return main([*words, "--budget", "44", *more])


@pytest.mark.slow
def test_a_search_is_kept_and_no_other_goes_on_from_it(moons, tmp_path, capsys):
    found = tmp_path / "schedule.json"
    assert searched(moons, found) == 0
    kept = found.with_suffix(".jsonl").read_text()
    assert searched(moons, found) == 0
    assert found.with_suffix(".jsonl").read_text() == kept
    capsys.readouterr()
    assert searched(moons, found, "--seed", "1") == 2
    assert "another search" in capsys.readouterr().err


def test_search_then_sample_by_the_schedule(moons, tmp_path, capsys):
    found = tmp_path / "schedule.json"
    assert searched(moons, found) == 0
    said = capsys.readouterr().out
    assert "unipc" in said and "44 schedules scored" in said
    out = tmp_path / "x.npz"
    assert (
        main(["sample", str(moons), "--schedule", str(found), "--n", "4", "--out", str(out)]) == 0
    )
    assert f"schedule {found}, 3 steps, 3 evaluations" in capsys.readouterr().out
    assert np.isfinite(np.load(out)["x"]).all()


def test_sample_a_label(digits, tmp_path):
    out = tmp_path / "x.npz"
    words = ["--n", "3", "--solver", "ddim", "--steps", "3", "--label", "3", "--guidance", "2"]
    assert main(["sample", str(digits), *words, "--out", str(out)]) == 0
    x = np.load(out)["x"]
    assert x.shape == (3, 8, 8, 1) and x.dtype == np.uint8 and x.max() <= 16


def test_sample_by_steered_particles(digits, tmp_path, capsys, monkeypatch):
    out, shown = tmp_path / "x.npz", []
    draw = pictures.draw_steering
    monkeypatch.setattr(
        pictures, "draw_steering", lambda *given: (shown.append(given[5]), draw(*given))
    )
    words = ["--steer", "guide=2", "--label", "3", "--particles", "4", "--steps", "3"]
    assert main(["sample", str(digits), *words, "--n", "6", "--out", str(out)]) == 0
    made = np.load(out)
    assert made["x"].shape == (6, 8, 8, 1) and made["x"].dtype == np.uint8
    assert made["ess"].shape == made["resampled"].shape == (2, 3)
    assert (made["ess"] > 0.24).all() and (made["ess"] < 1.001).all()
    assert (tmp_path / "x-steering.png").read_bytes().startswith(b"\x89PNG")
    # Noise is shown as large as data, whatever the process does to it.
    assert shown[0].shape == (3, 4, 8, 8, 1) and 0.7 < shown[0][0].std() < 1.3
    said = capsys.readouterr().out
    assert "guide=2 of 3, 2 times 4 particles, weighted, 3 steps, 8 evaluations" in said


@pytest.mark.slow
def test_sample_annealed_points(moons, tmp_path, capsys):
    words = ["--steer", "anneal=1.5", "--particles", "8", "--steps", "4", "--uncorrected"]
    out = tmp_path / "x.png"
    assert main(["sample", str(moons), *words, "--n", "8", "--out", str(out)]) == 0
    assert out.exists() and (tmp_path / "x-steering.png").exists()
    assert "without weights, 4 steps, 4 evaluations, resampled 0" in capsys.readouterr().out


def test_evaluate_gives_the_same_figures_again(moons, tmp_path, capsys):
    moons = shutil.copytree(moons, tmp_path / "run")
    before = figures_of(moons)
    assert main(["evaluate", str(moons)]) == 0
    assert "nats per dim" in capsys.readouterr().out
    after = figures_of(moons)
    assert before.pop("seconds") and after.pop("seconds")
    assert after == before
    assert main(["evaluate", str(moons), "--n", "10", "--solver", "heun", "--steps", "2"]) == 0
    assert figures_of(moons)["samples"]["evaluations"] == 4


def test_inpaint_keeps_what_is_known(digits, tmp_path, capsys):
    out = tmp_path / "filled.npz"
    words = ["--n", "3", "--steps", "22", "--hide", "left"]
    assert main(["inpaint", str(digits), *words, "--out", str(out)]) == 0
    assert "44 evaluations" in capsys.readouterr().out
    found = np.load(out, allow_pickle=False)
    x, mask, filled = found["x"], found["mask"], found["inpainted"]
    assert mask[:, :4].sum() == 0 and mask[:, 4:].all()
    np.testing.assert_array_equal(filled[:, :, 4:], x[:, :, 4:])
    assert (filled[:, :, :4] != x[:, :, :4]).mean() > 0.3


# --- what cannot be done ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--data", "nowhere"), "nowhere"),
        (("--learning-rate", "-1"), "learning_rate"),
        (("--solver", "best"), "heun"),
        (("--config", "none.yaml"), "none.yaml"),
        (("--process-args", "gamma=1"), "gamma"),
        (("--data", "swissroll", "--labels"), "has none"),
        (("--channel-mults", "1", "2", "2", "2", "2"), "sides divide by 16"),
    ],
)
def test_a_run_that_cannot_be_leaves_nothing(tmp_path, capsys, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, "train", *words)
    assert not list(tmp_path.iterdir())


def test_another_run_is_in_the_folder(moons, tmp_path, capsys):
    before = snapshot(moons)
    line = refused(capsys, "train", "--out", moons, "--seed", "3", "--ema", "0.9")
    assert "seed 0 there, 3 now" in line and "ema 0.999 there, 0.9 now" in line
    assert "past 5" in refused(capsys, "train", "--out", moons, "--steps", "5")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "holds no run" in refused(capsys, "train", "--out", tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    assert snapshot(moons) == before


def test_a_config_file_comes_in_and_its_mistakes_are_named(moons, tmp_path, capsys):
    out = tmp_path / "again"
    words = ("--config", str(moons / "config.yaml"), "--out", str(out))
    assert main(["train", *words, "--steps", "2", "--seed", "1", "--quiet"]) == 0
    ours, theirs = (yaml.safe_load((p / "config.yaml").read_text()) for p in (out, moons))
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == {"steps", "seed", "out"}
    path = tmp_path / "bad.yaml"
    path.write_text("widht: 3\n")
    line = refused(capsys, "train", "--config", path, "--out", tmp_path / "x")
    assert "'widht'" in line and "width" in line and not (tmp_path / "x").exists()


def test_a_falling_rate_is_bent_only_on_request(pool, tmp_path, capsys):
    out = shutil.copytree(pool, tmp_path / "run")
    words = ("train", "--out", str(out), "--steps", "6")
    assert "--reschedule" in refused(capsys, *words)
    assert main([*words, "--reschedule"]) == 0
    assert figures_of(out)["step"] == 6


def test_commands_that_need_a_run(tmp_path, capsys):
    for command in ("sample", "evaluate", "compare", "search", "inpaint"):
        assert "jaxgen train" in refused(capsys, command, tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("sample", "--solver", "best"), "heun"),
        (("sample", "--n", "0"), "--n is 0"),
        (("sample", "--steps", "0"), "--steps is 0"),
        (("sample", "--out", "x.gif"), ".png"),
        (("sample", "--out", "no/such/x.png"), "no/such"),
        (("sample", "--label", "1"), "--labels"),
        (("sample", "--guidance", "2"), "--label"),
        (("sample", "--steer", "guide=2"), "needs a --label"),
        (("sample", "--steer", "heat=2"), "anneal=NUMBER"),
        (("sample", "--steer", "anneal"), "anneal=NUMBER"),
        (("sample", "--steer", "anneal=-1"), "above 0"),
        (("sample", "--steer", "anneal=2", "--solver", "ddim"), "leave out --solver"),
        (("sample", "--steer", "anneal=2", "--particles", "1"), "--particles is 1"),
        (("sample", "--uncorrected"), "--steer"),
        (("sample", "--particles", "8"), "--particles is for --steer"),
        (("evaluate", "--n", "1"), "--n"),
        (("evaluate", "--solver", "best"), "heun"),
        (("sample", "--schedule", "none.json"), "jaxgen search"),
        (("sample", "--solver", "unipc", "--schedule", "none.json"), "leave out --solver"),
        (("compare", "--solvers", "best"), "dpmv3"),
        (("compare", "--evaluations", "0"), "at least 1"),
        (("inpaint",), "no images"),
        (("inpaint", "--steps", "1"), "--steps"),
    ],
)
def test_commands_that_a_run_refuses(moons, capsys, words, part):
    before = snapshot(moons)
    assert part in refused(capsys, words[0], moons, *words[1:])
    assert snapshot(moons) == before


def test_a_damaged_checkpoint_is_named(moons, tmp_path, capsys):
    out = shutil.copytree(moons, tmp_path / "run")
    (victim,) = (out / "checkpoints").glob("step_*6/manifest.json")
    victim.write_text(victim.read_text().replace('"step": 6', '"step": 7'))
    before = snapshot(out)
    for command in ("sample", "evaluate"):
        assert "manifest" in refused(capsys, command, out)
    assert snapshot(out) == before


def test_folders_that_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    for out in (file, file / "below"):
        refused(capsys, *MOONS, "--out", out)
    assert file.read_text() == "in the way" and list(tmp_path.iterdir()) == [file]


@pytest.fixture
def largest_file():
    """Let files grow to so many bytes only, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_at_the_start(tmp_path, capsys, largest_file):
    largest_file(100)
    line = refused(capsys, *MOONS, "--out", tmp_path / "deep" / "run")
    largest_file(resource.RLIM_INFINITY)
    assert "config.yaml" in line or "File too large" in line
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_in_the_end(moons, tmp_path, capsys, largest_file):
    out = moons / "sampled.npz"
    before = snapshot(moons)
    largest_file(200)
    words = ["sample", str(moons), "--solver", "ddim", "--steps", "3", "--out", str(out)]
    assert main(words) == 2
    largest_file(resource.RLIM_INFINITY)
    assert "File too large" in capsys.readouterr().err.splitlines()[-1]
    assert snapshot(moons) == before


@pytest.mark.slow
def test_default_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in refused(capsys, "train", "--data", "nowhere")
    assert main([*MOONS, "--process", "ve", "--steps", "1"]) == 0
    assert Path("runs/moons-ve/metrics.json").exists()
