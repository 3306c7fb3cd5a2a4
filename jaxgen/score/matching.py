r"""Losses whose minimum over fields is the score, or an equivalent of it.

- ``denoising_loss``: regression of any prediction kind on its value along the path of one datum
  and one noise (Vincent 2011; Song et al., arXiv 2011.13456, equation 7). Regression of the
  velocity is flow matching.
- ``implicit_loss``: E[tr(grad s) + |s|^2/2] (Hyvaerinen 2005, theorem 1), which needs samples
  alone, and no known noise.
- ``sliced_loss``: the same along random directions (Song et al., arXiv 1905.07088, equations 8
  and 9).

All three differ by constants in expectation: E[tr(grad s) + |s|^2/2] = E|s - grad log p|^2/2 + c.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, batch_event, event_size, left_broadcast, sum_event
from jaxgen.process.linear import LinearSDE, Rates
from jaxgen.score import derivatives
from jaxgen.score.prediction import PREDICTIONS, Field, from_parts
from jaxgen.score.times import TIMES, stratify
from jaxgen.score.weighting import Weighting, weight

__all__ = ["ESTIMATORS", "REDUCTIONS", "denoising_loss", "implicit_loss", "sliced_loss"]

REDUCTIONS = ("mean", "sum", "sum_half")

ESTIMATORS = ("exact", "hutchinson")


def _square(x: jax.Array) -> jax.Array:
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else x**2


def _reduce(squares: jax.Array, reduce: str, event_ndim: int | None) -> jax.Array:
    total = sum_event(squares, event_ndim)
    if reduce == "mean":
        return total / event_size(squares, event_ndim)
    return 0.5 * total if reduce == "sum_half" else total


def denoising_loss(
    key: jax.Array,
    field: Field,
    sde: LinearSDE,
    x0: ArrayLike,
    *,
    prediction: str = "noise",
    weighting: str | Weighting = "simple",
    time: str = "uniform",
    reduce: str = "mean",
    t_min: ArrayLike | None = None,
    event_ndim: int | None = None,
) -> jax.Array:
    """Denoising score matching: the weighted squared error of a prediction, per example.

    Draws a time and a noise for each example, and compares ``field(x_t, t)`` with what it should
    predict on this path.

    Args:
      key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``. A stratified ``time``
        draws one more number for the whole batch, so there a batch is not its examples one by one.
      field: maps ``(x, t)``, ``t`` of shape ``(batch,)``, to an array like ``x``.
      sde: the process.
      x0: data ``(batch, *event)``, floating or complex.
      prediction: what the field predicts: ``"score" "noise" "data" "v" "velocity"``.
      weighting: ``"simple" "likelihood" "edm" "min_snr"``, or a function ``(t, sde) -> weight`` of
        the squared noise error, of ``t``'s shape. Except for ``"simple"``, the plain squared error
        of what is predicted (times ``sigma^2`` for a score), the expected loss is the same for
        every kind; see ``score.weighting``.
      time: ``"uniform"``, ``"stratified"``, ``"importance"``, ``"stratified_importance"``, all of
        the same expectation, or ``"lognormal"``; see ``score.times``.
      reduce: over an example's entries: ``"mean"``, ``"sum"`` or ``"sum_half"``, half the sum.
      t_min: first time drawn, ``sde.t_min`` if ``None``.
      event_ndim: ``x0.ndim`` if ``x0`` is one example; the field is then called with it and ``t``
        of shape ``()``.

    Returns:
      Losses ``(batch,)`` or ``()``, float32 or wider; the average over examples is yours to take.

    Raises:
      ValueError: an unknown name, or a field or weighting of another shape.
      TypeError: a raw key, integer data, or a field of an integer dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen import process
      >>> x0 = jnp.ones((4, 3))
      >>> denoising_loss(jax.random.key(0), lambda x, t: x, process.vp(), x0).shape
      (4,)
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    checks.one_of("reduce", reduce, REDUCTIONS)
    checks.one_of("time", time, TIMES)
    x0 = checks.floating("x0", x0, allow_complex=True)
    batch, event = batch_event(x0, event_ndim)
    sampler = TIMES[time]
    noise_dtype = jnp.promote_types(x0.dtype, jnp.float32)
    key = keys.check(key)
    if sampler.stratified:
        key_offset, key = jax.random.split(key)

    def draw(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_time, key_noise = jax.random.split(k)
        return jax.random.uniform(key_time), jax.random.normal(key_noise, event, noise_dtype)

    u, noise = keys.map_batch(draw, key, batch)
    if sampler.stratified:
        u = stratify(key_offset, batch)
    t, factor = sampler.map(u, sde, jnp.asarray(sde.t_min if t_min is None else t_min))
    # The noise is rounded as the state is, so that the target is the noise that the field sees.
    noise = noise.astype(x0.dtype)
    x_t = sde.path(x0, noise, t)

    wide = x0.astype(noise_dtype)
    mu = sde.centre(x0)
    rates = Rates(*(left_broadcast(c, x0) for c in sde.rates(t)))
    if prediction == "data":
        target = wide
    else:
        centred = wide if mu is None else wide - mu
        target = from_parts(prediction, centred, noise.astype(noise_dtype), rates)
    error = checks.cast_field_output(field(x_t, t), wide) - target
    loss = _reduce(_square(error), reduce, event_ndim)
    return factor * weight(weighting, prediction, t, sde) * loss


def implicit_loss(
    key: jax.Array | None,
    score: Field,
    x: ArrayLike,
    t: ArrayLike,
    *,
    estimator: str = "hutchinson",
    probe: str = "rademacher",
    n_probes: int = 1,
    event_ndim: int | None = None,
) -> jax.Array:
    """Hyvaerinen's loss ``div s + |s|^2/2`` of a score, per example.

    Its samples may be clean data or noisy states of any process; the time is only handed to the
    field. A field of another kind enters through ``convert``.

    Args:
      key: typed key of the probes, example ``i`` of a batch using ``fold_in(key, i)``; not used,
        and may be ``None``, if ``estimator="exact"``.
      score: maps ``(x, t)`` to an array like ``x``.
      x: samples ``(batch, *event)``, real.
      t: times, ``()`` or ``(batch,)``.
      estimator: ``"exact"``, one Jacobian-vector product per entry of an example, or
        ``"hutchinson"``, one per probe.
      probe: ``"rademacher"`` or ``"gaussian"``.
      n_probes: probes per example.
      event_ndim: ``x.ndim`` if ``x`` is one example.

    Returns:
      Losses ``(batch,)`` or ``()``, in nats, float32 or wider; may be negative.

    Raises:
      ValueError: an unknown name or shapes that do not fit.
      TypeError: a raw key, or ``x`` no real floating array.
    """
    checks.one_of("estimator", estimator, ESTIMATORS)
    x = checks.floating("x", x)
    x = x.astype(at_least_f32(x.dtype))
    if estimator == "exact":
        directions = None
    else:
        directions = derivatives.probes(
            keys.check(key), x.shape, probe, n=n_probes, event_ndim=event_ndim
        )
    value, divergence = derivatives.value_and_divergence(
        score, x, t, directions, event_ndim=event_ndim
    )
    return divergence + 0.5 * sum_event(value**2, event_ndim)


def sliced_loss(
    key: jax.Array,
    score: Field,
    x: ArrayLike,
    t: ArrayLike,
    *,
    variance_reduced: bool = True,
    probe: str = "rademacher",
    n_probes: int = 1,
    event_ndim: int | None = None,
) -> jax.Array:
    """Sliced score matching: ``v . (grad s) v + (v . s)^2/2`` averaged over probes, per example.

    Args:
      key: typed key of the probes, example ``i`` of a batch using ``fold_in(key, i)``.
      score: maps ``(x, t)`` to an array like ``x``.
      x: samples ``(batch, *event)``, real; clean data or noisy states.
      t: times, ``()`` or ``(batch,)``.
      variance_reduced: replace ``(v . s)^2`` by its expectation ``|s|^2``; this is
        ``implicit_loss`` with Hutchinson's estimator.
      probe: ``"rademacher"`` or ``"gaussian"``.
      n_probes: probes per example.
      event_ndim: ``x.ndim`` if ``x`` is one example.

    Returns:
      Losses ``(batch,)`` or ``()``, in nats, float32 or wider; may be negative.

    Raises:
      ValueError: an unknown name or shapes that do not fit.
      TypeError: a raw key, or ``x`` no real floating array.
    """
    x = checks.floating("x", x)
    x = x.astype(at_least_f32(x.dtype))
    directions = derivatives.probes(
        keys.check(key), x.shape, probe, n=n_probes, event_ndim=event_ndim
    )
    value, traces = derivatives.value_and_traces(score, x, t, directions, event_ndim=event_ndim)
    if variance_reduced:
        return jnp.mean(traces, axis=0) + 0.5 * sum_event(value**2, event_ndim)
    along = jax.vmap(lambda v: sum_event(v * value, event_ndim))(directions)
    return jnp.mean(traces + 0.5 * along**2, axis=0)
