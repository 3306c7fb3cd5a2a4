r"""Langevin correctors: steps of Langevin dynamics at one noise level.

Song et al., arXiv 2011.13456, algorithms 4 and 5. At level t, with score g and noise z,

    x_mean = x + e g,    x = x_mean + sqrt(2 e) z
    e = 2 a (snr ||z|| / ||g||)^2      "langevin", norms over the event                      (1)
    e = 2 a (snr sigma(t))^2           "ald", annealed Langevin dynamics                     (2)

with a = 1 - beta_i for vp and sub_vp and 1 for other processes. As published, both norms in (1) are
averaged over the batch, so that a sample depends on its batch; with norms per sample, or with the
noise's norm replaced by its expected value sqrt(d), it does not. A corrector of fixed snr leaves a
bias: for a Gaussian of d dimensions the variance tends to 1/(1 - snr^2) of the right one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.core import checks
from jaxgen.core.arrays import cast_coefficient, event_size, safe_sqrt, sum_event
from jaxgen.solve.chain import Chain, Step, at

__all__ = ["LangevinCorrector", "langevin_corrector"]


@dataclasses.dataclass(frozen=True)
class LangevinCorrector:
    """See ``langevin_corrector``; called with a chain it gives the step."""

    snr: float
    steps: int
    variant: str
    norms: str
    axis_name: Any

    def __call__(self, chain: Chain) -> Step:
        """The step ``(key, x, i) -> (x, x_mean)`` on a chain."""
        numbers = (chain.first, chain.shrink, chain.term.conversion(chain.first, "score"))
        event_ndim = None if chain.batch else -1

        def draw(key: jax.Array, x: jax.Array) -> jax.Array:
            split = jax.vmap(lambda k: jax.random.split(k, self.steps))(key.reshape(-1))
            return chain.normal(split.reshape(*key.shape, self.steps), x)

        def apply(noise: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
            level, shrink, (a, b) = at(numbers, i)
            mean = x
            for z in noise:
                out = chain.term.output(x, level.t)
                score = (
                    cast_coefficient(a, x) * chain.term.centred(x) + cast_coefficient(b, x) * out
                )
                ndim = x.ndim if event_ndim == -1 else None
                e = 2 * shrink * self._square(level.sigma, z, score, ndim)
                mean = x + cast_coefficient(e, x) * score
                x = mean + cast_coefficient(jnp.sqrt(2 * e), x) * z
            return x, mean

        calls = jnp.asarray(chain.steps * self.steps, jnp.int32)
        return Step(draw, apply, calls, self.variant)

    def _square(
        self, sigma: jax.Array, z: jax.Array, score: jax.Array, event_ndim: int | None
    ) -> jax.Array:
        """``(snr ||z|| / ||g||)^2`` or ``(snr sigma)^2``, ``()`` or ``(batch,)``."""
        if self.variant == "ald":
            return (self.snr * sigma) ** 2
        top, bottom = _norm(z, event_ndim), _norm(score, event_ndim)
        if self.norms == "batch":
            top, bottom = jnp.mean(top), jnp.mean(bottom)
            if self.axis_name is not None:
                top, bottom = jax.lax.pmean((top, bottom), self.axis_name)
        elif self.norms == "expected":
            top = jnp.full_like(top, event_size(z, event_ndim) ** 0.5)
        checks.debug_check(jnp.all(bottom > 0), "the score's norm is 0: {norm}", norm=bottom)
        return (self.snr * top / jnp.maximum(bottom, jnp.finfo(bottom.dtype).tiny ** 0.25)) ** 2


def _norm(x: jax.Array, event_ndim: int | None) -> jax.Array:
    return safe_sqrt(jnp.real(sum_event(jnp.real(x * jnp.conj(x)), event_ndim)))


def langevin_corrector(
    snr: float = 0.16,
    steps: int = 1,
    *,
    variant: str = "langevin",
    norms: str = "batch",
    axis_name: Any = None,
) -> LangevinCorrector:
    """A Langevin corrector for ``sample`` and ``predictor_corrector``.

    Args:
      snr: signal-to-noise ratio r of a step (published: 0.16 for CIFAR-10, 0.075 at 256 pixels).
      steps: Langevin steps at each level, M.
      variant: ``"langevin"``, equation (1), or ``"ald"``, equation (2).
      norms: of equation (1): ``"batch"`` as published, ``"per_sample"`` or ``"expected"``.
      axis_name: mesh or pmap axis over which ``"batch"`` averages too.

    Returns:
      A frozen, hashable object, called by the loop with its chain.

    Raises:
      ValueError: ``snr <= 0``, ``steps < 1``, an unknown name, or ``axis_name`` with other norms
        than the batch's. A score of norm zero is an error under ``checkify``; without, its norm is
        held at the fourth root of the smallest number.
    """
    if not snr > 0:
        raise ValueError(f"snr is {snr}; expected a positive number")
    steps = checks.positive_int("steps", steps)
    checks.one_of("variant", variant, ("langevin", "ald"))
    checks.one_of("norms", norms, ("batch", "per_sample", "expected"))
    if axis_name is not None and (norms != "batch" or variant != "langevin"):
        raise ValueError('axis_name averages norms over the batch; expected norms="batch"')
    return LangevinCorrector(float(snr), steps, variant, norms, axis_name)
