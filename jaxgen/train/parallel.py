"""For code built on ``pmap`` and ``shard_map``: a step to map, and functions mapped over a batch.

``make_train_step`` needs none of this: it runs on a mesh as it is. Here a function sees one
device's part of the batch. Example ``i`` draws from ``fold_in(key, i)``, ``i`` counted over all
devices (``jaxgen.core.keys.part_of_batch``), and gradients and means are summed over devices in
float32, so that the numbers are those of one device up to the rounding of sums.

``shard_map`` checks which values differ between devices (``check_vma``). A ``diffeqsolve`` does not
pass that check; give ``check_vma=False`` where one is inside: ``solve.sample`` with a
``controller``, ``adjoint`` or ``brownian``, and ``solve.log_likelihood``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxgen.core import keys
from jaxgen.core.checks import positive_int
from jaxgen.train.mesh import batch_axes, batch_sharding, replicated
from jaxgen.train.state import TrainState
from jaxgen.train.step import LossFn, Metrics, Parts

__all__ = ["local_step", "mean_over_batch", "over_batch", "pmap_step", "shard_map_step"]

StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def local_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    axis_name: str | tuple[str, ...],
    **options: Any,
) -> StepFn:
    """A training step to call inside one's own ``shard_map`` or ``pmap``; not jitted.

    Args:
      loss_fn: as in ``make_train_step``; it gets the device's part of the batch, and keeps the
        promise of ``per_example`` there.
      optimizer: an optax transformation.
      axis_name: the mapped axis or axes that split the batch.
      **options: ``ema``, ``clip``, ``accumulate``, ``dtype`` and ``pass_step`` of
        ``make_train_step``; ``accumulate`` must divide each device's part.

    Returns:
      ``step(state, part) -> (state, metrics)``; ``state`` and what is returned are the same on
      every device, ``part`` is the device's own.
    """
    parts = Parts(loss_fn, optimizer, **options)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

    def compute(params: Any, key: jax.Array, part: Any, taken: jax.Array) -> tuple[jax.Array, Any]:
        return parts.local(parts.cast(params), key, part, taken, axes)

    def step(state: TrainState, part: Any) -> tuple[TrainState, Metrics]:
        return parts.step(state, part, compute=compute, devices=jax.lax.axis_size(axes))

    return step


def shard_map_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    check_vma: bool = True,
    **options: Any,
) -> StepFn:
    """``local_step`` under ``shard_map`` and ``jit``, the state whole on every device and donated.

    Args:
      loss_fn: as in ``local_step``.
      optimizer: an optax transformation.
      mesh: its axes ``"data"`` and ``"fsdp"`` split the batch.
      check_vma: ``shard_map``'s check; ``False`` where the loss holds a ``diffeqsolve``.
      **options: as in ``local_step``.

    Returns:
      ``step(state, batch)``, for a state from ``replicate`` and a batch from ``shard_batch``.

    Raises:
      ValueError: ``mesh`` has no axis that splits a batch.
    """
    step = local_step(loss_fn, optimizer, _axes(mesh), **options)
    whole = PartitionSpec()
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(whole, batch_sharding(mesh).spec),
        out_specs=(whole, whole),
        check_vma=check_vma,
    )
    return jax.jit(mapped, donate_argnums=0)


def pmap_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    devices: Sequence[jax.Device] | None = None,
    **options: Any,
) -> StepFn:
    """``local_step`` under ``pmap``.

    Args:
      loss_fn: as in ``local_step``.
      optimizer: an optax transformation.
      devices: default: all.
      **options: as in ``local_step``.

    Returns:
      ``step(state, batch)``: every leaf of ``state`` and of what is returned has an axis for the
      devices in front, along which it repeats; leaves of ``batch`` are ``(devices, n / devices,
      ...)``. The state is donated.
    """
    step = local_step(loss_fn, optimizer, "devices", **options)
    mapped: StepFn = jax.pmap(step, axis_name="devices", devices=devices, donate_argnums=0)
    return mapped


def over_batch(f: Callable[..., Any], mesh: Mesh, *, check_vma: bool = True) -> Callable[..., Any]:
    """Split a function of a batch over a mesh: sampling, likelihoods, anything per example.

    Numbers of examples that do not divide are padded with copies of the last one, whose results
    are cut off. Compiled once for each number of examples and shape.

    Args:
      f: ``f(key, part, *shared)`` gives a pytree of arrays whose axis 0 is that of ``part``; where
        the call has a number instead of a batch, ``part`` is how many examples to make. Draws by
        ``jaxgen.core.keys`` and by jaxgen's functions are numbered over the whole batch.
      mesh: its axes ``"data"`` and ``"fsdp"`` split the batch.
      check_vma: ``shard_map``'s check; ``False`` where a ``diffeqsolve`` is inside ``f``.

    Returns:
      ``call(key, batch, *shared)``: ``batch`` a pytree of arrays ``(n, ...)`` or the number ``n``,
      ``shared`` pytrees that every device gets whole, such as parameters. It returns what ``f``
      does, with axis 0 of length ``n``.

    Raises:
      ValueError: ``mesh`` has no axis that splits a batch; at the call: no example, leaves that
        disagree in axis 0, or a result of ``f`` without the batch's axis 0.

    >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    >>> draw = over_batch(lambda key, n: keys.normal(key, (n, 2)), mesh)
    >>> x = draw(jax.random.key(0), 3)
    >>> bool((x == keys.normal(jax.random.key(0), (3, 2))).all())
    True
    """
    axes = _axes(mesh)

    def local(key: jax.Array, part: Any, shared: Any, size: int, n: int) -> Any:
        del n
        with keys.part_of_batch(axes, size):
            out = f(key, size if part is None else part, *shared)
        for leaf in jax.tree.leaves(out):
            _check_result(leaf, size)
        return out

    return _Mapped(local, mesh, batch_sharding(mesh).spec, check_vma)


def mean_over_batch(
    f: Callable[..., Any], mesh: Mesh, *, check_vma: bool = True
) -> Callable[..., Any]:
    """The mean over examples of what ``f`` gives for each, split over a mesh.

    Sums are in float32 or wider, within devices and between them, and padding is left out of them.

    Args:
      f: as in ``over_batch``.
      mesh: as in ``over_batch``.
      check_vma: as in ``over_batch``.

    Returns:
      ``call(key, batch, *shared)``, as in ``over_batch``; leaves lose axis 0, and are the same on
      every device.

    Raises:
      ValueError: as ``over_batch``.
    """
    axes = _axes(mesh)

    def local(key: jax.Array, part: Any, shared: Any, size: int, n: int) -> Any:
        with keys.part_of_batch(axes, size):
            out = f(key, size if part is None else part, *shared)
        is_real = jax.lax.axis_index(axes) * size + jnp.arange(size) < n

        def mean(leaf: jax.Array) -> jax.Array:
            _check_result(leaf, size)
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            mask = is_real.reshape((size,) + (1,) * (leaf.ndim - 1))
            total = jnp.sum(jnp.where(mask, leaf, 0), axis=0, dtype=dtype)
            return jax.lax.psum(total, axes) / n

        return jax.tree.map(mean, out)

    return _Mapped(local, mesh, PartitionSpec(), check_vma)


class _Mapped:
    """``local(key, part, shared, size, n)`` over the devices of a mesh, padding a batch."""

    def __init__(self, local: Callable[..., Any], mesh: Mesh, out: PartitionSpec, check_vma: bool):
        self._local, self._mesh, self._out, self._check = local, mesh, out, check_vma
        self._shards = math.prod(mesh.shape[name] for name in _axes(mesh))
        self._run = jax.jit(self._mapped, static_argnames=("size", "n"))

    def __call__(self, key: jax.Array, batch: Any, *shared: Any) -> Any:
        keys.check(key)
        is_count = isinstance(batch, int | np.integer)
        n = positive_int("batch", batch) if is_count else _examples(batch)
        size = -(-n // self._shards)
        missing = size * self._shards - n
        part = None
        if not is_count:
            padded = jax.tree.map(functools.partial(_pad, missing=missing), batch)
            part = jax.device_put(padded, batch_sharding(self._mesh))
        key, shared = jax.device_put((key, shared), replicated(self._mesh))
        out = self._run(key, part, shared, size=size, n=n)
        if not missing or self._out == PartitionSpec():
            return out
        if AxisType.Explicit in self._mesh.axis_types:
            # An axis of Explicit type is not split unevenly.
            out = jax.device_put(out, replicated(self._mesh))
        return jax.tree.map(lambda leaf: leaf[:n], out)

    def _mapped(self, key: jax.Array, part: Any, shared: Any, *, size: int, n: int) -> Any:
        whole = PartitionSpec()
        return jax.shard_map(
            functools.partial(self._local, size=size, n=n),
            mesh=self._mesh,
            in_specs=(whole, batch_sharding(self._mesh).spec, whole),
            out_specs=self._out,
            check_vma=self._check,
        )(key, part, shared)


def _axes(mesh: Mesh) -> tuple[str, ...]:
    axes = batch_axes(mesh)
    if not axes:
        raise ValueError(
            f"mesh has the axes {mesh.axis_names}; expected one named 'data' or 'fsdp', which "
            "split the batch"
        )
    return axes


def _examples(batch: Any) -> int:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            f"batch has leaves of shapes {shapes}; expected arrays that agree in axis 0, or a "
            "number of examples"
        )
    if shapes[0][0] == 0:
        raise ValueError(f"batch has leaves of shapes {shapes}, no example; expected one at least")
    return int(shapes[0][0])


def _pad(leaf: Any, missing: int) -> Any:
    if not missing:
        return leaf
    xp = jnp if isinstance(leaf, jax.Array) else np
    return xp.concatenate([leaf, xp.repeat(leaf[-1:], missing, axis=0)])


def _check_result(leaf: Any, size: int) -> None:
    if jnp.shape(leaf)[:1] != (size,):
        raise ValueError(
            f"f gave an array of shape {jnp.shape(leaf)} for a part of {size} examples; expected "
            "axis 0 to count examples (return the arrays wanted, such as sample(...).x)"
        )
