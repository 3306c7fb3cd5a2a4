r"""Diffrax terms in raw time: the probability flow and the reverse SDE of a linear process.

With the process dx = f(x, t) dt + g(t) dw and a score s (Song et al., arXiv 2011.13456,
equations (6) and (13)),

    probability flow   dx = (f - g^2 s / 2) dt                                              (1)
    reverse SDE        dx = (f - g^2 s) dt + g dw-bar                                       (2)

Both are integrated from noise to data with ``diffeqsolve(t0=t_max, t1=t_min, dt0<0)``; (1) serves
the other way too. The noise of (2) is additive, so Ito and Stratonovich solvers agree.

The state of a term is real or complex, in float32 or wider. A batched state ``(batch, *event)``
shares one time; to give each sample its own step size, map single samples over the solve with
``map_samples``, which a batched field serves through ``on_single``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.typing import DTypeLike

from jaxgen.core import checks
from jaxgen.core.arrays import cast_coefficient
from jaxgen.process.linear import LinearSDE
from jaxgen.score.prediction import PREDICTIONS, Field, convert

__all__ = [
    "FieldCall",
    "arrays_of",
    "map_samples",
    "on_single",
    "probability_flow",
    "reverse_sde",
    "with_batch_of",
]


class FieldCall(eqx.Module):
    """A field with what is needed to call it on a solver's state.

    The state is handed to the field in ``dtype`` (a bfloat16 network under a float32 state) and
    the output comes back in the state's dtype.

    Attributes:
      field: ``f(x, t) -> like x``.
      event_ndim: ``None`` for a batched state, the state's ``ndim`` for one example.
      dtype: what the field is called in; the state's own if ``None``.
    """

    field: Field
    event_ndim: int | None = eqx.field(static=True, default=None)
    dtype: Any = eqx.field(static=True, default=None)

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        """The field's output, like ``x``; ``t`` is ``()`` or ``(batch,)``."""
        given = x if self.dtype is None else x.astype(self.dtype)
        time = checks.field_time(t, x, self.event_ndim)
        out = self.field(given, time if self.event_ndim is not None else with_batch_of(x, time))
        return checks.cast_field_output(out, x)


class _Single(eqx.Module):
    field: Field

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.field(x[None], t[None])[0]


def on_single(field: Field) -> Field:
    """A field of one example from a batched one: ``field(x[None], t[None])[0]``."""
    return _Single(field)


def with_batch_of(x: jax.Array, tree: Any) -> Any:
    """Arrays with a batch in front, laid out like ``x``'s batch on an Explicit mesh."""
    sharding = jax.typeof(x).sharding
    axis = sharding.spec[0] if sharding.spec else None
    if axis is None or not sharding.mesh.explicit_axes:
        return tree
    return jax.tree.map(lambda v: jax.reshard(v, jax.P(axis)), tree)


def arrays_of(sde: LinearSDE) -> LinearSDE:
    """The process with its data as JAX arrays, as terms and adjoints hold it."""
    return jax.tree.map(jnp.asarray, sde)


def map_samples(
    solve: Callable[..., Any], sde: LinearSDE, x: jax.Array, *mapped: Any, **shared: Any
) -> Any:
    """``vmap`` of ``solve(sde, x_i, *mapped_i, **shared)`` over the samples of ``x``.

    Args:
      solve: solves for one sample; the anchor ``mu`` of the process that it gets is the sample's.
      sde: the process; ``mu`` may have a batch axis.
      x: ``(batch, *event)``.
      *mapped: pytrees whose leaves have the batch in front.
      **shared: handed on as they are.
    """
    mu = sde.centre(x)
    if mu is not None and mu.shape[0] == 1:
        mu = mu[0]
    has_axis = mu is not None and mu.ndim == x.ndim
    plain = dataclasses.replace(sde, mu=None) if mu is not None else sde

    def one(mu_i, x_i, *mapped_i):
        own = plain if mu_i is None else dataclasses.replace(sde, mu=mu_i)
        return solve(own, x_i, *mapped_i, **shared)

    axes = (0 if has_axis else None, *[0] * (1 + len(mapped)))
    mu, mapped = with_batch_of(x, mu) if has_axis else mu, with_batch_of(x, mapped)
    return jax.vmap(one, in_axes=axes)(mu, x, *mapped)


class _Flow(eqx.Module):
    """The drift of equation (1), as diffrax calls it."""

    call: FieldCall
    sde: LinearSDE
    prediction: str = eqx.field(static=True)

    def __call__(self, t: Any, x: jax.Array, args: Any) -> jax.Array:
        del args
        return convert(self.call(x, t), x, t, self.sde, self.prediction, "velocity")


class _ReverseDrift(eqx.Module):
    """The drift of equation (2), as diffrax calls it."""

    call: FieldCall
    sde: LinearSDE
    prediction: str = eqx.field(static=True)

    def __call__(self, t: Any, x: jax.Array, args: Any) -> jax.Array:
        del args
        score = convert(self.call(x, t), x, t, self.sde, self.prediction, "score")
        return self.sde.drift(x, t) - cast_coefficient(self.sde.diffusion_squared(t), x) * score


class _Diffusion(eqx.Module):
    """The diffusion of equation (2): a diagonal operator."""

    sde: LinearSDE

    def __call__(self, t: Any, x: jax.Array, args: Any) -> lx.DiagonalLinearOperator:
        del args
        g = cast_coefficient(self.sde.diffusion(t), x)
        return lx.DiagonalLinearOperator(jnp.broadcast_to(g, x.shape).astype(x.dtype))


def probability_flow(
    field: Field,
    sde: LinearSDE,
    *,
    prediction: str = "noise",
    event_ndim: int | None = None,
    dtype: DTypeLike | None = None,
) -> diffrax.ODETerm:
    """The probability-flow ODE, equation (1), as a diffrax term in raw time.

    Args:
      field: ``f(x, t) -> like x``; called with ``t`` of shape ``(batch,)``, or ``()`` for one
        example. Parameters inside a pytree field (an Equinox module) are leaves of the term, and
        so differentiable by every adjoint.
      sde: the process.
      prediction: what the field predicts, one of ``score.PREDICTIONS``.
      event_ndim: ``None`` for a batched state; the state's ``ndim`` for one example.
      dtype: what the field is called in, if not the state's dtype.

    Returns:
      A term whose vector field is ``dx/dt``, the velocity, like the state.

    Raises:
      ValueError: an unknown ``prediction``; when solving, a field output of another shape.
      TypeError: when solving, an integer output, or a complex one for a real state.

    Example:
      >>> import diffrax, jax.numpy as jnp
      >>> from jaxgen import process, score
      >>> sde = process.vp()
      >>> field = score.closed_form.gaussian(sde, jnp.zeros(2), 1.0).noise
      >>> term = probability_flow(field, sde)
      >>> end = diffrax.diffeqsolve(
      ...     term, diffrax.Heun(), t0=1.0, t1=1e-3, dt0=-0.1, y0=jnp.ones((3, 2)))
      >>> end.ys.shape
      (1, 3, 2)
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    call = FieldCall(field, event_ndim, dtype)
    return diffrax.ODETerm(_Flow(call, arrays_of(sde), prediction))


def reverse_sde(
    field: Field,
    sde: LinearSDE,
    path: diffrax.AbstractBrownianPath,
    *,
    prediction: str = "noise",
    event_ndim: int | None = None,
    dtype: DTypeLike | None = None,
) -> diffrax.MultiTerm:
    """The reverse SDE, equation (2), as a diffrax term in raw time.

    Args:
      field: see ``probability_flow``.
      sde: the process.
      path: a Brownian path of the state's shape and dtype; its Levy area as the solver asks.
      prediction: what the field predicts, one of ``score.PREDICTIONS``.
      event_ndim: ``None`` for a batched state; the state's ``ndim`` for one example.
      dtype: what the field is called in, if not the state's dtype.

    Returns:
      A ``MultiTerm`` of an ``ODETerm`` and a ``ControlTerm`` with a diagonal operator.

    Diffrax 0.7.2 runs its stochastic Runge-Kutta solvers (``AbstractSRK``: ShARK, SEA, SRA1, ...)
    the wrong way on a backward solve; ``solve.sample`` serves them, ``diffeqsolve`` with this term
    does not.

    Raises:
      ValueError: an unknown ``prediction``; when solving, a field output of another shape.
      TypeError: when solving, an integer output, or a complex one for a real state.
    """
    checks.one_of("prediction", prediction, PREDICTIONS)
    call, data = FieldCall(field, event_ndim, dtype), arrays_of(sde)
    drift = diffrax.ODETerm(_ReverseDrift(call, data, prediction))
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(_Diffusion(data), path))
