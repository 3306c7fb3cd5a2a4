"""64 exact log-likelihoods: ours in one jitted call against ``scipy.integrate.solve_ivp``.

The peer integrates the same jitted field and exact divergence with RK45 at the same tolerances,
stepping on the host, the whole batch as one system (the usual way, as in the released score-SDE
code). Wall time after warm-up. The errors are those against the host's solve at 1e-7.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from benchmarks.measure import PAIRS, Result, compare
from jaxgen import process, score, solve

N, TOLERANCE, FINE = 64, 1e-5, 1e-7


def _fields(dim: int):
    key_means, key_net = jax.random.split(jax.random.key(2))
    means = 2 * jax.random.normal(key_means, (4, dim))
    yield (
        "mixture",
        score.closed_form.mixture(process.vp(), jnp.ones(4), means, jnp.full((4,), 0.25)).noise,
    )
    keys = jax.random.split(key_net, 3)
    widths = (dim + 1, 128, 128, dim)
    layers = [
        jax.random.normal(k, (a, b)) / a**0.5
        for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
    ]

    def network(x, t):
        h = jnp.concatenate([x, t[:, None]], axis=-1)
        for layer in layers[:-1]:
            h = jnp.tanh(h @ layer)
        return h @ layers[-1]

    yield "mlp", network


def _peer(field, sde, x, tolerance=TOLERANCE):
    """The log-likelihoods by RK45 on the host."""
    n, dim = x.shape

    def velocity(x, t):
        noise = field(x, t)
        return score.convert(noise, x, t, sde, "noise", "velocity")

    @jax.jit
    def right_side(x, t):
        times = jnp.full((n,), t)

        def divergence(one, t):
            return jnp.trace(jax.jacfwd(lambda y: velocity(y[None], t[None])[0])(one))

        return velocity(x, times), jax.vmap(divergence)(x, times)

    def flat(t, state):
        value, divergence = right_side(
            jnp.asarray(state[: n * dim].reshape(n, dim), jnp.float32), jnp.float32(t)
        )
        return np.concatenate([np.asarray(value).ravel(), np.asarray(divergence)])

    prior = jax.jit(sde.prior_log_prob)

    def run():
        start = np.concatenate([np.asarray(x).ravel(), np.zeros(n)])
        span = (float(sde.t_min), float(sde.t_max))
        end = solve_ivp(flat, span, start, rtol=tolerance, atol=tolerance, method="RK45").y[:, -1]
        return np.asarray(prior(end[: n * dim].reshape(n, dim))) + end[n * dim :]

    return run


def run(*, quick: bool) -> Iterator[Result]:
    sde, key = process.vp(), jax.random.key(0)
    for dim in (8,) if quick else (2, 8, 32):
        x = jax.random.normal(jax.random.key(3), (N, dim))
        for name, field in _fields(dim):
            ours = jax.jit(
                lambda x, field=field: (
                    solve.log_likelihood(
                        key, field, sde, x, estimator="exact", rtol=TOLERANCE, atol=TOLERANCE
                    ).log_prob
                )
            )
            peer = _peer(field, sde, x)
            result = compare(
                "likelihood",
                f"{name}_{dim}d",
                lambda ours=ours, x=x: ours(x),
                peer,
                peer_name="scipy RK45",
                goal=1.0,
                pairs=PAIRS,
            )
            # A much finer solve on the host says what each side's tolerance is worth.
            fine = _peer(field, sde, x, FINE)()
            errors = (float(np.abs(np.asarray(side) - fine).max()) for side in (ours(x), peer()))
            note = "largest error {:.1e} nats against {:.1e}".format(*errors)
            yield dataclasses.replace(result, note=note)
