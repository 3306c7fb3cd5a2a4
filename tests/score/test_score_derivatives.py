"""Divergence, Laplacian and directional derivatives against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.score import derivatives

MATRIX = jnp.array([[0.5, -1.0, 0.3], [0.2, 0.8, -0.4], [1.0, 0.1, -0.6]])


def field(x, t):
    """sin(A x) (1 + t), whose Jacobian is cos(A x)_i A_ij (1 + t)."""
    factor = 1 + (t if x.ndim == 1 else t[:, None])
    return jnp.sin(x @ MATRIX.T) * factor


def true_divergence(x, t):
    return (np.cos(x @ MATRIX.T) * np.diag(MATRIX)[None]).sum(1) * (1 + t)


@pytest.fixture(scope="module")
def state():
    x = jax.random.normal(jax.random.key(1), (6, 3))
    return x, jnp.linspace(0.1, 0.9, 6)


@pytest.mark.parametrize("block", [2**18, 36, 1])
def test_exact_divergence_in_blocks_of_any_size(state, block, monkeypatch):
    monkeypatch.setattr(derivatives, "_BLOCK", block)
    x, t = state
    value, divergence = jax.jit(lambda x, t: derivatives.value_and_divergence(field, x, t))(x, t)
    np.testing.assert_allclose(value, field(x, t), rtol=1e-6)
    np.testing.assert_allclose(divergence, true_divergence(x, t), rtol=1e-5, atol=1e-6)


def test_field_is_called_once(state):
    x, t = state
    calls = []

    def counted(x, t):
        calls.append((x.shape, t.shape))
        return field(x, t)

    derivatives.value_and_divergence(counted, x, t)
    assert calls == [((6, 3), (6,))]
    probes = derivatives.probes(jax.random.key(0), x.shape, n=4)
    derivatives.value_and_divergence(counted, x, 0.5, probes[0])
    derivatives.value_and_divergence(counted, x, t, probes)
    derivatives.value_and_jvp(counted, x, t, x)
    assert calls == [((6, 3), (6,))] * 4


def test_unbatched_equals_batched_and_images_have_events_of_any_rank(state):
    x, t = state
    value, divergence = derivatives.value_and_divergence(field, x[2], t[2], event_ndim=1)
    assert divergence.shape == ()
    np.testing.assert_allclose(value, field(x, t)[2], rtol=1e-6)
    np.testing.assert_allclose(divergence, true_divergence(x, t)[2], rtol=1e-5)
    image = jnp.arange(16.0).reshape(2, 2, 2, 2) / 16
    _, divergence = derivatives.value_and_divergence(lambda x, t: x**2, image, 0.5)
    np.testing.assert_allclose(divergence, 2 * image.sum((1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("kind", derivatives.PROBES)
def test_hutchinson_and_its_square_are_unbiased(state, kind):
    x, t = state
    n = 4000
    probes = derivatives.probes(jax.random.key(3), x.shape, kind, n=2 * n)
    run = jax.jit(lambda p: derivatives.value_and_traces(field, x, t, p))
    value, traces = run(probes)
    truth = true_divergence(x, t)
    np.testing.assert_allclose(value, field(x, t), rtol=1e-6)
    error = traces.std(0) / (2 * n) ** 0.5
    assert (abs(traces.mean(0) - truth) < 4 * error).all()
    pairs = traces.reshape(2, n, -1)
    squares = derivatives.unbiased_square(pairs)
    np.testing.assert_allclose(squares, pairs[0] * pairs[1], rtol=1e-5, atol=1e-6)
    error = squares.std(0) / n**0.5
    assert (abs(squares.mean(0) - truth**2) < 4 * error).all()
    # The square of one estimate is what this avoids: it is off by the probe's variance.
    naive = (traces**2).mean(0)
    assert (naive - truth**2 > 5 * (traces**2).std(0) / (2 * n) ** 0.5).all()


def test_unbiased_square_averages_over_all_pairs():
    a = np.array([[1.0], [2.0], [-3.0]])
    pairs = np.mean([a[i] * a[j] for i in range(3) for j in range(3) if i != j])
    np.testing.assert_allclose(derivatives.unbiased_square(jnp.array(a)), pairs[None])
    with pytest.raises(ValueError, match="at least 2 along axis 0"):
        derivatives.unbiased_square(jnp.ones((1, 4)))


def test_one_probe_and_several_agree(state):
    x, t = state
    probes = derivatives.probes(jax.random.key(5), x.shape, n=3)
    one = [derivatives.value_and_divergence(field, x, t, p)[1] for p in probes]
    _, mean = derivatives.value_and_divergence(field, x, t, probes)
    np.testing.assert_allclose(mean, sum(one) / 3, rtol=1e-5)


def test_probes_belong_to_their_example_and_index(key):
    many = derivatives.probes(key, (5, 2), n=3)
    np.testing.assert_array_equal(derivatives.probes(key, (2, 2), n=2), many[:2, :2])
    assert set(np.unique(many)) == {-1.0, 1.0}
    alone = derivatives.probes(jax.random.fold_in(key, 1), (2,), event_ndim=1)
    np.testing.assert_array_equal(alone, derivatives.probes(key, (5, 2))[1])
    assert derivatives.probes(key, (2, 2), dtype=jnp.bfloat16).dtype == jnp.float32
    with pytest.raises(ValueError, match="kind is 'sobol'; expected one of rademacher, gaussian"):
        derivatives.probes(key, (2, 2), "sobol")
    with pytest.raises(ValueError, match="n is 0"):
        derivatives.probes(key, (2, 2), n=0)


def test_reduced_precision_states_get_float32_derivatives(state):
    x, t = state
    low = x.astype(jnp.bfloat16)
    probe = derivatives.probes(jax.random.key(0), x.shape, "gaussian")
    value, divergence = derivatives.value_and_divergence(field, low, t, probe)
    assert value.dtype == jnp.bfloat16 and divergence.dtype == jnp.float32
    _, wide = derivatives.value_and_divergence(field, low.astype(jnp.float32), t, probe)
    np.testing.assert_array_equal(divergence, wide)


def test_directional_and_time_derivatives(state):
    x, t = state
    _, in_time = derivatives.value_and_time_derivative(field, x, t)
    np.testing.assert_allclose(in_time, jnp.sin(x @ MATRIX.T), rtol=1e-5, atol=1e-6)
    v = jnp.roll(x, 1, 0)
    value, along = derivatives.value_and_jvp(field, x, t, v, jnp.full((6,), 2.0))
    truth = jnp.cos(x @ MATRIX.T) * (v @ MATRIX.T) * (1 + t)[:, None] + 2 * in_time
    np.testing.assert_allclose(value, field(x, t), rtol=1e-6)
    np.testing.assert_allclose(along, truth, rtol=1e-5, atol=1e-6)


def test_laplacian_of_a_density_and_of_a_field(state):
    x, t = state
    function = jax.jit(lambda x, t: derivatives.value_and_laplacian(_quartic, x, t))
    value, laplacian = function(x, t)
    np.testing.assert_allclose(value, (x**4).sum(1) * t, rtol=1e-5)
    np.testing.assert_allclose(laplacian, 12 * (x**2).sum(1) * t, rtol=1e-5)
    _, of_field = derivatives.value_and_laplacian(lambda x, t: x**3, x, t)
    np.testing.assert_allclose(of_field, 6 * x, rtol=1e-5)
    # The Hessian is diagonal, so that signs give it exactly.
    probes = derivatives.probes(jax.random.key(2), x.shape, n=2)
    for probe in (probes, probes[0]):
        value, estimate = derivatives.value_and_laplacian(_quartic, x, t, probe)
        np.testing.assert_allclose(estimate, laplacian, rtol=1e-5)
        np.testing.assert_allclose(value, (x**4).sum(1) * t, rtol=1e-5)


def test_a_scalar_and_all_its_derivatives_from_one_evaluation(state):
    x, t = state
    calls = []

    def counted(x, t):
        calls.append((x.shape, t.shape))
        return _quartic(x, t)

    found = jax.jit(lambda x, t: derivatives.scalar_derivatives(counted, x, t))(x, t)
    assert calls == [((6, 3), (6,))]
    np.testing.assert_allclose(found.value, (x**4).sum(1) * t, rtol=1e-5)
    np.testing.assert_allclose(found.gradient, 4 * x**3 * t[:, None], rtol=1e-5)
    np.testing.assert_allclose(found.in_time, (x**4).sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.laplacian, 12 * (x**2).sum(1) * t, rtol=1e-5)
    # The Hessian is diagonal, so that each sign gives it exactly.
    probes = derivatives.probes(jax.random.key(2), x.shape, n=2)
    two = derivatives.scalar_derivatives(_quartic, x, t, probes).laplacian
    np.testing.assert_allclose(two, jnp.stack([found.laplacian] * 2), rtol=1e-5)
    one = derivatives.scalar_derivatives(_quartic, x[2], 0.5, probes[0, 2], event_ndim=1)
    np.testing.assert_allclose(one.laplacian, 6 * (x[2] ** 2).sum(), rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"returned shape \(6, 3\).*one number per example, \(6,\)"
    ):
        derivatives.scalar_derivatives(lambda x, t: x, x, t)
    with pytest.raises(TypeError, match=r"function\(x, t\) has dtype int32"):
        derivatives.scalar_derivatives(lambda x, t: jnp.ones(6, int), x, t)


def _quartic(x, t):
    return jnp.sum(x**4, axis=-1) * t


def test_gradients_vmap_and_shard_map_pass_through(state):
    x, t = state
    grad = jax.grad(lambda x: derivatives.value_and_divergence(field, x, t)[1].sum())(x)
    truth = -(jnp.sin(x @ MATRIX.T) * jnp.diag(MATRIX)[None] * (1 + t)[:, None]) @ MATRIX
    np.testing.assert_allclose(grad, truth, rtol=1e-4, atol=1e-5)
    single = jax.vmap(lambda x, t: derivatives.value_and_divergence(field, x, t, event_ndim=1)[1])(
        x, t
    )
    np.testing.assert_allclose(single, true_divergence(x, t), rtol=1e-5, atol=1e-6)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
        lambda x, t: derivatives.value_and_divergence(field, x, t)[1],
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
    )
    np.testing.assert_allclose(sharded(x, t), true_divergence(x, t), rtol=1e-5, atol=1e-6)


def test_bad_input_is_named(state):
    x, t = state
    for probe in (jnp.ones((6, 2)), jnp.ones((1, 1, 6, 3))):
        with pytest.raises(ValueError, match="probe has shape"):
            derivatives.value_and_divergence(field, x, t, probe)
    with pytest.raises(ValueError, match=r"expected \(n, \*\(6, 3\)\)"):
        derivatives.value_and_traces(field, x, t, x)
    with pytest.raises(ValueError, match="dx has shape"):
        derivatives.value_and_jvp(field, x, t, jnp.ones((2, 6, 3)))
    with pytest.raises(ValueError, match=r"t has shape \(5,\)"):
        derivatives.value_and_divergence(field, x, jnp.ones(5))
    with pytest.raises(ValueError, match=r"returned shape \(6,\)"):
        derivatives.value_and_divergence(lambda x, t: t, x, t)
    with pytest.raises(TypeError, match="x has dtype complex64"):
        derivatives.value_and_divergence(field, x.astype(jnp.complex64), t)
    with pytest.raises(TypeError, match="returned dtype int32"):
        derivatives.value_and_divergence(lambda x, t: x.astype(int), x, t)
