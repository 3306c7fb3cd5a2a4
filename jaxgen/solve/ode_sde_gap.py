r"""How far apart one score's two samplers end: the probability flow and the reverse SDE.

With a learned score s, the flow ``f - g^2 s/2`` and the reverse SDE of drift ``f - g^2 s`` give
one law only if s is the score of a density that solves the Fokker-Planck equation
(``score.fokker_planck``; Deveney et al., arXiv 2311.15996). Let q be the law of the reverse SDE,
which the flow of field ``f - g^2 grad log q/2`` carries too. The two flows differ by
``(g^2/2) (s - grad log q)``, so that from one law at the last time, by Gronwall,

    W2(ode, q)(t_0) <= int_{t_0}^{T} exp(int_{t_0}^{t} L) (g^2/2) ||s - grad log q||_{L2(q)} dt  (1)

with L(t) the one-sided Lipschitz constant in x of ``g^2 s/2 - f``:
``(b(x) - b(y)) . (x - y) <= L |x - y|^2`` for that field b, the flow run backwards.

Both samplers run by Euler's rule on one grid with the same start law, or the difference of their
discretisations would be measured too. As in the paper, the last steps are cut finer and the SDE's
very last one is without noise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, batch_event
from jaxgen.metrics.wasserstein import wasserstein2
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field
from jaxgen.solve.euler_maruyama import EulerMaruyama
from jaxgen.solve.euler_time import EulerTime
from jaxgen.solve.grids import make_grid
from jaxgen.solve.sample import sample
from jaxgen.solve.semilinear import SemiLinearTerm, Window

__all__ = ["Gap", "ode_sde_bound", "ode_sde_gap", "refine_end"]


class Gap(NamedTuple):
    """What ``ode_sde_gap`` returns.

    Attributes:
      ode: samples of the probability flow, ``(batch, *event)``; NaN where it left the numbers.
      sde: samples of the reverse SDE, from other starts and other noise.
      w2: the 2-Wasserstein distance between the two (not its square), ``()``.
      nfe: field evaluations of each sampler, int32 ``()``.
    """

    ode: jax.Array
    sde: jax.Array
    w2: jax.Array
    nfe: jax.Array


class _QuietLast(EulerMaruyama):
    """Euler-Maruyama whose very last step is without noise."""

    @property
    def name(self) -> str:
        """As the solver that it is but for one step."""
        return "euler_maruyama"

    def coefficients(self, term: SemiLinearTerm, window: Window) -> Any:
        """Those of ``EulerMaruyama``, the deviation of the last step zero."""
        t, a, b, spread = super().coefficients(term, window)
        return t, a, b, jnp.where(window.left == 1, jnp.zeros_like(spread), spread)


def refine_end(times: ArrayLike, count: int, parts: int) -> jax.Array:
    """A grid whose last ``count`` intervals are each cut into ``parts`` equal ones.

    Args:
      times: ``(steps + 1,)``.
      count: number of intervals, at most ``steps``.
      parts: parts of each.

    Returns:
      ``(steps + count (parts - 1) + 1,)``.

    Raises:
      ValueError: numbers out of range, or times of another rank.

    Example:
      >>> refine_end([3.0, 2.0, 1.0], 1, 2).tolist()
      [3.0, 2.0, 1.5, 1.0]
    """
    times = jnp.asarray(times)
    count, parts = checks.positive_int("count", count, least=0), checks.positive_int("parts", parts)
    if times.ndim != 1 or not count < times.shape[0]:
        raise ValueError(f"times has shape {times.shape}; expected ({count} + 1 or more,)")
    if count == 0 or parts == 1:
        return times
    first, last = times[-count - 1 : -1, None], times[-count:, None]
    share = (jnp.arange(parts, dtype=times.dtype) + 1)[None] / parts
    # Weighted at both ends, so that the knots of the coarse grid stay as they are.
    cut = jnp.reshape(first * (1 - share) + last * share, -1)
    return jnp.concatenate([times[:-count], cut])


def ode_sde_gap(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    shape: tuple[int, ...],
    *,
    prediction: str = "noise",
    steps: int | None = None,
    grid: str | ArrayLike = "time",
    refine: tuple[int, int] | None = (10, 10),
    method: str | None = None,
    dtype: DTypeLike | None = None,
) -> Gap:
    """Draw from one field by its probability flow and by its reverse SDE, and compare.

    Two samples of one law are at some distance too: for a floor, take ``metrics.wasserstein2``
    between the SDE's samples of two keys.

    Args:
      key: typed key; split for the two samplers, where sample ``i`` draws from keys folded with
        ``i``.
      field: ``f(x, t) -> like x``; a score with ``prediction="score"``, such as
        ``score.potential_score(u)``.
      sde: the process.
      shape: ``(batch, *event)``.
      prediction: what the field predicts, one of ``score.PREDICTIONS``.
      steps: intervals of the grid before it is refined; 800 if ``None``, or an array's length.
      grid: a name of ``solve.GRIDS``, or ``(steps + 1,)`` falling times.
      refine: ``(count, parts)``: cut each of the last ``count`` steps (all, if there are fewer)
        into so many parts; ``None`` for the grid as it is.
      method: of the distance, see ``metrics.wasserstein2``.
      dtype: of the samples; the default floating dtype if ``None``.

    Returns:
      A ``Gap``.

    Raises:
      ValueError: an unknown name, a shape without a batch, or a grid out of range.
      TypeError: a raw key, or a field of an integer dtype.
    """
    if len(shape) < 2:
        raise ValueError(f"shape is {tuple(shape)}; expected (batch, *event)")
    batch, _ = batch_event(tuple(shape), None)
    if steps is None and isinstance(grid, str):
        steps = 800
    times = make_grid(
        grid, sde, steps, batch=batch, dtype=at_least_f32(jnp.float32 if dtype is None else dtype)
    )
    if refine is not None:
        count, parts = refine
        count = checks.positive_int("refine[0]", count, least=0)
        times = refine_end(times, min(count, times.shape[0] - 1), parts)
    key_ode, key_sde = jax.random.split(keys.check(key))
    ode, noisy = (
        sample(
            own, field, sde, shape, solver=solver, grid=times, prediction=prediction, dtype=dtype
        )
        for own, solver in ((key_ode, EulerTime()), (key_sde, _QuietLast()))
    )
    return Gap(ode.x, noisy.x, wasserstein2(ode.x, noisy.x, method=method), ode.nfe)


def ode_sde_bound(
    sde: LinearSDE, times: ArrayLike, lipschitz: ArrayLike, mismatch: ArrayLike
) -> jax.Array:
    """The bound (1) on the gap, by the trapezoid rule.

    It is for two samplers that start from one law; a start that differs from the field's own
    density adds to the mismatch, which is against the law q of the reverse SDE.

    Args:
      sde: the process.
      times: ``(n,)``, rising from the sampler's end to its start.
      lipschitz: one-sided Lipschitz constants L of ``g^2 s/2 - f`` at these times, ``(n,)``.
      mismatch: ``||s - grad log q||`` in L2(q) at these times, ``(n,)``, at least 0.

    Returns:
      ``()``, float32 or wider, in the units of x.

    Raises:
      ValueError: shapes that differ, or fewer than two times.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen import process
      >>> t = jnp.linspace(1.0, 3.0, 5)
      >>> float(ode_sde_bound(process.edm(), t, jnp.zeros(5), jnp.ones(5)))  # int t dt
      4.0
    """
    arrays = [checks.floating("times", times)]
    arrays += [jnp.asarray(v) for v in (lipschitz, mismatch)]
    if arrays[0].ndim != 1 or len({v.shape for v in arrays}) > 1 or arrays[0].shape[0] < 2:
        raise ValueError(
            f"times, lipschitz and mismatch have shapes {', '.join(str(v.shape) for v in arrays)}; "
            "expected (n,) each, of two times or more"
        )
    dtype = at_least_f32(jnp.result_type(*arrays))
    t, rate, size = (v.astype(dtype) for v in arrays)
    gaps = jnp.diff(t)
    rises = jnp.all(gaps > 0)
    checks.debug_check(rises, "times do not rise: {t}", t=t)
    growth = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(0.5 * gaps * (rate[1:] + rate[:-1]))])
    integrand = jnp.exp(growth) * 0.5 * sde.diffusion_squared(t) * size
    total = jnp.sum(0.5 * gaps * (integrand[1:] + integrand[:-1]))
    return jnp.where(rises, total, jnp.nan)
