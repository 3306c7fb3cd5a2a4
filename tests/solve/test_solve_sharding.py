"""The same samples on one device and on eight, by jit with shardings and by shard_map."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxgen import process, score, solve
from jaxgen.process.coupling import minibatch_coupling
from jaxgen.process.interpolant import interpolant
from jaxgen.score import fokker_planck
from jaxgen.solve.interpolant_likelihood import interpolant_log_likelihood

N = 16
SPEC = PartitionSpec("data")
CORRECTED = {"solver": "ancestral", "corrector": solve.langevin_corrector(norms="expected")}
ROWS = {
    "euler_maruyama": {"solver": "euler_maruyama"},
    "heun": {"solver": "heun"},
    "unipc": {"solver": "unipc"},
    "corrected": CORRECTED,
    "tsit5": {"solver": diffrax.Tsit5()},
}


def mesh(kind):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices, set before jax is imported")
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


SDE = process.vp()


@functools.cache
def closed():
    return SDE, score.closed_form.gaussian(SDE, jnp.array([1.0, -0.5]), 0.25)


@pytest.fixture(autouse=True)
def made_before_any_trace():
    closed()


def draw(key, n, row, x=None, first=0):
    sde, exact = closed()
    return solve.sample(
        key, exact.noise, sde, (n, 2), steps=8, x_init=x, first_index=first, **ROWS[row]
    ).x


@functools.cache
def alone(row):
    x = jax.random.normal(jax.random.key(4), (N, 2))
    return x, np.asarray(jax.jit(lambda k, x: draw(k, N, row, x))(jax.random.key(0), x))


def rows(*slow):
    return [pytest.param(r, marks=[pytest.mark.slow] if r in slow else []) for r in ROWS]


@pytest.mark.parametrize("row", rows("heun", "tsit5"))
def test_sharded_batch_gives_the_same_samples(key, row):
    x, want = alone(row)
    sharding = NamedSharding(mesh(AxisType.Auto), SPEC)
    run = jax.jit(lambda k, x: draw(k, N, row, x), out_shardings=sharding)
    out = run(key, jax.device_put(x, sharding))
    assert len(out.sharding.device_set) == 8
    np.testing.assert_allclose(out, want, atol=2e-5)


@pytest.mark.parametrize("row", rows("heun"))
def test_shard_map_with_the_number_of_the_first_sample(key, row):
    x, want = alone(row)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh(AxisType.Auto),
        in_specs=(PartitionSpec(), SPEC),
        out_specs=SPEC,
        # The loop over the stages of a diffrax Runge-Kutta step does not pass the check.
        check_vma=row != "tsit5",
    )
    def run(key, x):
        return draw(key, N // 8, row, x, jax.lax.axis_index("data") * (N // 8))

    np.testing.assert_allclose(run(key, x), want, atol=2e-5)


@pytest.mark.parametrize(
    "row", ["euler_maruyama", "corrected", pytest.param("heun", marks=pytest.mark.slow)]
)
def test_explicit_mesh(key, row):
    x, want = alone(row)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        out = jax.jit(lambda k, x: draw(k, N, row, x))(key, jax.device_put(x, SPEC))
        assert jax.typeof(out).sharding.spec[0] == "data"
        np.testing.assert_allclose(out, want, atol=2e-5)


def test_statistics_on_an_explicit_mesh(key):
    sde, exact = closed()
    x0 = exact.sample(key, (N, 2))

    @jax.jit
    def slopes(x0):
        own = solve.estimate_statistics(key, exact.noise, sde, x0, n_grid=N - 1, n_samples=N)
        lam = jax.sharding.reshard(own.lam, SPEC)
        return own.lam, own.at(lam)[0]

    with jax.set_mesh(mesh(AxisType.Explicit)):
        lam, out = slopes(jax.device_put(x0, SPEC))
    want = jax.nn.sigmoid(-2 * np.asarray(lam) - np.log(0.25))  # sigma^2/(alpha^2 v + sigma^2)
    np.testing.assert_allclose(out, np.stack([want, want], axis=1), atol=1e-4)


def test_batch_norms_are_averaged_over_the_mesh(key):
    sde, exact = closed()
    x = jax.random.normal(jax.random.key(4), (N, 2))

    def run(k, x, axis_name=None, first=0):
        return solve.sample(
            k,
            exact.noise,
            sde,
            x.shape,
            solver="reverse_diffusion",
            corrector=solve.langevin_corrector(axis_name=axis_name),
            steps=4,
            x_init=x,
            first_index=first,
        ).x

    def part(k, x):
        return run(k, x, "data", jax.lax.axis_index("data") * (N // 8))

    specs = {"in_specs": (PartitionSpec(), SPEC), "out_specs": SPEC}
    out = jax.jit(jax.shard_map(part, mesh=mesh(AxisType.Auto), **specs))(key, x)
    np.testing.assert_allclose(out, jax.jit(run)(key, x), atol=2e-5)


def _on_meshes(key, x):
    """Numbers per example of what gathers, repeats or starts a loop from a state."""
    interp = interpolant("linear")

    def field(x, t):
        return -x

    likelihood = interpolant_log_likelihood(
        key, field, field, interp, x, lambda x: x[:, 0], epsilon=0.3, steps=2, paths=2
    )
    loss = fokker_planck.regularised_loss(
        key,
        lambda x, t: -0.5 * jnp.sum(x**2, axis=1),
        SDE,
        x,
        weight=0.1,
        laplacian="hutchinson",
    )
    return likelihood.log_prob, loss


def test_interpolants_and_residuals_on_both_kinds_of_mesh(key):
    x = jax.random.normal(key, (N, 2))
    run = jax.jit(_on_meshes)
    want = *run(key, x), minibatch_coupling(None, x, x + 1).partner
    with jax.set_mesh(mesh(AxisType.Explicit)):
        own = jax.device_put(x, SPEC)
        out = *jax.jit(_on_meshes)(key, own), minibatch_coupling(None, own, own + 1).partner
        for a, b in zip(out, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # Inside shard_map each part draws for itself: that it is traced and finite is the matter.
    parts = jax.shard_map(
        _on_meshes, mesh=mesh(AxisType.Auto), in_specs=(PartitionSpec(), SPEC), out_specs=SPEC
    )
    assert all(np.isfinite(v).all() for v in jax.jit(parts)(key, x))
