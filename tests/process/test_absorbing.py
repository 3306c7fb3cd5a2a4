"""The absorbing process: its schedules near both ends, its masks, its expected evaluations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxgen.process.absorbing import (
    absorbing,
    expected_nfe,
    mask_tokens_k,
    mask_tokens_lambda,
    mask_tokens_t,
)

PROCESSES = [absorbing(5), absorbing(5, eps=0.0), absorbing(5, "geometric")]
TIMES = np.array([1e-5, 1e-3, 0.3, 0.7, 0.999, 1.0])


def reference(process, t):
    """Total noise and rate in double precision."""
    t = np.asarray(t, np.float64)
    if process.schedule == "log_linear":
        eps = float(process.params[0])
        with np.errstate(divide="ignore"):
            return -np.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)
    low, high = (float(p) for p in process.params)
    total = low ** (1 - t) * high**t
    return total, total * np.log(high / low)


@jax.jit
def coefficients(process, t):
    return (
        process.total(t),
        process.rate(t),
        process.mask_probability(t),
        process.reverse_rate(t),
        process.unmask_probability(t[1:], t[:-1]),
        process.unmask_probability(t[1:], t[:-1], method="euler"),
    )


@pytest.mark.parametrize("process", PROCESSES)
def test_schedules_are_accurate_near_both_ends(process):
    total, rate = reference(process, TIMES)
    with np.errstate(over="ignore", invalid="ignore"):
        reverse = rate / np.expm1(total)
    if float(process.params[0]) == 0:
        reverse[-1] = 1.0
    keep = np.exp(-total)
    tweedie = (keep[:-1] - keep[1:]) / -np.expm1(-total[1:])
    euler = np.minimum(np.diff(TIMES) * reverse[1:], 1)
    expected = (total, rate, -np.expm1(-total), reverse, tweedie, euler)
    found = coefficients(process, jnp.asarray(TIMES, jnp.float32))
    # float32 times lie up to 6e-8 off, which at t = 0.999 is 6e-5 of 1 - t, and the exponential of
    # 20 turns rounding of the total, 1e-6, into as much of the value.
    for ours, truth in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, truth, rtol=2e-4)


def test_the_rate_is_the_slope_of_the_total():
    for process in PROCESSES:
        slope = jax.grad(process.total)(0.4)
        np.testing.assert_allclose(slope, process.rate(0.4), rtol=1e-5)


def test_times_out_of_range_are_nan_and_an_error_under_checkify():
    process = absorbing(5)
    assert np.isnan(process.mask_probability(jnp.array([-0.1, 0.0, 1.1, jnp.nan]))).all()
    error, _ = checkify.checkify(jax.jit(process.total))(1.5)
    with pytest.raises(checkify.JaxRuntimeError, match="outside"):
        error.throw()


@functools.partial(jax.jit, static_argnames="kind")
def masked(key, process, x0, level, kind):
    hide = {"t": mask_tokens_t, "lambda": mask_tokens_lambda, "k": mask_tokens_k}[kind]
    return hide(key, process, x0, level)


@pytest.mark.parametrize(("kind", "level"), [("t", 0.3), ("lambda", 0.3), ("k", 7)])
def test_each_token_is_masked_as_often_as_it_should_be(key, kind, level):
    process, n, length = absorbing(5), 4000, 20
    x0 = jax.random.randint(key, (n, length), 0, 5)
    x = np.asarray(masked(key, process, x0, jnp.asarray(level), kind))
    is_masked = x == process.mask
    assert (x == np.asarray(x0))[~is_masked].all()
    share = {"t": 0.999 * 0.3, "lambda": 0.3, "k": 7 / 20}[kind]
    error = np.sqrt(share * (1 - share) / n)
    assert np.abs(is_masked.mean(0) - share).max() < 4.5 * error
    # Pairs: independent, but without replacement for k.
    pair = share * (6 / 19 if kind == "k" else share)
    both = (is_masked[:, 3] & is_masked[:, 11]).mean()
    assert abs(both - pair) < 4.5 * np.sqrt(pair / n)
    if kind == "k":
        assert (is_masked.sum(1) == 7).all()


def test_levels_at_their_ends(key):
    process, x0 = absorbing(5), jnp.zeros((2, 6), jnp.int32)
    assert (mask_tokens_lambda(key, process, x0, 0.0) == 0).all()
    assert (mask_tokens_lambda(key, process, x0, 1.0) == 5).all()
    counts = (mask_tokens_k(key, process, x0, jnp.array([0, 6])) == 5).sum(1)
    assert counts.tolist() == [0, 6]


def test_a_sequence_does_not_change_with_its_batch(key):
    process, x0 = absorbing(5), jnp.zeros((3, 50), jnp.int32)
    for hide, level in ((mask_tokens_lambda, 0.5), (mask_tokens_k, 20), (mask_tokens_t, 0.4)):
        whole = hide(key, process, x0, jnp.asarray(level))
        alone = hide(jax.random.fold_in(key, 2), process, x0[2], jnp.asarray(level), event_ndim=1)
        assert (whole[2] == alone).all()
        assert not (whole[1] == alone).all()


def test_what_is_no_token_or_level_gives_no_token(key):
    process, x0 = absorbing(5), jnp.zeros((2, 4), jnp.int32)
    bad = jax.jit(mask_tokens_lambda)
    assert (bad(key, process, x0.at[0, 0].set(6), 0.5)[0] == 6).all()
    assert (bad(key, process, x0.at[0, 0].set(-1), 0.5)[0] == 6).all()
    assert (bad(key, process, x0, jnp.array([jnp.nan, 1.5])) == 6).all()
    assert (mask_tokens_k(key, process, x0, 5) == 6).all()
    assert (mask_tokens_t(key, process, x0, 1.5) == 6).all()
    checked = checkify.checkify(bad)
    with pytest.raises(checkify.JaxRuntimeError, match="x0 holds ids"):
        checked(key, process, x0 + 7, 0.5)[0].throw()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": 1}, "vocabulary is 1"),
        ({"vocabulary": 5, "schedule": "cosine"}, "schedule is 'cosine'"),
        ({"vocabulary": 5, "eps": 1.0}, "eps is 1.0"),
        ({"vocabulary": 5, "t_min": 0.0}, "t_min is 0.0"),
        ({"vocabulary": 5, "schedule": "geometric", "sigma_min": 30.0}, "sigma_min"),
    ],
)
def test_processes_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        absorbing(**arguments)


def test_arguments_that_do_not_fit(key):
    process, x0 = absorbing(5), jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(TypeError, match="float32; expected integer token ids"):
        mask_tokens_lambda(key, process, x0.astype(float), 0.5)
    with pytest.raises(ValueError, match="holds the token 6"):
        mask_tokens_lambda(key, process, x0 + 6, 0.5)
    with pytest.raises(ValueError, match=r"level has shape \(3,\)"):
        mask_tokens_lambda(key, process, x0, jnp.ones(3))
    with pytest.raises(ValueError, match="sequences"):
        mask_tokens_lambda(key, process, x0[None], 0.5)
    with pytest.raises(TypeError, match="k has dtype float32"):
        mask_tokens_k(key, process, x0, 2.0)
    with pytest.raises(TypeError, match="typed key"):
        mask_tokens_lambda(jax.random.PRNGKey(0), process, x0, 0.5)
    for steps, length, match in ((0, 4, "steps"), (4, 0, "length")):
        with pytest.raises(ValueError, match=match):
            expected_nfe(process, steps, length)
    with pytest.raises(ValueError, match="count"):
        expected_nfe(process, 4, 4, count="all")
    with pytest.raises(ValueError, match="method"):
        process.unmask_schedule(4, method="heun")


@pytest.mark.parametrize(
    ("steps", "lazy"), [(32, 32.0), (256, 251.3), (1024, 647.5), (4096, 906.1)]
)
def test_expected_evaluations_in_closed_form(steps, lazy):
    process = absorbing(2, eps=0.0)
    both = jax.jit(lambda p: [expected_nfe(p, steps, 1024, count=c) for c in ("lazy", "eager")])
    found = [float(value) for value in both(process)]
    exact = steps * -np.expm1(1024 * np.log1p(-1 / steps))
    assert found[0] == pytest.approx(exact, rel=1e-4)
    assert round(exact, 1) == lazy
    assert found[1] == pytest.approx(exact + (1 - 1 / steps) ** 1024, rel=1e-4)
    assert found[0] <= min(steps, 1024) * (1 + 1e-6)


def test_expected_evaluations_of_one_step_and_under_jit():
    for process in PROCESSES:
        assert float(expected_nfe(process, 1, 7)) == 1
        assert float(expected_nfe(process, 1, 7, count="eager")) == 1
    sweep = jax.vmap(lambda eps: expected_nfe(absorbing(2, eps=eps), 64, 32))
    found = jax.jit(sweep)(jnp.array([0.0, 1e-3]))
    assert found[0] == pytest.approx(25.335, abs=1e-3)
