r"""The chain of levels that the predictor-corrector loop walks, and the steps that it calls.

A step is ``(key, x, i) -> (x, x_mean)``: the new state, and its mean without the step's own noise.
The index ``i`` counts down from ``steps - 1`` (noise) to 0 and is carried by the loop, never found
from a time: at 1000 steps rounding a float time skips indices.

On the published grid (``"score_sde"``, Song et al., arXiv 2011.13456, as in their code) index i is
at t_i = linspace(t_end, t_max, N)[i], the chain's kernels are those of ``LinearSDE.discretize``,
and other steps have length t_max / N although the spacing is (t_max - t_end)/(N - 1). On any other
grid of N + 1 knots the step from t_i ends at the next knot, and for vp and ve the kernels are the
process' own between the two: decay a = alpha(t_i)/alpha(next), variance G^2 = sigma(t_i)^2 - a^2
sigma(next)^2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core.arrays import safe_sqrt
from jaxgen.process.discretize import span
from jaxgen.process.linear import LinearSDE
from jaxgen.solve.noise import sample_keys
from jaxgen.solve.path import normals
from jaxgen.solve.semilinear import Level, SemiLinearTerm, knots

__all__ = ["Chain", "Kernel", "Step", "at", "published", "walk"]

Kernel = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Chain:
    """Levels and kernels of a chain; arrays have the index ``i`` in front, rising to noise.

    Attributes:
      term: calls the field, combines, knows the process.
      first: the level of each index.
      last: the level that its step leads to; ``None`` on the published grid.
      h: length of its step in time.
      decay: ``a_i`` of the forward kernel.
      noise_std: ``G_i`` of the forward kernel.
      sigma: the kernel's marginal deviation at ``i``.
      sigma_next: the same one step closer to data; 0 at the published chain's end.
      shrink: ``1 - beta_i`` for vp and sub_vp, else 1: the corrector's factor.
      batch: the batch's shape.
      first_index: number of the first sample.
    """

    term: SemiLinearTerm
    first: Level
    last: Level | None
    h: jax.Array
    decay: jax.Array
    noise_std: jax.Array
    sigma: jax.Array
    sigma_next: jax.Array
    shrink: jax.Array
    batch: tuple[int, ...]
    first_index: ArrayLike

    @property
    def steps(self) -> int:
        """Number of indices."""
        return self.first.t.shape[0]

    @property
    def sde(self) -> LinearSDE:
        """The process."""
        return self.term.sde

    def normal(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """Standard normal noise like ``x``, per sample; ``(*key, *x)`` for an array of keys."""
        keys = key
        if self.batch:
            flat = jax.vmap(lambda k: sample_keys(k, self.batch, self.first_index))(key.reshape(-1))
            keys = flat.reshape(key.shape + self.batch)
        return normals(keys, x.shape[len(self.batch) :], x.dtype)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step whose noise can be drawn ahead of the loop.

    Attributes:
      draw: ``(key, x) -> noise``, any pytree; ``x`` serves for its shape and dtype. An array of
        keys gives the noise of each, in front.
      apply: ``(noise, x, i) -> (x, x_mean)``.
      calls: field evaluations over the whole chain, int32.
      name: for the record.
    """

    draw: Callable[[jax.Array, jax.Array], Any]
    apply: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    calls: jax.Array
    name: str

    def __call__(self, key: jax.Array, x: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The protocol ``(key, x, i) -> (x, x_mean)``."""
        return self.apply(self.draw(key, x), x, i)


def at(numbers: Any, i: jax.Array) -> Any:
    """The numbers of index ``i``; out of range gives NaN."""
    return jax.tree.map(
        lambda v: v.at[i].get(
            mode="fill", fill_value=jnp.nan if jnp.issubdtype(v.dtype, jnp.inexact) else None
        ),
        numbers,
    )


def published(term: SemiLinearTerm, steps: int, batch: tuple[int, ...], index: ArrayLike) -> Chain:
    """The published chain of ``steps`` indices.

    Raises:
      ValueError: fewer than 2 steps, or for vp no more than ``beta_max``.
    """
    sde = term.sde
    kernel = sde.discretize(steps)
    first = term.level_at(kernel.t)
    sigma_next = jnp.concatenate([jnp.zeros_like(kernel.sigma[:1]), kernel.sigma[:-1]])
    shrink = jnp.ones_like(kernel.decay)
    if sde.kind in ("vp", "sub_vp"):
        low, high = sde.params
        shrink = 1 - jnp.linspace(low / steps, high / steps, steps, dtype=shrink.dtype)
    h = jnp.broadcast_to((span(sde) / steps).astype(kernel.t.dtype), kernel.t.shape)
    return Chain(
        term,
        first,
        None,
        h,
        kernel.decay,
        kernel.noise_std,
        kernel.sigma,
        sigma_next,
        shrink,
        batch,
        index,
    )


def walk(term: SemiLinearTerm, batch: tuple[int, ...], index: ArrayLike) -> Chain:
    """The chain along a term's own grid."""
    sde = term.sde
    first, last = (Level(*(v[::-1] for v in level)) for level in knots(term))
    h = first.t - last.t
    decay = first.alpha / last.alpha
    shrink = decay**2 if sde.kind in ("vp", "sub_vp", "discrete_betas") else jnp.ones_like(decay)
    if sde.kind in ("vp", "ve", "discrete_betas"):
        left = decay * last.sigma
        noise_std = safe_sqrt((first.sigma - left) * (first.sigma + left))
    else:
        decay = 1 + sde.log_alpha_dot(first.t) * h
        noise_std = safe_sqrt(sde.diffusion_squared(first.t) * h)
    return Chain(
        term, first, last, h, decay, noise_std, first.sigma, last.sigma, shrink, batch, index
    )


def check_step(value: Any, argument: str) -> None:
    """Raise unless ``value`` can build a step."""
    if not callable(value):
        raise TypeError(
            f"{argument} is {value!r}; expected a name, a solver, or a function of a chain"
        )
