r"""Minibatch optimal-transport coupling: pair the two halves of a batch along short ways.

Of a batch of x0 and one of x1, take the pairing that is optimal for the squared distance, and learn
an interpolant or a flow between the pairs (Tong et al., arXiv 2302.00482, section 3.2; Pooladian et
al., arXiv 2304.14772). The formulas of an interpolant hold for any pairing; its velocity changes,
and the flow's paths get straighter.

- ``exact``: the assignment of least cost, a permutation (optax's Hungarian algorithm, cubic in the
  batch).
- ``sinkhorn``: a partner for each x0 drawn from its row of the entropic plan (ott-jax, an optional
  dependency). Rows are exact; a datum of x1 may be drawn twice, or not at all.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import at_least_f32, unsharded

__all__ = ["METHODS", "Coupling", "minibatch_coupling"]

METHODS = ("exact", "sinkhorn")


class Coupling(NamedTuple):
    """What ``minibatch_coupling`` returns.

    Attributes:
      x0: as given.
      x1: ``x1[partner]``; NaN where the costs are not finite.
      partner: int32 ``(batch,)``, for labels that go with ``x1``; the batch's size, out of range,
        where the costs are not finite.
    """

    x0: jax.Array
    x1: jax.Array
    partner: jax.Array


def _sinkhorn(key: jax.Array, cost: jax.Array, epsilon: ArrayLike | None) -> jax.Array:
    try:
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn
    except ImportError as error:
        raise ImportError(
            "method 'sinkhorn' needs ott-jax, which is not installed: pip install 'jaxgen[ot]', "
            "or take method='exact'"
        ) from error
    # ott-jax broadcasts over ranks, which a caller may have forbidden.
    with jax.numpy_rank_promotion("allow"):
        geom = geometry.Geometry(cost_matrix=cost, epsilon=epsilon)
        out = sinkhorn.Sinkhorn()(linear_problem.LinearProblem(geom))
        log_plan = (out.f[:, None] + out.g[None] - cost) / geom.epsilon

    def draw(k: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(k, row)

    index = jax.vmap(draw)(keys.fold(key, cost.shape[0]), log_plan)
    return jnp.where(out.converged, index, cost.shape[0])


def minibatch_coupling(
    key: jax.Array | None,
    x0: ArrayLike,
    x1: ArrayLike,
    *,
    method: str = "exact",
    epsilon: ArrayLike | None = None,
) -> Coupling:
    """Pair each ``x0`` of a batch with an ``x1`` of it, along a plan of optimal transport.

    Works under ``jit`` and ``vmap``. A pairing is of the batch as a whole: unlike draws per
    example, it changes with the batch and its size. Gradients stop at it.

    Args:
      key: typed key, which ``"sinkhorn"`` draws from; ``None`` serves ``"exact"``.
      x0: ``(batch, *event)``, real floating.
      x1: of ``x0``'s shape.
      method: ``"exact"`` or ``"sinkhorn"`` (module docstring).
      epsilon: the entropic regularisation of ``"sinkhorn"`` in units of the squared distance;
        ``None`` is ott-jax's default for these costs.

    Returns:
      A ``Coupling``. Costs that are not finite, or a Sinkhorn loop that did not converge, give
      NaN and no plausible pairing.

    Raises:
      ValueError: an unknown method, different shapes, no batch, or ``epsilon`` with ``"exact"``.
      TypeError: integer data, or no key for ``"sinkhorn"``.
      ImportError: ``"sinkhorn"`` without ott-jax.

    Example:
      >>> import jax.numpy as jnp
      >>> x0, x1 = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[2.1], [0.1], [1.1]])
      >>> minibatch_coupling(None, x0, x1).partner.tolist()
      [1, 2, 0]
    """
    checks.one_of("method", method, METHODS)
    # All of one are held against all of the other, wherever they lie.
    x0, x1 = (unsharded(checks.floating(name, x)) for name, x in (("x0", x0), ("x1", x1)))
    if x0.shape != x1.shape or x0.ndim < 1:
        raise ValueError(
            f"x0 has shape {x0.shape} and x1 {x1.shape}; expected (batch, *event) for both"
        )
    if method == "exact" and epsilon is not None:
        raise ValueError("epsilon is given for method 'exact', which has none")
    n, size = x0.shape[0], math.prod(x0.shape[1:])
    wide = at_least_f32(jnp.promote_types(x0.dtype, x1.dtype))
    a, b = (jax.lax.stop_gradient(x).astype(wide).reshape(n, size) for x in (x0, x1))
    # Centred first, so that a common shift costs no digits.
    centre = jnp.mean(a, axis=0, keepdims=True)
    a, b = a - centre, b - centre
    cost = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None]
    cost = cost - 2 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    is_finite = jnp.all(jnp.isfinite(cost))
    checks.debug_check(is_finite, "x0 or x1 is not finite")
    # The search would not end on NaN.
    cost = jnp.where(is_finite, cost, 0.0)
    if method == "exact":
        # Of a row for each column: so of an x1 for each x0.
        index = optax.assignment.hungarian_algorithm(cost.T)[0]
    else:
        index = _sinkhorn(keys.check(key), cost, epsilon)
    partner = jnp.where(is_finite, index, n).astype(jnp.int32)
    return Coupling(x0, x1.at[partner].get(mode="fill", fill_value=jnp.nan), partner)
