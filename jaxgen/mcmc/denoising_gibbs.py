r"""Denoising Langevin Gibbs: a Markov chain on a noisy state and its noise level together.

Kim and Ye, ICML 2023, arXiv 2209.14593. With p_sigma = data * N(0, sigma^2 I) and a prior pi of the
levels, the chain's law is

    p(x, sigma) ~ p_sigma(x) pi(sigma)                                                      (1)

and one sweep, which costs one evaluation of the field, is

    x     <- x + (eta/2) grad log p_sigma(x) + sqrt(eta) z,     z ~ N(0, I)                 (2)
    sigma <- a draw from p(sigma | x) ~ p_sigma(x) pi(sigma), by a noise-level classifier    (3)

The chain lives in the coordinates of variance-exploding noise, x/alpha and sigma/alpha (``sweep``),
and the field is called at the matching time. So one classifier, of x0 + sigma n, serves every
process, and fields of every kind serve.

What the fixed step does: if the level is known and the data vary little, one sweep takes sigma^2 to
sigma^2 + eta^2 / (4 sigma^2). No level falls below about sqrt(eta) after a sweep, so eta alone sets
how noisy, and how mobile, the chain is; from sigma^2 well below eta/4 a sweep throws the state far
out, and the error of unadjusted Langevin pushes levels up, slowly: look at the level quantiles, and
cap the levels (``sigma_cap``, which is a prior) where they drift. ``scaling="relative"`` takes eta
times sigma^2, which is ours and for low dimensions only: it adds eta^2/4 to log sigma^2 each sweep.

Left out: a Metropolis correction of (2), which needs a density.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, left_broadcast
from jaxgen.mcmc.sweep import (
    GibbsState,
    LevelLogits,
    check_state,
    check_step_size,
    rescale,
    sweeper,
)
from jaxgen.process.linear import LinearSDE
from jaxgen.score.levels import levels
from jaxgen.score.prediction import Field
from jaxgen.solve.meter import Ticker
from jaxgen.solve.noise import sample_keys
from jaxgen.solve.path import fold_each, normals
from jaxgen.solve.sample import sample

__all__ = [
    "PICKS",
    "ChainInfo",
    "ChainRun",
    "GibbsState",
    "Initial",
    "Start",
    "chain",
    "init",
    "levels",
    "step",
]

PICKS = ("min", "last")


class Initial(NamedTuple):
    """First states of the chains, and the evaluations of the field that they took, int32 ``()``."""

    state: GibbsState
    nfe: jax.Array


class Start(NamedTuple):
    """States to denoise.

    Attributes:
      x: ``(draws, chains, *event)`` or ``(draws, *event)``, in x/alpha.
      sigma: their levels sigma/alpha, ``(draws, chains)`` or ``(draws,)``.
    """

    x: jax.Array
    sigma: jax.Array


class ChainInfo(NamedTuple):
    """What the chains did; without the axis ``chains`` for one chain.

    Attributes:
      level: index of the level after each sweep, int32 ``(draws, skip, chains)``.
      distinct: number of distinct starts of each chain, int32 ``(chains,)``.
      restarts: how often each chain was restarted, int32 ``(chains,)``.
    """

    level: jax.Array
    distinct: jax.Array
    restarts: jax.Array


class ChainRun(NamedTuple):
    """The end of a chain.

    Attributes:
      state: last state, to go on from.
      start: the states kept.
      nfe: evaluations of the field, int32 ``()``: ``draws * skip``.
      info: for the reader.
    """

    state: GibbsState
    start: Start
    nfe: jax.Array
    info: ChainInfo


def _event_ndim(state: GibbsState) -> int | None:
    return None if jnp.ndim(state.level) else jnp.ndim(state.x)


def step(
    key: jax.Array,
    state: GibbsState,
    field: Field,
    sde: LinearSDE,
    level_logits: LevelLogits,
    levels: ArrayLike,
    *,
    step_size: ArrayLike,
    prediction: str = "noise",
    select: str = "sample",
    scaling: str = "fixed",
    log_prior: ArrayLike | None = None,
    sigma_cap: ArrayLike | None = None,
    first_index: ArrayLike = 0,
) -> GibbsState:
    """One sweep of the chains, equations (2) and (3): one evaluation of the field.

    Args:
      key: typed key; chain ``i`` draws from ``fold_in(key, i)``, one chain alone from ``key``.
      state: where the chains are.
      field: ``f(x, t) -> like x`` with ``t`` of shape ``(chains,)``, or ``()`` for one chain.
      sde: the field's process, any ``LinearSDE``.
      level_logits: classifier of x0 + sigma n, ``(chains, *event) -> (chains, n)``: unnormalised
        log-probabilities of the levels under a uniform prior of their index.
      levels: the levels sigma/alpha, ``(n,)``, strictly falling, within the process' own.
      step_size: eta, positive, the same at every level.
      prediction: what the field predicts, one of ``score.PREDICTIONS``.
      select: ``"sample"``, the Gibbs step; or ``"argmax"``, as released, which comes to the same in
        high dimension only: in one dimension its law is far from (1).
      scaling: ``"fixed"``, or ``"relative"`` for a step of eta sigma^2, stable for eta < 4.
      log_prior: added to the logits, ``(n,)``: unnormalised log-prior of the levels; ``None`` for
        a uniform one (log-uniform in sigma).
      sigma_cap: levels above it have no prior mass.
      first_index: number of the first chain, for chains that run in parts; see ``solve.sample``.

    Returns:
      The next state, ``x`` in its own dtype.

    Raises:
      ValueError: unknown names, shapes that do not fit, levels that do not fall, are not positive
        or that the process does not know, a level index out of range or a step that is not positive
        (where they are known; traced ones give NaN, and an error under ``checkify``).
      TypeError: a raw key, or dtypes of another kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> sde, grid = process.edm(0.01, 50.0), levels(0.01, 50.0, 100)
      >>> law = score.closed_form.gaussian(sde, jnp.zeros(2), 1.0)
      >>> state = GibbsState(jnp.ones((3, 2)), jnp.full(3, 50))
      >>> sweep = jax.jit(lambda key, state: step(
      ...     key, state, law.noise, sde, lambda x: law.level_log_prob(x, grid), grid,
      ...     step_size=0.5))
      >>> state = sweep(jax.random.key(0), state)
      >>> state.x.shape, state.level.shape
      ((3, 2), (3,))
    """
    sweep = sweeper(
        field,
        sde,
        level_logits,
        levels,
        _event_ndim(state),
        prediction=prediction,
        select=select,
        scaling=scaling,
        log_prior=log_prior,
        sigma_cap=sigma_cap,
    )
    state = check_state(state, sweep.n)
    each = sample_keys(keys.check(key), state.level.shape, first_index)
    return sweep(each, state, check_step_size("step_size", step_size))


def init(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    level_logits: LevelLogits,
    levels: ArrayLike,
    shape: tuple[int, ...],
    *,
    warm_up: Sequence[tuple[int, ArrayLike]],
    x0: ArrayLike | None = None,
    solver: Any = "heun",
    steps: int = 19,
    t_end: ArrayLike | None = None,
    bump: ArrayLike = 0.5,
    event_ndim: int | None = None,
    first_index: ArrayLike = 0,
    **sweep_options: Any,
) -> Initial:
    """First states: samples from noise, a little noise on them, their levels, and a few sweeps.

    As released for CIFAR-10: 19 steps of Heun's solver with churn to sigma = 0 (37 evaluations),
    0.5 z, and ``warm_up=((10, 0.5), (20, step_size))``.

    Args:
      key: typed key; chain ``i`` draws from keys folded with ``i``.
      field: see ``step``.
      sde: see ``step``.
      level_logits: see ``step``.
      levels: see ``step``.
      shape: ``(chains, *event)``, or the event of one chain if ``event_ndim=len(shape)``.
      warm_up: pairs of a number of sweeps and their step size, in turn; may be empty.
      x0: clean states of ``shape`` to start from, such as data; drawn by ``solver`` if ``None``.
      solver: a name or an object for ``solve.sample``, which starts from the prior.
      steps: its steps.
      t_end: its last time; the process' ``t_end`` if ``None``.
      bump: standard deviation of the noise added to the clean states.
      event_ndim: see ``shape``.
      first_index: see ``step``.
      **sweep_options: ``prediction``, ``select``, ``scaling``, ``log_prior`` and ``sigma_cap`` of
        ``step``.

    Returns:
      An ``Initial``, its states in float32 or wider.

    Raises:
      ValueError: as ``step`` and ``solve.sample``; a negative ``bump``, a ``warm_up`` of another
        form.
      TypeError: as ``step``; an unknown option.
    """
    key_sample, key_bump, key_level, key_sweep = jax.random.split(keys.check(key), 4)
    shape = tuple(shape)
    if event_ndim not in (None, len(shape)):
        raise ValueError(f"event_ndim is {event_ndim}; expected None or {len(shape)}")
    batch = shape[:1] if event_ndim is None else ()
    sweep = sweeper(field, sde, level_logits, levels, event_ndim, **sweep_options)
    known = checks.concrete(bump)
    if known is not None and not (known >= 0 and np.isfinite(known)):
        raise ValueError(f"bump is {bump}; expected a number of at least 0")
    step_sizes = _step_sizes(warm_up)
    nfe = jnp.zeros((), jnp.int32)
    if x0 is None:
        drawn = sample(
            key_sample,
            field,
            sde,
            shape,
            solver=solver,
            steps=steps,
            prediction=sweep.prediction,
            t_end=t_end,
            event_ndim=event_ndim,
            first_index=first_index,
        )
        end = jnp.asarray(sde.t_end if t_end is None else t_end)
        x, nfe = rescale(sde, drawn.x, 1 / sde.alpha(end)), drawn.nfe
    else:
        x = checks.floating("x0", x0)
        if x.shape != shape:
            raise ValueError(f"x0 has shape {x.shape}; expected {shape}")
        x = x.astype(at_least_f32(x.dtype))
    noise = normals(sample_keys(key_bump, batch, first_index), shape[len(batch) :], x.dtype)
    x = x + jnp.asarray(bump, x.dtype) * noise
    state = GibbsState(x, sweep.draw_level(sample_keys(key_level, batch, first_index), x))
    each = sample_keys(key_sweep, batch, first_index)

    def body(state: GibbsState, inputs: tuple[jax.Array, jax.Array]) -> tuple[GibbsState, None]:
        j, step_size = inputs
        return sweep(fold_each(each, j), state, step_size), None

    state, _ = jax.lax.scan(body, state, (jnp.arange(step_sizes.shape[0]), step_sizes))
    return Initial(state, nfe + step_sizes.shape[0])


def _step_sizes(warm_up: Any) -> jax.Array:
    """The step size of each sweep of a warm-up."""
    wrong = f"warm_up is {warm_up!r}; expected pairs (sweeps, step_size) such as ((20, 0.8),)"
    try:
        pairs = [(n, eta) for n, eta in warm_up]
    except (TypeError, ValueError) as error:
        raise ValueError(wrong) from error
    runs = [
        jnp.full(
            (checks.positive_int("sweeps of warm_up", n, least=0),),
            check_step_size("step_size of warm_up", eta),
        )
        for n, eta in pairs
    ]
    return jnp.concatenate(runs) if runs else jnp.zeros((0,))


def chain(
    key: jax.Array,
    state: GibbsState,
    field: Field,
    sde: LinearSDE,
    level_logits: LevelLogits,
    levels: ArrayLike,
    *,
    step_size: ArrayLike,
    skip: int,
    draws: int,
    pick: str = "min",
    restart: bool = False,
    progress: bool | None = None,
    first_index: ArrayLike = 0,
    **sweep_options: Any,
) -> ChainRun:
    """Run the chains, and keep a state of each every ``skip`` sweeps.

    A chain goes on from its last state, never from the kept one.

    Args:
      key: typed key; sweep ``j`` of chain ``i`` draws from ``fold_in(fold_in(key, i), j)``.
      state: first state, such as ``init(...).state`` or an earlier run's ``state``.
      field: see ``step``.
      sde: see ``step``.
      level_logits: see ``step``.
      levels: see ``step``.
      step_size: see ``step``.
      skip: sweeps from one kept state to the next.
      draws: number of states kept.
      pick: ``"min"`` keeps, of the ``skip`` new states and the one before them, that of lowest
        level (the earliest of equals), as published: it selects on the path, so that even an exact
        chain is then slightly biased, and draws may repeat (``info.distinct``). ``"last"`` keeps
        the last.
      restart: put a chain whose state is not finite, or has no level, back to its first state, and
        count it. Otherwise it is NaN from there on, and an error under ``checkify``.
      progress: ``True`` shows a meter.
      first_index: see ``step``.
      **sweep_options: ``prediction``, ``select``, ``scaling``, ``log_prior`` and ``sigma_cap`` of
        ``step``.

    Returns:
      A ``ChainRun``.

    Raises:
      ValueError: as ``step``; ``skip`` or ``draws`` below 1, an unknown ``pick``.
      TypeError: as ``step``; an unknown option.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> sde, grid = process.edm(0.01, 50.0), levels(0.01, 50.0, 100)
      >>> law = score.closed_form.gaussian(sde, jnp.zeros(2), 1.0)
      >>> state = GibbsState(jnp.ones((3, 2)), jnp.full(3, 50))
      >>> run = chain(jax.random.key(0), state, law.noise, sde,
      ...             lambda x: law.level_log_prob(x, grid), grid, step_size=0.5, skip=2, draws=5)
      >>> run.start.x.shape, run.start.sigma.shape, int(run.nfe)
      ((5, 3, 2), (5, 3), 10)
    """
    skip, draws = checks.positive_int("skip", skip), checks.positive_int("draws", draws)
    checks.one_of("pick", pick, PICKS)
    sweep = sweeper(field, sde, level_logits, levels, _event_ndim(state), **sweep_options)
    first = check_state(state, sweep.n)
    batch = first.level.shape
    eta = check_step_size("step_size", step_size)
    each = sample_keys(keys.check(key), batch, first_index)
    tick = Ticker(draws, "denoising Gibbs") if progress else None

    def one(carry: Any, j: jax.Array) -> Any:
        state, kept, restarts = carry
        state = sweep(fold_each(each, j), state, eta)
        if restart:
            is_finite = jnp.all(jnp.isfinite(state.x), axis=tuple(range(len(batch), state.x.ndim)))
            is_lost = ~is_finite | (state.level == sweep.n)
            state = _where(is_lost, first, state)
            restarts = restarts + is_lost.astype(jnp.int32)
        else:
            has_level = state.level < sweep.n
            checks.debug_check(jnp.all(has_level), "a chain is lost, sweep {j}", j=j)
        if pick == "last":
            kept = state
        else:  # levels fall with their index; that of a chain without a level is out of range
            is_lower = (state.level > kept.level) & (state.level < sweep.n)
            kept = _where(is_lower, state, kept)
        return (state, kept, restarts), state.level

    def draw(carry: Any, d: jax.Array) -> Any:
        state, restarts = carry
        numbers = d * skip + jnp.arange(skip)
        (state, kept, restarts), trace = jax.lax.scan(one, (state, state, restarts), numbers)
        if tick is not None:
            tick(d)
        return (state, restarts), (kept, trace)

    begun = (first, 0 * first.level)  # which varies over the mesh axes that the state does
    (last, restarts), (kept, trace) = jax.lax.scan(draw, begun, jnp.arange(draws))
    is_new = jnp.any(kept.x[1:] != kept.x[:-1], axis=tuple(range(1 + len(batch), kept.x.ndim)))
    return ChainRun(
        last,
        Start(kept.x, sweep.at(sweep.levels, kept.level)),
        jnp.asarray(draws * skip, jnp.int32),
        ChainInfo(trace, 1 + jnp.sum(is_new, axis=0, dtype=jnp.int32), restarts),
    )


def _where(mask: jax.Array, yes: GibbsState, no: GibbsState) -> GibbsState:
    return jax.tree.map(lambda a, b: jnp.where(left_broadcast(mask, a), a, b), yes, no)
