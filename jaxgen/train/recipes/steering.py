"""A trained run steered while it samples: annealed, or guided to a class with the right weights.

``smc.feynman_kac`` on the run's own network, from which every population of weighted particles is
resampled to equal weights at its end. The network is a plug-in for the scores that the weights take
for exact, so that the law reached is that of the target only as far as the network's is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import metrics, smc
from jaxgen.smc import target as targets
from jaxgen.smc.feynman_kac import FeynmanKac, feynman_kac
from jaxgen.train.recipes.classifier import Judge
from jaxgen.train.recipes.evaluate import rounded
from jaxgen.train.recipes.score import Experiment

__all__ = ["KINDS", "Steered", "guided_classes", "start_time", "steer"]

KINDS = ("anneal", "guide")

# First sigma/alpha, in units of the data's own deviation: higher up all is noise, and weights that
# are spent there are wasted.
_FIRST = 20.0
# Particles and times of the history.
_SHOWN, _TIMES = 8, 10


class Steered(NamedTuple):
    """Samples of equal weight, and how their populations fared.

    Attributes:
      x: float32 ``(n, *event)``, network-scaled.
      ess: effective sample size after each step, as a share of the particles,
        ``(populations, steps)``.
      resampled: ``(populations, steps)``.
      log_z: log normaliser of each population, ``(populations,)``.
      history: particles of the first population on their way, in units of ``sqrt(alpha^2 +
        sigma^2)`` so that data and noise are as large, ``(times, shown, *event)``.
      levels: sigma/alpha of the steps, ``(steps,)``.
      shown_at: which steps the history is of, ``(times,)``.
      how: what it was made with, as plain values.
    """

    x: np.ndarray
    ess: np.ndarray
    resampled: np.ndarray
    log_z: np.ndarray
    history: np.ndarray
    levels: np.ndarray
    shown_at: np.ndarray
    how: dict[str, Any]


def start_time(experiment: Experiment) -> float:
    """Where steering starts: sigma/alpha 20 times the data's deviation, or ``t_max``."""
    sde = experiment.sde
    level = -2 * np.log(_FIRST * experiment.sigma_data)
    if float(sde.log_snr(sde.t_max)) >= level:
        return float(sde.t_max)
    return float(sde.inverse_log_snr(level))


def _target(
    experiment: Experiment, params: Any, kind: str, value: Any, label: jax.Array | None, n: int
) -> targets.Target:
    params = experiment.weights(params)
    known = None if label is None else jnp.broadcast_to(jnp.asarray(label, jnp.int32), (n,))
    if kind == "anneal":
        return targets.annealed(experiment.field(params, known), value)
    return targets.guided(experiment.field(params), experiment.field(params, known), value)


def sampler(
    experiment: Experiment,
    kind: str,
    particles: int,
    *,
    steps: int = 100,
    noise: float | None = None,
    corrected: bool = True,
    ess_threshold: float = 0.5,
) -> Callable[..., tuple[jax.Array, FeynmanKac]]:
    """A compiled population of one kind of steering.

    Args:
      experiment: what was trained.
      kind: ``"anneal"`` or ``"guide"``.
      particles: of a population.
      steps: of the grid.
      noise: z of ``feynman_kac``; ``None`` is 1 for guidance, and for a power B above 4/3 what its
        weights need, 2.5 - 2/B.
      corrected: ``False`` leaves out the weights.
      ess_threshold: see ``feynman_kac``.

    Returns:
      ``f(key, params, value, label) -> (x, FeynmanKac)``: particles of equal weight in random
      order; the value (a power, or a guidance scale) and the label (``None`` for all) are traced.

    Raises:
      ValueError: an unknown kind, a number out of range; when called, guidance without a label.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    t_start = start_time(experiment)

    @jax.jit
    def population(
        key: jax.Array, params: Any, value: jax.Array, label: jax.Array | None
    ) -> tuple[jax.Array, FeynmanKac]:
        if kind == "guide" and label is None:
            raise ValueError("guidance needs a label")
        key_run, key_end, key_order = jax.random.split(key, 3)
        safe = jnp.maximum(1.0, 2.5 - 2 / value) if kind == "anneal" else 1.0
        out = feynman_kac(
            key_run,
            _target(experiment, params, kind, value, label, particles),
            experiment.sde,
            (particles, *experiment.train.event),
            steps=steps,
            t_start=t_start,
            noise=safe if noise is None else noise,
            ess_threshold=ess_threshold,
            weights="trapezoid" if corrected else "none",
            resample="systematic" if corrected and particles > 1 else None,
            prediction=experiment.prediction,
            observe=lambda x, log_weights, t: x[:_SHOWN],
        )
        x = out.x
        if corrected:
            # Ancestors come in rising order, so that a first part of them would be no fair sample.
            x = smc.take(
                x, jax.random.permutation(key_order, smc.resample(key_end, out.log_weights))
            )
        return x, out

    return population


def steer(
    key: jax.Array,
    experiment: Experiment,
    params: Any,
    n: int,
    *,
    kind: str,
    value: float,
    label: int | None = None,
    particles: int = 64,
    advance: Callable[[int], None] | None = None,
    **options: Any,
) -> Steered:
    """Draw samples from steered populations, one after another.

    Args:
      key: typed key; population ``i`` uses ``fold_in(key, i)``.
      experiment: what was trained.
      params: parameters of the network, usually the averaged ones.
      n: number of samples; the first ``k`` are the same whatever ``n``.
      kind: ``"anneal"``: the density to the power ``value``; ``"guide"``: guided to ``label`` with
        the scale ``value``.
      value: see ``kind``.
      label: a class that the network was trained with; annealing takes one too.
      particles: of a population; the samples of one are not independent.
      advance: called with the number of samples done after each population.
      **options: ``steps``, ``noise``, ``corrected``, ``ess_threshold`` of ``sampler``.

    Raises:
      ValueError: see ``sampler``.
    """
    run = sampler(experiment, kind, particles, **options)
    given = None if label is None else jnp.int32(label)
    parts, outs = [], []
    for i in range(-(-n // particles)):
        x, out = run(jax.random.fold_in(key, i), params, jnp.float32(value), given)
        parts.append(np.asarray(x)[: n - i * particles])
        outs.append(out)
        if advance is not None:
            advance(len(parts[-1]))
    first, sde = outs[0], experiment.sde
    ess = np.stack([np.asarray(out.ess) for out in outs]) / particles
    resampled = np.stack([np.asarray(out.resampled) for out in outs])
    times = first.times[1:]
    shown_at = np.unique(np.linspace(0, first.steps - 1, _TIMES).astype(int))
    alpha, sigma = np.asarray(sde.alpha(times)), np.asarray(sde.sigma(times))
    observed = np.asarray(first.observed)[shown_at]
    size = np.hypot(alpha, sigma)[shown_at].reshape(-1, *(1,) * (observed.ndim - 1))
    how = {
        "steer": f"{kind}={value:g}",
        "label": label,
        "particles": particles,
        "populations": len(outs),
        "steps": first.steps,
        "grid": first.grid,
        "weights": first.weights,
        "evaluations": int(first.nfe),
        "resampled": rounded(resampled.sum(axis=1).mean()),
        "last_ess": rounded(ess[:, -1].mean() * particles),
    }
    return Steered(
        np.concatenate(parts),
        ess,
        resampled,
        np.asarray([out.log_z for out in outs]),
        observed / size,
        sigma / alpha,
        shown_at,
        how,
    )


def guided_classes(
    key: jax.Array,
    experiment: Experiment,
    params: Any,
    judge: Judge,
    *,
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0),
    per_class: int = 64,
    particles: int = 64,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Guided samples of every class at each scale, with the weights and without.

    Args:
      key: typed key.
      experiment: a run on labelled images, trained with labels.
      params: its averaged parameters.
      judge: a classifier of the data (``train_judge``).
      scales: of guidance.
      per_class: samples of each class.
      particles: of a population.
      say: called with a line for each row.
      **options: ``steps``, ``noise``, ``ess_threshold`` of ``sampler``.

    Returns:
      A row for each scale and side: ``scale``, ``corrected``, ``accuracy`` (share of the samples in
      which the judge sees the class that was asked for), ``top`` (its mean largest probability),
      ``frechet`` to as many real examples, in the judge's features, ``data_to_data`` of two halves
      of the data at that count, ``spread`` (mean distance of a class' samples from their mean, as a
      share of the data's), ``count``, mean ``last_ess`` and ``resampled``.

    Raises:
      ValueError: a run without labels.
    """
    data = experiment.train
    if not experiment.config.labels or data.label is None or data.num_classes is None:
        raise ValueError("the run was trained without labels; expected one with labels")
    classes = range(data.num_classes)
    count = min(per_class * data.num_classes, len(data) // 2)
    order = np.random.default_rng(0).permutation(len(data))
    halves = [data.to_unit(data.x[part]) for part in (order[:count], order[count : 2 * count])]
    real = [judge.look(half)[0] for half in halves]
    own = [_spread(data.to_unit(data.x[data.label == k])) for k in classes]
    rows = []
    for corrected in (True, False):
        run = sampler(experiment, "guide", particles, corrected=corrected, **options)
        for scale in scales:
            made: list[np.ndarray] = []
            labels: list[int] = []
            sizes, often = [], []
            for k in classes:
                for i in range(-(-per_class // particles)):
                    own_key = jax.random.fold_in(jax.random.fold_in(key, k), i)
                    drawn, out = run(own_key, params, jnp.float32(scale), jnp.int32(k))
                    made.append(np.asarray(drawn)[: per_class - i * particles])
                    labels += [k] * len(made[-1])
                    sizes.append(float(out.ess[-1]))
                    often.append(int(out.resampled.sum()))
            # Quantised as real images are, see ``evaluate.judged``.
            x, label = data.to_unit(data.from_unit(np.concatenate(made))), np.asarray(labels)
            features, top = judge.look(x)
            chosen = np.random.default_rng(1).permutation(len(x))[:count]
            spread = np.mean([_spread(x[label == k]) / own[k] for k in classes])
            rows.append(
                {
                    "scale": scale,
                    "corrected": corrected,
                    "accuracy": rounded(np.mean(top.argmax(axis=1) == label)),
                    "top": rounded(top.max(axis=1).mean()),
                    "frechet": rounded(metrics.frechet_distance(features[chosen], real[0])),
                    "data_to_data": rounded(metrics.frechet_distance(real[1], real[0])),
                    "spread": rounded(spread),
                    "count": count,
                    "last_ess": rounded(np.mean(sizes)),
                    "resampled": rounded(np.mean(often)),
                }
            )
            say(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    return rows


def _spread(x: np.ndarray) -> float:
    """Root mean square distance from the mean."""
    centred = x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(axis=0)
    return float(np.sqrt((centred**2).sum(axis=1).mean()))
