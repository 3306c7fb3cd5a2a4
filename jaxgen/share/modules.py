"""Whole modules of other libraries in one pool: Flax linen, Flax NNX, Equinox and any callable.

Each wrapper is a module of its library again: it initialises, trains, saves and composes there,
and what its optimiser sees is ``Shared(pool, rest)``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.share.gather import Shared, expand, init
from jaxgen.share.layout import Layout, named_leaves, plan

__all__ = ["SharedCallable", "SharedModule", "SharedNNX", "share_callable"]


class SharedModule(nn.Module):
    """A Flax linen module with its parameters in a pool.

    Its one parameter, ``shared``, is a ``Shared``; other collections (batch statistics) keep their
    place under the module's own names. Scales come from ``plan`` on shapes (Flax's defaults),
    unless ``options`` has a ``scale``. What the module sows is not passed on.

    Attributes:
        module: the module that is wrapped.
        budget: see ``plan``.
        options: keyword arguments of ``plan``.

    Example:
        >>> import jax.numpy as jnp
        >>> net = SharedModule(nn.Dense(32), 0.25)
        >>> variables = net.init(jax.random.key(0), jnp.ones((4, 64)))
        >>> variables["params"]["shared"].pool.shape
        (512,)
    """

    module: nn.Module
    budget: int | float = 0.1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def plan(self, *args: Any, **kwargs: Any) -> Layout:
        """The layout, from the arguments of a call: what ``scale_by_pool`` takes."""
        inner = self.module.clone(parent=None, name=None)
        shapes = jax.eval_shape(lambda: inner.init(jax.random.key(0), *args, **kwargs))
        return plan(shapes.get("params", {}), self.budget, **self.options)

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module."""
        inner = self.module.clone(parent=None, name=None)
        layout = self.plan(*args, **kwargs)

        def fresh(key: jax.Array) -> Any:
            return inner.init(key, *args, **kwargs)

        def make(key: jax.Array) -> Shared:
            key_pool, key_rest = jax.random.split(key)
            # Only what passes through leaves the jit: the rest is never drawn.
            kept = {k.path for k in layout.kept}

            @jax.jit
            def rest(key: jax.Array) -> dict[str, jax.Array]:
                leaves = named_leaves(fresh(key)["params"])
                return {name: leaf for name, leaf in leaves.items() if name in kept}

            return init(key_pool, layout, rest(key_rest))

        shared = self.param("shared", make)
        shapes = jax.eval_shape(lambda: fresh(jax.random.key(0)))
        others = {}
        for name in sorted(set(shapes) - {"params"}):
            # In a jit, as above: no parameter is drawn.
            start = jax.jit(lambda key, name=name: fresh(key)[name])
            others[name] = self.variable(
                name, "inner", lambda start=start: start(jax.random.key(0))
            )
        variables = {"params": expand(shared, layout), **{k: v.value for k, v in others.items()}}
        mutable = [name for name in others if self.is_mutable_collection(name)]
        streams = self.scope.rngs if self.scope is not None else {}
        rngs = {name: self.make_rng(name) for name in streams}
        if not mutable:
            return inner.apply(variables, *args, rngs=rngs, **kwargs)
        out, new = inner.apply(variables, *args, rngs=rngs, mutable=mutable, **kwargs)
        if not self.is_initializing():
            for name in mutable:
                others[name].value = new[name]
        return out


class SharedNNX(nnx.Module):
    """A Flax NNX module with its ``nnx.Param``s in a pool; other state stays as it is.

    Attributes:
        pool: an ``nnx.Param``, ``(m,)``.
        rest: the ``nnx.Param``s that pass through, by name.
        module: the wrapped module with its other state, a scalar zero for each parameter.
        layout: static.

    Args:
        module: the module that is wrapped, with its parameters.
        budget: see ``plan``.
        rngs: draws the pool, from its ``params`` stream.
        options: keyword arguments of ``plan``.

    Example:
        >>> import jax.numpy as jnp
        >>> net = SharedNNX(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), 0.25, rngs=nnx.Rngs(1))
        >>> net(jnp.ones((4, 64))).shape
        (4, 32)
    """

    def __init__(self, module: nnx.Module, budget: int | float, *, rngs: nnx.Rngs, **options: Any):
        graph, state, others = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
        params = nnx.to_pure_dict(state)
        self.layout = nnx.static(plan(params, budget, **options))
        shared = init(rngs.params(), self.layout, params)
        self.pool = nnx.Param(shared.pool)
        self.rest = nnx.data({name: nnx.Param(value) for name, value in shared.rest.items()})
        # A submodule, so that train(), eval() and set_attributes reach it, without its weights.
        hollow = jax.tree.map(lambda x: jnp.zeros((), x.dtype), state)
        self.module = nnx.merge(graph, hollow, others, copy=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module; what it changes of its other state is kept."""
        rest = {name: value.get_value() for name, value in self.rest.items()}
        params = expand(Shared(self.pool.get_value(), rest), self.layout)
        graph, _, others = nnx.split(self.module, nnx.Param, ...)  # type: ignore[misc]
        module = nnx.merge(graph, nnx.State(params), others)
        out = module(*args, **kwargs)
        nnx.update(self.module, nnx.state(module, nnx.Not(nnx.Param)))
        return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedCallable:
    """A callable pytree, an Equinox module say, with its weights in a pool; see ``share_callable``.

    Attributes:
      shared: pool and rest: the arrays.
      layout: static.
      static: what the model has besides arrays, and its structure; static.
    """

    shared: Shared
    layout: Layout = dataclasses.field(metadata={"static": True})
    static: Any = dataclasses.field(metadata={"static": True})

    def expand(self) -> Any:
        """The model as it was wrapped, with expanded weights."""
        structure, names, other = self.static
        named = expand(self.shared, self.layout)
        leaves = [named.get(name, kept) for name, kept in zip(names, other, strict=True)]
        return jax.tree.unflatten(structure, leaves)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the expanded model."""
        return self.expand()(*args, **kwargs)


def share_callable(
    key: jax.Array, model: Any, budget: int | float, **options: Any
) -> SharedCallable:
    """Put a callable pytree, such as an Equinox module, in a pool.

    The result is a callable pytree whose leaves are the pool and what passes through, so that
    ``equinox.filter_grad``, ``jax.grad``, optax and serialisation of leaves take it as they take
    the model.

    Args:
      key: typed key, draws the pool.
      model: a callable pytree; leaves that are no arrays (activation functions) are kept aside.
      budget: see ``plan``.
      options: keyword arguments of ``plan``.

    Raises:
      TypeError: ``model`` is not callable, or as ``plan`` and ``init``.
      ValueError: as ``plan`` and ``init``.

    Example:
      >>> import jax.numpy as jnp
      >>> model = jax.tree_util.Partial(lambda w, x: x @ w, jnp.arange(12.0).reshape(4, 3))
      >>> shared = share_callable(jax.random.key(0), model, 0.5)
      >>> shared(jnp.ones((2, 4))).shape, shared.shared.pool.shape
      ((2, 3), (6,))
    """
    if not callable(model):
        raise TypeError(f"model is {type(model).__name__}; expected a callable pytree")
    pairs, structure = jax.tree_util.tree_flatten_with_path(model)
    names = tuple(jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in pairs)
    is_array = [isinstance(x, jax.Array | np.ndarray) for _, x in pairs]
    arrays = {n: x for n, (_, x), ok in zip(names, pairs, is_array, strict=True) if ok}
    other = tuple(None if ok else x for (_, x), ok in zip(pairs, is_array, strict=True))
    layout = plan(arrays, budget, **options)
    return SharedCallable(init(key, layout, arrays), layout, (structure, names, other))
