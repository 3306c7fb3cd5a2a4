r"""How far a learned log-density is from solving the Fokker-Planck equation, and a penalty on it.

A process ``dx = f dt + g dw`` with linear drift moves its density p by

    dp/dt = -div(f p) + (g^2/2) Lap p                                                       (1)

so that ``u = log p + c`` has the residual

    R = du/dt + div f + f . grad u - (g^2/2) (Lap u + |grad u|^2) = dc/dt                   (2)

(Deveney, Stanczuk, Kreusser, Budd and Schoenlieb, arXiv 2311.15996). The score s of a network
without a potential has the gradient of (2) instead,

    ds/dt + grad(f . s - (g^2/2) (div s + |s|^2))                                           (3)

(Lai et al., arXiv 2210.04296). Where R vanishes and ``u(t_max)`` is the prior's log-density, the
reverse SDE and the probability flow of ``s = grad u`` give one law, that of ``exp u``; where it
does not they differ, see ``solve.ode_sde_gap``. Training adds a weight times the mean of R^2 to
denoising score matching.

A number added to u that depends on time alone shifts R and no sampler. ``penalty`` of R as it
stands pins it too; ``centred`` leaves it free.

R needs second derivatives of u, and training third ones: a network of ReLUs has a Laplacian that is
zero almost everywhere, and the penalty then means nothing (``check_curvature``).

Left out: the paper's terms at the first time, at the last time and at the box's faces, whose
weights are zero in its final runs.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import (
    at_least_f32,
    batch_event,
    event_size,
    left_broadcast,
    sum_event,
    unsharded,
)
from jaxgen.process.linear import LinearSDE
from jaxgen.score import derivatives
from jaxgen.score.matching import ESTIMATORS, denoising_loss
from jaxgen.score.prediction import Field
from jaxgen.score.times import sample_times
from jaxgen.score.weighting import Weighting

__all__ = [
    "check_curvature",
    "collocation_box",
    "collocation_paths",
    "log_density_residual",
    "penalty",
    "per_log_level",
    "potential_score",
    "precondition_potential",
    "regularised_loss",
    "score_residual",
]

# Dimensions up to which uniform points of a box meet the mass.
_BOX_DIMS = 3


def _check_potential(value: jax.Array, x: jax.Array, event_ndim: int | None) -> None:
    batch, _ = batch_event(x, event_ndim)
    if value.shape != batch:
        what = " (a vector field? see score_residual)" if value.shape == x.shape else ""
        raise ValueError(
            f"u(x, t) returned shape {value.shape} for x of shape {x.shape}{what}; expected one "
            f"number per example, {batch}"
        )


def _potential(u: Field, event_ndim: int | None) -> Field:
    """``u`` with a check of what it returns."""

    def checked(x: jax.Array, t: jax.Array) -> jax.Array:
        value = checks.floating("u(x, t)", u(x, t))
        _check_potential(value, x, event_ndim)
        return value

    return checked


def potential_score(u: Field) -> Field:
    """The score ``grad u`` of a log-density, as a field.

    Args:
      u: maps ``(x, t)`` to one real number per example: ``(batch, *event)`` and ``(batch,)`` to
        ``(batch,)``, or one example and ``()`` to ``()``.

    Returns:
      ``f(x, t) -> like x``.

    Raises:
      ValueError: when called, ``u`` returns something else.

    Example:
      >>> import jax.numpy as jnp
      >>> potential_score(lambda x, t: -jnp.sum(x**2, axis=-1) / 2)(jnp.ones((1, 2)), 0.1).tolist()
      [[-1.0, -1.0]]
    """

    def score(x: jax.Array, t: jax.Array) -> jax.Array:
        x, t = checks.floating("x", x), jnp.asarray(t)

        def at(y: jax.Array) -> jax.Array:
            value = checks.floating("u(x, t)", u(y, t))
            # A time of shape () goes with one example, and may go with a batch.
            if t.ndim or x.ndim < 2 or value.shape != x.shape[:1]:
                _check_potential(value, x, None if t.ndim else x.ndim)
            return value

        value, pull = jax.vjp(at, x)
        return pull(jnp.ones_like(value))[0]

    return score


def precondition_potential(net: Field, sde: LinearSDE, sigma_data: ArrayLike) -> Field:
    """A log-density from a network of any process: that of Gaussian data plus a correction.

        u = -|x'|^2/2 - d log(size) + net(x', level),   x' = (x - mu)/size

    with ``size^2 = sigma^2 + alpha^2 sigma_data^2`` and ``level = log(sigma/alpha)/4``. The network
    sees numbers of order one. Where it vanishes, u is the log-density of Gaussian data
    ``N(mu, sigma_data^2 I)``, which solves (1), so that the prior needs no learning.

    Args:
      net: maps ``(x', level)`` to one number per example.
      sde: the process.
      sigma_data: standard deviation of the data about the anchor.

    Returns:
      ``u(x, t)``; see ``potential_score``.
    """

    def u(x: jax.Array, t: jax.Array) -> jax.Array:
        mu = sde.centre(x)
        size = jnp.sqrt(sde.sigma(t) ** 2 + (sde.alpha(t) * sigma_data) ** 2)
        scaled = ((x if mu is None else x - mu) / left_broadcast(size, x)).astype(x.dtype)
        level = -sde.log_snr(jnp.clip(t, sde.t_min, sde.t_max)) / 8
        event_ndim = None if jnp.ndim(t) else x.ndim
        dims = event_size(x, event_ndim)
        gaussian = -0.5 * sum_event(scaled**2, event_ndim) - dims * jnp.log(size)
        return gaussian + net(scaled, level)

    return u


def log_density_residual(
    u: Field,
    sde: LinearSDE,
    *,
    laplacian: str = "exact",
    probe: str = "rademacher",
    event_ndim: int | None = None,
) -> Callable[..., jax.Array]:
    """The residual (2) of a log-density, zero (or a function of time alone) for a true one.

    Args:
      u: maps ``(x, t)`` to one real number per example; see ``potential_score``.
      sde: the process, in forward time.
      laplacian: ``"exact"``, one product per entry of an example, for up to ten or so, or
        ``"hutchinson"``, an unbiased estimate by one probe. The square of an estimate is biased;
        ``penalty`` takes two.
      probe: ``"rademacher"`` or ``"gaussian"``.
      event_ndim: ``x.ndim`` if the residual will be called with one example.

    Returns:
      ``residual(x, t, key=None) -> (batch,)`` or ``()``, float32 or wider; ``x`` of shape
      ``(batch, *event)``, ``t`` of ``()`` or ``(batch,)``, and a key for ``"hutchinson"``.

    Raises:
      ValueError: an unknown name; when called, ``u`` returns no number per example, or no key.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> sde = process.vp()
      >>> truth = score.closed_form.gaussian(sde, jnp.zeros(2), 1.0)
      >>> residual = log_density_residual(truth.log_prob, sde)(jnp.ones((3, 2)), 0.5)
      >>> bool(jnp.all(jnp.abs(residual) < 1e-4))
      True
    """
    checks.one_of("laplacian", laplacian, ESTIMATORS)
    checks.one_of("probe", probe, derivatives.PROBES)

    def residual(x: ArrayLike, t: ArrayLike, key: jax.Array | None = None) -> jax.Array:
        return _residual(key, u, sde, x, t, laplacian, probe, None, event_ndim)

    return residual


def _residual(
    key: jax.Array | None,
    u: Field,
    sde: LinearSDE,
    x: ArrayLike,
    t: ArrayLike,
    laplacian: str,
    probe: str,
    n_probes: int | None,
    event_ndim: int | None,
) -> jax.Array:
    """Equation (2), once for each probe if ``n_probes`` is a number."""
    x = checks.floating("x", x)
    t = checks.field_time(t, x, event_ndim)
    wide = x.astype(at_least_f32(x.dtype))
    direction = None
    if laplacian != "exact":
        if key is None:
            raise ValueError('key is None; laplacian="hutchinson" draws its probes from one')
        direction = derivatives.probes(
            key, x.shape, probe, n=n_probes, dtype=wide.dtype, event_ndim=event_ndim
        )
    found = derivatives.scalar_derivatives(
        _potential(u, event_ndim), x, t, direction, event_ndim=event_ndim
    )
    growth = event_size(x, event_ndim) * sde.log_alpha_dot(t)  # div f
    transport = sum_event(sde.drift(wide, t) * found.gradient, event_ndim)
    squares = sum_event(found.gradient**2, event_ndim)
    half = 0.5 * sde.diffusion_squared(t)
    rest = found.in_time + growth + transport - half * squares
    if found.laplacian.ndim > rest.ndim:
        return rest[None] - half[None] * found.laplacian
    return rest - half * found.laplacian


def score_residual(
    s: Field,
    sde: LinearSDE,
    *,
    laplacian: str = "exact",
    probe: str = "rademacher",
    event_ndim: int | None = None,
) -> Callable[..., jax.Array]:
    """The residual (3) of a score, zero for the score of a density that solves (1).

    Args:
      s: the score, mapping ``(x, t)`` to an array like ``x``; a field of another kind enters
        through ``score.convert``.
      sde: the process, in forward time.
      laplacian: ``"exact"`` or ``"hutchinson"``, of ``div s``, which is the Laplacian of a
        potential; see ``log_density_residual``.
      probe: ``"rademacher"`` or ``"gaussian"``.
      event_ndim: ``x.ndim`` if the residual will be called with one example.

    Returns:
      ``residual(x, t, key=None)``, like ``x`` in float32 or wider.

    Raises:
      ValueError: an unknown name; when called, a field of another shape, or no key.
    """
    checks.one_of("laplacian", laplacian, ESTIMATORS)
    checks.one_of("probe", probe, derivatives.PROBES)

    def residual(x: ArrayLike, t: ArrayLike, key: jax.Array | None = None) -> jax.Array:
        x = checks.floating("x", x)
        t = checks.field_time(t, x, event_ndim)
        wide = x.astype(at_least_f32(x.dtype))
        direction = None
        if laplacian != "exact":
            if key is None:
                raise ValueError('key is None; laplacian="hutchinson" draws its probes from one')
            direction = derivatives.probes(
                key, x.shape, probe, dtype=wide.dtype, event_ndim=event_ndim
            )
        half = 0.5 * sde.diffusion_squared(t)

        def energy(y: jax.Array) -> jax.Array:
            value, divergence = derivatives.value_and_divergence(
                s, y, t, direction, event_ndim=event_ndim
            )
            along = sum_event(sde.drift(y, t) * value, event_ndim)
            return jnp.sum(along - half * (divergence + sum_event(value**2, event_ndim)))

        _, in_time = derivatives.value_and_time_derivative(s, wide, t, event_ndim=event_ndim)
        return in_time + jax.grad(energy)(wide)

    return residual


def per_log_level(t: jax.Array, sde: LinearSDE) -> jax.Array:
    """``(dt/d log(sigma/alpha))^2``: a weighting of R^2 under which R counts per log noise level.

    It is the same whatever the clock of the process, and like the noise error it stays bounded near
    the data, where R in time grows as ``g^2/sigma^2``.

    Args:
      t: times.
      sde: the process, whose log-SNR falls strictly.
    """
    rates = sde.rates(t)
    return (rates.sigma_dot / rates.sigma - rates.alpha_dot / rates.alpha) ** -2


def penalty(
    key: jax.Array | None,
    u: Field,
    sde: LinearSDE,
    points: ArrayLike,
    times: ArrayLike,
    *,
    power: float = 2,
    centred: bool = False,
    laplacian: str = "exact",
    probe: str = "rademacher",
    weighting: Weighting | None = None,
) -> jax.Array:
    """The mean of ``|R|^power`` over collocation points.

    Args:
      key: typed key of the probes; not used, and may be ``None``, if ``laplacian="exact"``.
      u: maps ``(x, t)`` to one real number per example.
      sde: the process.
      points: ``(n, *event)``, from ``collocation_box`` or ``collocation_paths``. Points where the
        density is negligible pull the score there and hurt the reverse SDE.
      times: ``(n,)`` or ``()``.
      power: at least 1.
      centred: take the variance of R over the points, all at one time (``times`` of shape ``()``;
        map over several), instead of the mean of its square: what a function of time alone adds to
        ``u`` is then left free.
      laplacian: ``"exact"``, or ``"hutchinson"`` with two independent probes, whose product is an
        unbiased square and may be negative; ``power`` is then 2.
      probe: ``"rademacher"`` or ``"gaussian"``.
      weighting: ``(t, sde) -> factor`` of ``|R|^power``, such as ``per_log_level``; ``None`` for 1.

    Returns:
      ``()``, float32 or wider.

    Raises:
      ValueError: an unknown name, a power below 1, ``u`` no number per example, times of several
        values with ``centred``, or another power than 2 with an estimate or ``centred``.
    """
    checks.one_of("laplacian", laplacian, ESTIMATORS)
    checks.one_of("probe", probe, derivatives.PROBES)
    if not power >= 1:
        raise ValueError(f"power is {power}; expected a number of at least 1")
    is_estimate = laplacian != "exact"
    if power != 2 and (is_estimate or centred):
        raise ValueError(f"power is {power}; expected 2 with laplacian={laplacian!r}, {centred=}")
    times = checks.floating("times", times)
    if centred and times.ndim:
        raise ValueError(
            f"times has shape {times.shape}; expected () with centred=True, whose variance is over "
            "points of one time (jax.vmap maps over several times)"
        )
    x = checks.floating("points", points)
    if centred and x.shape[0] < 2:
        raise ValueError(f"points has shape {x.shape}; expected at least 2 with centred=True")
    t = checks.field_time(times, x)
    n_probes = 2 if is_estimate else None
    r = _residual(key, u, sde, x, t, laplacian, probe, n_probes, None)
    checks.debug_check(
        jnp.all(jnp.isfinite(r)), "the Fokker-Planck residual is not finite: {r}", r=r
    )
    factor = jnp.ones_like(t) if weighting is None else jnp.asarray(weighting(t, sde))
    if factor.shape != t.shape:
        raise ValueError(f"weighting(t, sde) returned shape {factor.shape}; expected {t.shape}")
    if centred:
        r = r - jnp.mean(r, axis=-1, keepdims=True)
    size = derivatives.unbiased_square(r) if is_estimate else jnp.abs(r) ** power
    total = jnp.mean(factor * size)
    return total * (x.shape[0] / (x.shape[0] - 1)) if centred else total


# --- collocation points -------------------------------------------------------------------------


def collocation_box(
    key: jax.Array,
    n: int,
    low: Sequence[float] | jax.Array,
    high: Sequence[float] | jax.Array,
    t_min: float,
    t_max: float,
) -> tuple[jax.Array, jax.Array]:
    """Uniform points and times of a box, for up to three dimensions.

    Args:
      key: typed key; point ``i`` draws from ``fold_in(key, i)``.
      n: number of points.
      low: lower corner, ``(d,)``.
      high: upper corner, ``(d,)``.
      t_min: first time, above zero.
      t_max: last time.

    Returns:
      Points ``(n, d)`` and times ``(n,)``, float32 or wider.

    Raises:
      ValueError: a box or an interval without inside, or ``t_min <= 0``.

    Warns:
      UserWarning: more than three dimensions, where hardly a point of the box meets the mass.
    """
    n = checks.positive_int("n", n)
    corners = jnp.asarray(low), jnp.asarray(high)
    dtype = at_least_f32(jnp.result_type(*corners))
    low, high = (corner.astype(dtype) for corner in corners)
    if low.ndim != 1 or low.shape != high.shape or not low.size:
        raise ValueError(f"low and high have shapes {low.shape} and {high.shape}; expected (d,)")
    known = checks.concrete(low), checks.concrete(high)
    if known[0] is not None and known[1] is not None and not (known[0] < known[1]).all():
        raise ValueError(f"low is {known[0]} and high {known[1]}; expected low < high")
    first, last = checks.concrete(t_min), checks.concrete(t_max)
    if first is not None and not first > 0:
        raise ValueError(f"t_min is {first}; expected a time above 0")
    if first is not None and last is not None and not first < last:
        raise ValueError(f"t_min is {first} and t_max {last}; expected t_min < t_max")
    if low.size > _BOX_DIMS:
        warnings.warn(
            f"a box of {low.size} dimensions: uniform points miss the mass; use collocation_paths",
            stacklevel=2,
        )

    def draw(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_x, key_t = jax.random.split(k)
        share = jax.random.uniform(key_t, (), dtype)
        return (
            low + (high - low) * jax.random.uniform(key_x, low.shape, dtype),
            t_min * (1 - share) + t_max * share,
        )

    return keys.map_batch(draw, key, (n,))


def collocation_paths(
    key: jax.Array,
    x0: ArrayLike,
    sde: LinearSDE,
    n: int,
    *,
    time: str = "uniform",
    t_min: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Points of the forward process from data, where the density has its mass.

    Args:
      key: typed key; point ``i`` draws from ``fold_in(key, i)`` (its time from the batch's key
        where ``time`` is stratified).
      x0: data ``(batch, *event)``, real; point ``i`` starts from a random one.
      sde: the process.
      n: number of points.
      time: the distribution of times, a row of ``score.times.TIMES``. The points are meant to be
        spread so; the factor that would give the expectation of uniform times is left out.
      t_min: first time; ``sde.t_min`` if ``None``.

    Returns:
      Points ``(n, *event)`` in ``x0``'s dtype and times ``(n,)``, float32 or wider.

    Raises:
      ValueError: an unknown ``time``, no data, or ``n < 1``.
      TypeError: ``x0`` is no real floating array.
    """
    x0 = checks.floating("x0", x0)
    n = checks.positive_int("n", n)
    if x0.ndim < 1 or not x0.shape[0]:
        raise ValueError(f"x0 has shape {x0.shape}; expected (batch, *event) with data in it")
    key_time, key_pick, key_noise = jax.random.split(keys.check(key), 3)
    times, _ = sample_times(key_time, sde, (n,), time=time, t_min=t_min)
    count = x0.shape[0]
    pick = keys.map_batch(lambda k: jax.random.randint(k, (), 0, count), key_pick, (n,))
    start = jnp.take(unsharded(x0), unsharded(pick), axis=0)
    noise = keys.normal(key_noise, start.shape, start.dtype)
    return sde.path(start, noise, times), times


# --- training -----------------------------------------------------------------------------------


def regularised_loss(
    key: jax.Array,
    u: Field,
    sde: LinearSDE,
    x0: ArrayLike,
    *,
    weight: ArrayLike,
    collocation: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    weighting: str | Weighting = "simple",
    time: str = "uniform",
    t_min: ArrayLike | None = None,
    power: float = 2,
    laplacian: str = "exact",
    residual_weighting: Weighting | None = None,
) -> jax.Array:
    """Denoising score matching of ``grad u`` plus ``weight`` times the penalty, per example.

    The penalty is one number, added to every example's loss, so that their mean is the whole
    objective: ``make_train_step`` takes it as any other loss.

    Args:
      key: typed key.
      u: the log-density up to a function of time; see ``potential_score``.
      sde: the process.
      x0: data ``(batch, *event)``, real.
      weight: of the penalty, at least 0; the paper's range is 0.1 to 10. A plain 0 costs nothing.
      collocation: ``f(key, x0) -> (points, times)``; ``None`` for ``collocation_paths`` from
        ``x0``, as many points as examples, at times drawn by ``time``.
      weighting: of the denoising loss, see ``denoising_loss``; ``"simple"`` is the noise error.
      time: distribution of the denoising loss's times.
      t_min: first time, ``sde.t_min`` if ``None``.
      power: see ``penalty``.
      laplacian: see ``penalty``.
      residual_weighting: ``penalty``'s ``weighting``.

    Returns:
      Losses ``(batch,)``, float32 or wider.

    Raises:
      ValueError: a negative weight, an unknown name, or ``u`` no number per example.
    """
    known = checks.concrete(weight)
    if known is not None and not (known.ndim == 0 and 0 <= known < math.inf):
        raise ValueError(f"weight is {weight}; expected one number of at least 0")
    x0 = checks.floating("x0", x0)
    key_loss, key_points, key_probe = jax.random.split(keys.check(key), 3)
    loss = denoising_loss(
        key_loss,
        potential_score(u),
        sde,
        x0,
        prediction="score",
        weighting=weighting,
        time=time,
        t_min=t_min,
    )
    if known is not None and known == 0:
        return loss
    if collocation is None:
        points, times = collocation_paths(key_points, x0, sde, x0.shape[0], time=time, t_min=t_min)
    else:
        points, times = collocation(key_points, x0)
    extra = penalty(
        key_probe,
        u,
        sde,
        points,
        times,
        power=power,
        laplacian=laplacian,
        weighting=residual_weighting,
    )
    return loss + left_broadcast(jnp.asarray(weight) * extra, loss)


def check_curvature(u: Field, x: ArrayLike, t: ArrayLike) -> jax.Array:
    """The largest ``|Lap u|`` over some points, refused where it is zero at all of them.

    A network of ReLUs is piecewise linear, so that R lacks its Laplacian and the penalty teaches
    something else.

    Args:
      u: maps ``(x, t)`` to one real number per example.
      x: ``(batch, *event)``, a few states where ``u`` is in use.
      t: ``()`` or ``(batch,)``.

    Returns:
      ``()``; NaN (an error under ``checkify``) instead of zero where values are traced.

    Raises:
      ValueError: the Laplacian is zero at every point.
    """
    found = derivatives.scalar_derivatives(_potential(u, None), x, t)
    largest = jnp.max(jnp.abs(found.laplacian))
    message = (
        "the Laplacian of u is zero at every point given; expected an activation with a second "
        "derivative (softplus, swish), not ReLU"
    )
    known = checks.concrete(largest)
    if known is not None and known == 0:
        raise ValueError(message)
    checks.debug_check(largest != 0, message)
    return jnp.where(largest == 0, jnp.nan, largest)
