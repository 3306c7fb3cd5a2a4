"""PaRIS particle Gibbs (PPG): the smoother inside conditional SMC, sweep after sweep.

Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson, ICML 2023 (arXiv 2301.00900). Each
sweep is a conditional PaRIS run (``paris``): an estimate over all its particles, and a path that is
the next sweep's reference. Given a reference from the smoothing law an estimate is unbiased, so
that all bias is in the start and dies as the chain forgets it, at least geometrically. The roll-out
estimator is the mean of the sweeps' estimates after the burn-in.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import keys as keys_
from jaxgen.core.checks import positive_int
from jaxgen.smc import conditional
from jaxgen.smc import filter as _filter
from jaxgen.smc import paris as _paris
from jaxgen.smc.paris import Functional, InitialFunctional
from jaxgen.smc.state_space import StateSpaceModel

__all__ = ["ParticleGibbs", "particle_gibbs"]


class ParticleGibbs(NamedTuple):
    """Sweeps of the PaRIS Gibbs sampler.

    Attributes:
      estimate: ``(D,)``, mean of ``per_sweep`` after the burn-in. The sweeps are dependent: take
        standard errors from independent chains or from means of batches.
      per_sweep: ``(sweeps, D)``, each sweep's own estimate.
      reference: the last path, leaves ``(steps, *event)``, where another run may go on.
    """

    estimate: jax.Array
    per_sweep: jax.Array
    reference: Any


@dataclasses.dataclass(frozen=True)
class _Options:
    paris: _paris.Options
    sweeps: int
    burn_in: int


def check_sweeps(sweeps: int, burn_in: int) -> tuple[int, int]:
    """Both as ints.

    Raises:
      ValueError: ``sweeps < 1``, ``burn_in < 0`` or ``burn_in >= sweeps``.
    """
    sweeps, burn_in = positive_int("sweeps", sweeps), positive_int("burn_in", burn_in, least=0)
    if burn_in >= sweeps:
        raise ValueError(f"burn_in is {burn_in} for {sweeps} sweeps; expected fewer")
    return sweeps, burn_in


def first_reference(
    key: jax.Array, observations: Any, observed: Any, options: _paris.Options
) -> Any:
    """A path of one unconditional run, whose functional nobody reads."""

    def nothing(x_prev: Any, x_next: Any, t: jax.Array) -> jax.Array:
        return jnp.zeros(0)

    options = dataclasses.replace(
        options, functional=nothing, initial_functional=None, draws=1, with_path=True
    )
    return _paris.run(key, observations, observed, None, options)[0].path


def sweep(
    key: jax.Array,
    observations: Any,
    observed: Any,
    reference: Any,
    options: _paris.Options,
    sweeps: int,
) -> tuple[Any, jax.Array, jax.Array]:
    """The last path, each sweep's estimate, and whether the first reference has density zero."""

    def body(reference: Any, key: jax.Array) -> tuple[Any, Any]:
        out, is_dead = _paris.run(key, observations, observed, reference, options)
        return out.path, (out.estimate, is_dead)

    reference, (estimates, is_dead) = jax.lax.scan(body, reference, keys_.fold(key, sweeps))
    return reference, estimates, is_dead[0]


@_filter.compiled
def _particle_gibbs(
    key: jax.Array, observations: Any, observed: Any, reference: Any, *, options: _Options
) -> tuple[ParticleGibbs, jax.Array]:
    key_first, key = jax.random.split(key)
    if reference is None:
        reference = first_reference(key_first, observations, observed, options.paris)
    path, estimates, is_dead = sweep(
        key, observations, observed, reference, options.paris, options.sweeps
    )
    return ParticleGibbs(jnp.mean(estimates[options.burn_in :], 0), estimates, path), is_dead


def particle_gibbs(
    key: jax.Array,
    model: StateSpaceModel,
    observations: Any,
    n: int,
    functional: Functional,
    *,
    sweeps: int,
    burn_in: int,
    reference: Any = None,
    initial_functional: InitialFunctional | None = None,
    draws: int = 2,
    backward: str = "exact",
    max_trials: int | None = None,
    resample: str = "multinomial",
    observed: ArrayLike | None = None,
) -> ParticleGibbs:
    """The smoothed mean of an additive functional, its bias falling geometrically in the burn-in.

    The variance is about that of ``paris`` with ``n (sweeps - burn_in)`` particles. At the same
    total work the two tie for the first sweeps; the gap opens with the budget, as PaRIS's bias
    falls as 1 / n only. Several chains: ``vmap`` over keys.

    Args:
      key: a typed key.
      model: as in ``paris``.
      observations: as in ``paris``.
      n: number of particles with the reference, at least 2.
      functional: as in ``paris``.
      sweeps: how many.
      burn_in: sweeps that the estimate leaves out, fewer than ``sweeps``.
      reference: where to start, leaves ``(steps, *event)``; by default a path of one ``paris`` run,
        the work of one sweep more.
      initial_functional: as in ``paris``.
      draws: as in ``paris``.
      backward: as in ``paris``.
      max_trials: as in ``paris``.
      resample: scheme of the free slots, in its conditional version.
      observed: as in ``paris``.

    Returns:
      ``ParticleGibbs``.

    Raises:
      TypeError, ValueError: as ``conditional_paris``; ``burn_in >= sweeps``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = StateSpaceModel(
      ...     init=jax.random.normal,
      ...     transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
      ...     log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ...     log_transition=lambda x, x_next, t: -2.0 * (x_next - 0.9 * x) ** 2,
      ... )
      >>> y = jnp.array([0.3, 0.1, -0.4])
      >>> products = lambda x_prev, x_next, t: jnp.array([x_prev * x_next])
      >>> out = particle_gibbs(
      ...     jax.random.key(0), model, y, 10, products, sweeps=4, burn_in=1
      ... )
      >>> out.per_sweep.shape, out.reference.shape
      ((4, 1), (3,))
    """
    sweeps, burn_in = check_sweeps(sweeps, burn_in)
    inner = _paris.check_options(
        _paris.Options(
            model, functional, initial_functional, n, draws, backward, max_trials, resample, True
        )
    )
    steps = _filter._steps(observations)
    seen = _filter._observed(observed, (steps,))
    if reference is not None:
        reference = conditional.check_reference(model, reference, steps)
    out, is_dead = _particle_gibbs(
        keys_.check(key),
        observations,
        seen,
        reference,
        options=_Options(inner, sweeps, burn_in),
    )
    conditional.report_reference(is_dead)
    return out
