r"""Steering a diffusion while it samples: weighted particles next to the reverse SDE.

Skreta et al., "Feynman-Kac correctors in diffusion", ICML 2025, arXiv 2503.02819, derived here with
the noise level z free, a reward at any z, and density weights for any z.

In y = (x - mu)/alpha and u = (sigma/alpha)^2 every ``LinearSDE`` is dy = dW over du, and a density
with score s obeys d_u log q = (1/2)(div s + |s|^2). The target (``target``) is

    p_u = prod_i q_i^{b_i} e^h,    S = sum_i b_i s_i,    h = c R,    B = sum_i b_i           (1)

Let u fall, tau = u_0 - u. Particles that follow dy = v dtau + sqrt(z) dW with log-weights d log w =
G dtau have the weighted law p if G = d_tau log p + div v + v . grad log p - (z/2)(lap log p +
|grad log p|^2). Of all drifts

    v = ((1 + z)/2) S + (z/2) grad h                                                         (2)

is the one for which every second derivative cancels, at every z:

    G = (1/2)(|S|^2 - sum_i b_i |s_i|^2) + (1/2) S . grad h + (d_tau h at fixed y)
        + sum_i (d_tau b_i) log q_i                                                          (3)

(z = 1 is the paper's target-score SDE, 1/b its tempered noise, 0 the ODE.) From noise predictions
e_i = -sqrt(u) s_i and E = sum_i b_i e_i, u G = (1/2)(|E|^2 - sum_i b_i |e_i|^2) has no division.

*Step u -> v.* With S = -B (y - m)/u and m held, (2) is linear and is solved exactly: with c = (1 +
z)/2, L = log(v/u), phi(a) = (e^a - 1)/a and p = 2 c B - 1,

    y' = y + sqrt(u) E c L phi(c B L) - (z/2) grad h v L phi((c B - 1) L) + sqrt(w) n
    w = -z v L phi(p L)                                                                      (4)

Log-weights are the integral of u G over log u by the trapezoid rule along the path.

*Density weights*, where the log q_i are known: with the kernel K of (4) and any kernel M back,
log p_v(y') - log p_u(y) + log M(y | y') - log K(y' | y) is exact at any step size. M is the reverse
of (2), drift ((z - 1)/2) S + (z/2) grad h and noise z as u grows, solved like (4) from y'; for z =
1 without a reward it is the noising kernel N(y', (u - v) I). (At any other z the noising kernel has
another variance than K, whose ratio does not vanish with the step.)

*Choosing z.* Far from the data all is Gaussian. The particles' law, of variance z u/((1 + z) B - 1)
without weights, covers p, of variance u/B, only if z > 1 - 1/B. But the final particles descend
from those of a law of variance z u/((z - 1) B + 1), and that has finite variance under p, so that
errors fall as n^(-1/2), only if z > 2 - 2/B: 1 will do for B < 2, 2 for every B. With less, start
lower: at z = 1 and B > 2 below (sigma/alpha)^2 = 1/(B - 2) times the data's own variance.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import (
    at_least_f32,
    cast_coefficient,
    event_size,
    matmul,
    sum_event,
)
from jaxgen.particles.resample import METHODS, maybe_resample
from jaxgen.particles.weights import ess, log_mean_exp
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field
from jaxgen.smc.feynman_kac_step import (
    Level,
    Pending,
    Run,
    evaluate,
    increment,
    known_log_probs,
    levels,
    move,
    raw,
)
from jaxgen.smc.target import Density, Target, as_target, per_particle, predictions_of
from jaxgen.solve.grids import finite_ends, make_grid
from jaxgen.solve.meter import Ticker
from jaxgen.solve.noise import sample_keys
from jaxgen.solve.path import AHEAD, fold_each, normals
from jaxgen.solve.terms import arrays_of

__all__ = ["WEIGHTS", "FeynmanKac", "feynman_kac"]

WEIGHTS = ("left", "trapezoid", "density", "none")

# The interval that no grid has: its increment is the noise of the first particles.
_START = np.uint32(2**32 - 1)

Init = str | ArrayLike | Callable[[jax.Array, tuple[int, ...]], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeynmanKac:
    """Weighted particles of one population, and how they came about.

    Attributes:
      x: particles, of the shape and dtype asked for.
      log_weights: unnormalised, ``(n,)``; zeros right after resampling.
      log_z: log of the integral of ``prod_i q_i^{b_i} e^{c R}`` at the last time, ``()``; NaN for
        ``weights="none"``.
      ess: effective sample size after each step, before it is resampled, ``(steps,)``.
      resampled: whether it then was, ``(steps,)``; never after the last step.
      ancestors: int32 ``(steps, n)``: the particle before that resampling which each one is.
      observed: what ``observe`` returned after each step, ``(steps, ...)``; ``None`` without it.
      nfe: evaluations of fields for one particle, all fields counted, int32 ``()``.
      times: the grid, ``(steps + 1,)``.
      weights: what the log-weights are (static).
      resample: the scheme, ``None`` without (static).
      prediction: what the fields predict (static).
      steps: intervals of the grid (static).
      grid: its name, ``"array"`` for a given one (static).
    """

    x: jax.Array
    log_weights: jax.Array
    log_z: jax.Array
    ess: jax.Array
    resampled: jax.Array
    ancestors: jax.Array
    observed: Any
    nfe: jax.Array
    times: jax.Array
    weights: str = dataclasses.field(metadata={"static": True})
    resample: str | None = dataclasses.field(metadata={"static": True})
    prediction: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    steps: int = dataclasses.field(metadata={"static": True})
    grid: str = dataclasses.field(metadata={"static": True})


class _Often(NamedTuple):
    """How and when particles are resampled."""

    method: str | None
    threshold: float
    allowed: Any = None  # at each knot, (steps + 1,)


# --- first particles ------------------------------------------------------------------------------


def _begin(
    run: Run,
    key: jax.Array,
    numbered: jax.Array,
    init: Init,
    level: Level,
    last: Level,
    shape: tuple[int, ...],
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First particles as ``y``, their log-weights, and what is to be added to ``log_z``."""
    total, final, size = jnp.sum(level.exponents), jnp.sum(last.exponents), run.size
    # Densities of x from those of y.
    at_start, at_end = size * (1 - total) * level.log_alpha, size * (1 - final) * last.log_alpha
    if run.by_potential:
        at_end = at_start
    if isinstance(init, str):
        n = normals(fold_each(numbered, jnp.asarray(_START)), shape[1:], dtype)
        variance = level.root**2 / total
        y = cast_coefficient(jnp.sqrt(variance), n) * n
        if run.log_probs is None:
            weights = jnp.zeros_like(n, shape=shape[:1])
            log_2pi_u = math.log(2 * math.pi) + level.log_u
            log_z = size / 2 * ((1 - total) * log_2pi_u - jnp.log(total)) + at_end
        else:
            own = matmul(known_log_probs(run, level, raw(run, level, y)), level.exponents)
            log_normal = -0.5 * sum_event(n**2) - size / 2 * jnp.log(2 * math.pi * variance)
            weights, log_z = own - log_normal, at_end
        if run.target.reward is not None:
            weights = weights + level.tilt * per_particle(
                run.target.reward(raw(run, level, y)), y, "reward"
            )
        return y, _like_particles(weights, y), log_z
    if callable(init):
        own_key = key
        if run.axis_name is not None:
            own_key = jax.random.fold_in(key, jax.lax.axis_index(run.axis_name))
        made = init(own_key, shape)
    else:
        made = init
    x, weights = made if isinstance(made, tuple) else (made, None)
    x = checks.floating("init", x).astype(dtype)
    if x.shape != shape:
        raise ValueError(f"init has shape {x.shape}; expected {shape}")
    mu = run.sde.centre(x)
    y = (x if mu is None else (x - mu).astype(dtype)) / cast_coefficient(level.alpha, x)
    weights = jnp.zeros(shape[:1]) if weights is None else per_particle(weights, x, "init weights")
    return y, _like_particles(weights.astype(at_least_f32(dtype)), y), at_end - at_start


def _like_particles(weights: jax.Array, y: jax.Array) -> jax.Array:
    """Weights laid out, and varying over mesh axes, as the particles are."""
    # Never taken, but what follows depends on y all the same.
    return weights + jnp.where(False, sum_event(y), 0.0).astype(weights.dtype)


# --- checks ---------------------------------------------------------------------------------------


def _total(target: Target, t: Any) -> float | None:
    """B at a time, where it is known."""
    if checks.concrete(t) is None:
        return None
    with jax.ensure_compile_time_eval():
        values = [b(jnp.asarray(t, jnp.float32)) if callable(b) else b for b in target.exponents]
        known = [checks.concrete(v) for v in values]
    if any(v is None for v in known):
        return None
    return float(sum(float(v) for v in known if v is not None))


def _check_noise(
    noise: Any, totals: Sequence[float | None], weights: str, resample: str | None
) -> None:
    if jnp.shape(noise) != ():
        raise ValueError(f"noise has shape {jnp.shape(noise)}; expected a number")
    known = checks.concrete(noise)
    if known is None:
        return
    z = float(known)
    if not z >= 0 or not math.isfinite(z):
        raise ValueError(f"noise is {z:g}; expected a finite number of at least 0")
    if z == 0 and weights == "density":
        raise ValueError('noise is 0, where steps have no density; expected more for "density"')
    if weights == "none":
        return
    if z == 0 and resample is not None:
        warnings.warn(
            "noise is 0 and particles are resampled: copies never separate; expected noise > 0, or "
            "resample=None",
            stacklevel=3,
        )
        return
    for total in totals:
        if total is not None and total > 0 and z <= 1 - 1 / total:
            warnings.warn(
                f"noise is {z:g}; with exponents that sum to {total:g} the log-weights far from "
                f"the data have finite variance only above {1 - 1 / total:g}: expect wrong answers "
                f"of small spread; more than {2 - 2 / total:g} is safe",
                stacklevel=3,
            )
            return


def _check_init(init: Init, totals: Sequence[float | None]) -> None:
    if not isinstance(init, str):
        return
    checks.one_of("init", init, ("scaled_prior",))
    if totals[0] is not None and not totals[0] > 0:
        raise ValueError(
            f"the exponents sum to {totals[0]:g}, for which there is no scaled prior; expected "
            "more than 0, or init=a function (key, shape) -> particles or (particles, log-weights)"
        )


def _check_window(window: Any, sde: LinearSDE) -> tuple[Any, Any] | None:
    if window is None:
        return None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window is {window!r}; expected two times (low, high)")
    known = [checks.concrete(v) for v in (*window, sde.t_min, sde.t_max)]
    if any(v is None for v in known):
        return window[0], window[1]
    low, high, first, last = (float(v) for v in known if v is not None)
    ends = [end for end in sde.ends or () if math.isfinite(end)]
    first, last = min([first, *ends]), max([last, *ends])
    slack = 1e-6 * (last - first)
    if not (first - slack <= low < high <= last + slack):
        raise ValueError(
            f"window is ({low:g}, {high:g}); expected rising times within [{first:g}, {last:g}]"
        )
    return window[0], window[1]


def _check_counts(
    shape: tuple[int, ...], resample: str | None, every: int | None, threshold: Any, count: int
) -> None:
    if resample is not None:
        checks.one_of("resample", resample, METHODS)
        if count < 2:
            raise ValueError(
                f"shape is {shape}: one particle has nothing to be resampled with; expected at "
                "least 2, or resample=None"
            )
    elif every is not None:
        raise ValueError(f"resample_every is {every} and resample None; expected a scheme")
    if every is not None:
        checks.positive_int("resample_every", every)
    if isinstance(threshold, bool) or not 0 < threshold <= 1:
        raise ValueError(f"ess_threshold is {threshold!r}; expected a number in (0, 1]")


# --- the sampler ----------------------------------------------------------------------------------


def feynman_kac(
    key: jax.Array,
    targets: Target | Sequence[tuple[Field, Any]],
    sde: LinearSDE,
    shape: tuple[int, ...],
    *,
    steps: int | None = None,
    resample: str | None = "systematic",
    ess_threshold: float = 0.9,
    resample_every: int | None = None,
    window: tuple[float, float] | None = None,
    noise: ArrayLike = 1.0,
    weights: str = "trapezoid",
    prediction: str | Sequence[str] = "noise",
    grid: str | ArrayLike = "karras",
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
    log_probs: Sequence[Density] | None = None,
    init: Init = "scaled_prior",
    clip: float | None = None,
    observe: Callable[[jax.Array, jax.Array, jax.Array], Any] | None = None,
    progress: bool | None = None,
    dtype: DTypeLike | None = None,
    axis_name: str | None = None,
) -> FeynmanKac:
    """Sample a product of powers of diffusions' densities, or a tilted one (module docstring).

    Weighted particles: expectations are ``softmax(log_weights) @ f(x)``; for equal weights resample
    them by ``smc.resample``.

    Args:
      key: typed key; particle ``i`` draws its noise from keys folded with ``i``.
      targets: a ``Target``, or pairs of a field and its exponent.
      sde: the process that all fields belong to; an anchor ``mu`` is one for all particles.
      shape: ``(n, *event)``: n particles of one population; ``vmap`` over keys for many.
      steps: intervals of the grid; an array's length if ``None``.
      resample: a scheme of ``smc.resample``, or ``None`` for weights alone.
      ess_threshold: resample where the effective sample size is below this share of n.
      resample_every: resample after every so many steps instead.
      window: ``(low, high)``: times within which particles are resampled; always if ``None``.
      noise: z >= 0; 1 is safe for exponents that sum to less than 2, and 2 for every target; more
        lowers the variance of the weights and needs more steps. Warns at or below 1 - 1/B (module
        docstring, choosing z).
      weights: ``"trapezoid"``; ``"left"`` (more bias); ``"density"``, with ``log_probs``, for which
        ``exp(log_z)`` is unbiased at any step size, and of finite variance where every step keeps
        more than about half of (sigma/alpha)^2; ``"none"`` for the uncorrected sampler.
      prediction: what the fields predict, one kind or one for each.
      grid: see ``sample``; the first time must have alpha > 0, the last sigma > 0. Weights that are
        spent where all is noise are wasted: start no higher than needed.
      t_start: first time; ``t_max`` if ``None``.
      t_end: last time; the process' ``t_end`` if ``None``.
      log_probs: ``(x, t) -> (n,)`` for each field, its log-density at time ``t``. With them first
        particles are weighted too, so that ``log_z`` does not depend on how far up they start.
      init: ``"scaled_prior"``, N(mu, sigma^2/B) at the first time; particles there, or ``f(key,
        shape)`` that gives them; or particles and their log-weights, log of the unnormalised target
        over the density that they are drawn from. With particles alone ``log_z`` is relative to the
        target's integral at the first time.
      clip: bound on each step's log-weight about its mean over particles, as released image code
        has it; biased.
      observe: ``f(x, log_weights, t)`` of the particles after each step, before they are resampled,
        such as a mean or a few of them.
      progress: ``True`` shows a meter.
      dtype: of the particles; float32 if ``None``. The state is kept in float32 or wider, and the
        fields are called in ``dtype``.
      axis_name: inside ``shard_map``, the mesh axis that the particles are split over; ``shape`` is
        then the device's own, the key the same on all, and what is not per particle is of them all.

    Returns:
      A ``FeynmanKac``. Each step calls each field once, and weights at the end of a step
      (trapezoid, density) once more at the last time.

    A field, density or reward that is not finite gives that particle a NaN weight, an error under
    ``checkify``; nothing is resampled from then on, and ``log_z`` is NaN.

    Raises:
      ValueError: shapes that do not fit; unknown names; exponents that sum to 0 or less without an
        ``init``; exponents of time, or ``weights="density"``, without ``log_probs``; a negative
        noise, or none with density weights; a threshold outside (0, 1]; a window or times outside
        the process; one particle to resample; a first time where alpha is 0 or a last time where
        sigma is (where they are known; NaN if not).
      TypeError: a raw key, an integer or complex dtype, or targets that are none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> sde = process.ve(sigma_max=10.0)
      >>> field = score.closed_form.gaussian(sde, jnp.zeros(2), 1.0).noise
      >>> out = feynman_kac(jax.random.key(0), [(field, 2.0)], sde, (256, 2), steps=20)
      >>> out.x.shape, int(out.nfe)
      ((256, 2), 21)
    """
    keys.check(key)
    target = as_target(targets)
    predictions = predictions_of(target, prediction)
    checks.one_of("weights", weights, WEIGHTS)
    shape = tuple(shape)
    if len(shape) < 1 or shape[0] < 1:
        raise ValueError(f"shape is {shape}; expected (n, *event) with at least one particle")
    if weights == "none":
        resample, resample_every = None, None
    split = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    _check_counts(shape, resample, resample_every, ess_threshold, shape[0] * split)
    window = _check_window(window, sde)
    if log_probs is not None:
        if callable(log_probs):
            raise TypeError("log_probs is a function; expected a list of them, one for each field")
        log_probs = tuple(log_probs)
        if len(log_probs) != len(target.fields):
            raise ValueError(
                f"log_probs has {len(log_probs)} functions for {len(target.fields)} fields"
            )
    elif weights == "density":
        raise ValueError('weights is "density" and log_probs None; expected one for each field')
    elif target.is_varying and weights != "none":
        raise ValueError(
            "an exponent is a function of time, whose weights need the fields' densities; expected "
            "log_probs"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip!r}; expected a number above 0")
    dtype = checks.floating(
        "dtype", np.zeros((), jnp.result_type(float) if dtype is None else dtype)
    )
    dtype = dtype.dtype
    wide = at_least_f32(dtype)
    if isinstance(grid, str):
        steps = checks.positive_int("steps", steps)
    times = make_grid(grid, sde, steps, t_start=t_start, t_end=t_end, dtype=wide)
    if times.ndim != 1:
        raise ValueError(f"t_start has shape {times.shape[1:]}; expected one time for all")
    ends = finite_ends(sde, grid, t_start, t_end)
    for name, is_fine, what in zip(("first", "last"), ends, ("alpha", "sigma"), strict=True):
        if is_fine is False:
            raise ValueError(
                f"the {name} time is a proper end, where {what} is 0; expected times within "
                f"[{sde.t_min}, {sde.t_max}] for weights"
            )
    first, last = (
        (sde.t_max if t_start is None else t_start),
        (sde.t_end if t_end is None else t_end),
    )
    totals = [_total(target, t) for t in (first, last)]
    _check_noise(noise, totals, weights, resample)
    _check_init(init, totals)
    mu = sde.centre(jax.ShapeDtypeStruct(shape, wide))  # type: ignore[arg-type]
    if mu is not None and mu.shape[0] != 1:
        raise ValueError(f"sde.mu has shape {mu.shape}; expected one anchor for {shape[1:]}")
    known, z = checks.concrete(noise), jnp.asarray(noise, wide)
    run = Run(
        target,
        arrays_of(sde),
        predictions,
        log_probs,
        weights,
        jnp.where(z > 0 if weights == "density" else z >= 0, z, jnp.nan),
        known is None or bool(known != 0),
        clip,
        event_size(shape),
        dtype if dtype != wide else None,
        axis_name,
    )
    often = _Often(resample, 1.0 if resample_every else ess_threshold)
    often = often._replace(allowed=_when(times, window, resample, resample_every))
    tick = Ticker(times.shape[0] - 1, "feynman_kac") if progress else None
    out = _drive(run, key, shape, times, init, often, observe, tick)
    return FeynmanKac(
        **{**out, "x": out["x"].astype(dtype)},
        times=times,
        weights=weights,
        resample=resample,
        prediction=predictions,
        steps=times.shape[0] - 1,
        grid=grid if isinstance(grid, str) else "array",
    )


def _when(
    times: jax.Array, window: tuple[Any, Any] | None, resample: str | None, every: int | None
) -> jax.Array:
    """Knots at which particles may be resampled, ``(steps + 1,)``."""
    n = jnp.arange(times.shape[0])
    allowed = (n > 0) & (n < times.shape[0] - 1) & (resample is not None)
    if every is not None:
        allowed &= n % every == 0
    if window is not None:
        allowed &= (times >= window[0]) & (times <= window[1])
    return allowed


class _Settled(NamedTuple):
    """Particles and weights after a knot's resampling, and what is told of it."""

    tree: Any
    log_weights: jax.Array
    gain: jax.Array
    ess: jax.Array
    resampled: jax.Array
    ancestors: jax.Array


def _settle(
    run: Run, often: _Often, key: jax.Array, n: jax.Array, tree: Any, log_weights: jax.Array
) -> _Settled:
    """Resample at knot ``n`` where it is due."""
    size = ess(log_weights, axis_name=run.axis_name)
    if often.method is None:
        count = log_weights.shape[0]
        stay = _first(run, count) + jnp.arange(count, dtype=jnp.int32)
        never = jnp.zeros((), bool)
        return _Settled(tree, log_weights, jnp.zeros_like(size), size, never, stay)
    # A weight that is not a number stays with its particle, to be seen.
    due = often.allowed[n] & ~jnp.isnan(size)
    done = maybe_resample(
        jax.random.fold_in(key, n),
        tree,
        log_weights,
        method=often.method,
        threshold=often.threshold,
        when=due,
        axis_name=run.axis_name,
    )
    return _Settled(
        done.x, done.log_weights, done.log_z_increment, size, done.resampled, done.ancestors
    )


def _first(run: Run, count: int) -> jax.Array:
    """Number of the first particle held here."""
    if run.axis_name is None:
        return jnp.zeros((), jnp.int32)
    return jnp.asarray(count * jax.lax.axis_index(run.axis_name), jnp.int32)


def _blank(run: Run, y: jax.Array) -> Pending | None:
    """The pending step before the first one."""
    if not run.waits:
        return None
    none = _like_particles(jnp.zeros(y.shape[:1], y.dtype), y)

    def zeros(is_used: bool) -> jax.Array | None:
        return none if is_used else None

    if run.weights == "density":
        return Pending(None, None, None, None, jnp.zeros_like(y), zeros(True))
    by_fields = not run.by_potential
    has_logs = by_fields and run.target.is_varying
    has_reward = by_fields and run.target.reward is not None
    return Pending(
        zeros(True),
        jnp.stack([none] * len(run.target.fields), -1) if has_logs else None,
        zeros(has_reward),
        zeros(has_reward),
        None,
        None,
    )


def _drive(
    run: Run,
    key: jax.Array,
    shape: tuple[int, ...],
    times: jax.Array,
    init: Init,
    often: _Often,
    observe: Any,
    tick: Ticker | None,
) -> dict[str, Any]:
    """The scan over the grid."""
    steps, event, dtype = times.shape[0] - 1, shape[1:], times.dtype
    key_init, key_noise, key_resample = jax.random.split(key, 3)
    numbered = sample_keys(key_noise, shape[:1], _first(run, shape[0]))
    knots = levels(run, times)

    def at(index: Any) -> Level:
        return jax.tree.map(lambda v: v[index], knots)

    y, log_weights, log_z = _begin(run, key_init, numbered, init, at(0), at(-1), shape, dtype)
    # Where weights wait for a step's end, one more round looks at the last knot and stays there.
    rounds = steps + 1 if run.waits else steps
    index = jnp.arange(rounds)
    drawn = None
    if run.is_noisy and rounds * math.prod(shape) <= AHEAD:
        drawn = normals(fold_each(numbered, index), event, dtype)

    def look(level: Level, y: jax.Array, log_weights: jax.Array) -> Any:
        return None if observe is None else observe(raw(run, level, y), log_weights, level.t)

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        y, log_weights, log_z, pending = carry
        n, last, here, there, own = inputs
        if run.is_noisy and own is None:
            own = normals(fold_each(numbered, n), event, dtype)
        node = evaluate(run, here, y)
        if run.waits:
            gained = increment(run, last, here, pending, node, y)
            log_weights = log_weights + jnp.where(n > 0, gained, 0.0)
            seen = look(here, y, log_weights)
            done = _settle(run, often, key_resample, n, (y, node), log_weights)
            (y, node), log_weights = done.tree, done.log_weights
            y, pending = move(run, here, there, y, node, own)
        else:
            y, started = move(run, here, there, y, node, own)
            if run.weights == "left":
                log_weights = log_weights + increment(run, here, there, started, None, y)
            seen = look(there, y, log_weights)
            done = _settle(run, often, key_resample, n + 1, y, log_weights)
            y, log_weights = done.tree, done.log_weights
        if tick is not None:
            tick(n - 1 if run.waits else n)
        told = done.ess, done.resampled, done.ancestors, seen
        return (y, log_weights, log_z + done.gain, pending), told

    near = at(jnp.maximum(index - 1, 0)), at(index), at(jnp.minimum(index + 1, steps))
    carry = (y, log_weights, jnp.asarray(log_z, dtype), _blank(run, y))
    (y, log_weights, log_z, _), told = jax.lax.scan(body, carry, (index, *near, drawn))
    sizes, resampled, ancestors, seen = jax.tree.map(lambda v: v[rounds - steps :], told)
    is_number = jnp.all(~jnp.isnan(log_weights))
    checks.debug_check(is_number, "log-weights are NaN: a field or density is not finite")
    log_z = log_z + log_mean_exp(log_weights, axis_name=run.axis_name)
    return {
        "x": raw(run, at(-1), y),
        "log_weights": log_weights,
        "log_z": jnp.full_like(log_z, jnp.nan) if run.weights == "none" else log_z,
        "ess": sizes,
        "resampled": resampled,
        "ancestors": ancestors,
        "observed": seen,
        "nfe": jnp.asarray(rounds * len(run.target.fields), jnp.int32),
    }
