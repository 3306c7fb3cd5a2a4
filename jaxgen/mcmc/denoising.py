r"""Denoising MCMC: states of a denoising Gibbs chain, each denoised from its own noise level.

Kim and Ye, ICML 2023, arXiv 2209.14593. The chain stays near the data at modest noise, so that an
integrator from there needs far fewer evaluations than one from pure noise. The end is one Tweedie
step, x + e^2 grad log p_e(x), the data prediction at the last level e. A state that is already at
or below the last level is denoised by that step alone, from its own level: a grid from it would run
upwards.

The gain is one of few evaluations: with Heun's solver the chain wins by far at 10, and from about
16 on samples from noise are as good; with multistep solvers they are from about 10 on
(``tests/claims/test_denoising_mcmc.py`` has the figures). Samples of one chain are correlated, so
that standard errors of independent ones are too small. The count ``nfe`` has everything in it:
first states, chain, integrator and Tweedie steps.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, left_broadcast
from jaxgen.mcmc.denoising_gibbs import GibbsState, Start, chain, init
from jaxgen.mcmc.sweep import LevelLogits, level_of, predict, rescale, time_of
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import PREDICTIONS, Field
from jaxgen.solve.meter import Ticker
from jaxgen.solve.sample import sample
from jaxgen.solve.state import Sample
from jaxgen.solve.terms import FieldCall

__all__ = ["Denoised", "DenoisingMCMC", "Spent", "denoise", "denoising_mcmc", "mode_changes"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# A start within this of the last level, in log sigma, leaves an integrator nothing to do.
_NEAR = 1e-3


class Denoised(NamedTuple):
    """Denoised states.

    Attributes:
      x: of the starts' shape and dtype; NaN where ``result`` is not successful.
      nfe: evaluations of the field for each draw, int32: ``(draws,)``, or ``(draws, chains)`` where
        each sample was its own solve; -1 where the solver does not tell.
      tweedie: of these, Tweedie steps, int32 ``(draws,)``.
      result: ``diffrax.RESULTS``, ``(draws, chains)`` or ``(draws,)``.
    """

    x: jax.Array
    nfe: jax.Array
    tweedie: jax.Array
    result: Any


class Spent(NamedTuple):
    """Evaluations of the field by each chain for all its draws, int32; -1 where not known.

    Attributes:
      init: by the first states, ``()``.
      chain: by the sweeps, ``()``.
      solver: by the integrator, ``()`` or ``(chains,)``.
      tweedie: by Tweedie steps, ``()``.
    """

    init: jax.Array
    chain: jax.Array
    solver: jax.Array
    tweedie: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenoisingMCMC:
    """Samples by denoising MCMC, and what they cost; one chain alone has no axis ``chains``.

    Attributes:
      x: samples, ``(draws, chains, *event)``.
      nfe: evaluations of the field by each chain in all, int32 ``()`` or ``(chains,)``.
      spent: the same by purpose.
      start: the states that were denoised, and their levels.
      state: the chains' last state, to go on from.
      result: ``diffrax.RESULTS`` of the integrator, ``(draws, chains)``.
      level_quantiles: of sigma/alpha over all sweeps and chains, at 5, 25, 50, 75 and 95 %,
        ``(5,)``: whether the chain has drifted or is stuck.
      distinct: number of distinct starts of each chain, ``(chains,)``.
      mode_changes: share of a chain's consecutive samples with different labels, ``(chains,)``;
        ``None`` without a labelling function.
      restarts: how often each chain was restarted, ``(chains,)``.
      draws: samples of a chain (static).
      skip: sweeps from one to the next (static).
    """

    x: jax.Array
    nfe: jax.Array
    spent: Spent
    start: Start
    state: GibbsState
    result: Any
    level_quantiles: jax.Array
    distinct: jax.Array
    mode_changes: jax.Array | None
    restarts: jax.Array
    draws: int = dataclasses.field(metadata={"static": True})
    skip: int = dataclasses.field(metadata={"static": True})

    @property
    def nfe_per_sample(self) -> jax.Array:
        """Evaluations for one sample, with its share of the first states; float32."""
        return self.nfe / self.draws


def denoise(
    key: jax.Array,
    start: Start,
    field: Field,
    sde: LinearSDE,
    *,
    solver: Any = "heun",
    steps: int | None = None,
    prediction: str = "noise",
    t_end: ArrayLike | None = None,
    tweedie: bool = True,
    tweedie_sigma: ArrayLike | None = None,
    progress: bool | None = None,
    first_index: ArrayLike = 0,
    **options: Any,
) -> Denoised:
    """Denoise each state from its own level, all chains of a draw together.

    Args:
      key: typed key; sample ``i`` of draw ``d`` draws from ``fold_in(fold_in(key, d), i)``.
      start: states and levels, such as ``chain(...).start``.
      field: ``f(x, t) -> like x``, see ``solve.sample``.
      sde: the process.
      solver: a name or an object for ``solve.sample``, or any integrator ``(key, x, t_start) ->
        Sample`` of states of the process and their times.
      steps: intervals of the grid; the solver's default if ``None``.
      prediction: what the field predicts.
      t_end: last time; the process' ``t_end`` if ``None``.
      tweedie: end with a Tweedie step, one more evaluation.
      tweedie_sigma: its level sigma/alpha; the last level (that of ``t_min``, where the end has no
        noise at all) if ``None``.
      progress: ``True`` shows a meter.
      first_index: number of the first chain; see ``solve.sample``.
      **options: others of ``solve.sample``, such as a named ``grid``, or a ``controller``.

    Returns:
      A ``Denoised``. Without the Tweedie step, states at ``t_end``, but data predictions for states
      that started at or below the last level.

    Raises:
      ValueError: as ``solve.sample``, which also refuses solvers and grids that know no start per
        sample; shapes that do not fit; ``denoise_last``, which is ``tweedie``.
      TypeError: a raw key, states that are not floating, or a class for ``solver``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> sde = process.edm(0.01, 50.0)
      >>> field = score.closed_form.gaussian(sde, jnp.zeros(2), 1.0).noise
      >>> start = Start(jnp.ones((5, 3, 2)), jnp.full((5, 3), 0.4))
      >>> run = jax.jit(lambda key: denoise(key, start, field, sde, steps=3))
      >>> out = run(jax.random.key(0))
      >>> out.x.shape, out.nfe.tolist()
      ((5, 3, 2), [7, 7, 7, 7, 7])
    """
    keys.check(key)
    checks.one_of("prediction", prediction, PREDICTIONS)
    x, sigma = checks.floating("start.x", start.x), checks.floating("start.sigma", start.sigma)
    if sigma.ndim not in (1, 2) or x.shape[: sigma.ndim] != sigma.shape:
        raise ValueError(
            f"start.sigma has shape {sigma.shape} and start.x {x.shape}; expected (draws, chains) "
            "and (draws, chains, *event), or (draws,) and (draws, *event)"
        )
    _check_solver(solver)
    _check_grid(options)
    if options.get("denoise_last"):
        raise ValueError(
            "denoise_last is True, and that is tweedie: the same last step; leave it out, and pass "
            "tweedie=True or False"
        )
    end = jnp.asarray(sde.t_end if t_end is None else t_end)
    is_proper = sde.sigma(end) <= 0
    lowest = level_of(sde, jnp.where(is_proper, sde.t_min, end))
    last = lowest if tweedie_sigma is None else jnp.asarray(tweedie_sigma)
    event_ndim = None if sigma.ndim == 2 else x.ndim - 1
    call = FieldCall(field, event_ndim)

    def integrate(key: jax.Array, x: jax.Array, t: jax.Array) -> Sample:
        if callable(solver):
            return solver(key, x, t)
        return sample(
            key,
            field,
            sde,
            x.shape,
            solver=solver,
            steps=steps,
            prediction=prediction,
            x_init=x,
            t_start=t,
            t_end=t_end,
            event_ndim=event_ndim,
            first_index=first_index,
            **options,
        )

    def project(x: jax.Array, level: jax.Array) -> jax.Array:
        return predict(call, sde, prediction, x, time_of(sde, level), "data")

    tick = Ticker(x.shape[0], "denoise") if progress else None

    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> Denoised:
        d, x, sigma = inputs
        is_near = ~(jnp.log(sigma) > jnp.log(lowest) + _NEAR)
        # Where there is nothing to integrate any start will do.
        t = jnp.where(is_near, sde.t_max, time_of(sde, sigma)).astype(at_least_f32(x.dtype))
        out = integrate(jax.random.fold_in(key, d), rescale(sde, x, sde.alpha(t)), t)
        near = left_broadcast(is_near, x)
        if tweedie:
            clean = jnp.where(near, x, rescale(sde, out.x, 1 / sde.alpha(end)))
            clean = project(clean, jnp.where(is_near, sigma, last))
            extra = jnp.ones((), jnp.int32)
        else:
            some = jnp.any(is_near)
            clean = jax.lax.cond(
                some,
                lambda x, s: jnp.where(near, project(x, s), out.x),
                lambda x, s: out.x,
                x,
                sigma,
            )
            extra = some.astype(jnp.int32)
        if tick is not None:
            tick(d)
        nfe = jnp.where(out.nfe < 0, out.nfe, out.nfe + extra)
        return Denoised(clean, nfe, extra, _result(out.result, is_near, clean))

    return jax.lax.map(one, (jnp.arange(x.shape[0]), x, sigma))


def _check_solver(solver: Any) -> None:
    if isinstance(solver, type):
        raise TypeError(
            f"solver is the class {solver.__name__}; expected a name, an object such as "
            f"{solver.__name__}(), or a function (key, x, t_start) -> Sample"
        )


def _check_grid(options: Mapping[str, Any]) -> None:
    grid = options.get("grid")
    if grid is not None and (not isinstance(grid, str) or grid == "score_sde"):
        raise ValueError(
            f"grid is {grid!r}, which starts at one level for all; expected the name of a grid "
            "that starts at each sample's own"
        )


def _result(result: Any, is_near: jax.Array, x: jax.Array) -> Any:
    """The result codes, of the Tweedie step alone where no integrator was needed."""
    is_finite = jnp.all(jnp.isfinite(x), axis=tuple(range(is_near.ndim, x.ndim)))

    def one(code: Any, is_near: jax.Array, is_finite: jax.Array) -> Any:
        code = diffrax.RESULTS.where(is_near, diffrax.RESULTS.successful, code)
        is_fine = is_finite | (code != diffrax.RESULTS.successful)
        return diffrax.RESULTS.where(is_fine, code, diffrax.RESULTS.nonfinite)

    return (jax.vmap(one) if is_near.ndim else one)(result, is_near, is_finite)


def mode_changes(labels: ArrayLike) -> jax.Array:
    """Share of consecutive draws whose labels differ.

    Args:
      labels: of the draws of each chain, such as the nearest mode, ``(draws, chains)`` or
        ``(draws,)``.

    Returns:
      ``(chains,)`` or ``()``, float32; NaN for a single draw.

    Example:
      >>> float(mode_changes([0, 0, 1, 1, 2]))
      0.5
    """
    labels = jnp.asarray(labels)
    if labels.shape[0] < 2:
        return jnp.full(labels.shape[1:], jnp.nan)
    return jnp.mean(labels[1:] != labels[:-1], axis=0)


def denoising_mcmc(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    level_logits: LevelLogits,
    levels: ArrayLike,
    shape: tuple[int, ...],
    *,
    step_size: ArrayLike,
    skip: int,
    draws: int,
    pick: str = "min",
    restart: bool = False,
    state: GibbsState | None = None,
    init_options: Mapping[str, Any] | None = None,
    sweep_options: Mapping[str, Any] | None = None,
    prediction: str = "noise",
    t_end: ArrayLike | None = None,
    label: Callable[[jax.Array], jax.Array] | None = None,
    progress: bool | None = None,
    event_ndim: int | None = None,
    first_index: ArrayLike = 0,
    **denoise_options: Any,
) -> DenoisingMCMC:
    """Sample by denoising MCMC: ``init``, ``chain`` and ``denoise``.

    Args:
      key: typed key; the first ``k`` chains are the same however many there are, to rounding.
      field: ``f(x, t) -> like x``, see ``solve.sample``.
      sde: the process, any ``LinearSDE``.
      level_logits: noise-level classifier, see ``denoising_gibbs.step``; trained by
        ``score.level_classification_loss``, or exact by ``ClosedForm.level_log_prob``.
      levels: its levels sigma/alpha, see ``denoising_gibbs.levels``.
      shape: ``(chains, *event)``, or the event of one chain if ``event_ndim=len(shape)``.
      step_size: eta of the sweeps: the chain works at levels from about its root on.
      skip: sweeps between samples, each one evaluation.
      draws: samples of each chain.
      pick: see ``denoising_gibbs.chain``.
      restart: see ``denoising_gibbs.chain``.
      state: an earlier run's ``state``, to go on from; ``init`` if ``None``.
      init_options: of ``denoising_gibbs.init``; ``warm_up`` is 20 sweeps with ``step_size`` unless
        given.
      sweep_options: of ``denoising_gibbs.step``: ``select``, ``scaling``, ``log_prior``,
        ``sigma_cap``.
      prediction: what the field predicts.
      t_end: last time of all integrations; the process' ``t_end`` if ``None``.
      label: maps samples ``(chains, *event)`` to integers ``(chains,)``, such as the nearest mode,
        to report how often a chain changes it.
      progress: ``True`` shows a meter for the chain and one for the denoising.
      event_ndim: see ``shape``.
      first_index: see ``solve.sample``.
      **denoise_options: ``solver``, ``steps``, ``tweedie`` and the others of ``denoise``.

    Returns:
      A ``DenoisingMCMC``.

    Raises:
      ValueError: as the three functions; ``state`` of another shape than ``shape``; labels of
        another shape.
      TypeError: as the three functions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import mcmc, process, score
      >>> sde, grid = process.edm(0.01, 50.0), mcmc.denoising_gibbs.levels(0.01, 50.0, 100)
      >>> law = score.closed_form.gaussian(sde, jnp.zeros(2), 1.0)
      >>> run = jax.jit(lambda key: denoising_mcmc(
      ...     key, law.noise, sde, lambda x: law.level_log_prob(x, grid), grid,
      ...     (3, 2), step_size=0.5, skip=2, draws=5, steps=3))
      >>> out = run(jax.random.key(0))
      >>> out.x.shape, int(out.nfe)  # 38 + 20, 5 * 2, 5 * 6, 5
      ((5, 3, 2), 103)
    """
    key_init, key_chain, key_denoise = jax.random.split(keys.check(key), 3)
    shape, sweeps = tuple(shape), {"prediction": prediction, **(sweep_options or {})}
    spent_init = jnp.zeros((), jnp.int32)
    if state is None:
        begun = init(
            key_init,
            field,
            sde,
            level_logits,
            levels,
            shape,
            event_ndim=event_ndim,
            first_index=first_index,
            **{"warm_up": ((20, step_size),), "t_end": t_end, **sweeps, **(init_options or {})},
        )
        state, spent_init = begun.state, begun.nfe
    elif jnp.shape(state.x) != shape:
        raise ValueError(f"state.x has shape {jnp.shape(state.x)}; expected shape {shape}")
    run = chain(
        key_chain,
        state,
        field,
        sde,
        level_logits,
        levels,
        step_size=step_size,
        skip=skip,
        draws=draws,
        pick=pick,
        restart=restart,
        progress=progress,
        first_index=first_index,
        **sweeps,
    )
    out = denoise(
        key_denoise,
        run.start,
        field,
        sde,
        prediction=prediction,
        t_end=t_end,
        progress=progress,
        first_index=first_index,
        **denoise_options,
    )
    tweedie, total = jnp.sum(out.tweedie), jnp.sum(out.nfe, axis=0)
    is_known = jnp.all(out.nfe >= 0, axis=0)
    spent = Spent(spent_init, run.nfe, jnp.where(is_known, total - tweedie, -1), tweedie)
    changes = None
    if label is not None:
        labels = jax.lax.map(label, out.x)
        if labels.shape != run.start.sigma.shape:
            raise ValueError(
                f"label(x) returned shape {labels.shape[1:]}; expected {run.start.sigma.shape[1:]}"
            )
        changes = mode_changes(labels)
    trace = jnp.asarray(levels).at[run.info.level].get(mode="fill", fill_value=jnp.nan)
    return DenoisingMCMC(
        x=out.x,
        nfe=jnp.where(is_known, spent_init + run.nfe + total, -1),
        spent=spent,
        start=run.start,
        state=run.state,
        result=out.result,
        level_quantiles=jnp.quantile(trace, jnp.asarray(QUANTILES, trace.dtype)),
        distinct=run.info.distinct,
        mode_changes=changes,
        restarts=run.info.restarts,
        draws=draws,
        skip=skip,
    )
