r"""Fields known in closed form: an interpolant between two Gaussian mixtures.

If x0 ~ sum_i p_i N(m_i, C_i) and x1 ~ sum_j q_j N(n_j, D_j) are independent, then under a spatially
linear interpolant (Albergo, Boffi and Vanden-Eijnden, arXiv 2303.08797, appendix A)

    rho_t = sum_ij p_i q_j N(m_ij, C_ij)                                                    (1)
    m_ij = alpha m_i + beta n_j,   C_ij = alpha^2 C_i + beta^2 D_j + gamma^2 I
    b = E[m_ij' + C_ij' w_ij / 2 | x],   w_ij = C_ij^{-1} (x - m_ij)                        (2)
    s = -E[w_ij | x],   E[z | x] = -gamma s                                                 (3)
    E[x0 | x] = E[m_i + alpha C_i w_ij | x],   E[x1 | x] = E[n_j + beta D_j w_ij | x]       (4)

with the posterior weights of the pairs (i, j). (2) is exact for any covariances: within a pair all
is Gaussian, and the covariance of dx_t/dt with x_t is C_ij'/2. The velocity v = E[dI/dt | x] is (2)
without gamma gamma' in C_ij'/2. A one-sided interpolant has x0 ~ N(0, I), and alpha in the part of
gamma in (3). A curve of the user's for ``I`` has no closed form.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import batch_event
from jaxgen.process.interpolant import Interpolant

__all__ = ["TwoMixtures", "two_mixtures"]

# Accelerators multiply float32 in fewer bits unless asked.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Mixture:
    """A mixture over flattened events; ``covs`` is ``(k, d)``, diagonal, or ``(k, d, d)``."""

    log_weights: jax.Array
    means: jax.Array
    covs: jax.Array

    def draw(self, key: jax.Array) -> jax.Array:
        key_component, key_normal = jax.random.split(key)
        i = jax.random.categorical(key_component, self.log_weights)
        z = jax.random.normal(key_normal, self.means.shape[1:], self.means.dtype)
        if self.covs.ndim == 2:
            return self.means[i] + jnp.sqrt(self.covs[i]) * z
        values, vectors = jnp.linalg.eigh(self.covs[i])
        return self.means[i] + _einsum("de,e->d", vectors, jnp.sqrt(jnp.maximum(values, 0)) * z)


class _Coefficients(NamedTuple):
    """Numbers of one time; ``alpha_alpha_dot`` and ``level_level_dot`` are finite at the ends."""

    alpha: jax.Array
    beta: jax.Array
    gamma: jax.Array
    alpha_dot: jax.Array
    beta_dot: jax.Array
    alpha_alpha_dot: jax.Array
    gamma_gamma_dot: jax.Array


class _Posterior(NamedTuple):
    log_prob: jax.Array  # ()
    b: jax.Array  # (d,)
    v: jax.Array
    whitened: jax.Array  # E[w | x], minus the score
    x0: jax.Array
    x1: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TwoMixtures:
    """Marginals and fields of an interpolant between two mixtures (module docstring).

    Made by ``two_mixtures``. The methods ``b``, ``v``, ``score``, ``noise``, ``x0`` and ``x1`` are
    fields: ``f(x, t)`` with ``x`` of shape ``(batch, *event)`` and ``t`` ``(batch,)`` or ``()``, or
    one example and ``t`` of shape ``()``; the result is like ``x``.

    Attributes:
      interp: the interpolant.
      start: the mixture at t = 0.
      end: the mixture at t = 1.
      event_shape: the event's shape.
    """

    interp: Interpolant
    start: _Mixture
    end: _Mixture
    event_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def _coefficients(self, t: jax.Array) -> _Coefficients:
        r = self.interp.rates(t)
        product = r.alpha * r.alpha_dot
        if self.interp.one_sided:
            product = self.interp.noise_rates(t)[1]
        return _Coefficients(
            r.alpha, r.beta, r.gamma, r.alpha_dot, r.beta_dot, product, r.gamma_gamma_dot
        )

    def _one(self, x: jax.Array, c: _Coefficients) -> _Posterior:
        """Posterior of one flattened example over the pairs ``(i, j)``."""
        m, n = self.start.means, self.end.means
        cov0, cov1 = self.start.covs, self.end.covs
        d = x.shape[0]
        is_full = cov0.ndim == 3
        unit = jnp.eye(d, dtype=x.dtype) if is_full else jnp.ones((d,), x.dtype)

        def pairs(a: jax.Array, b: jax.Array) -> jax.Array:
            return a[:, None] + b[None]

        def mix(a: jax.Array, b: jax.Array, noise: jax.Array) -> jax.Array:
            both = pairs(a * cov0, b * cov1)
            return both + jnp.expand_dims(noise * unit, (0, 1))

        def times(matrix: jax.Array, w: jax.Array) -> jax.Array:
            return _einsum("ijde,ije->ijd", matrix, w) if is_full else matrix * w

        difference = jnp.expand_dims(x, (0, 1)) - pairs(c.alpha * m, c.beta * n)
        cov = mix(c.alpha**2, c.beta**2, c.gamma**2)
        if is_full:
            factor = jnp.linalg.cholesky(cov)
            solve = jax.vmap(jax.vmap(lambda f, y: jax.scipy.linalg.cho_solve((f, True), y)))
            w = solve(factor, difference)
            log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)
        else:
            w = difference / cov
            log_det = jnp.sum(jnp.log(cov), axis=-1)
        joint = pairs(self.start.log_weights, self.end.log_weights)
        joint = joint - 0.5 * (
            jnp.sum(difference * w, axis=-1) + log_det + d * math.log(2 * math.pi)
        )
        log_prob = jax.nn.logsumexp(joint)
        weights = jnp.exp(joint - log_prob)

        def average(values: jax.Array) -> jax.Array:
            return _einsum("ij,ijd->d", weights, values)

        # Of a one-sided interpolant alpha' may be infinite, and the mean of x0 is zero.
        shift0 = jnp.zeros_like(m) if self.interp.one_sided else c.alpha_dot * m
        slope = mix(c.alpha_alpha_dot, c.beta * c.beta_dot, jnp.zeros_like(c.alpha))
        v = average(pairs(shift0, c.beta_dot * n) + times(slope, w))
        whitened = average(w)
        every = jnp.zeros_like(w)
        x0 = average(m[:, None] + every + c.alpha * times(cov0[:, None], w))
        x1 = average(n[None] + every + c.beta * times(cov1[None], w))
        return _Posterior(log_prob, v + c.gamma_gamma_dot * whitened, v, whitened, x0, x1)

    def _map(self, x: ArrayLike, t: ArrayLike, pick: Any) -> jax.Array:
        """Apply ``pick(posterior, level)`` to each example."""
        x = checks.floating("x", x)
        n_event = len(self.event_shape)
        if x.ndim not in (n_event, n_event + 1) or x.shape[x.ndim - n_event :] != self.event_shape:
            raise ValueError(
                f"x has shape {x.shape}; expected {self.event_shape} or (batch,) + that"
            )
        is_batched = x.ndim == n_event + 1
        t = checks.field_time(t, x, n_event)
        wide = jnp.promote_types(x.dtype, self.start.means.dtype)
        flat = x.astype(wide).reshape((*x.shape[: int(is_batched)], -1))

        def one(flat: jax.Array, c: _Coefficients, level: jax.Array) -> jax.Array:
            return pick(self._one(flat, c), level)

        c = jax.tree.map(lambda v: v.astype(wide), self._coefficients(t))
        level = self.interp.noise_rates(t)[0].astype(wide)
        return jax.vmap(one)(flat, c, level) if is_batched else one(flat, c, level)

    def log_prob(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``log rho_t(x)`` in nats, ``(batch,)`` or ``()``."""
        return self._map(x, t, lambda p, _: p.log_prob)

    def _field(self, x: ArrayLike, t: ArrayLike, pick: Any) -> jax.Array:
        x = jnp.asarray(x)
        return self._map(x, t, pick).reshape(x.shape).astype(x.dtype)

    def b(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """Velocity of the probability flow, ``E[dx_t/dt | x_t = x]``."""
        return self._field(x, t, lambda p, _: p.b)

    def v(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``E[dI/dt | x_t = x]``; ``b`` itself for a one-sided interpolant."""
        return self._field(x, t, lambda p, _: p.v)

    def score(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``grad log rho_t(x)``."""
        return self._field(x, t, lambda p, _: -p.whitened)

    def noise(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``E[z | x_t = x]``, or ``E[x0 | x_t = x]`` for a one-sided interpolant."""
        return self._field(x, t, lambda p, level: level * p.whitened)

    def x0(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``E[x0 | x_t = x]``."""
        return self._field(x, t, lambda p, _: p.x0)

    def x1(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``E[x1 | x_t = x]``."""
        return self._field(x, t, lambda p, _: p.x1)

    def ends(self, key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Draw independent ``x0`` and ``x1``, each of ``shape``.

        Args:
          key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
          shape: ``(batch, *event)`` or the event alone.

        Raises:
          ValueError: ``shape`` does not end in the event's shape.
        """
        shape = tuple(shape)
        n_event = len(self.event_shape)
        if shape[len(shape) - n_event :] != self.event_shape or len(shape) > n_event + 1:
            raise ValueError(f"shape is {shape}; expected (batch,) + {self.event_shape}")

        def draw(k: jax.Array) -> tuple[jax.Array, jax.Array]:
            key0, key1 = jax.random.split(k)
            return self.start.draw(key0), self.end.draw(key1)

        x0, x1 = keys.map_batch(draw, key, batch_event(shape, n_event)[0])
        return x0.reshape(shape), x1.reshape(shape)

    def sample(self, key: jax.Array, shape: tuple[int, ...], t: ArrayLike) -> jax.Array:
        """Draw from ``rho_t``.

        Args:
          key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
          shape: ``(batch, *event)`` or the event alone.
          t: times, ``()`` or ``(batch,)``.
        """
        key_ends, key_noise = jax.random.split(keys.check(key))
        x0, x1 = self.ends(key_ends, shape)
        return self.interp.draw(key_noise, x0, x1, t, event_ndim=len(self.event_shape))[0]


def _mixture(name: str, given: Any, event_shape: tuple[int, ...] | None) -> tuple[_Mixture, Any]:
    """A mixture from ``(weights, means, covs)``, checked, and its event's shape."""
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise TypeError(f"{name} is {type(given).__name__}; expected (weights, means, covs)")
    weights, means, covs = (jnp.asarray(value) for value in given)
    dtype = jnp.promote_types(means.dtype, jnp.float32)
    weights, means, covs = (value.astype(dtype) for value in (weights, means, covs))
    if means.ndim < 2 or weights.shape != means.shape[:1]:
        raise ValueError(
            f"{name} has weights of shape {weights.shape} and means {means.shape}; expected (k,) "
            "and (k, *event)"
        )
    k, event = means.shape[0], means.shape[1:]
    if event_shape is not None and event != event_shape:
        raise ValueError(f"{name} has the event {event}; expected {event_shape} as the other has")
    d = math.prod(event)
    if covs.shape == (k,):
        covs = jnp.broadcast_to(covs[:, None], (k, d))
    elif covs.shape == (k, *event):
        covs = covs.reshape(k, d)
    elif covs.shape in ((k, d, d), (k, *event, *event)):
        covs = covs.reshape(k, d, d)
    else:
        raise ValueError(
            f"{name} has covs of shape {covs.shape}; expected ({k},) for isotropic, "
            f"({k}, *{event}) for diagonal or ({k}, {d}, {d}) for full covariances"
        )
    variances = covs if covs.ndim == 2 else jnp.diagonal(covs, axis1=-2, axis2=-1)
    for what, values in (("weight", weights), ("variance", variances)):
        known = checks.concrete(values)
        if known is not None and known.size and not float(known.min()) >= 0:
            raise ValueError(f"{name} has the {what} {float(known.min()):.3g}; expected 0 or more")
    log_weights = jnp.log(weights) - jnp.log(jnp.sum(weights))
    return _Mixture(log_weights, means.reshape(k, d), covs), event


def two_mixtures(interp: Interpolant, start: Any, end: Any) -> TwoMixtures:
    """The fields of an interpolant between two independent Gaussian mixtures.

    Args:
      interp: a spatially linear interpolant.
      start: the mixture at t = 0 as ``(weights, means, covs)``: positive weights ``(k,)``,
        normalised here, means ``(k, *event)``, and covariances ``(k,)`` for isotropic variances,
        ``(k, *event)`` for variances by entry or ``(k, d, d)`` for full matrices over the flattened
        event. ``None`` for the standard normal, which a one-sided interpolant needs.
      end: the mixture at t = 1, likewise.

    Raises:
      ValueError: shapes that do not fit, a negative weight or variance (where known), an
        interpolant given by a curve, a ``start`` for a one-sided one or none for another.
      TypeError: a mixture that is no triple.

    For ``mirror``, ``x0`` is not used: ``rho_t`` is ``end`` with noise.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen.process.interpolant import interpolant
      >>> normal = (jnp.ones(1), jnp.zeros((1, 1)), jnp.ones(1))
      >>> law = two_mixtures(interpolant("linear"), normal, normal)
      >>> round(float(law.score(jnp.ones((1, 1)), 0.5)[0, 0]), 4)  # variance 1/4 + 1/4 + 1/4
      -1.3333
    """
    if not interp.is_linear:
        raise ValueError("interp is given by a path_fn; expected a spatially linear interpolant")
    final, event = _mixture("end", end, None)
    if interp.one_sided != (start is None):
        raise ValueError(
            f"start is {'None' if start is None else 'given'} for a "
            f"{'one' if interp.one_sided else 'two'}-sided interpolant; expected None for a "
            "one-sided one alone: its x0 is standard normal"
        )
    if start is None:
        start = (jnp.ones(1), jnp.zeros((1, *event)), jnp.ones(1))
    first, _ = _mixture("start", start, event)
    dtype = jnp.promote_types(first.means.dtype, final.means.dtype)
    first, final = jax.tree.map(lambda v: v.astype(dtype), (first, final))
    if first.covs.ndim != final.covs.ndim:
        first, final = (
            m if m.covs.ndim == 3 else dataclasses.replace(m, covs=jax.vmap(jnp.diag)(m.covs))
            for m in (first, final)
        )
    return TwoMixtures(interp, first, final, event_shape=event)
