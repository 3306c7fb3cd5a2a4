"""From prior to posterior by tempering, each temperature chosen by the effective sample size.

Particles from the prior are weighed towards ``prior * likelihood^lambda`` with lambda rising from
0 to 1, resampled, and moved by a Markov kernel that leaves the tempered law invariant. The kernels
are the user's: anything with ``init(x) -> state`` and ``step(key, state) -> (state, info)``, whose
state has a ``position``, as every sampler of blackjax. Source: Del Moral, Doucet and Jasra 2006,
with the temperatures of Jasra et al. 2011. Left out: kernels, which blackjax keeps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.core import keys
from jaxgen.core.checks import debug_check, one_of, positive_int
from jaxgen.particles.resample import METHODS, maybe_resample
from jaxgen.particles.weights import check_log_weights, ess
from jaxgen.smc.state_space import scalar_log

__all__ = ["Tempered", "tempered"]

_BISECTIONS = 30


class Tempered(NamedTuple):
    """Draws of the posterior, equally weighted, and how they came about.

    Attributes:
      x: particles, arrays ``(n, *event)``; NaN where lambda did not reach 1.
      log_z: ``()``, the log normaliser: log of the prior's mean likelihood, unbiased in the
        natural scale when the temperatures are fixed and nearly so here.
      temperatures: ``(max_temperatures,)``; NaN after the last.
      ess: ``(max_temperatures,)``, of the weights that led to each temperature.
      acceptance: ``(max_temperatures,)``, the kernel's mean ``acceptance_rate``, NaN where its
        ``info`` has none.
      steps: int32 ``()``, how many temperatures.
    """

    x: Any
    log_z: jax.Array
    temperatures: jax.Array
    ess: jax.Array
    acceptance: jax.Array
    steps: jax.Array


def _next(log_likelihood: jax.Array, now: jax.Array, wanted: float) -> jax.Array:
    """The largest rise of lambda that leaves ``wanted`` of the particles that count."""
    alive = jnp.sum(log_likelihood > -jnp.inf)

    def enough(rise: jax.Array) -> jax.Array:
        return ess(jnp.where(rise > 0, rise * log_likelihood, 0.0)) >= wanted * alive

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        good = enough(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    whole = 1 - now
    _, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (jnp.zeros_like(now), whole))
    # The upper end, so that lambda rises even where the likelihood is a cliff.
    return jnp.where(enough(whole), 1.0, now + high)


def tempered(
    key: jax.Array,
    log_prior: Callable[[Any], jax.Array],
    log_likelihood: Callable[[Any], jax.Array],
    x: Any,
    kernel: Callable[[Callable[[Any], jax.Array], Any], Any],
    *,
    moves: int = 10,
    ess_target: float = 0.5,
    resample: str = "systematic",
    max_temperatures: int = 100,
) -> Tempered:
    """Posterior draws and the log normaliser, by sequential Monte Carlo over temperatures.

    Args:
      key: a typed key.
      log_prior: ``log_prior(x) -> ()`` of one particle.
      log_likelihood: ``log_likelihood(x) -> ()`` of one particle; -inf where it is zero.
      x: draws from the prior, a pytree of arrays ``(n, *event)``.
      kernel: ``kernel(log_density, x) -> sampler`` for the tempered log-density; ``x`` are the
        resampled particles, from which scales may be tuned. The sampler has ``init`` and ``step``.
      moves: steps of the kernel at each temperature.
      ess_target: in (0, 1); the share of the particles that a rise of the temperature leaves.
      resample: a scheme of ``smc.resample``.
      max_temperatures: after so many the run gives up: ``x`` and ``log_z`` are NaN.

    Returns:
      A ``Tempered``.

    Raises:
      ValueError: an ``ess_target`` outside (0, 1), a log-density that is not a scalar, a sampler
        without ``init`` and ``step``, an unknown scheme, counts below 1.

    Example:
      >>> import blackjax, jax, jax.numpy as jnp  # doctest: +SKIP
      >>> def kernel(log_density, x):  # doctest: +SKIP
      ...     return blackjax.hmc(log_density, 0.5, jnp.var(x, 0), num_integration_steps=5)
      >>> x = jax.random.normal(jax.random.key(0), (1000, 2))  # doctest: +SKIP
      >>> out = tempered(jax.random.key(1), log_prior, log_likelihood, x, kernel)  # doctest: +SKIP
    """
    keys.check(key)
    one_of("resample", resample, METHODS)
    positive_int("moves", moves)
    positive_int("max_temperatures", max_temperatures)
    if isinstance(ess_target, bool) or not 0 < ess_target < 1:
        raise ValueError(f"ess_target is {ess_target!r}; expected a number in (0, 1)")

    def likelihoods(x: Any) -> jax.Array:
        each = jax.vmap(lambda one: scalar_log("log_likelihood(x)", log_likelihood(one)))(x)
        return check_log_weights(each)

    def move(key: jax.Array, x: Any, temperature: jax.Array) -> tuple[Any, jax.Array]:
        def log_density(one: Any) -> jax.Array:
            prior = scalar_log("log_prior(x)", log_prior(one))
            return prior + temperature.astype(prior.dtype) * log_likelihood(one)

        sampler = kernel(log_density, x)
        missing = [name for name in ("init", "step") if not hasattr(sampler, name)]
        if missing:
            raise ValueError(f"kernel(log_density, x) returned {sampler!r} without {missing[0]}")

        def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            state, info = jax.vmap(sampler.step)(jax.random.split(key, n), state)
            rate = getattr(info, "acceptance_rate", jnp.nan)
            return state, jnp.mean(jnp.asarray(rate, jnp.float32))

        state, rates = jax.lax.scan(step, jax.vmap(sampler.init)(x), jax.random.split(key, moves))
        return state.position, jnp.mean(rates)

    first = likelihoods(x)
    n = first.shape[0]

    class State(NamedTuple):
        x: Any
        log_likelihood: jax.Array
        temperature: jax.Array
        log_z: jax.Array
        history: jax.Array
        i: jax.Array

    def body(state: State) -> State:
        step_key = jax.random.fold_in(key, state.i)
        resample_key, move_key = jax.random.split(step_key)
        temperature = _next(state.log_likelihood, state.temperature, ess_target)
        rise = temperature - state.temperature
        moved = maybe_resample(resample_key, state.x, rise * state.log_likelihood, method=resample)
        x, rate = move(move_key, moved.x, temperature)
        row = jnp.stack([temperature, moved.ess, rate.astype(moved.ess.dtype)])
        return State(
            x,
            likelihoods(x),
            temperature,
            state.log_z + moved.log_z_increment,
            state.history.at[state.i].set(row),
            state.i + 1,
        )

    zero = jnp.zeros((), first.dtype)
    start = State(
        x,
        first,
        zero,
        zero,
        jnp.full((max_temperatures, 3), jnp.nan, first.dtype),
        jnp.zeros((), jnp.int32),
    )
    end = jax.lax.while_loop(
        lambda s: (s.temperature < 1) & (s.i < max_temperatures) & (s.log_z > -jnp.inf), body, start
    )
    arrived = end.temperature >= 1
    # A likelihood that is zero for all, or NaN for one, ends the loop too.
    debug_check(arrived, "max_temperatures: the temperature ended at {t}", t=end.temperature)

    def or_nan(leaf: jax.Array) -> jax.Array:
        inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jnp.where(arrived, leaf, jnp.nan) if inexact else leaf

    x, log_z = jax.tree.map(or_nan, (end.x, end.log_z))
    temperatures, sizes, rates = end.history.T
    return Tempered(x, log_z, temperatures, sizes, rates, end.i)
