"""Conversion among prediction kinds: every path, both ends of time, bad input."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, score
from jaxgen.process import PROCESSES
from jaxgen.score import PREDICTIONS, closed_form, convert

MU = 0.3


def make(name):
    build = PROCESSES[name]
    return build(MU) if "mu" in inspect.signature(build).parameters else build()


@functools.partial(jax.jit, static_argnames=("sources", "targets"))
def _table(oracle, x, t, sources=PREDICTIONS, targets=PREDICTIONS):
    """The fields, and the conversion of each source's field to each target."""
    fields = {kind: getattr(oracle, kind)(x, t) for kind in {*sources, *targets}}
    pairs = [(a, b) for a in sources for b in targets]
    return fields, {(a, b): convert(fields[a], x, t, oracle.sde, a, b) for a, b in pairs}


@pytest.mark.parametrize("name", PROCESSES)
def test_every_path_leads_to_the_closed_form(name):
    """So every round trip is the identity too."""
    with jax.enable_x64(True):
        sde = make(name)
        oracle = closed_form.mixture(sde, [0.4, 0.6], np.array([[1.0, 0], [-1, 0.5]]), [0.1, 0.3])
        x = jnp.array([[0.3, -0.2], [1.0, 0.4], [-0.7, 0.9]])
        middle = float(sde.inverse_log_snr(0.0))
        t = jnp.array([0.5 * middle + 0.5 * float(sde.t_min), middle, 1.1 * middle])
        fields, table = _table(oracle, x, t)
        for (a, b), value in table.items():
            np.testing.assert_allclose(value, fields[b], rtol=1e-8, atol=1e-9, err_msg=f"{a} {b}")


@pytest.mark.parametrize("name", PROCESSES)
def test_kinds_that_stay_exact_in_float32_near_the_ends(name):
    sde = make(name)
    oracle = closed_form.gaussian(sde, np.array([1.0, -1.0]), 0.5)
    centre = 0.0 if sde.mu is None else MU
    # At the data's end the data follow from anything, at the noise's end the noise does.
    for t, kinds, target in (
        (sde.t_min, ("noise", "score", "v", "velocity"), "data"),
        (sde.t_max, ("data", "v", "velocity"), "noise"),
    ):
        x = centre + float(sde.alpha(t)) * jnp.array([[0.7, -0.4]]) + float(sde.sigma(t)) * 0.5
        fields, table = _table(oracle, x, jnp.full((1,), t), kinds, (target,))
        for kind in kinds:
            np.testing.assert_allclose(
                table[kind, target], fields[target], rtol=2e-3, atol=2e-3, err_msg=kind
            )


def test_at_the_proper_ends_a_kind_is_finite_or_plainly_undefined():
    sde = process.rectified()
    x = jnp.array([[0.3, -0.6]])
    value = jnp.array([[0.1, 0.2]])
    start = {(a, b): convert(value, x, 0.0, sde, a, b) for a in PREDICTIONS for b in PREDICTIONS}
    for a in PREDICTIONS:
        for b in PREDICTIONS:
            if a == b:
                np.testing.assert_array_equal(start[a, b], value)
            elif b == "score" or (a == "data" and b != "data"):
                assert not np.isfinite(start[a, b]).any(), (a, b)
            else:
                assert np.isfinite(start[a, b]).all(), (a, b)
    np.testing.assert_array_equal(start["noise", "data"], x)
    np.testing.assert_allclose(start["velocity", "noise"], x + value)
    end = {(a, b): convert(value, x, 1.0, sde, a, b) for a in PREDICTIONS for b in PREDICTIONS}
    np.testing.assert_allclose(end["velocity", "data"], x - value, rtol=1e-6)
    np.testing.assert_allclose(end["data", "noise"], x, rtol=1e-6)
    np.testing.assert_allclose(end["v", "data"], -value, rtol=1e-6)
    for a in ("noise", "score"):
        for b in ("data", "v", "velocity"):
            assert not np.isfinite(end[a, b]).any(), (a, b)


def test_complex_reduced_precision_and_unbatched():
    sde = process.ouve(jnp.complex64(0.2 + 0.1j))
    x = jnp.array([[0.3 + 1j, -0.6j]], jnp.complex64)
    noise = jnp.array([[1 - 1j, 0.5 + 0j]], jnp.complex64)
    data = convert(noise, x, 0.5, sde, "noise", "data")
    np.testing.assert_allclose(sde.path(data, noise, 0.5), x, rtol=1e-5)
    low = jnp.ones((2, 3), jnp.bfloat16)
    out = convert(low, low, jnp.array([0.2, 0.4]), process.vp(), "noise", "score")
    assert out.dtype == jnp.bfloat16
    one = convert(low[1], low[1], 0.4, process.vp(), "noise", "score")
    np.testing.assert_array_equal(one, out[1])


def test_per_example_and_flow_time():
    field = score.per_example(lambda x, t: x * t)
    x = jnp.ones((3, 2))
    np.testing.assert_allclose(field(x, jnp.arange(3.0))[:, 0], [0, 1, 2])
    np.testing.assert_allclose(field(x, 0.5), 0.5)
    with pytest.raises(ValueError, match=r"t has shape \(2,\)"):
        field(x, jnp.ones(2))
    flow = score.from_flow(lambda x, tau: x * tau[:, None])
    np.testing.assert_allclose(flow(x, jnp.full((3,), 0.25)), -0.75)


def test_bad_input_is_named():
    x = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="source is 'eps'; expected one of score, noise"):
        convert(x, x, 0.5, process.vp(), "eps", "data")
    with pytest.raises(ValueError, match="target is 'x0'"):
        convert(x, x, 0.5, process.vp(), "noise", "x0")
    with pytest.raises(ValueError, match=r"value\(x, t\) returned shape"):
        convert(x[0], x, 0.5, process.vp(), "noise", "data")
    with pytest.raises(TypeError, match="x has dtype int32"):
        convert(x, x.astype(int), 0.5, process.vp(), "noise", "data")
