r"""Statistics of a model for DPM-Solver-v3: three curves of the noise level for each dimension.

With lam = log(alpha/sigma), y = (x - mu)/alpha, eps the noise and D = y - e^{-lam} eps the data
prediction (centred), the probability flow is dy/dlam = -e^{-lam} eps. DPM-Solver-v3 (Zheng et al.,
arXiv 2310.13268) splits it by curves l, s and b, chosen per dimension so that

    f = e^{-lam} eps - l y = (1 - l) y - D           does not depend on y, to first order     (1)
    df/dlam - s f - b                                is smallest in mean square along the flow  (2)

over states x_lam = mu + alpha (x0 - mu) + sigma z of data x0 and noise z:

    l = E[diag(sigma d eps/dx)] = 1 - E[diag(alpha dD/dx)]                                   (3)
    s = Cov(f, f')/Var(f),      b = E f' - s E f                                             (4)

f' is the total derivative of f along the flow: with F either e^{-lam} eps or D, the one that the
field gives without a cancellation, f = c y - w F and f' = c' y + c dy/dlam - w dF/dlam, dF/dlam
being one Jacobian-vector product along (dx/dlam, dt/dlam). The same (x0, z) serve at every level,
or the curves would be rough. c' comes from differences of l over the levels, and everything else
from one evaluation with its products, so that each level is visited once.

The published code has no estimation; (1) to (4) follow from the formulation. Left out: states on
a solver's trajectories instead of noised data.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, left_broadcast, unsharded
from jaxgen.process.linear import LinearSDE
from jaxgen.score.derivatives import probes
from jaxgen.score.prediction import PREDICTIONS, Field, convert
from jaxgen.solve.grids import make_grid
from jaxgen.solve.meter import Ticker

__all__ = [
    "Statistics",
    "degenerate_statistics",
    "estimate_statistics",
    "load_statistics",
    "save_statistics",
]

_SPACING = 0.1
_POINTS = 4  # of the interpolating cubic
# Entries of an example up to which the Jacobian's diagonal is taken exactly by default.
_EXACT = 32
# Entries of the states at one level that are carried through the field at once.
_BLOCK = 2**18
_ROUNDINGS = 64
_CURVES = ("lam", "l", "s", "b")
_MADE = "statistics.json"
_ARRAYS = "curves"
_FORMAT = "jaxgen statistics"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """The curves of equations (3) and (4); made by ``estimate_statistics``.

    Attributes:
      lam: ``(n_grid + 1,)``, log(alpha/sigma), rising.
      l: ``(n_grid + 1, *event)``.
      s: ``(n_grid + 1, *event)``.
      b: ``(n_grid + 1, *event)``.
      made: what they were made with, as pairs of names and plain values; static.
    """

    lam: jax.Array
    l: jax.Array  # noqa: E741
    s: jax.Array
    b: jax.Array
    made: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def event(self) -> tuple[int, ...]:
        """The curves' event shape."""
        return jnp.shape(self.l)[1:]

    def at(self, lam: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``(l, s, b)`` between the nodes, by the cubic through the nearest four.

        Args:
          lam: any shape, finite; float32 or wider.

        Returns:
          Three arrays ``(*lam.shape, *event)``, NaN beyond the nodes.
        """
        dtype = jnp.promote_types(lam.dtype, self.l.dtype)
        nodes = jnp.asarray(self.lam, dtype)
        lam = unsharded(lam.astype(dtype))
        n = nodes.shape[0]
        # The nodes' last point at most, so that a rounding beyond them extrapolates.
        cell = jnp.searchsorted(nodes, lam, side="right") - 1
        first = jnp.clip(cell - 1, 0, n - _POINTS)
        rows = [first + i for i in range(_POINTS)]
        at = [nodes.at[i].get(mode="clip") for i in rows]
        weights = []
        for i in range(_POINTS):
            others = [j for j in range(_POINTS) if j != i]
            factors = [(lam - at[j]) / (at[i] - at[j]) for j in others]
            weights.append(functools.reduce(jnp.multiply, factors))
        weights[0] = jnp.where(self.covers(lam), weights[0], jnp.nan)

        def between(curve: jax.Array) -> jax.Array:
            curve = jnp.asarray(curve, dtype)
            expand = (*lam.shape, *(1,) * (curve.ndim - 1))
            terms = [
                w.reshape(expand) * curve.at[i].get(mode="clip")
                for w, i in zip(weights, rows, strict=True)
            ]
            return functools.reduce(jnp.add, terms)

        return between(self.l), between(self.s), between(self.b)

    def covers(self, lam: jax.Array) -> jax.Array:
        """Whether levels lie between the first and the last node, to a rounding of times."""
        first, last = jnp.asarray(self.lam[0]), jnp.asarray(self.lam[-1])
        slack = 1e-4 * (last - first)
        return (lam >= first - slack) & (lam <= last + slack)

    def check(self) -> None:
        """Check shapes, and values where they are known.

        Raises:
          ValueError: fewer than four nodes; curves of different shapes; ``lam`` that does not rise;
            a curve that is not finite.
        """
        shape = jnp.shape(self.lam)
        if len(shape) != 1 or shape[0] < _POINTS:
            raise ValueError(f"lam has shape {shape}; expected (n_grid + 1,), at least {_POINTS}")
        shapes = {name: jnp.shape(getattr(self, name)) for name in _CURVES[1:]}
        if len(set(shapes.values())) > 1 or any(s[:1] != shape for s in shapes.values()):
            raise ValueError(f"the curves have shapes {shapes}; expected ({shape[0]}, *event) each")
        known = {name: checks.concrete(getattr(self, name)) for name in _CURVES}
        lam = known["lam"]
        if lam is not None and not (np.diff(lam) > 0).all():
            raise ValueError(f"lam is {lam}; expected strictly rising values")
        for name, value in known.items():
            if value is not None and not np.isfinite(value).all():
                raise ValueError(
                    f"{name} has {int((~np.isfinite(value)).sum())} entries that are not finite"
                )


# --- the curves of DDIM -------------------------------------------------------------------------


def degenerate_statistics(
    sde: LinearSDE,
    kind: str,
    event: tuple[int, ...],
    *,
    n_grid: int = 8,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Statistics:
    """Constant curves, with which DPM-Solver-v3 is the solver on data or noise prediction.

    Args:
      sde: the process.
      kind: ``"data"`` (l = 1, s = 0, b = 0: f = -D) or ``"noise"`` (l = 0, s = -1, b = 0).
      event: the event's shape, or ones of its rank.
      n_grid: intervals between nodes, at least 3.
      t_start: as for ``estimate_statistics``.
      t_end: as for ``estimate_statistics``.
      dtype: float32 or wider.

    Raises:
      ValueError: another kind; times out of range or order.

    Example:
      >>> from jaxgen import process
      >>> degenerate_statistics(process.vp(), "noise", (2,)).s[0].tolist()
      [-1.0, -1.0]
    """
    checks.one_of("kind", kind, ("data", "noise"))
    _, lam = _levels(sde, n_grid, t_start, t_end, dtype)
    l, s = (1.0, 0.0) if kind == "data" else (0.0, -1.0)  # noqa: E741
    shape = (*lam.shape, *event)
    flat = [jnp.full(shape, value, lam.dtype) for value in (l, s, 0.0)]
    made = (("kind", kind), ("process", sde.kind or ""))
    return Statistics(lam, flat[0], flat[1], flat[2], made)


def _levels(
    sde: LinearSDE, n_grid: int, t_start: Any, t_end: Any, dtype: DTypeLike | None
) -> tuple[jax.Array, jax.Array]:
    """Times equally spaced in lam, falling, and lam."""
    checks.positive_int("n_grid", n_grid, least=_POINTS - 1)
    wide = at_least_f32(jnp.zeros(()).dtype if dtype is None else dtype)
    times = make_grid("log_snr", sde, n_grid, t_start=t_start, t_end=t_end, dtype=wide)
    if times.ndim != 1:
        raise ValueError(f"t_start has shape {jnp.shape(t_start)}; expected one time")
    lam = (0.5 * sde.log_snr(times)).astype(wide)
    known = checks.concrete(lam)
    if known is not None and not np.isfinite(known[[0, -1]]).all():
        raise ValueError(
            f"log-SNR is infinite at t_start or t_end (lam from {known[0]} to {known[-1]}); the "
            "statistics need an inner range, such as t_max to t_min"
        )
    return times, lam


# --- estimation ---------------------------------------------------------------------------------


def estimate_statistics(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    data: ArrayLike,
    *,
    prediction: str = "noise",
    n_grid: int = 120,
    n_samples: int = 1024,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
    batch_size: int | None = None,
    estimator: str = "auto",
    n_probes: int = 1,
    spacing: float | str | None = "auto",
    progress: bool | None = None,
) -> Statistics:
    """Estimate the curves of DPM-Solver-v3 for a field, equations (3) and (4).

    Once for a model: the curves serve every number of steps and every grid in their range. It
    costs ``(n_grid + 1) n_samples`` evaluations of the field, each with ``n_probes + 1``
    Jacobian-vector products (exact: one for each entry of the event, and one more). The curves are
    smooth, and read between the nodes by cubics, so that the default grid does as well as the
    published 1200 nodes read without.

    Args:
      key: typed key; noise and probes of sample ``i`` use a key folded with ``i``.
      field: ``f(x, t) -> like x`` on batches, differentiable in forward mode in both; examples
        must not mix.
      sde: the process; with a batch axis ``mu`` has one anchor for each of the data.
      data: clean samples ``(K, *event)``, of the data or of the model; float32 or wider.
      prediction: what the field predicts, one of ``score.PREDICTIONS``.
      n_grid: intervals between the levels, equally spaced in lam; at least 4.
      n_samples: pairs (x0, z), at least 2. Beyond K the data are used again with other noise.
      t_start: noisiest time, ``t_max`` if ``None``.
      t_end: last time, the process' ``t_end`` if ``None``. A solver's times must lie between.
      batch_size: samples carried through the field at once; ``None`` bounds their entries.
      estimator: of the Jacobian's diagonal: ``"exact"`` by a basis, ``"hutchinson"`` by
        ``E[v * J v]`` with random signs, ``"auto"``: exact for events of up to 32 entries.
      n_probes: of Hutchinson's estimator, for each sample.
      spacing: ``None`` differentiates the field in time. A network that was trained at whole times
        has no derivative there to speak of (its fastest sinusoids turn between two of them): a
        number takes central differences along the flow instead, so far to either side in lam, for
        two evaluations. ``"auto"``: 0.1 for ``discrete_betas``, else ``None``.
      progress: ``True`` shows a meter.

    Returns:
      ``Statistics`` in ``data``'s dtype, float32 or wider. Where f does not vary (Gaussian data),
      s is 0 and b is the mean of f'.

    Raises:
      ValueError: an unknown name; fewer than two samples; data with NaN; times out of range or
        order; an infinite log-SNR at an end; a field output of another shape.
      TypeError: a raw key; data of an integer dtype.

    A traced NaN gives curves of NaN, and an error under ``checkify``. Works under ``jit`` (pass the
    network's parameters as an argument) and ``grad``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> sde = process.vp()
      >>> exact = score.closed_form.gaussian(sde, jnp.ones(2), 0.25)
      >>> x0 = exact.sample(jax.random.key(0), (64, 2))
      >>> make = jax.jit(lambda key: estimate_statistics(
      ...     key, exact.noise, sde, x0, n_grid=8, n_samples=64))
      >>> own = make(jax.random.key(1))
      >>> want = jax.nn.sigmoid(-2 * own.lam - jnp.log(0.25))  # sigma^2/(alpha^2 v + sigma^2)
      >>> bool(jnp.allclose(own.l[:, 0], want, atol=1e-4))
      True
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.one_of("estimator", estimator, ("exact", "hutchinson", "auto"))
    checks.positive_int("n_grid", n_grid, least=_POINTS)
    checks.positive_int("n_samples", n_samples, least=2)
    checks.positive_int("n_probes", n_probes)
    if spacing == "auto":
        spacing = _SPACING if sde.kind == "discrete_betas" else None
    if isinstance(spacing, str) or (spacing is not None and not spacing > 0):
        raise ValueError(f'spacing is {spacing!r}; expected a positive number, None or "auto"')
    x0 = _clean(data)
    count, event = x0.shape[0], x0.shape[1:]
    dims = math.prod(event)
    if estimator == "auto":
        estimator = "exact" if dims <= _EXACT else "hutchinson"
    if batch_size is None:
        batch_size = max(1, _BLOCK // max(dims, 1))
    batch_size = min(checks.positive_int("batch_size", batch_size), n_samples)

    key_data, key_noise, key_probe = jax.random.split(keys.check(key), 3)
    drawn = jax.random.permutation(key_data, count)[jnp.arange(n_samples) % count]
    times, lam = _levels(sde, n_grid, t_start, t_end, x0.dtype)
    mu = sde.centre(x0)
    if mu is not None:
        mu = None if mu.shape[0] == 1 else unsharded(mu).at[drawn].get(mode="clip")
    samples: dict[str, Any] = {
        "x0": unsharded(x0).at[drawn].get(mode="clip"),
        "noise": keys.normal(key_noise, (n_samples, *event), x0.dtype),
        "mu": mu,
        "probe": None,
    }
    if estimator == "hutchinson":
        signs = probes(key_probe, (n_samples, *event), n=n_probes, dtype=x0.dtype)
        samples["probe"] = jnp.moveaxis(signs, 1, 0)
    tick = Ticker(n_grid + 1, "statistics") if progress else None

    def at_level(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        n, t = inputs
        one = functools.partial(
            _products, field, sde, prediction, t, jnp.stack([lam[0], lam[-1]]), spacing
        )
        moments = _moments(prediction, *_in_batches(one, samples, batch_size))
        if tick is not None:
            tick(n)
        return moments

    moments = jax.lax.map(at_level, (jnp.arange(n_grid + 1), times))
    l, s, b = (c.astype(x0.dtype) for c in _curves(lam, *moments))  # noqa: E741
    made: dict[str, Any] = {
        "estimator": estimator if estimator == "exact" else f"hutchinson, probes: {n_probes}",
        "n_grid": n_grid,
        "n_samples": n_samples,
        "spacing": spacing or 0.0,
        "data": count,
        "prediction": prediction,
        "process": sde.kind or "",
    }
    made |= _range(times)
    return Statistics(lam, l, s, b, tuple(made.items()))


def _clean(data: ArrayLike) -> jax.Array:
    """The data in float32 or wider, NaN throughout if there is a traced one."""
    x0 = checks.floating("data", data)
    if x0.ndim < 1 or x0.shape[0] < 1:
        raise ValueError(f"data has shape {x0.shape}; expected (K, *event) with K at least 1")
    x0 = x0.astype(at_least_f32(x0.dtype))
    known = checks.concrete(x0)
    if known is not None and not np.isfinite(known).all():
        raise ValueError(f"data has {int((~np.isfinite(known)).sum())} entries that are not finite")
    is_fine = jnp.all(jnp.isfinite(x0))
    checks.debug_check(is_fine, "data has entries that are not finite")
    return jnp.where(is_fine, x0, jnp.nan)


def _range(times: jax.Array) -> dict[str, float]:
    known = checks.concrete(times)
    return {} if known is None else {"t_start": float(known[0]), "t_end": float(known[-1])}


def _in_batches(function: Callable[[Any], Any], samples: Any, size: int) -> Any:
    """``function`` of batches of samples, joined along axis 0; the last one may be smaller."""
    n = jax.tree.leaves(samples)[0].shape[0]
    whole = n // size
    if whole <= 1 and n == size:
        return function(samples)
    split = jax.tree.map(lambda v: v[: whole * size].reshape(whole, size, *v.shape[1:]), samples)
    done = jax.lax.map(function, split)
    done = jax.tree.map(lambda v: v.reshape(whole * size, *v.shape[2:]), done)
    if whole * size == n:
        return done
    rest = function(jax.tree.map(lambda v: v[whole * size :], samples))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), done, rest)


def _products(
    field: Field,
    sde: LinearSDE,
    prediction: str,
    t: jax.Array,
    ends: jax.Array,
    spacing: float | None,
    samples: dict[str, Any],
) -> tuple[jax.Array, ...]:
    """For each sample ``y``, ``dy/dlam``, F, ``dF/dlam`` and the diagonal of ``alpha dF/dx``."""
    x0, noise = samples["x0"], samples["noise"]
    if samples["mu"] is not None:
        sde = dataclasses.replace(sde, mu=samples["mu"])
    kind = _kind(prediction)
    rates = sde.rates(t)
    slope = rates.alpha_dot / rates.alpha - rates.sigma_dot / rates.sigma  # dlam/dt
    mu = sde.centre(x0)
    x = sde.path(x0, noise, t)

    def output(x: jax.Array, t: jax.Array) -> jax.Array:
        out = checks.cast_field_output(field(x, t), x)
        out = convert(out, x, t, sde, prediction, kind)
        if kind == "noise":
            return left_broadcast(sde.sigma(t) / sde.alpha(t), x) * out
        return out if mu is None else out - mu

    clock = jnp.broadcast_to(t, x.shape[:1])
    value, push = jax.linearize(output, x, clock)
    y = (x if mu is None else x - mu) / rates.alpha
    dy = -value if kind == "noise" else value - y
    dx = rates.alpha_dot / slope * y + rates.alpha * dy
    if spacing is None:
        change = push(dx, jnp.broadcast_to(1 / slope, clock.shape))
    else:
        # Along y +- h dy/dlam; what the path lacks is even in h and cancels. Cut at the ends.
        lam = 0.5 * sde.log_snr(t)
        low, high = jnp.maximum(lam - spacing, ends[0]), jnp.minimum(lam + spacing, ends[1])

        def at(level: jax.Array) -> jax.Array:
            place = sde.inverse_log_snr(2 * level)
            moved = sde.alpha(place) * (y + (level - lam) * dy)
            return output(moved if mu is None else moved + mu, jnp.broadcast_to(place, clock.shape))

        change = (at(high) - at(low)) / (high - low)
    still = jnp.zeros_like(clock)

    def along(v: jax.Array) -> jax.Array:
        return v * push(v, still)

    if samples["probe"] is not None:
        diagonal = jnp.mean(jax.vmap(along, in_axes=1)(samples["probe"]), axis=0)
    else:
        diagonal = _over_basis(along, x)
    return y, dy, value, change, rates.alpha * diagonal


def _over_basis(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Sum of ``function`` over the unit vectors of an example, the same for all, in blocks."""
    event = x.shape[1:]
    dim = math.prod(event)

    def at_entry(i: jax.Array) -> jax.Array:
        unit = (jnp.arange(dim) == i).reshape(1, *event)
        return function(jnp.where(unit, jnp.ones_like(x), jnp.zeros_like(x)))

    size = min(dim, max(1, _BLOCK // max(x.size, 1)))
    if size == dim:
        return jnp.sum(jax.vmap(at_entry)(jnp.arange(dim)), axis=0)
    return jnp.sum(jax.lax.map(at_entry, jnp.arange(dim), batch_size=size), axis=0)


def _kind(prediction: str) -> str:
    """Which of F's two forms needs no difference of large numbers."""
    return "noise" if prediction in ("noise", "score") else "data"


def _moments(
    prediction: str,
    y: jax.Array,
    dy: jax.Array,
    value: jax.Array,
    change: jax.Array,
    diagonal: jax.Array,
) -> tuple[jax.Array, ...]:
    """l, and means and covariances of f, y and ``h = f' - c' y``."""
    mean = functools.partial(jnp.mean, axis=0)
    slope = mean(diagonal)
    # f = c y - w F, with c chosen to take away F's mean slope.
    c, w = (-slope, -1.0) if _kind(prediction) == "noise" else (slope, 1.0)
    f = c[None] * y - w * value
    h = c[None] * dy - w * change
    means = mean(f), mean(h), mean(y)
    f_c, h_c, y_c = (v - m[None] for v, m in zip((f, h, y), means, strict=True))
    # What rounding alone makes of a constant f.
    grain = _ROUNDINGS * jnp.finfo(f.dtype).eps
    floor = grain**2 * mean((c[None] * y) ** 2 + f**2)
    variance = mean(f_c**2)
    varies = variance > floor
    l = slope if w < 0 else 1 - slope  # noqa: E741
    return l, *means, variance, mean(f_c * h_c), mean(f_c * y_c), varies


def _curves(
    lam: jax.Array,
    l: jax.Array,  # noqa: E741
    f: jax.Array,
    h: jax.Array,
    y: jax.Array,
    variance: jax.Array,
    with_h: jax.Array,
    with_y: jax.Array,
    varies: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """l, s and b from the moments at every level; ``c' = -l'`` whatever the form."""
    l_dot = _derivative(lam, l)
    covariance = with_h - l_dot * with_y
    s = jnp.where(varies, covariance / jnp.where(varies, variance, 1.0), 0.0)
    return l, s, h - l_dot * y - s * f


def _derivative(lam: jax.Array, curve: jax.Array) -> jax.Array:
    """The derivative in lam at equally spaced nodes, from five: an error of fourth order."""
    n = lam.shape[0]
    step = (lam[-1] - lam[0]) / (n - 1)
    inner = (curve[:-4] - 8 * curve[1:-3] + 8 * curve[3:-1] - curve[4:]) / 12
    edges = np.array([[-25, 48, -36, 16, -3], [-3, -10, 18, -6, 1]]) / 12
    low = [sum(float(w) * curve[j] for j, w in enumerate(row)) for row in edges]
    high = [-sum(float(w) * curve[-1 - j] for j, w in enumerate(row)) for row in edges[::-1]]
    return jnp.concatenate([jnp.stack(low), inner, jnp.stack(high)]) / step


# --- on disk ------------------------------------------------------------------------------------


def save_statistics(directory: str | os.PathLike[str], statistics: Statistics) -> Path:
    """Save statistics: the curves by orbax, and beside them what they were made with.

    Args:
      directory: made if need be; statistics that are there are replaced.
      statistics: to save, with known values.

    Returns:
      The folder.

    Raises:
      ValueError: the folder holds something else; the statistics are none (``Statistics.check``).
      OSError: the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    statistics.check()
    folder = Path(directory).absolute()
    about = folder / _MADE
    if folder.exists() and not about.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and holds no statistics; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    # Without its description, written last, a folder holds nothing.
    about.unlink(missing_ok=True)
    curves = {name: np.asarray(getattr(statistics, name)) for name in _CURVES}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / _ARRAYS, curves, force=True)
    body = {
        "format": _FORMAT,
        "version": 1,
        "made": dict(statistics.made),
        "curves": {k: {"shape": v.shape, "dtype": str(v.dtype)} for k, v in curves.items()},
        "sha256": _digest(curves),
    }
    waiting = about.with_suffix(".tmp")
    waiting.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    os.replace(waiting, about)
    return folder


def load_statistics(directory: str | os.PathLike[str]) -> Statistics:
    """Read saved statistics back, bit for bit.

    Raises:
      ValueError: the folder holds no finished statistics, or their bytes are not those written.
    """
    import orbax.checkpoint as ocp

    folder = Path(directory).absolute()
    try:
        body = json.loads((folder / _MADE).read_text(encoding="utf-8"))
        if body["format"] != _FORMAT or body["version"] != 1:
            raise ValueError(f"format {body['format']!r}, version {body['version']!r}")
        like = {
            name: np.zeros(tuple(about["shape"]), about["dtype"])
            for name, about in body["curves"].items()
        }
        with ocp.StandardCheckpointer() as checkpointer:
            curves = checkpointer.restore(folder / _ARRAYS, like)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} holds no statistics that can be read: {error}") from error
    if _digest(curves) != body["sha256"]:
        raise ValueError(f"{folder} is damaged: the curves are not those that were written")
    lam, l, s, b = (jnp.asarray(curves[name]) for name in _CURVES)  # noqa: E741
    return Statistics(lam, l, s, b, tuple(body["made"].items()))


def _digest(curves: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in _CURVES:
        digest.update(np.ascontiguousarray(curves[name]).tobytes())
    return digest.hexdigest()
