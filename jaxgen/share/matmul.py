"""The product of activations with one shared leaf, whose weight is never kept.

``hashed_matmul`` chooses among implementations of the same three products: the output, the
gradient in x and the gradient in the pool. Each can be asked for by name:

- ``"xla"``: ``"xla_loop"``, blocks of the weight one after the other, or ``"xla_expand"``, the
  whole weight for the moment of the product, by a rule measured for CPUs;
- ``"mosaic_tpu"``, ``"mosaic_gpu"``: Pallas kernels, for tiled layouts;
- ``"interpret"``: the TPU kernel, interpreted on any machine, for tests.
"""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.typing import ArrayLike

from jaxgen.core import arrays
from jaxgen.core.checks import floating, one_of
from jaxgen.share.gather import check_pool
from jaxgen.share.kernels import xla
from jaxgen.share.layout import Spec

__all__ = ["hashed_matmul"]


class _Chosen(NamedTuple):
    """The implementation on each kind of device."""

    tpu: str
    gpu: str
    other: str


_NAMES = ("xla", "xla_loop", "xla_expand", "mosaic_tpu", "mosaic_gpu", "interpret")


def hashed_matmul(
    x: ArrayLike,
    pool: ArrayLike,
    spec: Spec,
    *,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """``x @ weight`` for a weight that lives in a pool.

    Sums run in float32 or wider; the pool's gradient is summed in a fixed order. Differentiable
    once in reverse mode. Forward mode in ``x``, as exact likelihoods take, and higher orders need
    ``"xla_expand"``, which is also what ``None`` takes for leaves of up to a million weights
    without tiles. On an Explicit mesh ``x`` is replicated first: split a batch by ``shard_map``.

    Args:
      x: ``(*batch, K)``, floating.
      pool: ``(m,)``, floating.
      spec: a leaf of shape ``(K, N)``, from ``leaf``.
      implementation: a name of the module, or several, tried in order; ``None`` takes
        ``"mosaic_tpu"`` on a TPU where it serves the leaf, ``"xla_expand"`` on a GPU, else
        ``"xla"``. ``"mosaic_gpu"`` must be asked for: it holds no weight, and on an H200 it is
        ahead of ``"xla_expand"`` up to a few hundred rows of ``x`` at high compression, behind it
        with thousands (``benchmarks/README.md``).

    Returns:
      ``(*batch, N)`` in ``x``'s dtype.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
      TypeError: a dtype that is not floating.
      NotImplementedError: no named implementation serves this leaf or dtype; the reasons.

    Source: Desai et al., ROAST (2023) and STABLE-RPS (2024), whose kernels build tiles on chip.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgen.share import init, leaf, plan
      >>> layout = plan({"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}, 0.25)
      >>> pool = init(jax.random.key(0), layout).pool
      >>> hashed_matmul(jnp.ones((3, 64)), pool, leaf(layout, "w")).shape
      (3, 32)
    """
    x = floating("x", x)
    pool = check_pool(pool, spec.m)
    if len(spec.shape) != 2:
        raise ValueError(f"{spec.path} has shape {spec.shape}; expected (K, N)")
    if x.ndim < 1 or x.shape[-1] != spec.shape[0]:
        raise ValueError(f"x has shape {x.shape}; expected (..., {spec.shape[0]}) for {spec.path}")
    x = arrays.unsharded(x)
    flat, pool = _vary_alike(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), pool)
    chosen = _choose(flat, pool, spec, implementation)
    if set(chosen) == {"xla_expand"}:
        # Plain operations, which forward mode takes too; the weight is not kept for the gradient.
        y = jax.checkpoint(functools.partial(xla.forward_expand, spec=spec))(flat, pool)
    else:
        y = _matmul(flat, pool, spec, chosen)
    return y.reshape(*x.shape[:-1], spec.shape[1])


def _vary_alike(*operands: jax.Array) -> list[jax.Array]:
    """The operands, each varying over the mesh axes of any, so that their gradients may.

    Under ``shard_map`` the gradient of a pool that is the same on all devices varies with x; the
    derivative of this cast sums it over them.
    """
    kinds = [jax.typeof(x) for x in operands]
    # The name of jax 0.10.2, and the one before it.
    own = [k.manual_axis_type.varying if hasattr(k, "manual_axis_type") else k.vma for k in kinds]
    lacking = [tuple(frozenset().union(*own) - mine) for mine in own]
    return [
        lax.pcast(x, names, to="varying") if names else x
        for x, names in zip(operands, lacking, strict=True)
    ]


def _kernel(name: str) -> Any:
    # Imported where it is asked for: Pallas is slow to import.
    return importlib.import_module(f"jaxgen.share.kernels.{name}")


def _reason(name: str, x: jax.Array, pool: jax.Array, spec: Spec) -> str | None:
    """Why an implementation cannot serve, or ``None``."""
    if name == "xla_expand":
        return None
    if name == "xla_loop":
        return xla.supports_loop(spec)
    module = _kernel("mosaic_tpu" if name == "interpret" else name)
    return module.supports(x.shape, x.dtype, spec, pool.dtype)


def _choose(
    x: jax.Array, pool: jax.Array, spec: Spec, implementation: str | Sequence[str] | None
) -> _Chosen:
    if implementation is None:
        plain = _xla_rule(spec)
        # No kernel is imported for a leaf that has no tiles to rotate.
        fused = spec.unit > 1 and _reason("mosaic_tpu", x, pool, spec) is None
        return _Chosen("mosaic_tpu" if fused else plain, "xla_expand", plain)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names:
        raise ValueError("implementation names none; expected one of " + ", ".join(_NAMES))
    reasons = []
    for name in names:
        one_of("implementation", name, _NAMES)
        name = _xla_rule(spec) if name == "xla" else name
        reason = _reason(name, x, pool, spec)
        if reason is None:
            return _Chosen(name, name, name)
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{spec.path} of shape {spec.shape}: " + "; ".join(reasons))


def _xla_rule(spec: Spec) -> str:
    """The loop wherever it has more than one block to run over: see ``benchmarks``."""
    is_one_block = xla.blocks(spec) == 1
    return "xla_expand" if xla.supports_loop(spec) or is_one_block else "xla_loop"


def _forward_by(name: str, x: jax.Array, pool: jax.Array, spec: Spec) -> jax.Array:
    if name == "xla_loop":
        return xla.forward_loop(x, pool, spec)
    if name == "xla_expand":
        return xla.forward_expand(x, pool, spec)
    if name == "interpret":
        return _kernel("mosaic_tpu").forward(x, pool, spec, interpret=True)
    return _kernel(name).forward(x, pool, spec)


def _backward_by(
    name: str, x: jax.Array, pool: jax.Array, dy: jax.Array, spec: Spec
) -> tuple[jax.Array, jax.Array]:
    if name == "xla_loop":
        return xla.backward_loop(x, pool, dy, spec)
    if name == "xla_expand":
        return xla.backward_expand(x, pool, dy, spec)
    options = {"interpret": True} if name == "interpret" else {}
    module = _kernel("mosaic_tpu" if name == "interpret" else name)
    dpool = module.grad_pool(x, dy, spec, **options)
    return module.grad_x(dy, pool, spec, **options), dpool.astype(pool.dtype)


def _by_platform(function: Any, names: _Chosen, *operands: Any) -> Any:
    tpu, gpu, other = (functools.partial(function, name) for name in names)
    if len(set(names)) == 1:
        return other(*operands)
    # A branch that is the default is left out: each is traced.
    branches = {"tpu": tpu} if names.tpu != names.other else {}
    branches |= {"cuda": gpu, "rocm": gpu} if names.gpu != names.other else {}
    return lax.platform_dependent(*operands, default=other, **branches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array, pool: jax.Array, spec: Spec, names: _Chosen) -> jax.Array:
    return _by_platform(lambda name, x, pool: _forward_by(name, x, pool, spec), names, x, pool)


def _matmul_fwd(x: jax.Array, pool: jax.Array, spec: Spec, names: _Chosen) -> Any:
    return _matmul(x, pool, spec, names), (x, pool)


def _matmul_bwd(
    spec: Spec, names: _Chosen, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _by_platform(
        lambda name, x, pool, dy: _backward_by(name, x, pool, dy, spec), names, *saved, dy
    )


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
