"""Parameters of a state-space model by stochastic approximation on the smoothed score.

Fisher's identity: the log-likelihood's gradient is the smoothed mean of an additive functional,

    grad log Z = E[ grad log p(x_0) + grad log g_0(x_0) + sum_t grad (log m_t + log g_t) | y ],

and ``particle_gibbs`` estimates that with a bias that dies geometrically in the sweeps. An ascent
keeps the reference path from one step to the next, so that the chain is warm (Cardoso et al., ICML
2023, arXiv 2301.00900). Markov score climbing (Naesseth, Lindsten and Blei, NeurIPS 2020, arXiv
2003.10374) is the same ascent on the law of the path under a variational family, the model being
fixed: it minimises KL(smoothing law || family). Both return Polyak and Ruppert's average, that of
the last half of the steps. No gradient goes through the sampler.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from jaxgen.core import keys as keys_
from jaxgen.core.checks import positive_int
from jaxgen.core.progress import meter
from jaxgen.smc import conditional
from jaxgen.smc import filter as _filter
from jaxgen.smc import paris as _paris
from jaxgen.smc.paris import Functional, InitialFunctional
from jaxgen.smc.particle_gibbs import check_sweeps, first_reference, sweep
from jaxgen.smc.state_space import StateSpaceModel

__all__ = ["Ascent", "fisher_functional", "markov_score_climbing", "score_ascent"]

# A run that shows its progress is cut into about this many pieces.
_PIECES = 50


class Ascent(NamedTuple):
    """An ascent's end.

    Attributes:
      theta: parameters, the average of the last half of ``history``.
      history: parameters after each step, leaves ``(steps, ...)``.
      score: ``(steps, D)``, each step's estimate of the score, before its move; parameters
        flattened in the order of ``jax.tree.leaves``.
      last: parameters after the last step.
      opt_state: the optimiser's state after the last step.
      reference: the last path, leaves ``(T, *event)``.
    """

    theta: Any
    history: Any
    score: jax.Array
    last: Any
    opt_state: Any
    reference: Any


def fisher_functional(
    model_of: Callable[[Any], StateSpaceModel],
    theta: Any,
    observations: Any,
    *,
    observed: ArrayLike | None = None,
) -> tuple[Functional, InitialFunctional]:
    """The additive functional whose smoothed mean is the gradient of the log-likelihood.

    Args:
      model_of: ``model_of(theta)`` makes the model, with ``log_init`` (a constant where the first
        state's law does not depend on ``theta``) and ``log_transition``.
      theta: any pytree of floating arrays.
      observations: ``(steps, ...)``, any pytree with that leading axis.
      observed: bool ``(steps,)``, false where the observation is missing.

    Returns:
      ``(functional, initial_functional)`` for ``paris`` and ``particle_gibbs``; D is the number
      of parameters, in the order of ``jax.flatten_util.ravel_pytree(theta)``.

    Raises:
      TypeError: ``theta`` has a leaf that is not floating, or ``model_of`` returned no model.
      ValueError: the model has no ``log_init`` or ``log_transition``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen.smc.paris import paris
      >>> def model_of(a):
      ...     return StateSpaceModel(
      ...         init=jax.random.normal,
      ...         transition=lambda key, x, t: a * x + 0.5 * jax.random.normal(key),
      ...         log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ...         log_transition=lambda x, x_next, t: -2.0 * (x_next - a * x) ** 2,
      ...         log_init=lambda x: 0.0,
      ...     )
      >>> y = jnp.array([0.3, 0.1, -0.4])
      >>> score, first = fisher_functional(model_of, 0.9, y)
      >>> out = paris(
      ...     jax.random.key(0), model_of(0.9), y, 50, score, initial_functional=first
      ... )
      >>> out.estimate.shape
      (1,)
    """
    seen = _filter._observed(observed, (_filter._steps(observations),))
    _require(model_of(theta), "model_of")
    return _fisher(model_of, theta, observations, seen)


def _require(model: Any, name: str) -> StateSpaceModel:
    if not isinstance(model, StateSpaceModel):
        raise TypeError(f"{name} returned {type(model).__name__}; expected a StateSpaceModel")
    model.require("log_init", "log_transition", what="the score")
    return model


def _flat(theta: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    for leaf in jax.tree.leaves(theta):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"theta has a leaf of dtype {jnp.result_type(leaf)}; expected floating")
    return ravel_pytree(theta)


def _fisher(
    model_of: Callable[[Any], StateSpaceModel],
    theta: Any,
    observations: Any,
    observed: Any,
    with_potential: bool = True,
) -> tuple[Functional, InitialFunctional]:
    flat, unravel = _flat(jax.lax.stop_gradient(theta))

    def potential(x: Any, t: jax.Array) -> jax.Array:
        if not with_potential:
            return jnp.zeros_like(flat)
        y, seen = jax.tree.map(lambda leaf: jnp.asarray(leaf)[t], (observations, observed))
        grad = jax.grad(lambda v: _real(model_of(unravel(v)).log_potential(x, y, t)))(flat)
        return grad if seen is None else jnp.where(seen, grad, 0)

    def functional(x_prev: Any, x_next: Any, t: jax.Array) -> jax.Array:
        def value(v: jax.Array) -> jax.Array:
            return _real(model_of(unravel(v)).log_transition(x_prev, x_next, t))  # type: ignore[misc]

        return jax.grad(value)(flat) + potential(x_next, t)

    def initial_functional(x: Any) -> jax.Array:
        def value(v: jax.Array) -> jax.Array:
            return _real(model_of(unravel(v)).log_init(x))  # type: ignore[misc]

        return jax.grad(value)(flat) + potential(x, jnp.int32(0))

    return functional, initial_functional


def _real(value: Any) -> jax.Array:
    # A constant may be a plain number, which has no gradient's dtype.
    return jnp.asarray(value, jnp.result_type(value, jnp.float32))


# --- the ascent -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is static in an ascent: the model at theta, and whose score is climbed."""

    model_of: Callable[[Any], StateSpaceModel]
    family_of: Callable[[Any], StateSpaceModel]
    with_potential: bool
    n: int
    steps: int
    sweeps: int
    burn_in: int
    draws: int
    backward: str
    max_trials: int | None
    resample: str
    optimizer: optax.GradientTransformation

    def options(self, theta: Any, observations: Any, observed: Any) -> _paris.Options:
        """A sweep's options at ``theta``."""
        functional, initial = _fisher(
            self.family_of, theta, observations, observed, self.with_potential
        )
        return _paris.Options(
            self.model_of(jax.lax.stop_gradient(theta)),
            functional,
            initial,
            self.n,
            self.draws,
            self.backward,
            self.max_trials,
            self.resample,
            True,
        )


@_filter.compiled
def _start(
    key: jax.Array, theta: Any, observations: Any, observed: Any, *, options: _Problem
) -> Any:
    return first_reference(
        key, observations, observed, options.options(theta, observations, observed)
    )


@_filter.compiled
def _climb(
    keys: jax.Array, state: Any, observations: Any, observed: Any, *, options: _Problem
) -> tuple[Any, Any]:
    def body(state: Any, key: jax.Array) -> tuple[Any, Any]:
        theta, opt_state, reference = state
        inner = options.options(theta, observations, observed)
        reference, estimates, _ = sweep(
            key, observations, observed, reference, inner, options.sweeps
        )
        score = jnp.mean(estimates[options.burn_in :], 0)
        # optax goes down, the likelihood is to go up.
        down = ravel_pytree(theta)[1](-score.astype(ravel_pytree(theta)[0].dtype))
        updates, opt_state = options.optimizer.update(down, opt_state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, opt_state, reference), (theta, score)

    return jax.lax.scan(body, state, keys)


def _ascend(
    key: jax.Array,
    problem: _Problem,
    theta: Any,
    observations: Any,
    observed: Any,
    reference: Any,
    progress: bool | Literal["bar"] | None,
) -> Ascent:
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), theta)
    flat, _ = _flat(theta)
    model = problem.model_of(theta)
    _paris.check_options(problem.options(theta, observations, observed))
    key_first, key = jax.random.split(keys_.check(key))
    if reference is None:
        reference = _start(key_first, theta, observations, observed, options=problem)
    else:
        reference = conditional.check_reference(model, reference, _filter._steps(observations))
    state = (theta, problem.optimizer.init(theta), reference)
    keys = keys_.fold(key, problem.steps)
    inputs = (key, flat, state, observations, observed)
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs))
    if progress is False or traced:
        state, (history, score) = _climb(keys, state, observations, observed, options=problem)
    else:
        pieces = []
        size = -(-problem.steps // _PIECES)
        with meter(problem.steps, description="ascent", enabled=progress) as shown:
            for at in range(0, problem.steps, size):
                piece = keys[at : at + size]
                state, kept = _climb(piece, state, observations, observed, options=problem)
                pieces.append(kept)
                shown.update(len(piece), score=float(jnp.linalg.norm(kept[1][-1])))
        history, score = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
    half = problem.steps // 2
    average = jax.tree.map(lambda leaf: jnp.mean(leaf[half:], axis=0), history)
    return Ascent(average, history, score, *state)


def score_ascent(
    key: jax.Array,
    model_of: Callable[[Any], StateSpaceModel],
    theta: Any,
    observations: Any,
    n: int,
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    sweeps: int = 2,
    burn_in: int = 1,
    reference: Any = None,
    draws: int = 2,
    backward: str = "exact",
    max_trials: int | None = None,
    resample: str = "multinomial",
    observed: ArrayLike | None = None,
    progress: bool | Literal["bar"] | None = False,
) -> Ascent:
    """Climb the likelihood of the parameters.

    Where the steps shrink like ``k ** -0.7`` and the score is unbiased the average converges to a
    local maximum; with a constant step it hovers there. Works under ``jit``, and by ``vmap`` over
    keys for several chains.

    Args:
      key: a typed key.
      model_of: ``model_of(theta)`` makes the model, with ``log_init`` and ``log_transition``.
      theta: where to start, any pytree of floating arrays, unconstrained.
      observations: ``(T, ...)``, any pytree with that leading axis.
      n: number of particles with the reference, at least 2.
      steps: steps of the ascent.
      optimizer: any optax transformation; ``optax.sgd(schedule)`` is Robbins and Monro.
      sweeps: Gibbs sweeps of each step.
      burn_in: sweeps of each step that its score leaves out, fewer than ``sweeps``.
      reference: a first path, leaves ``(T, *event)``; by default of one ``paris`` run.
      draws: as in ``paris``.
      backward: as in ``paris``.
      max_trials: as in ``paris``.
      resample: as in ``conditional_paris``.
      observed: bool ``(T,)``, false where the observation is missing.
      progress: as ``enabled`` of ``core.progress.meter``; ignored under tracing. Shown in pieces of
        the run, with the same result.

    Returns:
      ``Ascent``.

    Raises:
      TypeError, ValueError: as ``particle_gibbs`` and ``fisher_functional``; ``steps < 1``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def model_of(a):
      ...     return StateSpaceModel(
      ...         init=jax.random.normal,
      ...         transition=lambda key, x, t: a * x + 0.5 * jax.random.normal(key),
      ...         log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ...         log_transition=lambda x, x_next, t: -2.0 * (x_next - a * x) ** 2,
      ...         log_init=lambda x: 0.0,
      ...     )
      >>> y = jnp.array([0.3, 0.1, -0.4])
      >>> out = score_ascent(
      ...     jax.random.key(0), model_of, 0.5, y, 10, steps=3, optimizer=optax.sgd(0.01)
      ... )
      >>> out.history.shape, out.reference.shape
      ((3,), (3,))
    """
    sweeps, burn_in = check_sweeps(sweeps, burn_in)
    seen = _filter._observed(observed, (_filter._steps(observations),))
    _require(model_of(theta), "model_of")
    problem = _Problem(
        model_of,
        model_of,
        True,
        n,
        positive_int("steps", steps),
        sweeps,
        burn_in,
        draws,
        backward,
        max_trials,
        resample,
        optimizer,
    )
    return _ascend(key, problem, theta, observations, seen, reference, progress)


def markov_score_climbing(
    key: jax.Array,
    model: StateSpaceModel,
    family_of: Callable[[Any], StateSpaceModel],
    theta: Any,
    observations: Any,
    n: int,
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    sweeps: int = 2,
    burn_in: int = 1,
    reference: Any = None,
    draws: int = 2,
    backward: str = "exact",
    max_trials: int | None = None,
    resample: str = "multinomial",
    observed: ArrayLike | None = None,
    progress: bool | Literal["bar"] | None = False,
) -> Ascent:
    """Fit a Markov family of paths to the smoothing law by its inclusive Kullback divergence.

    Climbs the smoothed mean of ``log q(x_0) + sum_t log q_t(x_{t-1}, x_t)``. A family that contains
    the smoothing law's moments gets them; the exclusive divergence would get too small a spread.

    Args:
      key: a typed key.
      model: the state-space model whose smoothing law is fitted.
      family_of: ``family_of(theta)`` makes a model whose ``log_init`` and ``log_transition`` are
        the family's; the rest of it is not used.
      theta: where to start, any pytree of floating arrays, unconstrained.
      observations: as in ``score_ascent``.
      n: as in ``score_ascent``.
      steps: as in ``score_ascent``.
      optimizer: as in ``score_ascent``.
      sweeps: as in ``score_ascent``.
      burn_in: as in ``score_ascent``.
      reference: as in ``score_ascent``.
      draws: as in ``score_ascent``.
      backward: as in ``score_ascent``.
      max_trials: as in ``score_ascent``.
      resample: as in ``score_ascent``.
      observed: as in ``score_ascent``.
      progress: as in ``score_ascent``.

    Returns:
      ``Ascent``.

    Raises:
      TypeError, ValueError: as ``score_ascent``.
    """
    sweeps, burn_in = check_sweeps(sweeps, burn_in)
    seen = _filter._observed(observed, (_filter._steps(observations),))
    _require(family_of(theta), "family_of")
    problem = _Problem(
        _Constant(model),
        family_of,
        False,
        n,
        positive_int("steps", steps),
        sweeps,
        burn_in,
        draws,
        backward,
        max_trials,
        resample,
        optimizer,
    )
    return _ascend(key, problem, theta, observations, seen, reference, progress)


@dataclasses.dataclass(frozen=True)
class _Constant:
    """``f(theta) -> model``; equal for equal models, so that it compiles once."""

    model: StateSpaceModel

    def __call__(self, theta: Any) -> StateSpaceModel:
        return self.model
