r"""Training in a pool: an apply function of shared parameters, and the gradient scaler.

Gradient descent on the pool moves theta = A psi by -eta A A^T grad, whose size goes with lambda^2
and with how many weights share a slot: a step that is safe for the dense model, eta < 2/L,
diverges where lambda is large (a small pool_std). STABLE-RPS divides the pool's gradient by
Gamma_j, with sums over the weights i of slot j:

    v1 = (sum lambda)^2 / count      v2 = sum lambda           v3 = sum lambda / count
    v4 = sqrt(sum lambda^2)          v5 = sum lambda^2

Under v5 theta moves by eta A (A^T A)^-1 A^T grad, the dense step projected onto what the pool can
make: stable for every eta < 2/L and the same for every pool_std. Of the others only v1 is of
degree two in lambda, and with several scales in a slot it may exceed the bound.

Rules such as Adam undo any scaling that comes before them. After such a rule, which moves each
slot by about its learning rate, division by sqrt(mean lambda^2) makes each weight move by about
that rate: mode ``"mean"`` with power one half, which is ours and not the paper's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgen.core.checks import one_of
from jaxgen.share.gather import Shared, expand, fold
from jaxgen.share.layout import Layout

__all__ = ["ScaleByPoolState", "pool_scale", "scale_by_pool", "shared_apply"]

_MODES = ("v1", "v2", "v3", "v4", "v5", "mean")


def shared_apply(apply: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """An apply function of shared parameters, from one of the whole parameters.

    Args:
      apply: ``f(params, *args, **kwargs)``, of any library.
      layout: from ``plan`` on its parameters.

    Returns:
      ``f(shared, *args, **kwargs)``.

    Example:
      >>> from jaxgen.share import init, plan
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> layout = plan(params, 0.5)
      >>> f = shared_apply(lambda params, x: x @ params["w"], layout)
      >>> f(init(jax.random.key(1), layout), jnp.ones((2, 8))).shape
      (2, 4)
    """

    def applied(shared: Shared, *args: Any, **kwargs: Any) -> Any:
        return apply(expand(shared, layout), *args, **kwargs)

    return applied


def pool_scale(layout: Layout, mode: str = "v5") -> jax.Array:
    """Gamma: by what the gradient of each slot is divided; 1 for a slot without weights.

    Args:
      layout: from ``plan``.
      mode: ``"v1"`` to ``"v5"``, or ``"mean"``, the mean of lambda^2; see the module.

    Returns:
      ``(m,)`` float32, positive.

    Raises:
      ValueError: an unknown mode.

    Source: Desai and Shrivastava (2024) and its released code.
    """
    one_of("mode", mode, _MODES)
    specs = layout.leaves

    def total(of: Callable[[float], float]) -> jax.Array:
        return fold(specs, of)

    if mode in ("v2", "v4", "v5"):
        out = total((lambda lam: lam) if mode == "v2" else (lambda lam: lam * lam))
        out = jnp.sqrt(out) if mode == "v4" else out
    else:
        count = jnp.maximum(total(lambda _: 1.0), 1.0)
        out = total((lambda lam: lam * lam) if mode == "mean" else (lambda lam: lam)) / count
        out = out * out * count if mode == "v1" else out
    return jnp.where(out > 0, out, 1.0)


class ScaleByPoolState(NamedTuple):
    """The divisor of each slot, ``(m,)`` float32."""

    divisor: jax.Array


def scale_by_pool(
    layout: Layout, mode: str = "v5", power: float = 1.0
) -> optax.GradientTransformation:
    """An optax transform that divides the pool's updates by ``pool_scale(layout, mode) ** power``.

    Put it before gradient descent and momentum as it is. Put ``mode="mean", power=0.5`` after an
    Adam-like rule, where scaled gradients would change nothing. Decay of the pool is decay of the
    weights by the same factor: place ``optax.add_decayed_weights`` after this transform. An average
    of pools expands to the average of the weights.

    Args:
      layout: from ``plan``.
      mode: see ``pool_scale``.
      power: of the divisor.

    Returns:
      A transform of ``Shared``, or of any tree with one leaf named ``pool`` of the layout's length;
      all else is left as it is.

    Raises:
      ValueError: an unknown mode; at its use, a tree with no such pool or with several.

    Source: Desai and Shrivastava (2024), the gradient scaler.

    Example:
      >>> from jaxgen.share import plan
      >>> layout = plan({"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}, 0.5)
      >>> rule = optax.chain(scale_by_pool(layout), optax.sgd(0.1, momentum=0.9))
    """
    one_of("mode", mode, _MODES)

    def init(params: Any) -> ScaleByPoolState:
        _map_pool(lambda pool: pool, params, layout)
        return ScaleByPoolState(jax.jit(lambda: pool_scale(layout, mode) ** power)())

    def update(updates: Any, state: ScaleByPoolState, params: Any = None) -> tuple[Any, Any]:
        del params
        divisor = state.divisor
        return _map_pool(lambda pool: pool / divisor.astype(pool.dtype), updates, layout), state

    return optax.GradientTransformation(init, update)


def _map_pool(f: Callable[[jax.Array], jax.Array], tree: Any, layout: Layout) -> Any:
    """Map the pool of a tree: the one leaf under the name ``pool`` that has the layout's length."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    leaves = [leaf for _, leaf in pairs]
    pools = [i for i, name in enumerate(names) if "pool" in name.split("/")]
    found = [i for i in pools if jnp.shape(leaves[i]) == (layout.m,)]
    if len(found) != 1:
        seen = ", ".join(f"{names[i]} of shape {jnp.shape(leaves[i])}" for i in pools) or "none"
        raise ValueError(f"expected one pool of shape ({layout.m},) in the tree; found {seen}")
    leaves[found[0]] = f(leaves[found[0]])
    return jax.tree.unflatten(structure, leaves)
