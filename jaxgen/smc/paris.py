"""PaRIS: smoothed additive functionals with a few backward draws, at a memory constant in time.

Olsson and Westerborn, Bernoulli 2017; the conditional sweep is Cardoso, Janati El Idrissi, Le
Corff, Moulines and Olsson, ICML 2023 (arXiv 2301.00900). Wanted is the mean, given all
observations, of h = h_0(x_0) + sum_t h_t(x_{t-1}, x_t). Each particle carries a statistic b^i,
first h_0(x^i); for the particles x'^i of the next step, ``draws`` parents J are drawn backwards,
independently of the ancestors that made x'^i, and

    (1)  b'^i = mean over the J^{i,j} of  b^{J^{i,j}} + h_t(x^{J^{i,j}}, x'^i);
    (2)  estimate = sum_i W^i b^i.

From two draws on the variance grows linearly in the number of steps; with one, or along the
ancestors, with its square. A path along first draws J^{i,1} is one drawn by backward sampling. In
the conditional sweep slot 0 is a given path at every step, and takes part in everything else: given
the particles (2) is the mean of h(new path), so that the estimate is unbiased for any n >= 2 where
the reference is a draw from the smoothing law. The paper leaves the last observation out of its
target; here it is in, and so (2) is weighted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import keys as keys_
from jaxgen.core.arrays import varying_zeros
from jaxgen.core.checks import debug_check, floating
from jaxgen.particles.resample import take
from jaxgen.particles.weights import normalise
from jaxgen.smc import conditional
from jaxgen.smc import filter as _filter
from jaxgen.smc.backward import backward_indices, check_backward
from jaxgen.smc.state_space import StateSpaceModel

__all__ = [
    "Paris",
    "ParisState",
    "conditional_paris",
    "paris",
    "paris_estimate",
    "paris_init",
    "paris_step",
]

Functional = Callable[[Any, Any, jax.Array], jax.Array]
InitialFunctional = Callable[[Any], jax.Array]


class ParisState(NamedTuple):
    """What the next observation needs.

    Attributes:
      x: particles, leaves ``(n, *event)``.
      log_weights: ``(n,)``, scaled to a mean weight of one.
      statistic: ``(n, D)``, each particle's estimate of the functional of its past.
      log_z: ``()``, estimate of the log-likelihood so far.
      t: int32 ``()``, the step that the particles are at.
    """

    x: Any
    log_weights: jax.Array
    statistic: jax.Array
    log_z: jax.Array
    t: jax.Array


class Paris(NamedTuple):
    """A smoother's end.

    Attributes:
      estimate: ``(D,)``, of the functional's smoothed mean.
      statistic: ``(n, D)``, each last particle's own.
      log_weights: ``(n,)``, scaled to a mean weight of one.
      path: one path drawn by the last weights and along first backward draws, leaves ``(steps,
        *event)``; ``None`` where it was not asked for.
      log_z: ``()``, estimate of the log-likelihood; unbiased in the natural scale, unless there was
        a reference.
    """

    estimate: jax.Array
    statistic: jax.Array
    log_weights: jax.Array
    path: Any
    log_z: jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a smoother."""

    model: StateSpaceModel
    functional: Functional
    initial_functional: InitialFunctional | None
    n: int
    draws: int
    backward: str
    max_trials: int | None
    resample: str
    with_path: bool = False


def check_options(options: Options) -> Options:
    """The options as given.

    Raises:
      TypeError, ValueError: as ``paris``.
    """
    n = conditional.check_model(options.model, options.n, options.resample)
    check_backward(options.model, options.draws, options.backward, options.max_trials)
    size_of(options)
    return dataclasses.replace(options, n=n)


def size_of(options: Options) -> tuple[int, Any]:
    """The functional's ``D`` and dtype, float32 or wider."""
    like = jax.eval_shape(options.model.init, jax.random.key(0))
    t = jax.ShapeDtypeStruct((), jnp.int32)
    out = jax.eval_shape(options.functional, like, like, t)
    _check_value("functional", out, None)
    if options.initial_functional is not None:
        start = jax.eval_shape(options.initial_functional, like)
        _check_value("initial_functional", start, out.shape)
        return out.shape[0], jnp.result_type(out.dtype, start.dtype, jnp.float32)
    return out.shape[0], jnp.result_type(out.dtype, jnp.float32)


def _check_value(name: str, out: Any, shape: tuple[int, ...] | None) -> None:
    came = getattr(out, "shape", None)
    if came is None or len(came) != 1 or (shape is not None and came != shape):
        wanted = "(D,)" if shape is None else f"{shape}, as functional does"
        raise ValueError(f"{name} returned {out}; expected one array of shape {wanted}")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"{name} returned dtype {out.dtype}; expected a floating dtype")


# --- one step -------------------------------------------------------------------------------------


def start(
    key: jax.Array, y: Any, observed: Any, reference: Any, options: Options
) -> tuple[ParisState, jax.Array]:
    """Step 0, and whether the reference has density zero there."""
    # Hashed first: particles count up from the key, and so may the keys of a user's runs.
    _, key_move = jax.random.split(key)
    x, log_weights = conditional.first(key_move, options.model, y, options.n, observed, reference)
    size, dtype = size_of(options)
    if options.initial_functional is None:
        statistic = varying_zeros((options.n, size), dtype, log_weights)
    else:
        statistic = jax.vmap(options.initial_functional)(x).astype(dtype)
        statistic = statistic + varying_zeros((), dtype, log_weights)
    t = jnp.zeros((), jnp.int32)
    is_dead = jnp.isneginf(log_weights[0])
    log_weights, log_z = conditional.settle(log_weights, jnp.zeros((), log_weights.dtype), t)
    return ParisState(x, log_weights, statistic, log_z, t), is_dead


def step(
    key: jax.Array, state: ParisState, y: Any, observed: Any, reference: Any, options: Options
) -> tuple[ParisState, jax.Array, jax.Array]:
    """The next state, the first backward draws ``(n,)`` and whether the reference died."""
    key_parent, key_move, key_back = jax.random.split(key, 3)
    model, t = options.model, state.t + 1
    is_conditional = reference is not None
    ancestors = conditional.ancestors_of(
        key_parent, state.log_weights, options.resample, is_conditional
    )
    x, log_weights = conditional.advance(
        key_move, model, take(state.x, ancestors), y, t, observed, reference
    )
    parents = backward_indices(
        key_back,
        model,
        state.x,
        state.log_weights,
        x,
        t,
        draws=options.draws,
        backward=options.backward,
        max_trials=options.max_trials,
    )
    if is_conditional:
        # A reference that the model cannot reach is left behind.
        unreached = parents[0, 0] == options.n
        log_weights = log_weights.at[0].set(jnp.where(unreached, -jnp.inf, log_weights[0]))
    log_weights, log_z = conditional.settle(log_weights, state.log_z, t)
    is_lost = jnp.any((parents[:, 0] >= options.n) & ~jnp.isneginf(log_weights))
    debug_check(
        ~is_lost | jnp.isnan(log_z),
        "at step {t} a particle of positive weight has no parent: log_transition is -inf or NaN",
        t=t,
    )
    nan = jnp.where(is_lost, jnp.nan, 0).astype(log_weights.dtype)
    log_weights, log_z = log_weights + nan, log_z + nan
    dtype = state.statistic.dtype

    def one(x_next: Any, parents: jax.Array) -> jax.Array:
        def term(x: Any, b: jax.Array) -> jax.Array:
            return b + options.functional(x, x_next, t).astype(dtype)

        return jnp.mean(jax.vmap(term)(take(state.x, parents), take(state.statistic, parents)), 0)

    statistic = jax.vmap(one)(x, parents)
    return (
        ParisState(x, log_weights, statistic, log_z, t),
        parents[:, 0],
        jnp.isneginf(log_weights[0]),
    )


def paris_estimate(state: ParisState) -> jax.Array:
    """The smoothed functional at a state, ``(D,)``: equation (2).

    Args:
      state: where the smoother stands.
    """
    weights = jnp.exp(normalise(state.log_weights)).astype(state.statistic.dtype)[:, None]
    # A particle of weight zero counts for nothing, NaN though its statistic be.
    zero = jnp.zeros((), state.statistic.dtype)
    return jnp.sum(jnp.where(weights == 0, zero, weights * state.statistic), axis=0)


def run(
    key: jax.Array, observations: Any, observed: Any, reference: Any, options: Options
) -> tuple[Paris, jax.Array]:
    """All steps in a scan, and whether the reference has density zero."""
    steps = _filter._steps(observations)
    inputs = (keys_.fold(key, steps), (observations, observed, reference))
    (key_start, (y, seen, z)), rest = conditional.split_steps(*inputs)
    state, is_dead = start(key_start, y, seen, z, options)
    x_first = state.x

    def body(carry: Any, inputs: Any) -> Any:
        state, is_dead = carry
        key, (y, seen, z) = inputs
        state, parents, died = step(key, state, y, seen, z, options)
        return (state, is_dead | died), (state.x, parents) if options.with_path else None

    (state, is_dead), kept = jax.lax.scan(body, (state, is_dead), rest)
    path = None
    if options.with_path:
        here = jnp.arange(options.n, dtype=jnp.int32)
        x, parents = conditional.join((x_first, here), kept)
        last = jax.random.fold_in(key, steps)
        path = conditional.follow(last, x, parents, state.log_weights)
    out = Paris(paris_estimate(state), state.statistic, state.log_weights, path, state.log_z)
    return out, is_dead


# --- the public functions -------------------------------------------------------------------------


@_filter.compiled
def _paris(
    key: jax.Array, observations: Any, observed: Any, reference: Any, *, options: Options
) -> tuple[Paris, jax.Array]:
    return run(key, observations, observed, reference, options)


def paris(
    key: jax.Array,
    model: StateSpaceModel,
    observations: Any,
    n: int,
    functional: Functional,
    *,
    initial_functional: InitialFunctional | None = None,
    draws: int = 2,
    backward: str = "exact",
    max_trials: int | None = None,
    resample: str = "multinomial",
    observed: ArrayLike | None = None,
    path: bool = False,
) -> Paris:
    """The smoothed mean of an additive functional of the hidden path.

    Memory does not grow with the number of steps, unless a path is asked for. The results carry no
    gradient of the sampler's; for the likelihood's see ``fisher_functional``.

    Args:
      key: a typed key.
      model: with ``log_transition``; its ``log_auxiliary`` is not used. Compilations are kept for
        it and the functionals: make them once, or inside ``jit``.
      observations: ``(steps, ...)``, any pytree with that leading axis.
      n: number of particles, at least 2.
      functional: ``functional(x_prev, x_next, t) -> (D,)``, of one particle.
      initial_functional: ``initial_functional(x) -> (D,)``; zero by default.
      draws: backward draws of each particle; 2 or more, or the variance grows as the square of the
        number of steps.
      backward: ``"exact"``, ``n^2`` densities a step, or ``"rejection"``, which needs the model's
        ``log_transition_bound``; the same law.
      max_trials: rejection's trials of each draw before the exact one.
      resample: scheme of the particle filter.
      observed: bool ``(steps,)``, false where the observation is missing.
      path: keep the particles, ``steps x n``, and draw a path.

    Returns:
      ``Paris``. NaN where every weight is zero at a step or one is NaN, where a particle of
      positive weight has no parent, and where a density exceeds its bound; ``checkify`` tells
      which.

    Raises:
      TypeError: something else than a ``StateSpaceModel``, a functional of integer dtype.
      ValueError: ``n < 2``, ``draws < 1``, unknown names, a model without the functions needed, a
        functional of another shape than ``(D,)``.

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
      >>> paris(jax.random.key(0), model, y, 100, products).estimate.shape
      (1,)
    """
    options = check_options(
        Options(
            model, functional, initial_functional, n, draws, backward, max_trials, resample, path
        )
    )
    seen = _filter._observed(observed, (_filter._steps(observations),))
    return _paris(keys_.check(key), observations, seen, None, options=options)[0]


def conditional_paris(
    key: jax.Array,
    model: StateSpaceModel,
    observations: Any,
    reference: Any,
    n: int,
    functional: Functional,
    *,
    initial_functional: InitialFunctional | None = None,
    draws: int = 2,
    backward: str = "exact",
    max_trials: int | None = None,
    resample: str = "multinomial",
    observed: ArrayLike | None = None,
) -> Paris:
    """One sweep of the PaRIS Gibbs sampler: an estimate, and the next reference as ``path``.

    Where the reference is a draw from the smoothing law so is the path, and the estimate is
    unbiased for every ``n >= 2`` and ``draws >= 1``.

    Args:
      key: a typed key.
      model: as in ``paris``.
      observations: as in ``paris``.
      reference: the last path, leaves ``(steps, *event)``.
      n: number of particles with the reference, at least 2.
      functional: as in ``paris``.
      initial_functional: as in ``paris``.
      draws: as in ``paris``.
      backward: as in ``paris``.
      max_trials: as in ``paris``.
      resample: scheme of the free slots, in its conditional version.
      observed: as in ``paris``.

    Returns:
      ``Paris``. A reference of density zero gets weight zero: the sweep stays valid, with a
      ``RuntimeWarning`` (an error under ``checkify``).

    Raises:
      TypeError, ValueError: as ``paris``; a reference of another length or event shape.
    """
    options = check_options(
        Options(
            model, functional, initial_functional, n, draws, backward, max_trials, resample, True
        )
    )
    steps = _filter._steps(observations)
    seen = _filter._observed(observed, (steps,))
    reference = conditional.check_reference(model, reference, steps)
    out, is_dead = _paris(keys_.check(key), observations, seen, reference, options=options)
    conditional.report_reference(is_dead)
    return out


@_filter.compiled
def _paris_init(key: jax.Array, y: Any, observed: Any, *, options: Options) -> ParisState:
    return start(key, y, observed, None, options)[0]


def paris_init(
    key: jax.Array,
    model: StateSpaceModel,
    y: Any,
    n: int,
    functional: Functional,
    *,
    initial_functional: InitialFunctional | None = None,
    observed: ArrayLike | None = None,
) -> ParisState:
    """Step 0 of a smoother that is fed one observation at a time.

    With ``key = fold_in(k, 0)``, and ``fold_in(k, t)`` for step ``t``, the steps equal
    ``paris(k, ...)``.

    Args:
      key: a typed key.
      model: as in ``paris``.
      y: the first observation, any pytree.
      n: number of particles, at least 2.
      functional: as in ``paris``; only its shape is read.
      initial_functional: as in ``paris``.
      observed: bool ``()``, false where ``y`` is missing.

    Raises:
      TypeError, ValueError: as ``paris``.
    """
    options = check_options(
        Options(model, functional, initial_functional, n, 1, "exact", None, "multinomial")
    )
    return _paris_init(keys_.check(key), y, _filter._observed(observed, ()), options=options)


@_filter.compiled
def _paris_step(
    key: jax.Array, state: ParisState, y: Any, observed: Any, *, options: Options
) -> ParisState:
    return step(key, state, y, observed, None, options)[0]


def paris_step(
    key: jax.Array,
    model: StateSpaceModel,
    state: ParisState,
    y: Any,
    functional: Functional,
    *,
    draws: int = 2,
    backward: str = "exact",
    max_trials: int | None = None,
    resample: str = "multinomial",
    observed: ArrayLike | None = None,
) -> ParisState:
    """One observation more; ``paris_estimate`` of the state is the smoothed functional so far.

    Args:
      key: a typed key, another for each step.
      model: as in ``paris``.
      state: where the smoother stands.
      y: the next observation, any pytree.
      functional: as in ``paris``; it may close over ``y``.
      draws: as in ``paris``.
      backward: as in ``paris``.
      max_trials: as in ``paris``.
      resample: as in ``paris``.
      observed: bool ``()``, false where ``y`` is missing.

    Raises:
      TypeError, ValueError: as ``paris``; ``state`` does not hold one log-weight and one statistic
        of the functional's size for each particle.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = StateSpaceModel(
      ...     init=jax.random.normal,
      ...     transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
      ...     log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ...     log_transition=lambda x, x_next, t: -2.0 * (x_next - 0.9 * x) ** 2,
      ... )
      >>> total = lambda x_prev, x_next, t: jnp.array([x_next])
      >>> state = paris_init(jax.random.key(0), model, 0.3, 100, total)
      >>> state = paris_step(jax.random.key(1), model, state, 0.1, total)
      >>> paris_estimate(state).shape, int(state.t)
      ((1,), 1)
    """
    log_weights = floating("state.log_weights", state.log_weights)
    n = log_weights.shape[0] if log_weights.ndim == 1 else 0
    options = check_options(
        Options(model, functional, None, n, draws, backward, max_trials, resample)
    )
    size = size_of(options)[0]
    sizes = [jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(state.x)]
    if jnp.shape(state.statistic) != (n, size) or any(s != (n,) for s in sizes):
        raise ValueError(
            f"state holds {n} log-weights, a statistic {jnp.shape(state.statistic)} and particles "
            f"with leading axes {sizes}; expected ({n}, {size}) and ({n},)"
        )
    state = ParisState(*(_filter._strong(part) for part in state))
    return _paris_step(keys_.check(key), state, y, _filter._observed(observed, ()), options=options)
