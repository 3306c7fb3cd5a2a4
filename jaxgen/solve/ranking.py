r"""A small network that ranks solver schedules, trained on those already scored.

The predictor of S^3 (Liu et al., arXiv 2312.07243), with the layers of the same authors' OMS-DPM
(arXiv 2306.08860): for each step a sinusoidal embedding of its place and an embedding of its
decisions, an LSTM over the steps, the normalised mean of its outputs, a perceptron. It is trained
by a hinge on pairs that differ enough,

    loss = max(0, 1 - (P_worse - P_better))                                                 (1)

so that only order matters. Scores are replaced by the normal quantiles of their ranks, which makes
"enough" the same for every metric; a score that is no number has the worst rank.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen.core import keys
from jaxgen.solve.schedule import AFS, MAX_ORDER, PTYPES, RELAXATIONS, SolverSchedule

__all__ = ["Predictor", "RankingConfig", "fit_predictor", "ranking_loss"]

# Schedules ranked at once; more go in parts of this size, so that one compilation serves all.
CHUNK = 64
# Frequencies of a place in [0, 1], from one to so many periods.
_PERIODS = 64.0


@dataclasses.dataclass(frozen=True)
class RankingConfig:
    """Size and training of the predictor.

    Attributes:
      steps: of Adam, each on a batch of schedules.
      batch: schedules in a batch; every pair of them counts.
      learning_rate: of Adam.
      margin: pairs closer than this in normal quantiles do not count.
      width: of the LSTM; half of it for each embedding.
      hidden: layers of the last perceptron.
    """

    steps: int = 200
    batch: int = 32
    learning_rate: float = 1e-3
    margin: float = 0.25
    width: int = 128
    hidden: tuple[int, ...] = (200, 200, 200)


class _Features(NamedTuple):
    """Schedules as the network sees them, ``L`` steps at most.

    Attributes:
      place: ``(P, L, 2)`` where a step starts and ends, in [0, 1] of the schedules' range.
      choice: ``(P, L, C)`` its decisions, one-hot, and the relaxation's number.
      count: ``(P,)`` int32, its steps.
    """

    place: Any
    choice: Any
    count: Any


def _features(schedules: Sequence[SolverSchedule], most: int, ends: tuple[float, float]) -> Any:
    rows = [_row(s, most, ends) for s in schedules]
    return _Features(*(np.stack(column) for column in zip(*rows, strict=True)))


def _row(s: SolverSchedule, most: int, ends: tuple[float, float]) -> Any:
    low, high = ends
    lam = np.clip((np.asarray(s.lam, np.float64) - low) / (high - low), 0, 1)

    def one_hot(values: Any, count: int) -> np.ndarray:
        return np.eye(count)[np.broadcast_to(np.asarray(values, int), (s.steps,))]

    choice = [
        one_hot(s.ptype, len(PTYPES)),
        one_hot(np.asarray(s.order) - 1, MAX_ORDER),
        one_hot(s.est_order, MAX_ORDER),
        one_hot(s.relax_kind, len(RELAXATIONS)),
        one_hot(s.corrector, 2),
        one_hot(s.scale_corrector, 2),
        one_hot(s.afs, len(AFS)),
        10 * np.asarray(s.relax_coef, np.float64)[:, None],
    ]
    pad = ((0, most - s.steps), (0, 0))
    place = np.stack([lam[:-1], lam[1:]], axis=1)
    return (
        np.pad(place, pad).astype(np.float32),
        np.pad(np.concatenate(choice, axis=1), pad).astype(np.float32),
        np.int32(s.steps),
    )


class _Network(nn.Module):
    """The predictor; smaller is better."""

    config: RankingConfig

    @nn.compact
    def __call__(self, x: _Features) -> jax.Array:
        half = self.config.width // 2
        rates = jnp.geomspace(1.0, _PERIODS, half // 2)
        angles = 2 * jnp.pi * x.place[..., None] * rates[None, None, None]
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        place = nn.silu(nn.Dense(half)(waves.reshape((*waves.shape[:2], -1))))
        choice = nn.silu(nn.Dense(half)(nn.silu(nn.Dense(half)(x.choice))))
        steps = jnp.concatenate([place, choice], axis=-1)
        out: Any = nn.RNN(nn.LSTMCell(self.config.width))(steps, seq_lengths=x.count)
        is_live = jnp.arange(out.shape[1])[None] < x.count[:, None]
        mean = jnp.sum(jnp.where(is_live[..., None], _normalised(out), 0.0), axis=1)
        y = _normalised(mean / x.count[:, None])
        for size in self.config.hidden:
            y = nn.relu(nn.Dense(size)(y))
        return nn.Dense(1)(y)[:, 0]


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def ranking_loss(predicted: jax.Array, scores: jax.Array, margin: float = 0.25) -> jax.Array:
    """Mean of equation (1) over the pairs whose scores differ by more than ``margin``.

    Args:
      predicted: ``(P,)``.
      scores: ``(P,)``, lower is better.
      margin: closer pairs do not count; 0 loss if none does.

    Example:
      >>> import jax.numpy as jnp
      >>> float(ranking_loss(jnp.array([0.0, 2.0]), jnp.array([0.1, 0.9])))
      0.0
      >>> float(ranking_loss(jnp.array([2.0, 0.0]), jnp.array([0.1, 0.9])))
      3.0
    """
    worse = scores[:, None] - scores[None] > margin
    hinge = jax.nn.relu(1 - (predicted[:, None] - predicted[None]))
    return jnp.sum(jnp.where(worse, hinge, 0.0)) / jnp.maximum(jnp.sum(worse), 1)


def _targets(scores: np.ndarray) -> np.ndarray:
    """Normal quantiles of the ranks, ties and non-numbers sharing theirs."""
    scores = np.where(np.isfinite(scores), scores, np.inf)
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    del values
    middle = np.cumsum(counts) - 0.5 * counts
    share = jnp.asarray((middle / len(scores))[inverse], jnp.float32)
    return np.asarray(jax.scipy.special.ndtri(share))


@functools.partial(jax.jit, static_argnames="config")
def _fit(key: jax.Array, data: _Features, targets: Any, n: Any, config: RankingConfig) -> Any:
    """Parameters, by Adam on batches of the first ``n`` rows."""
    network, adam = _Network(config), optax.adam(config.learning_rate)
    key_init, key_rows = jax.random.split(key)
    params = network.init(key_init, jax.tree.map(lambda v: v[:1], data))

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        batch, wanted = jax.tree.map(
            lambda v: v.at[rows].get(mode="promise_in_bounds"), (data, targets)
        )
        return ranking_loss(network.apply(params, batch), wanted, config.margin)  # type: ignore[arg-type]

    def step(carry: Any, i: jax.Array) -> Any:
        params, state = carry
        rows = jax.random.randint(jax.random.fold_in(key_rows, i), (config.batch,), 0, n)
        updates, state = adam.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, adam.init(params))
    return jax.lax.scan(step, start, jnp.arange(config.steps))[0][0]


@functools.partial(jax.jit, static_argnames="config")
def _rank(params: Any, data: _Features, config: RankingConfig) -> Any:
    return _Network(config).apply(params, data)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained predictor; made by ``fit_predictor``.

    Attributes:
      params: of the network.
      config: its size.
      most_steps: steps at most of a schedule that it can rank.
      ends: the range in log-SNR that its places are relative to.
    """

    params: Any
    config: RankingConfig
    most_steps: int
    ends: tuple[float, float]

    def __call__(self, schedules: Sequence[SolverSchedule]) -> np.ndarray:
        """A number for each schedule, ``(P,)``, that only their order gives a meaning; low is good.

        Raises:
          ValueError: one has more steps than those that it was trained on.
        """
        return _in_chunks(
            schedules,
            lambda part: np.asarray(
                _rank(self.params, _features(part, self.most_steps, self.ends), self.config)
            ),
            self.most_steps,
        )


def _in_chunks(
    schedules: Sequence[SolverSchedule],
    rank: Callable[[list[SolverSchedule]], np.ndarray],
    most: int,
) -> np.ndarray:
    longest = max((s.steps for s in schedules), default=0)
    if longest > most:
        raise ValueError(f"a schedule has {longest} steps; expected at most {most}")
    parts = [np.zeros(0, np.float32)]
    for first in range(0, len(schedules), CHUNK):
        part = list(schedules[first : first + CHUNK])
        parts.append(rank(part + part[:1] * (CHUNK - len(part)))[: len(part)])
    return np.concatenate(parts)


def fit_predictor(
    key: jax.Array,
    schedules: Sequence[SolverSchedule],
    scores: Any,
    config: RankingConfig | None = None,
    *,
    most_steps: int | None = None,
) -> Predictor:
    """Train a predictor on scored schedules.

    Args:
      key: typed key.
      schedules: known values; their steps may differ.
      scores: one each, lower is better; any that is not finite ranks last.
      config: size and training.
      most_steps: steps at most of the schedules to rank; the longest here if ``None``.

    Raises:
      ValueError: fewer than two schedules, or another number of scores.

    Compiles once for each power of two that the number of schedules grows past.
    """
    config = RankingConfig() if config is None else config
    scores = np.asarray(scores, np.float64)
    if len(schedules) < 2 or scores.shape != (len(schedules),):
        raise ValueError(
            f"there are {len(schedules)} schedules and scores of shape {scores.shape}; expected at "
            "least two schedules and a score for each"
        )
    most = max(s.steps for s in schedules) if most_steps is None else most_steps
    finite = [np.asarray(s.lam)[np.isfinite(s.lam)] for s in schedules]
    ends = float(min(v.min() for v in finite)), float(max(v.max() for v in finite))
    n = len(schedules)
    room = max(CHUNK, 1 << (n - 1).bit_length())
    rows = np.minimum(np.arange(room), n - 1)
    data = jax.tree.map(lambda v: v[rows], _features(schedules, most, ends))
    params = _fit(keys.check(key), data, _targets(scores)[rows], jnp.int32(n), config)
    return Predictor(params, config, most, ends)
