"""Conditional SMC with backward sampling, and backward sampling of a filter's paths (FFBS).

A conditional sweep (Andrieu, Doucet and Holenstein, JRSS B 2010) is a particle filter whose slot 0
follows a given path, the reference. The new path, drawn backwards (Whiteley's discussion of that
paper; Lindsten and Schon 2012),

    P(k_{T-1} = l) ~ w_{T-1}^l,    P(k_{t-1} = l) ~ w_{t-1}^l m_t(x_{t-1}^l, x_t^{k_t}),

leaves the smoothing law invariant for any number of particles from 2 on and for any resampling
scheme whose conditional version gives each slot its own marginal: the draw at ``t`` has integrated
out all that came after but the path itself. To follow the ancestors instead is valid too, and mixes
far worse: at early steps all lineages have met the reference's. FFBS is Godsill, Doucet and West
2004.
"""

import dataclasses
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import keys as keys_
from jaxgen.core.checks import concrete, debug_check, one_of, positive_int
from jaxgen.particles.conditioned import conditional_resample
from jaxgen.particles.resample import METHODS, take
from jaxgen.particles.resample import resample as resample_
from jaxgen.particles.weights import check_log_weights, ess, log_mean_exp
from jaxgen.smc import filter as _filter
from jaxgen.smc.backward import (
    backward_indices,
    check_backward,
    draw_index,
    logits_of,
    uniforms_for,
)
from jaxgen.smc.genealogy import trace
from jaxgen.smc.state_space import StateSpaceModel

__all__ = ["ConditionalSMC", "backward_sample", "conditional_smc", "ffbs"]

PATHS = ("backward", "ancestors")

# Up to here n draws of about sqrt(n) work each are cheaper than one pass of many steps.
_FEW = 2048


class ConditionalSMC(NamedTuple):
    """One conditional sweep.

    Attributes:
      path: the new path, leaves ``(steps, *event)``.
      x: particles at the last step, leaves ``(n, *event)``; slot 0 is the reference.
      log_weights: ``(n,)``, scaled to a mean weight of one.
      log_z: ``()``, the sweep's estimate of the log-likelihood; not unbiased, as the reference is
        given.
      ess: ``(steps,)``, effective sample size of each step's weights.
    """

    path: Any
    x: Any
    log_weights: jax.Array
    log_z: jax.Array
    ess: jax.Array


# --- what every sweep is made of ------------------------------------------------------------------


def _fixed_at(model: StateSpaceModel, z: Any) -> StateSpaceModel:
    """The model all of whose draws are ``z``: slot 0 is weighed by the code of every slot."""
    return dataclasses.replace(
        model,
        init=lambda key: z,
        transition=lambda key, x, t: z,
        propose=None if model.propose is None else lambda key, x, y, t: z,
        propose_init=None if model.propose_init is None else lambda key, y: z,
    )


def join(one: Any, rest: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), one, rest)


def first(
    key: jax.Array, model: StateSpaceModel, y: Any, n: int, observed: Any, reference: Any = None
) -> tuple[Any, jax.Array]:
    """Particles of step 0 and their log-weights; slot 0 is ``reference`` where there is one."""
    t = jnp.zeros((), jnp.int32)

    def draw(key: jax.Array, model: StateSpaceModel) -> tuple[Any, jax.Array]:
        return _filter._first(key, model, y, t, observed)

    if reference is None:
        out = jax.vmap(lambda k: draw(k, model))(_filter.particle_keys(key, n))
    else:
        free = jax.vmap(lambda k: draw(k, model))(_filter.particle_keys(key, n - 1))
        out = join(draw(key, _fixed_at(model, reference)), free)
    return jax.lax.stop_gradient(out)


def advance(
    key: jax.Array,
    model: StateSpaceModel,
    parents: Any,
    y: Any,
    t: jax.Array,
    observed: Any,
    reference: Any = None,
) -> tuple[Any, jax.Array]:
    """Children of ``parents``, slot by slot, with log-weights; slot 0 becomes ``reference``."""

    def move(key: jax.Array, x: Any, model: StateSpaceModel) -> tuple[Any, jax.Array]:
        return _filter._next(key, x, model, y, t, observed)

    n = jax.tree.leaves(parents)[0].shape[0]
    if reference is None:
        out = jax.vmap(lambda k, x: move(k, x, model))(_filter.particle_keys(key, n), parents)
    else:
        head, rest = (jax.tree.map(lambda a, i=i: a[i], parents) for i in (0, slice(1, None)))
        free = jax.vmap(lambda k, x: move(k, x, model))(_filter.particle_keys(key, n - 1), rest)
        out = join(move(key, head, _fixed_at(model, reference)), free)
    return jax.lax.stop_gradient(out)


def ancestors_of(
    key: jax.Array, log_weights: jax.Array, method: str, is_conditional: bool
) -> jax.Array:
    """Ancestors ``(n,)``; in a conditional sweep slot 0 keeps its own."""
    n = log_weights.shape[0]
    free = n - 1 if is_conditional else n
    if method == "multinomial" and n <= _FEW:
        # All independent: one short pass, and no order that anything depends on.
        ancestors = draw_index(uniforms_for(key, (free,), log_weights), log_weights)
    elif method == "multinomial" or not is_conditional:
        ancestors = resample_(key, log_weights, method=method, n=free)
    else:
        return conditional_resample(key, log_weights, method=method)
    if not is_conditional:
        return ancestors
    return jnp.concatenate([jnp.where(ancestors[:1] < n, 0, n), ancestors])


def settle(log_weights: jax.Array, log_z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-weights at a mean weight of one and the log-likelihood; NaN where no weight is left."""
    # Integer particles cannot be NaN, their weights can.
    total = log_mean_exp(log_weights) + jnp.where(jnp.isnan(log_z), jnp.nan, 0)
    is_sound = jnp.isfinite(total)
    debug_check(
        is_sound | jnp.isnan(log_z),
        "at step {t} every particle has weight zero, or a log-weight is NaN or +inf",
        t=t,
    )
    total = jnp.where(is_sound, total, jnp.nan)
    return log_weights - total, log_z + total


def check_model(model: Any, n: int, resample: str) -> int:
    """Raise what every sweep raises; ``n`` as an int."""
    if not isinstance(model, StateSpaceModel):
        raise TypeError(f"model is {type(model).__name__}; expected a StateSpaceModel")
    one_of("resample", resample, METHODS)
    return positive_int("n", n, least=2)


def check_reference(model: StateSpaceModel, reference: Any, steps: int) -> Any:
    """The reference as arrays of the particle's dtypes.

    Raises:
      ValueError: another structure, number of steps or event shape than the model's.
    """
    like = jax.eval_shape(model.init, jax.random.key(0))
    came = jax.tree.map(jnp.shape, reference)
    expected = jax.tree.map(lambda leaf: (steps, *leaf.shape), like)
    if came != expected:
        raise ValueError(
            f"reference has shapes {came}; expected {expected}, {steps} steps of one particle"
        )
    return jax.tree.map(lambda leaf, r: jnp.asarray(r, leaf.dtype), like, reference)


def report_reference(is_dead: jax.Array) -> None:
    """Warn of a reference of density zero where that is known, and tell ``checkify``."""
    message = "the reference has density zero under the model; the sweep does without it"
    debug_check(~is_dead, message)
    known = concrete(is_dead)
    if known is not None and known.any():
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def split_steps(*trees: Any) -> tuple[Any, Any]:
    """What belongs to step 0, and what to the others."""
    return tuple(
        jax.tree.map(lambda leaf, part=part: leaf[part], trees) for part in (0, slice(1, None))
    )


# --- paths from stored particles ------------------------------------------------------------------


def backward_sample(
    key: jax.Array,
    model: StateSpaceModel,
    x: Any,
    log_weights: ArrayLike,
    paths: int,
    *,
    backward: str = "exact",
    max_trials: int | None = None,
) -> Any:
    """Paths drawn backwards through the particles of every step.

    Given the particles the paths are independent.

    Args:
      key: a typed key.
      model: with ``log_transition``.
      x: particles, leaves ``(steps, n, *event)``.
      log_weights: ``(steps, n)``, in any normalisation.
      paths: how many.
      backward: ``"exact"`` or ``"rejection"``, as in ``backward_indices``.
      max_trials: as in ``backward_indices``.

    Returns:
      Leaves ``(steps, paths, *event)``; NaN from where a state had no parent.

    Raises:
      ValueError: ``paths < 1``, or as ``backward_indices``.
    """
    paths = positive_int("paths", paths)
    check_backward(model, 1, backward, max_trials)
    log_weights = jnp.asarray(log_weights)
    if log_weights.ndim != 2 or 0 in log_weights.shape:
        raise ValueError(f"log_weights has shape {log_weights.shape}; expected (steps, n)")
    steps = log_weights.shape[0]
    for leaf in jax.tree.leaves(x):
        if jnp.shape(leaf)[:2] != log_weights.shape:
            raise ValueError(
                f"x has a leaf of shape {jnp.shape(leaf)} for log_weights {log_weights.shape}"
            )
    keys = jax.random.split(keys_.check(key), steps)
    last = check_log_weights(log_weights[-1])
    index = draw_index(uniforms_for(keys[0], (paths,), last), last)
    end = take(jax.tree.map(lambda leaf: leaf[-1], x), index)

    def back(state: Any, inputs: Any) -> tuple[Any, Any]:
        key, x, log_weights, t = inputs
        index = backward_indices(
            key, model, x, log_weights, state, t, backward=backward, max_trials=max_trials
        )[:, 0]
        before = take(x, index)
        return before, before

    if steps == 1:
        return jax.tree.map(lambda leaf: leaf[None], end)
    before = jax.tree.map(lambda leaf: leaf[:-1], (x, log_weights))
    inputs = (keys[1:], *before, jnp.arange(1, steps, dtype=jnp.int32))
    _, earlier = jax.lax.scan(back, end, inputs, reverse=True)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), earlier, end)


@dataclasses.dataclass(frozen=True)
class _Ffbs:
    model: StateSpaceModel
    n: int
    paths: int
    resample: str
    ess_threshold: float
    backward: str
    max_trials: int | None


@_filter.compiled
def _ffbs(key: jax.Array, observations: Any, observed: Any, *, options: _Ffbs) -> Any:
    steps = _filter._steps(observations)
    key_forward, key_backward = jax.random.split(key)
    inputs = (keys_.fold(key_forward, steps), observations, observed)
    (key, y, seen), rest = split_steps(*inputs)
    state, _ = _filter.filter_init(key, options.model, y, options.n, observed=seen)

    def body(state: Any, inputs: Any) -> Any:
        key, y, seen = inputs
        state, _ = _filter.filter_step(
            key,
            options.model,
            state,
            y,
            resample=options.resample,
            ess_threshold=options.ess_threshold,
            observed=seen,
        )
        return state, (state.x, state.log_weights)

    _, after = jax.lax.scan(body, state, rest)
    x, log_weights = join((state.x, state.log_weights), after)
    return backward_sample(
        key_backward,
        options.model,
        x,
        log_weights,
        options.paths,
        backward=options.backward,
        max_trials=options.max_trials,
    )


def ffbs(
    key: jax.Array,
    model: StateSpaceModel,
    observations: Any,
    n: int,
    paths: int,
    *,
    resample: str = "systematic",
    ess_threshold: float = 1.0,
    observed: ArrayLike | None = None,
    backward: str = "exact",
    max_trials: int | None = None,
) -> Any:
    """Forward filtering, backward sampling: paths from the smoothing law, as n grows.

    Keeps the particles of all steps; the backward pass costs ``steps x n x paths`` exactly. A
    gradient through the paths knows nothing of how they were chosen: stop it.

    Args:
      key: a typed key.
      model: with ``log_transition``.
      observations: ``(steps, ...)``, any pytree with that leading axis.
      n: number of particles.
      paths: number of paths.
      resample: as in ``particle_filter``.
      ess_threshold: as in ``particle_filter``.
      observed: as in ``particle_filter``.
      backward: as in ``backward_indices``.
      max_trials: as in ``backward_indices``.

    Returns:
      Leaves ``(steps, paths, *event)``.

    Raises:
      TypeError, ValueError: as ``particle_filter`` and ``backward_sample``.

    Example:
      >>> import jax
      >>> model = StateSpaceModel(
      ...     init=jax.random.normal,
      ...     transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
      ...     log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ...     log_transition=lambda x, x_next, t: -2.0 * (x_next - 0.9 * x) ** 2,
      ... )
      >>> ffbs(jax.random.key(0), model, jax.numpy.zeros(3), n=100, paths=5).shape
      (3, 5)
    """
    n = check_model(model, n, resample)
    steps = _filter._steps(observations)
    check_backward(model, 1, backward, max_trials)
    options = _Ffbs(
        model, n, positive_int("paths", paths), resample, ess_threshold, backward, max_trials
    )
    seen = _filter._observed(observed, (steps,))
    return _ffbs(keys_.check(key), observations, seen, options=options)


# --- the conditional sweep ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Sweep:
    model: StateSpaceModel
    n: int
    resample: str
    path: str


@_filter.compiled
def _conditional_smc(
    key: jax.Array, observations: Any, observed: Any, reference: Any, *, options: _Sweep
) -> tuple[ConditionalSMC, jax.Array]:
    model, n = options.model, options.n
    steps = _filter._steps(observations)
    key_start, key_path, key = jax.random.split(key, 3)
    (y, seen, z), rest = split_steps(observations, observed, reference)
    zero = jnp.zeros((), jnp.int32)
    x, log_weights = first(key_start, model, y, n, seen, z)
    is_dead = jnp.isneginf(log_weights[0])
    log_weights, log_z = settle(log_weights, jnp.zeros((), log_weights.dtype), zero)
    start = (x, log_weights, log_z, is_dead)

    def body(state: Any, inputs: Any) -> Any:
        x, log_weights, log_z, is_dead = state
        key, t, (y, seen, z) = inputs
        key_parent, key_move = jax.random.split(key)
        parents = ancestors_of(key_parent, log_weights, options.resample, True)
        x_next, grown = advance(key_move, model, take(x, parents), y, t, seen, z)
        if options.path == "backward":
            best = jnp.max(logits_of(model, x, log_weights, z, t))
            grown = grown.at[0].set(jnp.where(jnp.isneginf(best), -jnp.inf, grown[0]))
        is_dead = is_dead | jnp.isneginf(grown[0])
        log_weights, log_z = settle(grown, log_z, t)
        state = (x_next, log_weights, log_z, is_dead)
        return state, (x_next, log_weights, parents)

    inputs = (keys_.fold(key, steps - 1), jnp.arange(1, steps, dtype=jnp.int32), rest)
    (x, log_weights, log_z, is_dead), after = jax.lax.scan(body, start, inputs)
    all_x, all_weights, parents = join((start[0], start[1], jnp.arange(n, dtype=jnp.int32)), after)
    if options.path == "backward":
        path = backward_sample(key_path, model, all_x, all_weights, 1)
        path = jax.tree.map(lambda leaf: leaf[:, 0], path)
    else:
        path = follow(key_path, all_x, parents, log_weights)
    sizes = jax.vmap(ess)(all_weights)
    return ConditionalSMC(path, x, log_weights, log_z, sizes), is_dead


def follow(key: jax.Array, x: Any, parents: jax.Array, log_weights: jax.Array) -> Any:
    """The path of a particle drawn by its last weight, along ``parents``.

    Args:
      key: a typed key.
      x: leaves ``(steps, n, *event)``.
      parents: int32 ``(steps, n)``; row 0 is not read.
      log_weights: ``(n,)``, of the last step.

    Returns:
      Leaves ``(steps, *event)``.
    """
    last = draw_index(uniforms_for(key, (1,), log_weights), log_weights)
    path = jax.vmap(take)(x, trace(parents, last))
    return jax.tree.map(lambda leaf: leaf[:, 0], path)


def conditional_smc(
    key: jax.Array,
    model: StateSpaceModel,
    observations: Any,
    reference: Any,
    n: int,
    *,
    resample: str = "multinomial",
    path: str = "backward",
    observed: ArrayLike | None = None,
) -> ConditionalSMC:
    """A new path from an old one, by a kernel that leaves the smoothing law invariant.

    Particles are resampled at each step. A model's ``log_auxiliary`` is not used.

    Args:
      key: a typed key.
      model: with ``log_transition`` where ``path="backward"``.
      observations: ``(steps, ...)``, any pytree with that leading axis.
      reference: the old path, leaves ``(steps, *event)``.
      n: number of particles with the reference, at least 2.
      resample: scheme of the free slots, in its conditional version.
      path: ``"backward"`` draws the new path backwards, ``"ancestors"`` follows the ancestors.
      observed: bool ``(steps,)``, false where the observation is missing.

    Returns:
      ``ConditionalSMC``. A reference of density zero gets weight zero: the sweep stays valid, with
      a ``RuntimeWarning`` (an error under ``checkify``). Where no weight is left all is NaN.

    Raises:
      TypeError: something else than a ``StateSpaceModel``.
      ValueError: ``n < 2``, an unknown scheme or ``path``, a reference of another length or event
        shape, or a model without ``log_transition``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = StateSpaceModel(
      ...     init=jax.random.normal,
      ...     transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
      ...     log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ...     log_transition=lambda x, x_next, t: -2.0 * (x_next - 0.9 * x) ** 2,
      ... )
      >>> y = jnp.array([0.3, 0.1, -0.4])
      >>> conditional_smc(jax.random.key(0), model, y, reference=jnp.zeros(3), n=10).path.shape
      (3,)
    """
    n = check_model(model, n, resample)
    one_of("path", path, PATHS)
    if path == "backward":
        model.require("log_transition", what='path="backward"')
    steps = _filter._steps(observations)
    seen = _filter._observed(observed, (steps,))
    reference = check_reference(model, reference, steps)
    options = _Sweep(model, n, resample, path)
    out, is_dead = _conditional_smc(
        keys_.check(key), observations, seen, reference, options=options
    )
    report_reference(is_dead)
    return out
