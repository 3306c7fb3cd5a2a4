r"""Fast sampling of mean-reverting diffusion: image restoration in 5 to 20 evaluations.

Li et al., "MRS: a fast sampler for mean reverting diffusion based on ODE and SDE solvers", ICLR
2025, arXiv 2502.07856. The process reverts to the degraded image mu instead of to zero,

    x_t = mu + alpha (x0 - mu) + sigma n,     sigma^2 = sigma_inf^2 (1 - alpha^2)           (1)

so y = x - mu is a variance-preserving process in units of sigma_inf, and the paper's solvers are
the exponential multistep core on y: its equation (2) with Taylor's coefficients, data prediction
(DPM-Solver++) or noise prediction (DPM-Solver), eta = 0 for the probability flow and eta = 1 for
the reverse SDE. Every formula of the paper with its terms in mu is that one update, which this file
only sets up; ``exponential`` has no formula twice.

A network predicts noise n, data x0, or the paper's velocity. With s = sigma/sigma_inf = sin(phi)
and alpha = cos(phi) that is the state's speed in the angle, dx/dphi on a path of given x0 and n,

    w = alpha sigma_inf n - s (x0 - mu),      so  x0 - mu = alpha y - s w,
                                                  n = (alpha w + s y) / sigma_inf           (2)

(phi' w is the library's ``"velocity"``). The library's ``"v"``, alpha n - sigma (x0 - mu), is then

    v = (alpha^2/sigma_inf + s^2 sigma_inf) w + alpha s (1/sigma_inf - sigma_inf) y         (3)

and the same as w where sigma_inf = 1. The networks enter by (3), which is finite everywhere.

The first steps are of orders 1, 2, ...: the one of order 1 costs h^2, so order 3 shows only in its
constant. With fewer than 10 steps the last orders fall as well: the published loop has, for order 3
in M steps, order 2 at step M - 2, order 1 at step M - 1 and order 3 at the last; here the core's
rule gives order 2 at step M - 1 and 1 at the last. With ``denoise_last`` the two are the same.
Grids between integer times differ from the published ones by the interpolation of ``ir_sde``'s
tables. Clipping images to [0, 1] at the end is left to the caller.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import left_broadcast
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field
from jaxgen.solve.euler_maruyama import EulerMaruyama
from jaxgen.solve.euler_time import EulerTime
from jaxgen.solve.grids import GRIDS
from jaxgen.solve.heun_time import HeunTime
from jaxgen.solve.multistep import ExponentialMultistep, dpmpp
from jaxgen.solve.sample import sample
from jaxgen.solve.state import Sample
from jaxgen.solve.thresholding import thresholded

__all__ = [
    "MR_GRIDS",
    "mr_euler_sample",
    "mr_field",
    "mr_grid",
    "mr_heun_sample",
    "mr_posterior_sample",
    "mr_sample",
]

Net = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_TARGETS = ("noise", "data", "velocity")
# Processes that equation (1) describes.
_KINDS = ("mean_reverting", "ir_sde")
# Options of ``sample`` that serve every anchor, and those that solve each sample by itself.
_OPTIONS = ("x_init", "dtype", "event_ndim", "first_index", "progress", "max_steps")
_SINGLY = ("brownian", "adjoint", "controller")
# Below this many steps the published loop lowers its last orders.
_FEW_STEPS = 10
_RHO = 7.0


# --- the field ----------------------------------------------------------------------------------


def mr_field(net: Net, sde: LinearSDE, fit_target: str = "noise") -> tuple[Field, str]:
    """A network of state, anchor and time as a field, and what that field predicts.

    Args:
      net: ``f(x, mu, t) -> like x`` with ``mu`` broadcast to ``x``'s shape and dtype.
      sde: a process with an anchor.
      fit_target: what the network predicts: ``"noise"``, ``"data"`` or the paper's
        ``"velocity"``, equation (2).

    Returns:
      ``f(x, t)`` and its prediction, for ``sample`` and ``score.denoising_loss``.

    Raises:
      ValueError: another target, a process without an anchor, or a velocity for a process that is
        not of equation (1).
    """
    checks.one_of("fit_target", fit_target, _TARGETS)
    if sde.mu is None:
        raise ValueError("sde.mu is None; expected the anchor that the process reverts to")
    if fit_target == "velocity" and sde.kind not in _KINDS:
        raise ValueError(
            f"sde is of kind {sde.kind!r}; the paper's velocity is defined for {', '.join(_KINDS)}"
        )

    def field(x: jax.Array, t: jax.Array) -> jax.Array:
        mu = jnp.broadcast_to(cast(jax.Array, sde.centre(x)), x.shape).astype(x.dtype)
        out = checks.cast_field_output(net(x, mu, t), x, "net")
        if fit_target != "velocity":
            return out
        alpha, sigma, size = sde.alpha(t), sde.sigma(t), jnp.asarray(sde.prior_std)
        s = sigma / size
        on_out = left_broadcast(alpha**2 / size + s**2 * size, x)
        on_y = left_broadcast(alpha * s * (1 / size - size), x)
        return (on_out * out + on_y * (x - mu)).astype(x.dtype)

    return field, "v" if fit_target == "velocity" else fit_target


def _anchored(
    mu: ArrayLike, sde: LinearSDE, shape: tuple[int, ...] | None, options: dict[str, Any]
) -> tuple[LinearSDE, tuple[int, ...], dict[str, Any]]:
    """The process with its anchor, the shape of the samples, and options with ``mu``'s dtype."""
    mu = checks.floating("mu", mu)
    own = dataclasses.replace(sde, mu=mu)
    shape = mu.shape if shape is None else tuple(shape)
    own.centre(jax.ShapeDtypeStruct(shape, mu.dtype))  # type: ignore[arg-type]
    single = [name for name in _SINGLY if options.get(name) is not None]
    if single and options.get("event_ndim") is None and mu.ndim == len(shape) and mu.shape[0] != 1:
        raise ValueError(
            f"{single[0]} is set, which solves each sample by itself, and mu has a batch axis, "
            f"shape {mu.shape}; vmap over keys and mu, with event_ndim={len(shape) - 1}"
        )
    if options.get("dtype") is None and options.get("x_init") is None:
        options = {**options, "dtype": mu.dtype}
    return own, shape, options


def _check_options(options: dict[str, Any], *more: str) -> None:
    """Refuse options that these samplers set themselves, and what are none."""
    for name in options:
        if name in ("t_start", "t_end", "grid", "lam_min"):
            raise ValueError(
                f"{name} is {options[name]!r}, and the grid alone sets the times here; expected "
                "mr_sample(..., grid=mr_grid(..., lam_min=..., t_end=...)) for other ones"
            )
        if name not in (*_OPTIONS, *_SINGLY, *more):
            raise TypeError(
                f"unexpected option {name!r}; expected of {', '.join((*_OPTIONS, *_SINGLY, *more))}"
            )


# --- the grids ------------------------------------------------------------------------------------

_Grid = Callable[[LinearSDE, int, jax.Array, jax.Array], jax.Array]


def _unit(sde: LinearSDE) -> float | None:
    """The step of a network's training times, ``None`` where they are continuous."""
    return 1.0 if sde.kind == "ir_sde" else None


def _down(start: jax.Array, gap: jax.Array, steps: int) -> jax.Array:
    return start - gap * jnp.arange(steps + 1, dtype=gap.dtype)


def _linspace(sde: LinearSDE, steps: int, start: jax.Array, end: jax.Array) -> jax.Array:
    del sde
    # Exact at integers where the gap is one.
    return _down(start, (start - end) / steps, steps)


def _leading(sde: LinearSDE, steps: int, start: jax.Array, end: jax.Array) -> jax.Array:
    gap = (start - end) / (steps + 1)
    if _unit(sde) is not None:
        gap = jnp.floor(gap)
    return _down(end + steps * gap, gap, steps)


def _trailing(sde: LinearSDE, steps: int, start: jax.Array, end: jax.Array) -> jax.Array:
    del sde
    return _down(start, (start - end) / (steps + 1), steps)


def _karras_t(sde: LinearSDE, steps: int, start: jax.Array, end: jax.Array) -> jax.Array:
    end = jnp.maximum(end, _unit(sde) or 0.0)
    share = jnp.arange(steps + 1, dtype=start.dtype) / steps
    high, low = start ** (1 / _RHO), end ** (1 / _RHO)
    return (high + share * (low - high)) ** _RHO


MR_GRIDS: dict[str, _Grid] = {
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
    "karras_n": GRIDS["karras"],
    "karras_t": _karras_t,
    "linear_lambda": GRIDS["log_snr"],
}
_REACH_THE_END = ("linspace", "karras_n", "linear_lambda")


def mr_grid(
    name: str,
    sde: LinearSDE,
    steps: int,
    *,
    lam_min: float | None = -5.0,
    t_end: ArrayLike | None = None,
) -> jax.Array:
    """The grids of the paper's code, falling from a first time to near ``t_end``.

    The first time is the largest one with ``log(alpha/sigma) >= lam_min``. Then

    - ``"linspace"``: equally spaced in time.
    - ``"leading"``: t_end + n g, n = steps .. 0, with the gap g = (t - t_end) / (steps + 1), for an
      ``ir_sde`` rounded down to an integer: starts below the first time.
    - ``"trailing"``: with the same gap, not rounded, from the first time down: ends before t_end.
    - ``"karras_n"``: equally spaced in (sigma/alpha)^(1/7).
    - ``"karras_t"``: in t^(1/7), for an ``ir_sde`` down to t = 1.
    - ``"linear_lambda"``: in log(alpha/sigma).

    Args:
      name: one of these.
      sde: the process.
      steps: intervals.
      lam_min: see above; ``None`` for ``t_max`` whatever is left of the signal there.
      t_end: last time, the process' own if ``None``.

    Returns:
      ``(steps + 1,)`` falling times.

    Raises:
      ValueError: an unknown name; ``lam_min`` beyond the process; more steps than ``"leading"`` has
        integers for (where the process is known).

    Example:
      >>> from jaxgen import process
      >>> mr_grid("leading", process.ir_sde(None), 4).tolist()
      [80.0, 60.0, 40.0, 20.0, 0.0]
    """
    checks.one_of("grid", name, MR_GRIDS)
    steps = checks.positive_int("steps", steps)
    plain = dataclasses.replace(sde, mu=None)
    leaves = [*jax.tree.leaves(plain), t_end, lam_min]
    if any(isinstance(v, jax.core.Tracer) for v in leaves):
        return _grid(name, plain, steps, lam_min, t_end)
    # A known grid stays known under jit, where the solvers then know its ends.
    with jax.ensure_compile_time_eval():
        times = _grid(name, plain, steps, lam_min, t_end)
        if not (np.diff(np.asarray(times)) < 0).all():
            top = float(plain.log_snr(plain.t_end)) / 2
            raise ValueError(
                f"grid {name!r} of {steps} steps with lam_min {lam_min} is {times}; expected "
                f"strictly falling times: fewer steps, or lam_min below {top:g}"
            )
    return times


@functools.partial(jax.jit, static_argnames=("name", "steps"), inline=True)
def _grid(name: str, sde: LinearSDE, steps: int, lam_min: Any, t_end: Any) -> jax.Array:
    start = jnp.asarray(sde.t_max)
    if lam_min is not None:
        level = 2 * jnp.asarray(lam_min, start.dtype)
        lowest = sde.log_snr(start)
        guarded = sde.inverse_log_snr(jnp.maximum(level, lowest))
        start = jnp.where(level > lowest, guarded, start)
    end = jnp.asarray(sde.t_end if t_end is None else t_end, start.dtype)
    times = MR_GRIDS[name](sde, steps, start, end)
    if name not in _REACH_THE_END:
        return times
    return times.at[0].set(start).at[-1].set(end)


# --- the sampler ----------------------------------------------------------------------------------


def mr_sample(
    key: jax.Array,
    net: Net,
    mu: ArrayLike,
    sde: LinearSDE,
    shape: tuple[int, ...] | None = None,
    *,
    steps: int = 20,
    solver: str = "ode",
    order: int = 2,
    predict: str = "data",
    fit_target: str = "noise",
    grid: str | ArrayLike = "linspace",
    lam_min: float | None = -5.0,
    threshold: Callable[[jax.Array], jax.Array] | None = None,
    denoise_last: bool = False,
    third: str = "exact",
    lower_order_final: bool | None = None,
    **options: Any,
) -> Sample:
    """Restore images with a mean-reverting network: the paper's sampler (module docstring).

    Starts at N(mu, sigma_inf^2 I) and calls the network once a step.

    Args:
      key: typed key; sample ``i`` draws from keys folded with ``i``.
      net: ``f(x, mu, t) -> like x``, with ``mu`` broadcast to ``x``.
      mu: the degraded images, floating; ``(batch, *event)`` or what broadcasts against ``shape``.
      sde: the network's process, ``process.ir_sde(None)`` or ``process.mean_reverting(None)``; its
        own anchor is not used. Any other ``LinearSDE`` serves too, except for a velocity.
      shape: of the samples, ``mu``'s if ``None``.
      steps: intervals of the grid, at least the order, and one more with ``denoise_last``.
      solver: ``"ode"`` for the probability flow, ``"sde"`` for the reverse SDE.
      order: 1, 2 or, for ``"ode"``, 3.
      predict: what is extrapolated, ``"data"`` (stable in few steps) or ``"noise"``.
      fit_target: what the network predicts, ``"noise"``, ``"data"`` or the paper's ``"velocity"``.
      grid: a name of ``mr_grid``, or ``(steps + 1,)`` falling times.
      lam_min: see ``mr_grid``; guards the division by a vanishing alpha.
      threshold: a function of the data prediction, such as ``dynamic_threshold()`` as published.
      denoise_last: return the data prediction at the last but one time, in place of a last step.
      third: coefficients of order 3, ``"exact"``, or ``"official"`` of order 2 (see ``multistep``).
      lower_order_final: lower the order of the last steps; ``None``: where there are fewer than 10
        (module docstring). ``True`` serves data prediction on ``"linspace"``, whose last step spans
        the most log-SNR: a fifth of the error at 10 steps, a third at 20 (Gaussian data).
      **options: ``x_init``, ``dtype`` (``x_init``'s or else ``mu``'s if ``None``), ``event_ndim``,
        ``first_index`` and ``progress`` of ``sample``; where ``mu`` has no batch axis, or as one
        example with ``event_ndim``, also ``brownian``, ``adjoint``, ``controller``, ``max_steps``.

    Returns:
      A ``Sample``; ``nfe`` equals ``steps``.

    Raises:
      ValueError: unknown names, steps below the order, order 3 for the SDE, shapes that do not fit,
        times that coincide or are out of range, or noise prediction from where alpha is 0;
        ``t_start`` or ``t_end``; a batch of anchors for what solves each sample by itself.
      TypeError: a raw key, integer images or an unknown option.

    A NaN of the network spreads to the samples, and ``result`` says so.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process
      >>> mu = jnp.full((2, 8, 8, 1), 0.5)
      >>> net = lambda x, mu, t: jnp.ones_like(x)  # knows that the data are white
      >>> sde = process.ir_sde(None)
      >>> draw = jax.jit(lambda key: mr_sample(key, net, mu, sde, steps=5, fit_target="data"))
      >>> out = draw(jax.random.key(0))
      >>> int(out.nfe), bool(abs(out.x - 1).max() < 0.02)
      (5, True)
    """
    _check_options(options)
    checks.one_of("solver", solver, ("ode", "sde"))
    checks.one_of("predict", predict, ("data", "noise"))
    if solver == "sde" and order == 3:
        raise ValueError('order is 3 for solver "sde"; expected 1 or 2')
    steps = checks.positive_int("steps", steps)
    if steps < order + denoise_last:
        raise ValueError(
            f"steps is {steps} for order {order} with denoise_last={denoise_last}; expected at "
            f"least {order + denoise_last}"
        )
    own, shape, options = _anchored(mu, sde, shape, options)
    made = ExponentialMultistep(
        predict,
        order,
        third=third,
        eta=1.0 if solver == "sde" else 0.0,
        lower_order_final=steps < _FEW_STEPS if lower_order_final is None else lower_order_final,
        label=f"mr_{solver}_{predict}_{order}",
    )
    field, prediction = mr_field(net, own, fit_target)
    if threshold is not None:
        field, prediction = thresholded(field, own, threshold, prediction=prediction), "data"
    if isinstance(grid, str):
        grid = mr_grid(grid, own, steps, lam_min=lam_min)
    elif jnp.shape(grid) != (steps + 1,):
        raise ValueError(f"grid has shape {jnp.shape(grid)}; expected {(steps + 1,)} falling times")
    if denoise_last:
        steps, grid = steps - 1, jnp.asarray(grid)[:-1]
    return sample(
        key,
        field,
        own,
        shape,
        solver=made,
        steps=steps,
        grid=grid,
        prediction=prediction,
        denoise_last=denoise_last,
        **options,
    )


# --- what it is compared with ---------------------------------------------------------------------


def _baseline(
    key: jax.Array,
    net: Net,
    mu: ArrayLike,
    sde: LinearSDE,
    shape: tuple[int, ...] | None,
    solver: Any,
    steps: int,
    fit_target: str,
    options: dict[str, Any],
) -> Sample:
    _check_options(options, "denoise_last")
    own, shape, options = _anchored(mu, sde, shape, options)
    field, prediction = mr_field(net, own, fit_target)
    grid = mr_grid("linspace", own, steps, lam_min=None)
    return sample(
        key, field, own, shape, solver=solver, grid=grid, prediction=prediction, **options
    )


def mr_posterior_sample(
    key: jax.Array,
    net: Net,
    mu: ArrayLike,
    sde: LinearSDE,
    shape: tuple[int, ...] | None = None,
    *,
    steps: int | None = None,
    fit_target: str = "noise",
    **options: Any,
) -> Sample:
    """IR-SDE's posterior sampling: draw each state given the next and the predicted data.

    With A = alpha_t/alpha_r, B = alpha_t and C = alpha_r over a step from t to r, mean and variance
    are mu + A (1 - C^2)/(1 - B^2) (x - mu) + C (1 - A^2)/(1 - B^2) (x0 - mu) and sigma_inf^2 (1 -
    A^2)(1 - C^2)/(1 - B^2). That is the SDE solver of order 1 on data, which runs here: on an
    ``ir_sde`` over its integers, else over equal steps in time.

    Args:
      key: see ``mr_sample``, as the others.
      net: ``f(x, mu, t)``.
      mu: the degraded images.
      sde: the network's process.
      shape: of the samples.
      steps: ``None`` for all steps of an ``ir_sde``, else 100.
      fit_target: what the network predicts.
      **options: see ``mr_sample``; and ``denoise_last`` of ``sample``.

    Raises:
      ValueError: see ``mr_sample``.
    """
    if steps is None:
        known = checks.concrete(sde.t_max) if sde.kind == "ir_sde" else None
        steps = 100 if known is None else round(float(known))
    return _baseline(key, net, mu, sde, shape, dpmpp(1, eta=1.0), steps, fit_target, options)


def mr_euler_sample(
    key: jax.Array,
    net: Net,
    mu: ArrayLike,
    sde: LinearSDE,
    shape: tuple[int, ...] | None = None,
    *,
    steps: int = 100,
    form: str = "sde",
    fit_target: str = "noise",
    **options: Any,
) -> Sample:
    """Euler's method on the reverse SDE or the probability flow, in equal steps of time.

    Args:
      key: see ``mr_sample``, as the others.
      net: ``f(x, mu, t)``.
      mu: the degraded images.
      sde: the network's process.
      shape: of the samples.
      steps: intervals, and calls.
      form: ``"sde"`` or ``"ode"``.
      fit_target: what the network predicts.
      **options: see ``mr_sample``; and ``denoise_last`` of ``sample``.

    Raises:
      ValueError: see ``mr_sample``, or another form.
    """
    checks.one_of("form", form, ("sde", "ode"))
    solver = EulerMaruyama() if form == "sde" else EulerTime()
    return _baseline(key, net, mu, sde, shape, solver, steps, fit_target, options)


def mr_heun_sample(
    key: jax.Array,
    net: Net,
    mu: ArrayLike,
    sde: LinearSDE,
    shape: tuple[int, ...] | None = None,
    *,
    steps: int = 50,
    fit_target: str = "noise",
    **options: Any,
) -> Sample:
    """Heun's method on the probability flow, in equal steps of time, two calls each but the last.

    The score is -n/sigma with the marginal's sigma; the paper's own Heun baseline divides by the
    instantaneous diffusion instead, by which it is no solver of that flow.

    Args:
      key: see ``mr_sample``, as the others.
      net: ``f(x, mu, t)``.
      mu: the degraded images.
      sde: the network's process.
      shape: of the samples.
      steps: intervals.
      fit_target: what the network predicts.
      **options: see ``mr_sample``; and ``denoise_last`` of ``sample``.

    Raises:
      ValueError: see ``mr_sample``.
    """
    return _baseline(key, net, mu, sde, shape, HeunTime(), steps, fit_target, options)
