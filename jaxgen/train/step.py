r"""One training step: gradient, clipping, optimiser, moving average, and the skip of bad steps.

With per-example losses :math:`l_i` the gradient is that of their mean in float32,

1. :math:`g = \nabla \frac1n \sum_i l_i(\theta)`, by ``accumulate`` micro batches if asked,
2. :math:`g \leftarrow g \min(1, c / \|g\|)`, the norm over all leaves, in float32,
3. :math:`\theta \leftarrow \theta + \mathrm{optimizer}(g)`,
4. :math:`\bar\theta \leftarrow \bar\theta + (1 - d_k)(\theta - \bar\theta)` with
   :math:`d_k = \min(d, (1 + k)/(10 + k))` at step :math:`k`, so that the average forgets the
   first parameters quickly (the warm-up of TensorFlow's ``ExponentialMovingAverage``; Song et al.
   2021, arXiv:2011.13456, use the same average with d = 0.999 and 0.9999).

If the loss or the norm is not finite, 3 and 4 are left out and counted; the step number and the
data position go on, so the next step sees other data and other noise.
"""

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxgen.core import keys
from jaxgen.core.arrays import at_least_f32
from jaxgen.core.checks import positive_int
from jaxgen.train.mesh import batch_axes, batch_sharding
from jaxgen.train.state import TrainState

__all__ = ["LossFn", "Metrics", "Step", "make_train_step"]

LossFn = Callable[..., jax.Array]


class Metrics(NamedTuple):
    """What a person wants to see of one step; arrays of shape ``()``.

    Attributes:
      loss: float32, mean of the batch's losses (not finite if the step was skipped for it).
      grad_norm: float32, global norm of the gradient before clipping.
      skipped: int32, steps skipped so far.
      skipped_in_a_row: int32, steps skipped one after another up to this one.
    """

    loss: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Step:
    """A jitted training step, ``step(state, batch) -> (state, metrics)``; see ``make_train_step``.

    Where the state and the batch lie is read from the arrays themselves; each placement has its
    own compiled program, and the state comes back where it was.
    """

    def __init__(self, parts: "Parts", per_example: bool):
        self._parts = parts
        self._per_example = per_example
        self._made: dict[Any, Any] = {}
        # The state given back last, where its batch lay, and what was run.
        self._last: tuple[Callable[[], Any], list[Any], Any] = (lambda: None, [], None)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Take a step; the state it is called with is deleted."""
        returned, there, jitted = self._last
        where = _shardings(batch)
        # That state lies where it lay; a tree of a thousand leaves takes longer to look through
        # than a small step.
        if returned() is not state or there != where:
            jitted = self._jitted(state, batch)
        out: tuple[TrainState, Metrics] = jitted(state, batch)
        self._last = (weakref.ref(out[0]), where, jitted)
        return out

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """``jax.jit(...).lower`` of the step, for arrays or ``ShapeDtypeStruct``s."""
        return self._jitted(state, batch).lower(state, batch)

    def _cache_size(self) -> int:
        return sum(jitted._cache_size() for jitted in self._made.values())

    def _jitted(self, state: TrainState, batch: Any) -> Any:
        where, structure = _shardings(state), jax.tree.structure(state)
        mesh = _mesh_of(where + _shardings(batch))
        key = (None,) * 3 if mesh is None else (mesh, tuple(map(_spec_of, where)), structure)
        if key not in self._made:
            self._made[key] = self._jit(*key)
        return self._made[key]

    def _jit(self, mesh: Mesh | None, specs: Any, structure: Any) -> Any:
        if mesh is None:
            return jax.jit(self._parts.step, donate_argnums=0)
        shardings = jax.tree.unflatten(structure, [NamedSharding(mesh, spec) for spec in specs])
        compute = (
            self._parts.spread if self._per_example and batch_axes(mesh) else self._parts.whole
        )
        return jax.jit(
            functools.partial(
                self._parts.step,
                compute=functools.partial(compute, shardings=shardings.params),
            ),
            donate_argnums=0,
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        )


def _shardings(tree: Any) -> list[Any]:
    return [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]


def _mesh_of(where: list[Any]) -> Mesh | None:
    for sharding in where:
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None


def _spec_of(sharding: Any) -> PartitionSpec:
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema: float = 0.999,
    clip: float | None = 1.0,
    accumulate: int = 1,
    dtype: DTypeLike | None = None,
    pass_step: bool = False,
    per_example: bool = False,
) -> Step:
    """Build ``step(state, batch) -> (state, metrics)``: pure, jitted, the state donated.

    The same step serves one device and many: put the state and the batch on a mesh
    (``jaxgen.train.place``, ``shard_batch``). Parameters that are split over the axes of the batch
    are gathered for the loss, in ``dtype``, and their gradients split again. Step ``i`` calls
    ``loss_fn`` with ``fold_in(state.key, i)``; a loss that draws per example
    (``fold_in(key, index)``, as everything in ``jaxgen.score`` does) then gives the same numbers
    on any number of devices, within float32 rounding.

    Args:
      loss_fn: ``loss_fn(key, params, batch) -> (n,)`` per-example losses, ``n`` being the length
        of axis 0 of every leaf of ``batch``.
      optimizer: an optax transformation.
      ema: decay of the moving average, in [0, 1); 0 makes the average follow the parameters.
      clip: largest global norm of the gradient; ``None`` does not clip.
      accumulate: number of micro batches that one batch is worked through in, to save memory. It
        must divide ``n``; on a mesh with ``per_example``, each device's part of it. Micro batch
        ``j`` holds examples ``j, j + accumulate, ...`` (so that a sharded batch stays where it is)
        and draws from ``fold_in(key, j)``: a loss without randomness gives the gradient of the
        whole batch, up to float32 rounding, one with randomness draws other noise than with
        ``accumulate=1``.
      dtype: floating dtype that ``loss_fn`` gets the parameters in (``jnp.bfloat16``), master
        parameters, gradients and sums staying as they are. The batch is not cast: a network that
        should compute in that dtype casts its own input (``dtype=`` of Flax layers).
      pass_step: call ``loss_fn(key, params, batch, step)`` with the number of steps taken so far,
        int32 ``()``, for a loss that changes as training goes on.
      per_example: promise that an example's loss depends on that example alone, and that what is
        drawn per example is drawn by ``jaxgen.core.keys`` or a function of jaxgen. On a mesh
        ``loss_fn`` then gets each device's part of the batch by itself, inside ``shard_map`` with
        its check on (so no ``diffeqsolve`` in the loss), and the gradients of the parts are
        summed in float32. Without the promise ``loss_fn`` sees the whole batch, and XLA sums in
        the dtype in which the network computes: on TPUs in bfloat16 for a bfloat16 network; and
        on Explicit axes it must be a loss written for them. A loss that breaks the promise gives
        each device the same noise, and no error.

    Returns:
      The jitted step. The state that it is called with is deleted: keep only the one returned.

    Raises:
      ValueError: an argument out of range; at the first call: an empty batch, leaves of ``batch``
        that disagree in axis 0, ``accumulate`` or the devices not dividing it, or losses that are
        not of shape ``(n,)``.
    """
    return Step(Parts(loss_fn, optimizer, ema, clip, accumulate, dtype, pass_step), per_example)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a step is made of: gradients here, there or by micro batches, and the update.

    The attributes are the arguments of ``make_train_step``.
    """

    loss_fn: LossFn
    optimizer: optax.GradientTransformation
    ema: float = 0.999
    clip: float | None = 1.0
    accumulate: int = 1
    dtype: DTypeLike | None = None
    pass_step: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; expected a decay in [0, 1)")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; expected a positive norm or None")
        positive_int("accumulate", self.accumulate)
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype is {self.dtype}; expected a floating dtype or None")

    # --- gradients --------------------------------------------------------------------------------

    def cast(self, params: Any) -> Any:
        """The parameters as the loss gets them."""
        if self.dtype is None:
            return params
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)

    def mean_loss(self, params: Any, key: jax.Array, batch: Any, taken: jax.Array) -> jax.Array:
        """The mean of the losses, in float32 or wider."""
        n = _batch_size(batch)
        losses = self.loss_fn(key, params, batch, *((taken,) if self.pass_step else ()))
        if jnp.shape(losses) != (n,):
            raise ValueError(
                f"loss_fn returned shape {jnp.shape(losses)}; expected one loss per example, ({n},)"
            )
        return jnp.mean(losses, dtype=jnp.promote_types(losses.dtype, jnp.float32))

    def gradient(
        self,
        params: Any,
        key: jax.Array,
        batch: Any,
        taken: jax.Array,
        axes: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Any]:
        """Loss and gradient of one batch: as the loss gives it, or summed in float32 or wider.

        ``axes`` are the mapped axes, if any, that the parameters are marked as varying over.
        """
        gradient = jax.value_and_grad(self.mean_loss)
        if self.accumulate == 1:
            return gradient(params, key, batch, taken)

        def body(total: Any, xs: Any) -> tuple[Any, None]:
            j, micro = xs
            part = gradient(params, jax.random.fold_in(key, j), micro, taken)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part), None

        zeros = jax.tree.map(
            lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
        )
        wide = at_least_f32(jnp.result_type(*jax.tree.leaves(params)))
        total = jax.tree.map(lambda leaf: _vary(leaf, axes), (jnp.zeros((), wide), zeros))
        xs = (jnp.arange(self.accumulate), _micro_batches(batch, self.accumulate))
        total, _ = jax.lax.scan(body, total, xs)
        return jax.tree.map(lambda leaf: leaf / self.accumulate, total)

    def here(
        self, params: Any, key: jax.Array, batch: Any, taken: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Loss and gradient wherever XLA puts them."""
        return self.gradient(self.cast(params), key, batch, taken)

    def whole(
        self, params: Any, key: jax.Array, batch: Any, taken: jax.Array, *, shardings: Any
    ) -> tuple[jax.Array, Any]:
        """Loss and gradient of the whole batch on a mesh, parameters gathered for it."""
        params = jax.tree.map(_gathered, self.cast(params), shardings)
        loss, grads = self.gradient(params, key, batch, taken)
        return loss, jax.tree.map(_put, grads, shardings)

    def spread(
        self, params: Any, key: jax.Array, batch: Any, taken: jax.Array, *, shardings: Any
    ) -> tuple[jax.Array, Any]:
        """Loss and gradient of each device's part of the batch, summed over devices in float32."""
        mesh = jax.tree.leaves(shardings)[0].mesh
        axes, split, n = batch_axes(mesh), batch_sharding(mesh), _batch_size(batch)
        shards = math.prod(mesh.shape[name] for name in axes)
        if n % shards:
            raise ValueError(
                f"batch has {n} examples for {shards} devices; expected a multiple of {shards}"
            )
        specs = jax.tree.map(lambda sharding: _within(sharding.spec, axes), shardings)

        def local(
            params: Any, key: jax.Array, batch: Any, taken: jax.Array
        ) -> tuple[jax.Array, Any]:
            return self.local(params, key, batch, taken, axes, specs)

        nothing = PartitionSpec()
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(nothing, nothing, split.spec, nothing),
            out_specs=(nothing, specs),
            axis_names=set(axes),
        )
        params = jax.tree.map(_gathered, self.cast(params), shardings)
        return mapped(params, key, batch, taken)

    def local(
        self,
        params: Any,
        key: jax.Array,
        batch: Any,
        taken: jax.Array,
        axes: tuple[str, ...],
        specs: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Inside a mapped function: the mean over all devices of loss and gradient, in float32.

        Args:
          params: cast, the same on every device.
          key: the same on every device.
          batch: the device's own examples.
          taken: steps taken so far.
          axes: the mapped axes.
          specs: how each gradient is left split over them; ``None`` leaves all whole.
        """
        n = _batch_size(batch)
        if n % self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}, which does not divide the {n} examples of the "
                "batch that each device has; choose another one, a larger batch or fewer devices"
            )
        params = jax.tree.map(lambda leaf: _vary(leaf, axes), params)
        with keys.part_of_batch(axes, n // self.accumulate):
            loss, grads = self.gradient(params, key, batch, taken, axes)
        if specs is None:
            specs = jax.tree.map(lambda _: PartitionSpec(), grads)
        grads = jax.tree.map(lambda g, spec: _mean_over(g, axes, spec), grads, specs)
        return jax.lax.pmean(loss, axes), grads

    # --- the update -------------------------------------------------------------------------------

    def updated(self, grads: Any, norm: jax.Array, old: TrainState) -> tuple[Any, Any, Any]:
        """Parameters, their average and the optimiser's state after a good step."""
        if self.clip is not None:
            factor = jnp.minimum(1.0, self.clip / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
        updates, opt_state = self.optimizer.update(grads, old.opt_state, old.params)
        params = optax.apply_updates(old.params, updates)
        k = old.step.astype(jnp.float32)
        share = 1.0 - jnp.minimum(jnp.float32(self.ema), (1.0 + k) / (10.0 + k))
        average = jax.tree.map(
            lambda mean, new: mean + share.astype(mean.dtype) * (new - mean), old.ema, params
        )
        # Both branches must agree in dtype, weakness included.
        return jax.tree.map(
            lambda new, leaf: jnp.asarray(new, leaf.dtype),
            (params, average, opt_state),
            (old.params, old.ema, old.opt_state),
        )

    def step(
        self,
        state: TrainState,
        batch: Any,
        *,
        compute: Callable[..., tuple[jax.Array, Any]] | None = None,
        devices: int = 1,
    ) -> tuple[TrainState, Metrics]:
        """One step; ``compute`` gives loss and gradient, ``devices`` hold a batch like this one."""
        n = _batch_size(batch) * devices
        key = jax.random.fold_in(state.key, state.step)
        loss, grads = (compute or self.here)(state.params, key, batch, state.step)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)

        norm = _global_norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        # On a CPU a branch runs at the speed of a step without the check, where selecting between
        # old and new leaf by leaf took 1.4 times as long in a step of mostly update.
        params, average, opt_state = jax.lax.cond(
            good,
            self.updated,
            lambda grads, norm, old: (old.params, old.ema, old.opt_state),
            grads,
            norm,
            state,
        )
        bad = jnp.int32(1) - good.astype(jnp.int32)
        skipped = state.skipped + bad
        in_a_row = (state.skipped_in_a_row + 1) * bad
        state = TrainState(
            params=params,
            ema=average,
            opt_state=opt_state,
            step=state.step + 1,
            key=state.key,
            examples=state.examples + jnp.uint32(n),
            skipped=skipped,
            skipped_in_a_row=in_a_row,
        )
        return state, Metrics(loss, norm, skipped, in_a_row)


def _within(spec: PartitionSpec, axes: tuple[str, ...], inside: bool = True) -> PartitionSpec:
    """``spec`` with only the mesh axes among ``axes``, or only the others."""

    def keep(entry: Any) -> Any:
        names = (entry,) if isinstance(entry, str) else (entry or ())
        return tuple(name for name in names if (name in axes) == inside) or None

    return PartitionSpec(*map(keep, spec))


def _put(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(leaf, sharding)
    return jax.lax.with_sharding_constraint(leaf, sharding)


def _gathered(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """``leaf`` whole along the axes that split the batch, and as it was along the others."""
    mesh: Any = sharding.mesh
    return _put(leaf, NamedSharding(mesh, _within(sharding.spec, batch_axes(mesh), inside=False)))


def _vary(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """``leaf`` as one that may differ from device to device, so that its gradient may."""
    if not axes or not jax.typeof(leaf).sharding.mesh.manual_axes:
        return leaf  # the second: inside pmap
    return jax.lax.pcast(leaf, axes, to="varying")


def _mean_over(leaf: jax.Array, axes: tuple[str, ...], spec: PartitionSpec) -> jax.Array:
    """Mean over devices in float32 or wider, left split as ``spec`` says."""
    total = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    rest = axes
    for axis, names in enumerate(spec):
        if names:
            total = jax.lax.psum_scatter(total, names, scatter_dimension=axis, tiled=True)
            rest = tuple(name for name in rest if name not in names)
    total = jax.lax.psum(total, rest) if rest else total
    return total / jax.lax.axis_size(axes)


def _batch_size(batch: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"batch has leaves of shapes {shapes}; expected arrays that agree in axis 0, the batch"
        )
    n = sizes.pop() or 0
    if n == 0:
        raise ValueError(f"batch has leaves of shapes {shapes}, no example; expected one at least")
    return n


def _micro_batches(batch: Any, accumulate: int) -> Any:
    n = _batch_size(batch)
    if n % accumulate:
        raise ValueError(f"accumulate is {accumulate}, which does not divide the batch of {n}")
    return jax.tree.map(
        lambda x: jnp.moveaxis(jnp.reshape(x, (n // accumulate, accumulate, *x.shape[1:])), 1, 0),
        batch,
    )


def _global_norm(tree: Any) -> jax.Array:
    squares = [
        jnp.sum(jnp.square(jnp.abs(leaf).astype(at_least_f32(leaf.dtype))))
        for leaf in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))
