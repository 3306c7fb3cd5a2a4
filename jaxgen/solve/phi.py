r"""The phi functions of exponential integrators, in forms that hold everywhere on the real line.

    phi_0(z) = e^z,     phi_{k+1}(z) = (phi_k(z) - 1/k!) / z,     phi_k(0) = 1/k!            (1)

(Hochbruck and Ostermann, Acta Numerica 2010, section 2.1). Upwards, (1) loses about z^-k of the
digits; near zero the highest function is summed as a series and (1) is used downwards, which is
stable.
"""

import math

import jax
import jax.numpy as jnp

__all__ = ["phi"]

# Below this |z| the series of 18 terms is exact to double precision.
_NEAR = 1.5
_TERMS = 18


def phi(z: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """``(phi_1(z), ..., phi_n(z))`` by equation (1).

    Args:
      z: real, any shape, float32 or wider.
      n: at least 1.

    Returns:
      ``n`` arrays like ``z``, accurate to a few units of rounding for ``n`` up to 5.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(p), 4) for p in phi(jnp.zeros(()), 3)]
      [1.0, 0.5, 0.1667]
    """
    is_near = jnp.abs(z) < _NEAR
    small, large = jnp.where(is_near, z, 0.0), jnp.where(is_near, _NEAR, z)
    last = jnp.full_like(z, 1 / math.factorial(n + _TERMS))
    for k in reversed(range(n, n + _TERMS)):
        last = last * small + 1 / math.factorial(k)
    near = [last]
    for k in reversed(range(1, n)):
        near.append(near[-1] * small + 1 / math.factorial(k))
    far = [jnp.expm1(large) / large]
    for k in range(1, n):
        far.append((far[-1] - 1 / math.factorial(k)) / large)
    return tuple(jnp.where(is_near, a, b) for a, b in zip(reversed(near), far, strict=True))
