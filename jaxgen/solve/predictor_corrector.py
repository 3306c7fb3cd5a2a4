r"""Predictor-corrector sampling: at each level first correct, then predict.

Song et al., arXiv 2011.13456, section 4.2, in the order of their code: for each index i from noise
to data a corrector step at t_i, then a predictor step from t_i. The mean of the last step, without
its noise, is returned. Nfe = N (M + 1) for a predictor of one call and a corrector of M.

Predictors and correctors are functions of a ``Chain`` that give a step ``(key, x, i) -> (x,
x_mean)``, so that any pair composes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field
from jaxgen.solve.chain import Chain, Kernel, Step, published, walk
from jaxgen.solve.corrector import LangevinCorrector, langevin_corrector
from jaxgen.solve.drivers import scan_carry
from jaxgen.solve.grids import finite_ends, make_grid
from jaxgen.solve.meter import Ticker
from jaxgen.solve.path import AHEAD, fold_each
from jaxgen.solve.predictors import KERNELS, as_predictor
from jaxgen.solve.registry import resolve
from jaxgen.solve.semilinear import SemiLinearTerm
from jaxgen.solve.state import Sample, Start, finish, start
from jaxgen.solve.terms import FieldCall, arrays_of

__all__ = ["annealed_langevin", "predictor_corrector"]

Builder = Callable[[Chain], Kernel]
Projection = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _predictor(predictor: Any) -> tuple[str, Builder | None]:
    if predictor is None:
        return "none", None
    if callable(predictor) and not isinstance(predictor, diffrax.AbstractSolver | str):
        return getattr(predictor, "__name__", type(predictor).__name__), predictor
    name, _, made = resolve(predictor)
    return name, KERNELS[name] if made is None else as_predictor(made)  # type: ignore[arg-type]


def _chain(
    begun: Start,
    field: Field,
    sde: LinearSDE,
    steps: int,
    prediction: str,
    grid: str | ArrayLike,
    t_start: ArrayLike | None,
    t_end: ArrayLike | None,
    first_index: ArrayLike,
) -> tuple[Chain, jax.Array]:
    """The chain and its grid, falling."""
    call = FieldCall(field, None if begun.batch else begun.x.ndim, begun.field_dtype)
    if _is_published(grid):
        if t_start is not None:
            raise ValueError('grid "score_sde" starts at t_max; expected t_start=None')
        # N published times are N - 1 intervals of the grid in time.
        times = make_grid("time", sde, steps - 1, t_end=t_end, dtype=begun.x.dtype)
        own = sde if t_end is None else dataclasses.replace(sde, t_end=times[-1])
        term = SemiLinearTerm(call, arrays_of(own), times, None, prediction)
        return published(term, steps, begun.batch, first_index), times
    times = make_grid(
        grid, sde, steps, t_start=t_start, t_end=t_end, batch=begun.batch, dtype=begun.x.dtype
    )
    ends = finite_ends(sde, grid, t_start, t_end)
    term = SemiLinearTerm(call, arrays_of(sde), times, None, prediction, ends)
    return walk(term, begun.batch, first_index), times


def predictor_corrector(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    shape: tuple[int, ...],
    *,
    predictor: Any = "reverse_diffusion",
    corrector: Builder | None = None,
    steps: int = 1000,
    prediction: str = "noise",
    grid: str | ArrayLike = "score_sde",
    project: Projection | None = None,
    x_init: ArrayLike | None = None,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
    progress: Any = None,
    denoise_last: bool = False,
    dtype: DTypeLike | None = None,
    event_ndim: int | None = None,
    first_index: ArrayLike = 0,
) -> Sample:
    """Sample by a predictor and a corrector in turns (module docstring).

    Args:
      key: typed key; sample ``i`` draws from keys folded with ``first_index + i``.
      field: ``f(x, t) -> like x``, see ``sample``.
      sde: the process.
      shape: ``(batch, *event)``, or the event alone if ``event_ndim=len(shape)``.
      predictor: ``"ancestral"``, ``"reverse_diffusion"``, a name or object of our solvers, a
        function of a ``Chain`` that gives a step, or ``None`` for none.
      corrector: ``langevin_corrector(...)``, a function of a ``Chain`` that gives a step, or
        ``None`` for none.
      steps: levels, N.
      prediction: what the field predicts.
      grid: ``"score_sde"`` as published (N levels, both ends among them), or any grid of
        ``sample`` with N + 1 knots, where each predictor step ends at the next.
      project: ``(key, x, x_mean, t) -> (x, x_mean)``, called after every corrector and every
        predictor step with a fresh key and the time ``t``, ``()`` or ``(batch,)``, of the level
        that ``x`` is at: t_i throughout on the published grid; on others t_i after the corrector
        and the next knot after the predictor. For imputation; its field calls are not counted.
      x_init: first state; drawn from the prior if ``None``.
      t_start: see ``sample``; only on grids other than the published.
      t_end: last time.
      progress: ``True`` shows a meter.
      denoise_last: end with the data prediction at ``t_end`` from the last mean, one more call.
      dtype: see ``sample``; may be complex.
      event_ndim: see ``sample``.
      first_index: see ``sample``.

    Returns:
      A ``Sample``; its ``x`` is the last ``x_mean``.

    Raises:
      ValueError: unknown names; ancestral sampling for other processes than vp and ve; fewer than
        2 steps on the published grid, or for vp no more than ``beta_max``; a solver that needs
        levels on the published grid; neither predictor nor corrector.
      TypeError: something that is no predictor or corrector, or a raw key.
    """
    name, build = _predictor(predictor)
    if build is None and corrector is None:
        raise ValueError("predictor and corrector are both None; expected at least one")
    if corrector is not None and not callable(corrector):
        raise TypeError(
            f"corrector is {corrector!r}; expected langevin_corrector(...) or a function of a chain"
        )
    steps = checks.positive_int("steps", steps, least=2 if _is_published(grid) else 1)
    begun = start(key, sde, shape, x_init, prediction, dtype, event_ndim, first_index)
    chain, times = _chain(begun, field, sde, steps, prediction, grid, t_start, t_end, first_index)
    kernels = [
        (made(chain), after)
        for made, after in (
            (corrector, chain.first.t),
            (build, chain.first.t if chain.last is None else chain.last.t),
        )
        if made is not None
    ]
    tick = Ticker(steps, f"sample {name}") if progress else None
    mean = _loop(begun, kernels, steps, project, tick)
    calls = [k.calls if isinstance(k, Step) else jnp.asarray(-1, jnp.int32) for k, _ in kernels]
    nfe = sum(calls[1:], calls[0])
    if any(not isinstance(k, Step) for k, _ in kernels):
        nfe = jnp.asarray(-1, jnp.int32)
    return finish(
        begun,
        field,
        sde,
        mean,
        nfe,
        diffrax.RESULTS.successful,
        times,
        prediction=prediction,
        denoise_last=denoise_last,
        last_step="mean",
        solver=name,
        steps=steps,
        grid=grid if isinstance(grid, str) else "array",
        corrector=None if corrector is None else _corrector_name(corrector),
    )


def _is_published(grid: Any) -> bool:
    return isinstance(grid, str) and grid == "score_sde"


def _corrector_name(corrector: Any) -> str:
    if isinstance(corrector, LangevinCorrector):
        return corrector.variant
    return getattr(corrector, "__name__", type(corrector).__name__)


def _loop(
    begun: Start,
    kernels: list[tuple[Kernel, jax.Array]],
    steps: int,
    project: Projection | None,
    tick: Ticker | None,
) -> jax.Array:
    """The last ``x_mean``; noise is drawn ahead where it is small."""
    x = begun.x
    # For each level a key for every kernel's noise and for every projection.
    width = 2 * len(kernels)
    split = fold_each(begun.key, jnp.arange(steps * width)).reshape(steps, width)

    def is_drawn_ahead(kernel: Kernel) -> bool:
        if not isinstance(kernel, Step):
            return False
        noise = jax.eval_shape(kernel.draw, begun.key, x)
        return steps * sum(math.prod(v.shape) for v in jax.tree.leaves(noise)) <= AHEAD

    ahead = [is_drawn_ahead(k) for k, _ in kernels]
    drawn = [
        kernel.draw(split[:, j], x) if early else split[:, j]  # type: ignore[attr-defined]
        for j, ((kernel, _), early) in enumerate(zip(kernels, ahead, strict=True))
    ]

    def body(carry: tuple[jax.Array, jax.Array], inputs: Any) -> Any:
        x, mean = carry
        n, noises, keys = inputs
        i = steps - 1 - n
        for j, ((kernel, after), early) in enumerate(zip(kernels, ahead, strict=True)):
            step = kernel.apply if early else kernel  # type: ignore[attr-defined]
            x, mean = step(noises[j], x, i)
            if project is not None:
                x, mean = project(keys[j], x, mean, after[i])
        if tick is not None:
            tick(n)
        return (x, mean), None

    inputs = (jnp.arange(steps), drawn, split[:, len(kernels) :])
    return scan_carry(body, (x, x), inputs)[1]


def annealed_langevin(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    shape: tuple[int, ...],
    *,
    snr: float = 0.16,
    steps: int = 1000,
    corrector_steps: int = 1,
    variant: str = "ald",
    norms: str = "batch",
    **options: Any,
) -> Sample:
    """Annealed Langevin dynamics: the corrector alone at falling noise levels.

    Song and Ermon, arXiv 1907.05600, algorithm 1, with the step sizes of ``corrector``.

    Args:
      key: typed key.
      field: ``f(x, t) -> like x``, see ``sample``.
      sde: the process.
      shape: ``(batch, *event)``, or the event alone if ``event_ndim=len(shape)``.
      snr: see ``langevin_corrector``.
      steps: levels.
      corrector_steps: Langevin steps at each level.
      variant: see ``langevin_corrector``.
      norms: see ``langevin_corrector``.
      **options: see ``predictor_corrector``.

    Returns:
      A ``Sample``, the last step's mean; nfe is ``steps * corrector_steps``.
    """
    corrector = langevin_corrector(snr, corrector_steps, variant=variant, norms=norms)
    return predictor_corrector(
        key, field, sde, shape, predictor=None, corrector=corrector, steps=steps, **options
    )
