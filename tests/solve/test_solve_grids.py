"""Named grids against their formulas, ends proper, per-sample starts and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen import process
from jaxgen.solve.grids import GRIDS, finite_ends, make_grid


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["vp", "ve", "edm", "cosine", "rectified", "sub_vp"])
def test_grids_fall_from_start_to_end_exactly(grid, name):
    sde = process.PROCESSES[name]()
    times = np.asarray(make_grid(grid, sde, 10))
    assert times.shape == (11,) and (np.diff(times) < 0).all()
    assert times[0] == np.float32(sde.t_max) and times[-1] == np.float32(sde.t_end)


def test_log_snr_grid_is_equally_spaced():
    sde = process.vp()
    levels = np.asarray(sde.log_snr(make_grid("log_snr", sde, 8)))
    np.testing.assert_allclose(np.diff(levels), (levels[-1] - levels[0]) / 8, rtol=2e-3)


def test_karras_grid_is_the_published_one():
    # Karras et al., equation (5), with the last sigma 0.
    n, low, high = 18, 0.002, 80.0
    i = np.arange(n)
    sigmas = (high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    times = make_grid("karras", process.edm(), n, t_end=0.0)
    np.testing.assert_allclose(times, np.append(sigmas, 0), rtol=2e-5)


def test_proper_ends_are_added_to_a_grid_of_the_rest():
    sde = process.rectified()
    times = np.asarray(make_grid("log_snr", sde, 6, t_start=1.0, t_end=0.0))
    inner = np.asarray(make_grid("log_snr", sde, 4))
    assert times[0] == 1 and times[-1] == 0
    np.testing.assert_allclose(times[1:-1], inner, rtol=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
def test_start_per_sample(grid):
    sde, starts = process.cosine(), jnp.array([0.9, 0.5, 1.0])
    times = make_grid(grid, sde, 5, t_start=starts, batch=(3,))
    assert times.shape == (6, 3)
    for i in range(2):
        alone = make_grid(grid, sde, 5, t_start=starts[i])
        np.testing.assert_allclose(times[:, i], alone, rtol=1e-5)
    assert float(times[0, 2]) == 1.0 and bool(jnp.isfinite(times).all())


def test_grids_are_traceable_and_differentiable():
    def total(beta_max):
        return jnp.sum(make_grid("karras", process.vp(0.1, beta_max), 5))

    step = 0.05
    slope = (total(20.0 + step) - total(20.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(20.0), slope, rtol=0.02)


def test_finite_ends():
    assert finite_ends(process.vp(), "time") == (True, True)
    assert finite_ends(process.edm(), "karras", t_end=0.0) == (True, False)
    assert finite_ends(process.rectified(), np.array([1.0, 0.5, 0.0])) == (False, False)
    assert finite_ends(process.cosine(), "time", t_start=np.array([1.0, 0.5])) == (None, True)
    jax.jit(lambda b: _expect_unknown(process.vp(0.1, b)))(20.0)


def _expect_unknown(sde):
    assert finite_ends(sde, "time") == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "snr"}, "expected one of time"),
        ({"grid": [1.0, 0.5, 0.6]}, "strictly falling"),
        ({"grid": [1.0, 0.5, 1e-6]}, "expected times in"),
        ({"grid": [1.0, 0.0, -0.5]}, "expected times in"),
        ({"grid": [1.0, 0.5], "steps": 3}, "expected 4 times"),
        ({"grid": [1.0]}, "falling times"),
        ({"grid": [1.0, 0.5], "steps": None, "t_end": 0.1}, "named grid"),
        ({"t_start": 1.5}, "t_start is 1.5"),
        ({"t_start": 0.0005}, "expected t_start > t_end"),
        ({"t_start": np.array([0.5, 0.6, 0.7])}, r"shape \(3,\)"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_bad_grids_raise(options, message):
    options = {"grid": "time", "steps": 2 if "grid" in options else 4, "batch": (2,)} | options
    with pytest.raises(ValueError, match=message):
        make_grid(options.pop("grid"), process.vp(), options.pop("steps"), **options)


def test_traced_grids_that_rise_give_nan_and_a_checkify_error():
    def grid(times):
        return make_grid(times, process.vp(), 2)

    assert bool(jnp.isnan(jax.jit(grid)(jnp.array([0.5, 0.6, 0.1]))).all())
    error, _ = jax.jit(checkify.checkify(grid))(jnp.array([0.5, 0.6, 0.1]))
    assert "does not fall" in error.get()
