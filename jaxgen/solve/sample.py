"""Draw samples: a solver, a grid and a driver, chosen by name or given.

``sample`` moves noise along a process to data. Solvers on fixed grids run in the scan driver;
``controller``, ``adjoint`` or ``brownian`` choose ``diffeqsolve``; the published indexed kernels,
correctors and the published grid run in the predictor-corrector loop (``drivers``,
``predictor_corrector``).
"""

import dataclasses
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import batch_event
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import PREDICTIONS, Field, convert
from jaxgen.solve.drivers import Driven, scan_grid, scan_terms, solve_one
from jaxgen.solve.grids import ends_are_finite, make_grid
from jaxgen.solve.meter import Ticker
from jaxgen.solve.noise import Brownian, is_sde_solver, sample_keys, sample_path
from jaxgen.solve.registry import resolve
from jaxgen.solve.semilinear import GridSolver, SemiLinearTerm, knots, progress_grid
from jaxgen.solve.terms import (
    FieldCall,
    arrays_of,
    map_samples,
    on_single,
    probability_flow,
    reverse_sde,
)

__all__ = ["Sample", "sample"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    """Samples and what they were made with.

    Attributes:
      x: samples, of the shape and dtype asked for; NaN where ``result`` is not successful.
      nfe: field evaluations, int32: ``()``, or ``(batch,)`` where each sample was its own solve;
        -1 where the solver does not tell (implicit ones).
      result: ``diffrax.RESULTS``, ``()`` or ``(batch,)``; ``nonfinite`` where ``x`` is.
      times: the grid, ``(steps + 1,)`` or ``(steps + 1, batch)``; the two ends if adaptive.
      solver: name of the solver (static).
      prediction: what the field predicts (static).
      steps: intervals of the grid (static).
      grid: the grid's name, ``"array"`` for a given one, ``"adaptive"`` under a controller.
      corrector: name of the corrector, ``None`` without (static).
      last_step: ``"solver"``, ``"mean"`` (noise-free last step of the predictor-corrector loop)
        or ``"denoise"`` (data prediction at ``t_end``) (static).
    """

    x: jax.Array
    nfe: jax.Array
    result: Any
    times: jax.Array
    solver: str = dataclasses.field(metadata={"static": True})
    prediction: str = dataclasses.field(metadata={"static": True})
    steps: int = dataclasses.field(metadata={"static": True})
    grid: str = dataclasses.field(metadata={"static": True})
    corrector: str | None = dataclasses.field(metadata={"static": True})
    last_step: str = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the drivers need, resolved."""

    key: jax.Array
    field: Field
    sde: LinearSDE
    solver: diffrax.AbstractSolver
    prediction: str
    times: jax.Array
    is_finite: bool
    x: jax.Array
    event_ndim: int | None
    dtype: Any
    first_index: ArrayLike

    @property
    def batch(self) -> tuple[int, ...]:
        return batch_event(self.x, self.event_ndim)[0]

    @property
    def steps(self) -> int:
        return self.times.shape[0] - 1

    def keys(self) -> jax.Array:
        return sample_keys(self.key, self.batch, self.first_index)


def _semilinear(
    job: _Job, sde: LinearSDE, field: Field, times: jax.Array, path: Any, event_ndim: int | None
) -> SemiLinearTerm:
    return SemiLinearTerm(
        FieldCall(field, event_ndim, job.dtype),
        arrays_of(sde),
        times,
        path,
        job.prediction,
        job.is_finite,
    )


def _raw(
    job: _Job, sde: LinearSDE, field: Field, path: Any, event_ndim: int | None
) -> diffrax.AbstractTerm:
    options = {"prediction": job.prediction, "event_ndim": event_ndim, "dtype": job.dtype}
    if path is None:
        return probability_flow(field, sde, **options)
    return reverse_sde(field, sde, path, **options)


def _scan(job: _Job, tick: Any) -> Driven:
    x, solver = job.x, job.solver
    if issubclass(type(solver), GridSolver):
        path = sample_path(solver, job.keys(), batch_event(x, job.event_ndim)[1], x, job.steps)
        term = _semilinear(job, job.sde, job.field, job.times, path, job.event_ndim)
        return scan_grid(term, solver, x, tick)
    if isinstance(solver, GridSolver):
        raise ValueError(
            f"solver {type(solver).__name__} takes part steps; pass a controller for diffeqsolve"
        )
    event = batch_event(x, job.event_ndim)[1]
    if job.times.ndim == 1:
        path = sample_path(solver, job.keys(), event, x, job.steps, job.times)
        terms = _raw(job, job.sde, job.field, path, job.event_ndim)
        return scan_terms(terms, solver, job.times, x, tick)

    def one(sde: LinearSDE, x: jax.Array, key: jax.Array, times: jax.Array) -> Driven:
        path = sample_path(solver, key, event, x, job.steps, times)
        terms = _raw(job, sde, on_single(job.field), path, x.ndim)
        return scan_terms(terms, solver, times, x, tick)

    driven = map_samples(one, job.sde, x, job.keys(), job.times.T)
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
            f"controller is adaptive and solver {type(solver).__name__} estimates no error; wrap it "
            "in diffrax.HalfSolver, or take an adaptive solver such as diffrax.Tsit5()"
        )
    options = {"controller": controller, "adjoint": adjoint, "max_steps": max_steps, "meter": meter}

    def one(sde: LinearSDE, x: jax.Array, key: jax.Array, times: jax.Array, field: Field) -> Driven:
        event = x.shape
        if isinstance(solver, GridSolver):
            u = progress_grid(job.steps, x.dtype)
            path = sample_path(solver, key, event, x, job.steps, None, brownian, controller)
            term = _semilinear(job, sde, field, times, path, x.ndim)
            calls = None
            if controller is None:
                first, last = knots(term)
                numbers = jax.vmap(lambda a, b: solver.coefficients(term, a, b))(first, last)
                calls = solver.calls(term, numbers)
            return solve_one(term, solver, u, x, calls=calls, **options)
        path = sample_path(solver, key, event, x, job.steps, times, brownian, controller)
        terms = _raw(job, sde, field, path, x.ndim)
        return solve_one(terms, solver, times, x, **options)

    if not job.batch:
        return one(job.sde, job.x, job.keys(), job.times, job.field)
    times = job.times if job.times.ndim == 2 else job.times[:, None]
    times = jnp.broadcast_to(times, (job.steps + 1, *job.batch)).T
    return map_samples(one, job.sde, job.x, job.keys(), times, field=on_single(job.field))


def _nonfinite(driven: Driven, batch: tuple[int, ...]) -> Any:
    """The result codes, ``nonfinite`` where a sample is."""
    axes = tuple(range(len(batch), driven.x.ndim))
    is_finite = jnp.all(jnp.isfinite(driven.x), axis=axes)
    codes = jax.tree.map(
        lambda v: v if v.shape == batch else jnp.broadcast_to(v, batch), driven.result
    )

    def one(is_finite: jax.Array, code: Any) -> Any:
        is_fine = is_finite | (code != diffrax.RESULTS.successful)
        return diffrax.RESULTS.where(is_fine, code, diffrax.RESULTS.nonfinite)

    return jax.vmap(one)(is_finite, codes) if batch else one(is_finite, codes)


def sample(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    shape: tuple[int, ...],
    *,
    solver: str | diffrax.AbstractSolver = "heun",
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
      >>> out = sample(jax.random.key(0), field, sde, (4, 2), solver="ddim", steps=10)
      >>> out.x.shape, int(out.nfe)
      ((4, 2), 10)
    """
    keys.check(key)
    checks.one_of("prediction", prediction, PREDICTIONS)
    name, entry, made = resolve(solver)
    shape = tuple(shape)
    batch, event = batch_event(shape, event_ndim)
    if dtype is None:
        dtype = jnp.zeros(()).dtype if x_init is None else jnp.asarray(x_init).dtype
    dtype = checks.floating("dtype", jnp.zeros((), dtype), allow_complex=True).dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    grid = entry.grid if grid is None else grid
    if steps is None and isinstance(grid, str):
        steps = entry.steps
    if not isinstance(grid, str):
        steps = jnp.shape(grid)[0] - 1 if steps is None and jnp.ndim(grid) else steps

    key_start, key_loop = jax.random.split(key)
    if x_init is None:
        x = _prior(key_start, sde, batch, event, wide, first_index)
    else:
        x = checks.floating("x_init", x_init, allow_complex=True).astype(wide)
        if x.shape != shape:
            raise ValueError(f"x_init has shape {x.shape}; expected shape {shape}")
    uses_diffeq = any(v is not None for v in (controller, adjoint, brownian))

    times = make_grid(grid, sde, steps, t_start=t_start, t_end=t_end, batch=batch, dtype=wide)
    job = _Job(
        key_loop,
        field,
        sde,
        made,
        prediction,
        times,
        ends_are_finite(sde, grid, t_start, t_end),
        x,
        event_ndim,
        dtype if dtype != wide else None,
        first_index,
    )
    if uses_diffeq:
        meter = diffrax.TqdmProgressMeter() if progress is True else (progress or None)
        driven = _diffeq(job, controller, adjoint, brownian, max_steps, meter)
    else:
        driven = _scan(job, Ticker(job.steps, f"sample {name}") if progress else None)

    x, nfe = driven.x, driven.nfe
    if denoise_last:
        call = FieldCall(field, event_ndim, job.dtype)
        end = jnp.broadcast_to(times[-1], batch)
        x = convert(call(x, end), x, end, sde, prediction, "data")
        nfe = jnp.where(nfe < 0, nfe, nfe + 1)
    is_adaptive = isinstance(controller, diffrax.AbstractAdaptiveStepSizeController)
    return Sample(
        x=x.astype(dtype),
        nfe=nfe,
        result=_nonfinite(driven._replace(x=x), batch),
        times=times[jnp.array([0, -1])] if is_adaptive else times,
        solver=name,
        prediction=prediction,
        steps=job.steps,
        grid="adaptive" if is_adaptive else grid if isinstance(grid, str) else "array",
        corrector=None,
        last_step="denoise" if denoise_last else "solver",
    )


def _prior(
    key: jax.Array,
    sde: LinearSDE,
    batch: tuple[int, ...],
    event: tuple[int, ...],
    dtype: Any,
    first_index: ArrayLike,
) -> jax.Array:
    """The prior, sample ``i`` from ``fold_in(key, first_index + i)``."""
    if not batch:
        return sde.prior_sample(key, event, dtype=dtype, event_ndim=len(event))

    def one(sde: LinearSDE, x: jax.Array, key: jax.Array) -> jax.Array:
        return sde.prior_sample(key, event, dtype=dtype, event_ndim=x.ndim)

    like = jnp.zeros((*batch, *event), dtype)
    return map_samples(one, sde, like, sample_keys(key, batch, first_index))
