r"""First-order Sobol' indices by pick-freeze, as several expectations from one sample.

With X1 and X2 independent draws of the inputs' law, the share of the variance of phi(X) that input
i explains alone is

    S_i = (I_i - I_m^2) / (I_q - I_m^2),
    I_i = E[phi(X1) phi(X1_i, X2_-i)],  I_m = E[phi(X1)],  I_q = E[phi(X1)^2]

so that all d indices are functions of d + 2 expectations under one law on R^{2d}, for
``multiple_expectations``. The inputs must be independent; map them to standard normal ones first.

Source: Demange-Chryst, Bachoc and Morio, arXiv 2212.00568, section on Sobol' indices; pick-freeze:
Janon, Klein, Lagnoux, Nodet and Prieur, ESAIM: P&S 2014.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core.checks import floating, positive_int

__all__ = ["pick_freeze", "sobol_from_expectations"]


def pick_freeze(phi: Callable[[Any], Any], d: int) -> Callable[[Any], Any]:
    """The function whose expectations give the Sobol' indices of ``phi``.

    Args:
      phi: the model, ``phi(x) -> (n,)`` or ``(n, 1)`` for inputs ``(n, d)``. It is called once for
        a batch, with ``(d + 1) n`` points.
      d: number of inputs.

    Returns:
      ``phi_all(x) -> (n, d + 2)`` for ``x`` ``(n, 2d)``, whose columns are the products with input
      ``i`` frozen, ``phi`` and its square. NumPy in, NumPy out, so that it serves ``host=True``.
      Each of its evaluations is d + 1 evaluations of ``phi``.

    Raises:
      ValueError: ``d`` below 1; when called, ``x`` or ``phi(x)`` of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> pick_freeze(lambda x: x[:, 0] + 2 * x[:, 1], 2)(jnp.array([[1.0, 2.0, 3.0, 4.0]]))
      Array([[45., 35.,  5., 25.]], dtype=float32)
    """
    d = positive_int("d", d)

    def phi_all(x: Any) -> Any:
        xp: Any = np if isinstance(x, np.ndarray) else jnp
        if x.ndim != 2 or x.shape[1] != 2 * d:
            raise ValueError(
                f"x has shape {x.shape}; expected (n, {2 * d}), two draws side by side"
            )
        n = x.shape[0]
        first, second = x[:, :d], x[:, d:]
        is_frozen = xp.eye(d, dtype=bool)
        mixed = xp.where(is_frozen[:, None], first[None], second[None])
        y = phi(xp.concatenate([first[None], mixed]).reshape(-1, d))
        if y.shape not in (((d + 1) * n,), ((d + 1) * n, 1)):
            raise ValueError(
                f"phi returned shape {y.shape} for {(d + 1) * n} points; expected one number each"
            )
        y = y.reshape(d + 1, n)
        return xp.concatenate([y[1:] * y[:1], y[:1], y[:1] ** 2]).T

    return phi_all


def sobol_from_expectations(mean: ArrayLike) -> jax.Array:
    """First-order Sobol' indices ``(d,)`` from the expectations of ``pick_freeze`` ``(d + 2,)``.

    ``delta_method(sobol_from_expectations, out.mean, out.cov)`` adds their standard errors.

    Raises:
      TypeError: an integer dtype.
      ValueError: fewer than three expectations.

    Example:
      >>> import jax.numpy as jnp
      >>> sobol_from_expectations(jnp.array([1.25, 1.75, 1.0, 2.0]))
      Array([0.25, 0.75], dtype=float32)
    """
    mean = floating("mean", mean)
    if mean.ndim != 1 or mean.shape[0] < 3:
        raise ValueError(f"mean has shape {mean.shape}; expected (d + 2,) with d at least 1")
    square = mean[-2] ** 2
    return (mean[:-2] - square) / (mean[-1] - square)
