"""A multilayer perceptron with one output: a log-density up to a function of time.

Its gradient is a conservative score, as the Fokker-Planck penalty needs
(``score.fokker_planck``; Deveney et al., arXiv 2311.15996, whose network this is: three hidden
layers of 80 on ``(x, t)``, activation ``softplus(100 x)/100``). That activation is smooth but
nearly ReLU, so that the curvature sits in bands of width 1/100: scale ``x`` and ``t`` to about one.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from jaxgen.nets.layers import check_call

__all__ = ["PotentialMLP", "softplus"]


def softplus(sharpness: float = 100.0) -> Callable[[jax.Array], jax.Array]:
    """The activation ``log(1 + exp(b x))/b``, ReLU rounded off over a width of about ``1/b``.

    Args:
        sharpness: ``b``, positive.

    Returns:
        A function; the same one for the same number, so that networks made of it are equal.

    Raises:
        ValueError: the number is not positive.
    """
    if not sharpness > 0:
        raise ValueError(f"sharpness is {sharpness}; expected a positive number")

    return _softplus(float(sharpness))


# Apart from its caller, whose default, name and kind of number would be keys of their own.
@functools.cache
def _softplus(sharpness: float) -> Callable[[jax.Array], jax.Array]:
    def activation(x: jax.Array) -> jax.Array:
        return jax.nn.softplus(sharpness * x) / sharpness

    return activation


class PotentialMLP(nn.Module):
    """Map ``x`` of shape ``(batch, d)`` and ``t`` to one number per example.

    Attributes:
        width: hidden units.
        depth: hidden layers.
        activation: twice differentiable with a second derivative that is not zero: a ReLU would
            make the Laplacian zero (``score.fokker_planck.check_curvature``).
        dtype: dtype of the computation, None for that of ``x``; parameters are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = PotentialMLP(width=16)
        >>> x, t = jnp.ones((4, 2)), jnp.full((4,), 0.5)
        >>> variables = jax.jit(net.init)(jax.random.key(0), x, t)
        >>> net.apply(variables, x, t).shape
        (4,)
    """

    width: int = 80
    depth: int = 3
    activation: Callable[[jax.Array], jax.Array] = softplus()
    dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        label: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Evaluate the network.

        Args:
            x: real floating, ``(batch, d)``.
            t: real floating, ``(batch,)``, whatever number the caller conditions on.
            label: None; there are no classes.
            train: ignored, there is no dropout.

        Returns:
            ``(batch,)`` in the dtype of ``x``.

        Raises:
            ValueError: wrong rank or shape, or a label.
            TypeError: a dtype of another kind.
        """
        del train
        check_call(x, t, label, None, ndim=2)
        dtype = self.dtype or x.dtype
        h = jnp.concatenate([x.astype(dtype), t[:, None].astype(dtype)], axis=1)
        for _ in range(self.depth):
            h = self.activation(nn.Dense(self.width, dtype=dtype)(h))
        return nn.Dense(1, dtype=dtype)(h)[:, 0].astype(x.dtype)
