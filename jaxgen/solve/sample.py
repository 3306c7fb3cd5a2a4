"""Draw samples: a solver, a grid and a driver, chosen by name or given.

``sample`` moves noise along a process to data. Solvers on fixed grids run in the scan driver;
``controller``, ``adjoint`` or ``brownian`` choose ``diffeqsolve``; the published indexed kernels,
correctors and the published grid run in the predictor-corrector loop (``drivers``,
``predictor_corrector``).
"""

import dataclasses
import functools
import math
from typing import Any, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import Field
from jaxgen.solve.drivers import Driven, rising, scan_grid, scan_terms, solve_one
from jaxgen.solve.grids import finite_ends, make_grid
from jaxgen.solve.meter import Ticker
from jaxgen.solve.noise import Brownian, draws_ahead, sample_keys, sample_path
from jaxgen.solve.predictor_corrector import predictor_corrector
from jaxgen.solve.registry import resolve
from jaxgen.solve.semilinear import GridSolver, SemiLinearTerm, progress_grid, tabulate
from jaxgen.solve.state import Sample, Start, finish, start
from jaxgen.solve.terms import (
    FieldCall,
    arrays_of,
    map_samples,
    on_single,
    probability_flow,
    reverse_sde,
)

__all__ = ["Sample", "sample"]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the drivers need, resolved."""

    begun: Start
    field: Field
    sde: LinearSDE
    solver: diffrax.AbstractSolver
    prediction: str
    times: jax.Array
    ends: tuple[bool | None, bool | None]
    first_index: ArrayLike

    @property
    def steps(self) -> int:
        return self.times.shape[0] - 1

    @property
    def event_ndim(self) -> int | None:
        return None if self.begun.batch else self.begun.x.ndim

    def keys(self) -> jax.Array:
        return sample_keys(self.begun.key, self.begun.batch, self.first_index)


def _semilinear(
    job: _Job, sde: LinearSDE, field: Field, times: jax.Array, path: Any, event_ndim: int | None
) -> SemiLinearTerm:
    return SemiLinearTerm(
        FieldCall(field, event_ndim, job.begun.field_dtype),
        arrays_of(sde),
        times,
        path,
        job.prediction,
        job.ends,
    )


def _raw(
    job: _Job, sde: LinearSDE, field: Field, path: Any, event_ndim: int | None
) -> diffrax.AbstractTerm:
    options: dict[str, Any] = {
        "prediction": job.prediction,
        "event_ndim": event_ndim,
        "dtype": job.begun.field_dtype,
    }
    if path is None:
        return rising(probability_flow(field, sde, **options))
    return rising(reverse_sde(field, sde, path, **options))


def _scan(job: _Job, tick: Any) -> Driven:
    x, event, solver = job.begun.x, job.begun.event, job.solver
    # HalfSolver passes isinstance for the solver it wraps, so the type itself is asked.
    if issubclass(type(solver), GridSolver):
        path = sample_path(solver, job.keys(), event, x, job.steps, drawn=job.begun.increments)
        term = _semilinear(job, job.sde, job.field, job.times, path, job.event_ndim)
        return scan_grid(term, cast(GridSolver, solver), x, tick)
    if isinstance(solver, GridSolver):
        raise ValueError(
            f"solver {type(solver).__name__} takes part steps; pass a controller for diffeqsolve"
        )
    if job.times.ndim == 1:
        drawn = job.begun.increments
        path = sample_path(solver, job.keys(), event, x, job.steps, -job.times, drawn=drawn)
        terms = _raw(job, job.sde, job.field, path, job.event_ndim)
        return scan_terms(terms, solver, -job.times, x, tick)

    def one(sde: LinearSDE, x: jax.Array, key: jax.Array, times: jax.Array) -> Driven:
        path = sample_path(solver, key, event, x, job.steps, times)
        terms = _raw(job, sde, on_single(job.field), path, x.ndim)
        return scan_terms(terms, solver, times, x, tick)

    driven = map_samples(one, job.sde, x, job.keys(), -job.times.T)
    return driven._replace(nfe=driven.nfe[0])


def _diffeq(
    job: _Job,
    controller: Any,
    adjoint: Any,
    brownian: Brownian,
    max_steps: int,
    meter: Any,
) -> Driven:
    solver = job.solver
    is_adaptive = isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    if is_adaptive and not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"controller is adaptive and solver {type(solver).__name__} estimates no error; "
            "wrap it in diffrax.HalfSolver, or take an adaptive solver such as diffrax.Tsit5()"
        )
    if controller is not None and not isinstance(solver, GridSolver):
        controller = controller.wrap(-1)  # its times are raw, the terms' are negated
    options: dict[str, Any] = {
        "controller": controller,
        "adjoint": adjoint,
        "max_steps": max_steps,
        "meter": meter,
    }

    def one(sde: LinearSDE, x: jax.Array, key: jax.Array, times: jax.Array, field: Field) -> Driven:
        event = x.shape
        if isinstance(solver, GridSolver):
            u = progress_grid(job.steps, x.dtype)
            path = sample_path(solver, key, event, x, job.steps, None, brownian, controller)
            term = _semilinear(job, sde, field, times, path, x.ndim)
            calls = None
            if controller is None:
                calls = solver.calls(term, tabulate(term, solver))
            return solve_one(term, solver, u, x, calls=calls, **options)
        path = sample_path(solver, key, event, x, job.steps, -times, brownian, controller)
        terms = _raw(job, sde, field, path, x.ndim)
        return solve_one(terms, solver, -times, x, **options)

    if not job.begun.batch:
        return one(job.sde, job.begun.x, job.keys(), job.times, job.field)
    if job.times.ndim == 1:  # one clock for all, which a loop over fixed steps then keeps
        alike = functools.partial(one, times=job.times, field=on_single(job.field))
        return map_samples(alike, job.sde, job.begun.x, job.keys())
    return map_samples(
        one, job.sde, job.begun.x, job.keys(), job.times.T, field=on_single(job.field)
    )


def sample(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    shape: tuple[int, ...],
    *,
    solver: str | diffrax.AbstractSolver = "dpmpp_2m",
    steps: int | None = None,
    prediction: str = "noise",
    grid: str | ArrayLike | None = None,
    x_init: ArrayLike | None = None,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
    corrector: Any = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    brownian: Brownian = None,
    progress: bool | diffrax.AbstractProgressMeter | None = None,
    denoise_last: bool = False,
    max_steps: int = 4096,
    dtype: DTypeLike | None = None,
    event_ndim: int | None = None,
    first_index: ArrayLike = 0,
) -> Sample:
    """Draw samples by moving noise along a process to data.

    The first ``k`` samples of a batch of ``n`` are the same whatever ``n``, the number of devices
    and the sharding, to rounding (but for a corrector with norms over the batch).

    Args:
      key: typed key; sample ``i`` draws from keys folded with ``first_index + i``.
      field: ``f(x, t) -> like x`` with ``t`` of shape ``(batch,)``; ``()`` for one sample. Each
        sample that is its own solve calls it on a batch of one.
      sde: the process.
      shape: ``(batch, *event)``, or the event alone if ``event_ndim=len(shape)``.
      solver: a name of ``SOLVERS``, or a diffrax solver object: Ito and Stratonovich solvers take
        the reverse SDE, others the probability flow, ours their own term.
      steps: intervals of the grid; ``None`` for the solver's default (20; 1000 for ``ancestral``
        and ``reverse_diffusion``) or an array's length. Under a controller, the first step is
        1/steps of the way.
      prediction: what the field predicts, one of ``score.PREDICTIONS``.
      grid: ``"time"``, ``"log_snr"``, ``"karras"``, ``"score_sde"`` or ``(steps + 1,)`` falling
        times; ``None`` for the solver's default.
      x_init: state at ``t_start``, of ``shape``; drawn from the prior if ``None``.
      t_start: first time, ``()`` or per sample ``(batch,)``; ``t_max`` if ``None``.
      t_end: last time; the process' ``t_end`` if ``None``.
      corrector: see ``langevin_corrector``; runs the predictor-corrector loop.
      controller: a diffrax step-size controller; each sample has its own steps.
      adjoint: a diffrax adjoint. Without one, reverse mode goes through the scan.
      brownian: ``"grid"`` (the scan driver's own noise), ``"tree"`` (a ``VirtualBrownianTree``,
        the default under an adaptive controller), or ``f(key, shape, t0, t1) -> path`` for one
        sample, ``shape`` a ``ShapeDtypeStruct``.
      progress: ``True`` shows a meter; a diffrax progress meter serves ``diffeqsolve``.
      denoise_last: end with the data prediction at ``t_end``, one more call.
      max_steps: bound on steps under a controller.
      dtype: of the samples; ``x_init``'s, or the default floating dtype, if ``None``. The state is
        kept in float32 or wider, and the field is called in ``dtype``.
      event_ndim: see ``shape``.
      first_index: number of the first sample, for a batch that is drawn in parts: inside
        ``shard_map``, ``axis_index * local batch``. May be traced.

    Returns:
      A ``Sample``.

    Raises:
      ValueError: unknown names; shapes that do not fit; known times that do not fall or are out of
        range; a controller for a solver without error estimate; ``controller``, ``adjoint`` or
        ``brownian`` for the predictor-corrector loop.
      TypeError: a raw key, an integer dtype, or something that is no solver.

    Values that are not known at trace time (traced times) give NaN, and an error under
    ``checkify``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> sde = process.vp()
      >>> field = score.closed_form.gaussian(sde, jnp.ones(2), 0.25).noise
      >>> draw = jax.jit(lambda key: sample(key, field, sde, (4, 2), solver="ddim", steps=10))
      >>> out = draw(jax.random.key(0))
      >>> out.x.shape, int(out.nfe)
      ((4, 2), 10)
    """
    name, entry, made = resolve(solver)
    if grid is None and issubclass(type(made), GridSolver):
        grid = cast(GridSolver, made).times(sde)
    grid = entry.grid if grid is None else grid
    if steps is None:
        steps = entry.steps if isinstance(grid, str) else max(np.size(grid) - 1, 1)
    uses_diffeq = any(v is not None for v in (controller, adjoint, brownian))
    if made is None or corrector is not None or (isinstance(grid, str) and grid == "score_sde"):
        if uses_diffeq:
            raise ValueError(
                "controller, adjoint and brownian are for diffeqsolve; solver "
                f"{name} with corrector {corrector} on grid {grid} runs in the predictor-corrector "
                "loop, whose noise is its own"
            )
        return predictor_corrector(
            key,
            field,
            sde,
            shape,
            predictor=solver,
            corrector=corrector,
            steps=steps,
            prediction=prediction,
            grid=grid,
            x_init=x_init,
            t_start=t_start,
            t_end=t_end,
            progress=progress,
            denoise_last=denoise_last,
            dtype=dtype,
            event_ndim=event_ndim,
            first_index=first_index,
        )
    is_shared = jnp.ndim(0.0 if t_start is None else t_start) == 0 and isinstance(steps, int)
    ahead = draws_ahead(made, steps, math.prod(shape)) if is_shared and not uses_diffeq else 0
    begun = start(key, sde, shape, x_init, prediction, dtype, event_ndim, first_index, ahead)
    times = make_grid(
        grid, sde, steps, t_start=t_start, t_end=t_end, batch=begun.batch, dtype=begun.x.dtype
    )
    ends = finite_ends(sde, grid, t_start, t_end)
    job = _Job(begun, field, sde, made, prediction, times, ends, first_index)
    if uses_diffeq:
        meter = diffrax.TqdmProgressMeter() if progress is True else (progress or None)
        driven = _diffeq(job, controller, adjoint, brownian, max_steps, meter)
    else:
        driven = _scan(job, Ticker(job.steps, f"sample {name}") if progress else None)
    is_adaptive = isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    return finish(
        begun,
        field,
        sde,
        *driven,
        times[jnp.array([0, -1])] if is_adaptive else times,
        prediction=prediction,
        denoise_last=denoise_last,
        solver=name,
        steps=job.steps,
        grid="adaptive" if is_adaptive else grid if isinstance(grid, str) else "array",
        corrector=None,
    )
