"""EDM's preconditioning against its published formula, its unit target, anchors and ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process
from jaxgen.score import closed_form, denoising_loss, precondition

D = 0.5


def net(x, c):
    return jnp.tanh(x) * (1 + c[:, None])


def test_equals_the_published_form_on_edm():
    x = jnp.array([[0.3, -4.0], [20.0, 1.0], [0.1, 0.2]])
    s = jnp.array([0.5, 30.0, 0.01])
    column = s[:, None]
    root = jnp.sqrt(column**2 + D**2)
    expected = D**2 / root**2 * x + column * D / root * net(x / root, jnp.log(s) / 4)
    np.testing.assert_allclose(precondition(net, process.edm(), D)(x, s), expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["vp", "cosine", "ve"])
def test_other_processes_are_edm_in_scaled_states(name):
    sde = getattr(process, name)()
    y = jnp.array([[0.3, -4.0], [2.0, 1.0]])
    t = sde.inverse_log_snr(jnp.array([0.4, 1.0]))
    level, alpha = sde.sigma(t) / sde.alpha(t), sde.alpha(t)[:, None]
    expected = precondition(net, process.edm(), D)(y, level)
    np.testing.assert_allclose(precondition(net, sde, D)(alpha * y, t), expected, rtol=2e-4)


def test_an_anchor_shifts_state_and_data():
    mu = jnp.array([1.0, -2.0])
    x, t = jnp.array([[0.3, 0.1]]), jnp.array([0.4])
    plain = precondition(net, process.mean_reverting(jnp.zeros(2)), D)(x, t)
    shifted = precondition(net, process.mean_reverting(mu), D)(x + mu[None], t)
    np.testing.assert_allclose(shifted, plain + mu[None], rtol=1e-5)


@pytest.mark.parametrize("name", ["edm", "vp"])
def test_the_target_has_unit_variance_under_the_edm_weighting(name):
    """With a zero network the weighted loss is the target's variance, one at every level."""
    sde = getattr(process, name)()
    x0 = D * jax.random.normal(jax.random.key(0), (4000, 2))
    field = precondition(lambda x, c: jnp.zeros_like(x), sde, D)

    @jax.jit
    def loss(key):
        return denoising_loss(
            key, field, sde, x0, prediction="data", weighting="edm", time="lognormal"
        )

    loss = np.asarray(loss(jax.random.key(1)), np.float64)
    assert abs(loss.mean() - 1) < 4 * loss.std() / loss.size**0.5
    # A mean of two squared normals: variance one, at every level.
    assert abs(loss.var() - 1) < 0.2


def test_input_has_unit_variance_and_the_ideal_network_predicts_zero_for_a_normal():
    oracle = closed_form.gaussian(process.vp(), np.zeros(2, np.float32), D**2)

    @jax.jit
    def run(key):
        x, t = oracle.sample(key, (5000, 2), 0.3), jnp.full((5000,), 0.3)
        seen = []
        field = precondition(lambda x, c: seen.append(x) or jnp.zeros_like(x), oracle.sde, D)
        return field(x, t), oracle.data(x, t), seen[0]

    data, truth, scaled = run(jax.random.key(0))
    np.testing.assert_allclose(data, truth, rtol=1e-4, atol=1e-6)
    assert abs(float(scaled.var()) - 1) < 4 * (2 / 10000) ** 0.5


def test_finite_at_both_proper_ends_and_same_dtype():
    sde = process.rectified()
    field = precondition(net, sde, D)
    x = jnp.array([[0.3, 0.1]])
    np.testing.assert_allclose(field(x, jnp.zeros(1)), x, rtol=1e-6)
    end = field(x, jnp.ones(1))
    np.testing.assert_allclose(end, D * net(x, -sde.log_snr(sde.t_max)[None] / 8), rtol=1e-5)
    assert field(x.astype(jnp.bfloat16), jnp.full((1,), 0.5)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"net\(x, t\) returned shape"):
        precondition(lambda x, c: c, sde)(x, jnp.full((1,), 0.5))
