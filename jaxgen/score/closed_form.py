r"""Fields known in closed form: Gaussian data, Gaussian mixtures and a finite data set.

If x0 ~ sum_k w_k N(m_k, C_k) and C_k = Q_k diag(e_k) Q_k^T, then under any ``LinearSDE`` (anchor
mu)

    p_t = sum_k w_k N(mu + alpha (m_k - mu), S_k)                                           (1)
    S_k = Q_k diag(alpha^2 e_k + sigma^2) Q_k^T
    E[n | x, k]  = sigma S_k^{-1} (x - mean_k)                                              (2)
    E[x0 | x, k] = m_k + alpha C_k S_k^{-1} (x - mean_k)                                    (3)

and a mixture's fields are these, averaged with the posterior weights of the components. Neither
(2) nor (3) divides by alpha or sigma, so they hold at both ends of time. An empirical data set is a
mixture with C_k = 0. These are the oracles of the tests and of many a first notebook. Beside them
stand the fields of an interpolant between two mixtures (``two_mixtures``).
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import batch_event, matmul
from jaxgen.process.linear import LinearSDE, Rates
from jaxgen.score.prediction import from_parts
from jaxgen.score.two_mixtures import TwoMixtures, two_mixtures

__all__ = ["ClosedForm", "TwoMixtures", "empirical", "gaussian", "mixture", "two_mixtures"]

# Entries of one block of the (examples, components, dimensions) array of differences.
_BLOCK = 2**24


class _Posterior(NamedTuple):
    log_prob: jax.Array  # ()
    log_weights: jax.Array  # (k,), of the components, normalised
    data: jax.Array  # (d,), centred
    noise: jax.Array  # (d,)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ClosedForm:
    """Marginals and fields of a Gaussian mixture under a process (module docstring).

    Made by ``gaussian``, ``mixture`` and ``empirical``. The methods ``score``, ``noise``, ``data``,
    ``v`` and ``velocity`` are fields: ``f(x, t)`` with ``x`` of shape ``(batch, *event)`` and ``t``
    ``(batch,)`` or ``()``, or one example and ``t`` of shape ``()``; the result is like ``x``.

    Attributes:
      sde: the process.
      log_weights: normalised, ``(k,)``.
      means: ``(k, d)``, flattened events.
      variances: eigenvalues of the covariances, ``(k, d)``.
      basis: eigenvectors as columns, ``(k, d, d)``, or ``None`` for diagonal covariances.
      event_shape: the event's shape, ``prod(event_shape) == d``.
    """

    sde: LinearSDE
    log_weights: jax.Array
    means: jax.Array
    variances: jax.Array
    basis: jax.Array | None
    event_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def _one(self, x: jax.Array, r: Rates) -> _Posterior:
        """Posterior of one flattened example."""
        mu = self._mu()
        centred_means = self.means - mu[None]
        difference = (x - mu)[None] - r.alpha * centred_means
        if self.basis is not None:
            difference = jnp.einsum("kij,ki->kj", self.basis, difference, precision="highest")
        spread = r.alpha**2 * self.variances + r.sigma**2
        whitened = difference / spread
        log_probs = -0.5 * jnp.sum(
            difference * whitened + jnp.log(spread) + math.log(2 * math.pi), axis=-1
        )
        joint = self.log_weights + log_probs
        log_prob = jax.nn.logsumexp(joint)
        log_weights = joint - log_prob
        weights = jnp.exp(log_weights)
        pulled = r.alpha * self.variances * whitened
        if self.basis is not None:
            pulled = jnp.einsum("kij,kj->ki", self.basis, pulled, precision="highest")
            whitened = jnp.einsum("kij,kj->ki", self.basis, whitened, precision="highest")
        data = matmul(weights, centred_means + pulled)
        noise = r.sigma * matmul(weights, whitened)
        return _Posterior(log_prob, log_weights, data, noise)

    def _mu(self) -> jax.Array:
        size = self.means.shape[1]
        if self.sde.mu is None:
            return jnp.zeros((size,), self.means.dtype)
        mu = jnp.asarray(self.sde.mu, self.means.dtype)
        if mu.ndim > len(self.event_shape):
            raise ValueError(
                f"mu has shape {mu.shape}; expected one anchor for the event {self.event_shape}"
            )
        mu = jnp.reshape(mu, (1,) * (len(self.event_shape) - mu.ndim) + mu.shape)
        return jnp.broadcast_to(mu, self.event_shape).reshape(-1)

    def _map(self, x: ArrayLike, t: ArrayLike, pick) -> jax.Array:
        """Apply ``pick(posterior, rates, flat mu)`` to each example, in blocks if many."""
        x = checks.floating("x", x)
        batched = x.ndim == len(self.event_shape) + 1
        if not batched and x.ndim != len(self.event_shape):
            raise ValueError(
                f"x has shape {x.shape}; expected {self.event_shape} or (batch, "
                f"{', '.join(map(str, self.event_shape))})"
            )
        if x.shape[int(batched) :] != self.event_shape:
            raise ValueError(f"x has event {x.shape[int(batched) :]}; expected {self.event_shape}")
        t = checks.field_time(t, x, len(self.event_shape))
        wide = jnp.promote_types(x.dtype, self.means.dtype)
        flat = x.astype(wide).reshape((*x.shape[: int(batched)], -1))

        def one(pair):
            flat, rates = pair
            return pick(self._one(flat, rates), rates)

        rates = self.sde.rates(t)
        if not batched:
            return one((flat, rates))
        if flat.shape[0] * self.means.size > _BLOCK:
            size = max(1, _BLOCK // self.means.size)
            return jax.lax.map(one, (flat, rates), batch_size=size)
        return jax.vmap(one)((flat, rates))

    def log_prob(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``log p_t(x)`` in nats, ``(batch,)`` or ``()``."""
        return self._map(x, t, lambda p, _: p.log_prob)

    def component_log_prob(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """Posterior log-probabilities of the components, ``(batch, k)`` or ``(k,)``."""
        return self._map(x, t, lambda p, _: p.log_weights)

    def _field(self, kind: str, x: ArrayLike, t: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)

        def pick(p: _Posterior, r: Rates) -> jax.Array:
            value = from_parts(kind, p.data, p.noise, r)
            return value + self._mu() if kind == "data" else value

        return self._map(x, t, pick).reshape(x.shape).astype(x.dtype)

    def score(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``grad_x log p_t(x)``, like ``x``; undefined (NaN) where ``sigma`` is 0."""
        return self._field("score", x, t)

    def noise(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``E[n | x_t = x]``, like ``x``."""
        return self._field("noise", x, t)

    def data(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``E[x0 | x_t = x]``, the denoiser, like ``x``."""
        return self._field("data", x, t)

    def v(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """``E[alpha n - sigma x0 | x_t = x]``, like ``x``."""
        return self._field("v", x, t)

    def velocity(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """Velocity of the probability flow at ``x``, like ``x``."""
        return self._field("velocity", x, t)

    def sample(
        self, key: jax.Array, shape: tuple[int, ...], t: ArrayLike | None = None
    ) -> jax.Array:
        """Draw from ``p_t``, or from the data where ``t`` is ``None``.

        Args:
          key: typed key; example ``i`` of a batch uses ``fold_in(key, i)``.
          shape: ``(batch, *event)`` or the event alone.
          t: times, ``()`` or ``(batch,)``.

        Returns:
          Samples of ``shape`` in the dtype of the means.

        Raises:
          ValueError: ``shape`` does not end in the event's shape.
        """
        shape = tuple(shape)
        n_event = len(self.event_shape)
        if shape[len(shape) - n_event :] != self.event_shape or len(shape) > n_event + 1:
            raise ValueError(f"shape is {shape}; expected (batch,) + {self.event_shape}")

        def draw(k: jax.Array) -> jax.Array:
            key_component, key_normal = jax.random.split(k)
            i = jax.random.categorical(key_component, self.log_weights)
            z = jax.random.normal(key_normal, self.means.shape[1:], self.means.dtype)
            z = jnp.sqrt(self.variances[i]) * z
            if self.basis is not None:
                z = matmul(self.basis[i], z)
            return (self.means[i] + z).reshape(self.event_shape)

        key_data, key_noise = jax.random.split(keys.check(key))
        x0 = keys.map_batch(draw, key_data, batch_event(shape, n_event)[0])
        if t is None:
            return x0
        return self.sde.perturb(key_noise, x0, t, event_ndim=n_event)[0]

    def level_log_prob(
        self, x: ArrayLike, levels: ArrayLike, log_prior: ArrayLike | None = None
    ) -> jax.Array:
        """Posterior over noise levels, ``log p(level | x)`` with ``p(level | x) ~ p_t(x) p(t)``.

        Args:
          x: states ``(batch, *event)`` or one example.
          levels: times ``(m,)``.
          log_prior: unnormalised log-prior of the levels, ``(m,)``; uniform if ``None``.

        Returns:
          ``(batch, m)`` or ``(m,)``, normalised over the levels.
        """
        levels = jnp.asarray(levels)
        joint = jax.vmap(lambda t: self.log_prob(x, t), out_axes=-1)(levels)
        if log_prior is not None:
            log_prior = jnp.asarray(log_prior)
            joint = joint + jnp.reshape(log_prior, (1,) * (joint.ndim - 1) + log_prior.shape)
        return jax.nn.log_softmax(joint, axis=-1)


def _spectrum(
    cov: jax.Array, k: int, size: int, event_shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """Eigenvalues ``(k, d)`` and eigenvectors ``(k, d, d)`` or ``None`` of ``k`` covariances."""
    if cov.shape == (k,):
        return jnp.broadcast_to(cov[:, None], (k, size)), None
    # In one dimension (k, 1) is a variance and (k, 1, 1) a matrix: the same either way.
    if cov.shape == (k, *event_shape):
        return cov.reshape(k, size), None
    if cov.shape in ((k, size, size), (k, *event_shape, *event_shape)):
        values, vectors = jnp.linalg.eigh(cov.reshape(k, size, size))
        return values, vectors
    raise ValueError(
        f"covs has shape {cov.shape}; expected ({k},) for isotropic, ({k}, *{event_shape}) for "
        f"diagonal or ({k}, {size}, {size}) for full covariances"
    )


def _check_nonnegative(name: str, value: jax.Array) -> None:
    known = checks.concrete(value)
    if known is not None and known.size and float(known.min()) < -1e-6 * float(abs(known).max()):
        raise ValueError(f"{name} has the negative eigenvalue {float(known.min()):.3g}")


def mixture(
    sde: LinearSDE,
    weights: ArrayLike,
    means: ArrayLike,
    covs: ArrayLike,
    *,
    dtype: DTypeLike | None = None,
) -> ClosedForm:
    """The fields of Gaussian-mixture data.

    Args:
      sde: the process.
      weights: positive, normalised here, ``(k,)``.
      means: ``(k, *event)``.
      covs: covariances: ``(k,)`` isotropic variances, ``(k, *event)`` variances by entry, or
        ``(k, d, d)`` full matrices over the flattened event.
      dtype: dtype of the computation; ``means``' dtype, float32 or wider, if ``None``.

    Raises:
      ValueError: shapes that do not fit, or a negative weight or variance (where known).
    """
    means = jnp.asarray(means)
    if dtype is None:
        dtype = jnp.promote_types(means.dtype, jnp.float32)
        dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32
    means = means.astype(dtype)
    weights, covs = jnp.asarray(weights, dtype), jnp.asarray(covs, dtype)
    if means.ndim < 2 or weights.shape != means.shape[:1]:
        raise ValueError(
            f"weights has shape {weights.shape} and means {means.shape}; expected (k,) and "
            "(k, *event)"
        )
    event_shape = means.shape[1:]
    size = math.prod(event_shape)
    variances, basis = _spectrum(covs, means.shape[0], size, event_shape)
    _check_nonnegative("weights", weights)
    _check_nonnegative("covs", variances)
    variances = jnp.maximum(variances, 0)
    log_weights = jnp.log(weights) - jnp.log(jnp.sum(weights))
    return ClosedForm(
        sde, log_weights, means.reshape(-1, size), variances, basis, event_shape=event_shape
    )


def gaussian(sde: LinearSDE, mean: ArrayLike, cov: ArrayLike) -> ClosedForm:
    """The fields of Gaussian data.

    Args:
      sde: the process.
      mean: the event's shape.
      cov: ``()`` isotropic variance, the event's shape for a diagonal, or ``(d, d)`` full.

    Raises:
      ValueError: shapes that do not fit, or a negative variance (where known).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen import process
      >>> field = gaussian(process.ve(), jnp.zeros(2), 1.0).score
      >>> field(jnp.ones((3, 2)), jnp.zeros(3)).shape
      (3, 2)
    """
    return mixture(sde, jnp.ones((1,)), jnp.asarray(mean)[None], jnp.asarray(cov)[None])


def empirical(sde: LinearSDE, data: ArrayLike) -> ClosedForm:
    """The fields of a finite data set, each example with equal weight.

    Args:
      sde: the process.
      data: ``(n, *event)``.

    The differences of a batch to all examples are formed in blocks of bounded memory.
    """
    data = jnp.asarray(data)
    n = data.shape[0]
    return mixture(sde, jnp.ones((n,)), data, jnp.zeros((n,)))
