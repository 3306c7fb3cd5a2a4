"""Particle filters, bootstrap, guided and auxiliary: all observations in one scan, or one by one.

Gordon, Salmond and Smith 1993 (bootstrap); Doucet, Godsill and Andrieu 2000 (guided, resampling by
ESS); Pitt and Shephard 1999 in the form of Johansen and Doucet 2008 (auxiliary). Particles x_i with
log-weights l_i stand for the law of x_{t-1} given y_{0:t-1}. A step is

    (1)  eta_i = log_auxiliary(x_i, y_t, t), zero without one;
    (2)  if ESS(l + eta) < threshold n: ancestors A from the weights l + eta,
         log Z <- log Z + log mean exp(l + eta),  x_i <- x_{A_i},  l_i <- -eta_{A_i};
    (3)  x'_i from the transition, or from the proposal r where the model has one;
    (4)  l_i <- l_i + log_potential(x'_i) [+ log m(x_i, x'_i) - log r(x_i, x'_i)];
    (5)  log Z <- log Z + log mean exp(l),  l_i <- l_i - log mean exp(l).

exp(log Z) is an unbiased estimate of the likelihood of y_{0:t}, whatever the proposal, the
auxiliary weights and the resampling. (5) leaves a mean weight of one, so that log-weights stay
small however long the series. The gradient of ``log_z`` through a filter is not the score: it knows
nothing of how the ancestors were drawn.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core import keys as keys_
from jaxgen.core.arrays import at_least_f32
from jaxgen.particles.resample import METHODS, maybe_resample
from jaxgen.particles.weights import ess, log_mean_exp
from jaxgen.smc.genealogy import Genealogy, PathTree, default_capacity, tree_init, tree_update
from jaxgen.smc.state_space import StateSpaceModel, same_particle, scalar_log

__all__ = [
    "Filter",
    "FilterInfo",
    "FilterState",
    "compiled",
    "filter_init",
    "filter_step",
    "particle_filter",
    "particle_keys",
]


class FilterState(NamedTuple):
    """What the next observation needs.

    Attributes:
      x: particles, each leaf ``(n, *event)``.
      log_weights: ``(n,)``, scaled to a mean weight of one.
      log_z: ``()``, estimate of the log-likelihood of all observations so far.
      t: int32 ``()``, the step that the particles are at.
    """

    x: Any
    log_weights: jax.Array
    log_z: jax.Array
    t: jax.Array


class FilterInfo(NamedTuple):
    """What a reader may want to see of one step.

    Attributes:
      ess: ``()``, effective sample size of the step's weights.
      resampled: bool ``()``, whether the particles were resampled on the way to this step.
      ancestors: int32 ``(n,)``, the slot at ``t - 1`` that each particle comes from.
      means: weighted means of the asked functions, as ``functions`` is built; else ``None``.
    """

    ess: jax.Array
    resampled: jax.Array
    ancestors: jax.Array
    means: Any


class Filter(NamedTuple):
    """A filter's end.

    Attributes:
      x: particles at the last step, each leaf ``(n, *event)``.
      log_weights: ``(n,)``, scaled to a mean weight of one.
      log_z: ``()``, estimate of the log-likelihood of all observations.
      log_z_steps: ``(steps,)``, the same up to each step.
      ess: ``(steps,)``, effective sample size of each step's weights, before resampling.
      resampled: bool ``(steps,)``, whether particles were resampled on the way to the step.
      means: weighted means of the asked functions, leaves ``(steps, ...)``; else ``None``.
      genealogy: ``Genealogy`` or ``PathTree``, as ``store`` asks; else ``None``.
    """

    x: Any
    log_weights: jax.Array
    log_z: jax.Array
    log_z_steps: jax.Array
    ess: jax.Array
    resampled: jax.Array
    means: Any
    genealogy: Any


# --- per particle ---------------------------------------------------------------------------------


def particle_keys(key: jax.Array, n: int, offset: ArrayLike = 0) -> jax.Array:
    """Keys of particles ``offset, ..., offset + n - 1``, ``(n,)``; ``key`` serves nothing else.

    A Threefry key is the step's key with the particle's number added to its second word: distinct
    keys, which is all that the cipher asks for (Salmon et al. 2011, whose generators count in the
    key this way), and half the cost of hashing each. Other generators get ``fold_in(key, number)``.

    Args:
      key: the step's key.
      n: number of keys.
      offset: int ``()``, the first particle's number.
    """
    numbers = jnp.arange(n, dtype=jnp.uint32) + jnp.asarray(offset).astype(jnp.uint32)
    if jax.random.key_impl(keys_.check(key)) != "threefry2x32":
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
    first, second = jax.random.key_data(key)
    words = jnp.stack([jnp.broadcast_to(first, (n,)), second + numbers], axis=1)
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _strong(x: Any) -> Any:
    """``x`` as arrays without weak types, which a scan's carry must not have."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(a)), x)


def _varying(x: Any, key: jax.Array) -> Any:
    """``_strong``, and where keys differ between devices so do particles, equal though they be."""
    always = jax.random.key_data(key)[0] >= 0
    return jax.tree.map(lambda a: jnp.where(always, a, a), _strong(x))


def _checked(name: str, came: Any, like: Any) -> Any:
    same_particle(name, came, like)
    return _strong(came)


def _either(observed: jax.Array | None, seen: Callable[[], Any], unseen: Callable[[], Any]) -> Any:
    return seen() if observed is None else jax.lax.cond(observed, seen, unseen)


def _masked(observed: jax.Array | None, value: jax.Array) -> jax.Array:
    """A log-weight in float32 or wider, zero where nothing was observed."""
    value = value.astype(at_least_f32(value.dtype))
    return value if observed is None else jnp.where(observed, value, jnp.zeros_like(value))


def _log_potential(model: StateSpaceModel, x: Any, y: Any, t: jax.Array) -> jax.Array:
    return scalar_log("log_potential", model.log_potential(x, y, t))


def _first(
    key: jax.Array, model: StateSpaceModel, y: Any, t: jax.Array, observed: jax.Array | None
) -> tuple[Any, jax.Array]:
    """One particle of step 0 and its log-weight."""
    if model.propose_init is None:
        x = _varying(model.init(key), key)
        return x, _masked(observed, _log_potential(model, x, y, t))
    assert model.log_propose_init is not None and model.log_init is not None
    propose_init = model.propose_init
    like = jax.eval_shape(model.init, key)

    def guided() -> Any:
        return _checked("propose_init", propose_init(key, y), like)

    x = _varying(_either(observed, guided, lambda: _strong(model.init(key))), key)
    log_weight = (
        _log_potential(model, x, y, t)
        + scalar_log("log_init", model.log_init(x))
        - scalar_log("log_propose_init", model.log_propose_init(x, y))
    )
    return x, _masked(observed, log_weight)


def _next(
    key: jax.Array,
    x: Any,
    model: StateSpaceModel,
    y: Any,
    t: jax.Array,
    observed: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """One particle's next state and what its log-weight grows by: equations (3) and (4)."""

    def plain() -> Any:
        return _checked("transition", model.transition(key, x, t), x)

    if model.propose is None:
        x_next = plain()
        return x_next, _masked(observed, _log_potential(model, x_next, y, t))
    assert model.log_propose is not None and model.log_transition is not None
    propose = model.propose
    x_next = _either(observed, lambda: _checked("propose", propose(key, x, y, t), x), plain)
    growth = (
        _log_potential(model, x_next, y, t)
        + scalar_log("log_transition", model.log_transition(x, x_next, t))
        - scalar_log("log_propose", model.log_propose(x, x_next, y, t))
    )
    return x_next, _masked(observed, growth)


# --- per population -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is static in a filter."""

    model: StateSpaceModel
    n: int
    resample: str
    ess_threshold: float
    functions: tuple[Any, ...]
    axis_name: str | None
    store: str | int | None = None

    def means(self, x: Any, log_weights: jax.Array) -> Any:
        """Weighted means of the functions; ``log_weights`` have a mean weight of one."""
        leaves, treedef = self.functions
        if treedef is None:
            return None
        weights = jnp.exp(log_weights) / self.n

        def mean(values: jax.Array) -> jax.Array:
            values = values.astype(jnp.promote_types(values.dtype, weights.dtype))
            w = weights.reshape((-1,) + (1,) * (values.ndim - 1)).astype(values.dtype)
            # A particle of weight zero counts for nothing, infinite or NaN though it be.
            total = jnp.sum(jnp.where(w == 0, jnp.zeros_like(values), w * values), axis=0)
            return total if self.axis_name is None else jax.lax.psum(total, self.axis_name)

        return treedef.unflatten([jax.tree.map(mean, jax.vmap(f)(x)) for f in leaves])

    @property
    def local(self) -> int:
        """Particles on this device."""
        return self.n if self.axis_name is None else self.n // jax.lax.axis_size(self.axis_name)

    def keys(self, key: jax.Array) -> jax.Array:
        """This device's particles' keys: the same whatever the number of devices."""
        at = 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name) * self.local
        return particle_keys(key, self.local, at)


def _options(
    model: StateSpaceModel,
    n: int,
    resample: str,
    ess_threshold: float,
    functions: Any,
    axis_name: str | None,
    store: str | int | None = None,
) -> _Options:
    if not isinstance(model, StateSpaceModel):
        raise TypeError(f"model is {type(model).__name__}; expected a StateSpaceModel")
    n = checks.positive_int("n", n)
    checks.one_of("resample", resample, METHODS)
    if axis_name is not None and n % jax.lax.axis_size(axis_name):
        raise ValueError(
            f"n is {n}; expected a multiple of the {jax.lax.axis_size(axis_name)} devices of axis "
            f"{axis_name!r}"
        )
    if isinstance(ess_threshold, jax.core.Tracer):
        raise TypeError("ess_threshold is traced; expected a number known at trace time")
    if not 0 < ess_threshold <= 1:
        raise ValueError(f"ess_threshold is {ess_threshold!r}; expected a number in (0, 1]")
    flat: tuple[Any, ...] = ((), None)
    if functions is not None:
        leaves, treedef = jax.tree.flatten(functions, is_leaf=callable)
        wrong = [f for f in leaves if not callable(f)]
        if wrong or not leaves:
            raise TypeError(f"functions holds {wrong!r}; expected functions f(x) of one particle")
        flat = (tuple(leaves), treedef)
    return _Options(model, n, resample, float(ess_threshold), flat, axis_name, store)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(*arrays, options=...)`` compiled once for each hashable ``options``."""
    jitted = jax.jit(function, static_argnames="options")

    @functools.wraps(function)
    def call(*args: Any, options: Any) -> Any:
        try:
            hash(options)
        except TypeError:
            return function(*args, options=options)
        return jitted(*args, options=options)

    return call


def _close(
    x: Any,
    log_weights: jax.Array,
    log_z: jax.Array,
    t: jax.Array,
    resampled: jax.Array,
    ancestors: jax.Array,
    options: _Options,
) -> tuple[FilterState, FilterInfo]:
    """Equation (5), and NaN from here on where no weight is left."""
    total = log_mean_exp(log_weights, axis_name=options.axis_name)
    is_sound = jnp.isfinite(total)
    checks.debug_check(
        is_sound,
        "at step {t} every particle has weight zero, or a log-weight is NaN or +inf",
        t=t,
    )
    total = jnp.where(is_sound, total, jnp.nan)
    info = FilterInfo(
        ess(log_weights, axis_name=options.axis_name),
        resampled,
        ancestors,
        options.means(x, log_weights - total),
    )
    return FilterState(x, log_weights - total, log_z + total, t), info


def _init(
    key: jax.Array, y: Any, observed: jax.Array | None, options: _Options
) -> tuple[FilterState, FilterInfo]:
    t = jnp.zeros((), jnp.int32)
    # Hashed first: particles count up from the key, and so may the keys of a user's runs.
    _, key_move = jax.random.split(key)
    first = functools.partial(_first, model=options.model, y=y, t=t, observed=observed)
    x, log_weights = jax.vmap(first)(options.keys(key_move))
    no = jnp.zeros((), bool)
    here = jnp.arange(options.local, dtype=jnp.int32)
    if options.axis_name is not None:
        here = here + jax.lax.axis_index(options.axis_name) * options.local
    log_z = jnp.zeros((), log_weights.dtype)
    return _close(x, log_weights, log_z, t, no, here, options)


def _step(
    key: jax.Array, state: FilterState, y: Any, observed: jax.Array | None, options: _Options
) -> tuple[FilterState, FilterInfo]:
    key_resample, key_move = jax.random.split(key)
    model, t, old = options.model, state.t + 1, state.log_weights
    carried: tuple[Any, jax.Array | None] = (state.x, None)
    weights = old
    if model.log_auxiliary is not None:
        look = model.log_auxiliary

        def auxiliary(x: Any) -> jax.Array:
            return _masked(observed, scalar_log("log_auxiliary", look(x, y, t)))

        eta = jax.vmap(auxiliary)(state.x).astype(old.dtype)
        carried, weights = (state.x, eta), old + eta
    # A run that is lost has been told so at its step; it goes on in NaN by its log_z.
    weights = jnp.where(jnp.isnan(state.log_z), jnp.zeros_like(weights), weights)
    # After an unobserved step all weights may be equal, and resampling would only add noise.
    when = None if observed is None else _differ(weights, options.axis_name)
    new = maybe_resample(
        key_resample,
        carried,
        weights,
        method=options.resample,
        threshold=options.ess_threshold,
        when=when,
        axis_name=options.axis_name,
    )
    x, eta_of = new.x
    log_z = state.log_z + new.log_z_increment.astype(old.dtype)
    log_weights = new.log_weights
    if eta_of is not None:
        log_weights = jnp.where(new.resampled, -eta_of, old)
    # Integer particles cannot be NaN, their weights can.
    log_weights = log_weights + jnp.where(jnp.isnan(log_z), jnp.nan, 0.0).astype(old.dtype)
    move = functools.partial(_next, model=model, y=y, t=t, observed=observed)
    x, growth = jax.vmap(move)(options.keys(key_move), x)
    log_weights = log_weights + growth.astype(old.dtype)
    return _close(x, log_weights, log_z, t, new.resampled, new.ancestors, options)


def _differ(log_weights: jax.Array, axis_name: str | None) -> jax.Array:
    top, low = jnp.max(log_weights), jnp.min(log_weights)
    if axis_name is not None:
        top, low = jax.lax.pmax(top, axis_name), jax.lax.pmin(low, axis_name)
    return top > low


# --- the public functions -------------------------------------------------------------------------


def _observed(observed: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    if observed is None:
        return None
    array = jnp.asarray(observed)
    if array.dtype != bool or array.shape != shape:
        raise ValueError(
            f"observed has shape {array.shape} and dtype {array.dtype}; expected bool {shape}"
        )
    return array


def _steps(observations: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(observations)]
    if not shapes or () in shapes or len({s[0] for s in shapes}) > 1 or shapes[0][0] == 0:
        raise ValueError(
            f"observations has leaves of shapes {shapes}; expected (steps, ...) with one number of "
            "steps, at least 1"
        )
    return shapes[0][0]


_compiled_init = compiled(_init)
_compiled_step = compiled(_step)


def filter_init(
    key: jax.Array,
    model: StateSpaceModel,
    y: Any,
    n: int,
    *,
    observed: ArrayLike | None = None,
    functions: Any = None,
    axis_name: str | None = None,
) -> tuple[FilterState, FilterInfo]:
    """Step 0 of a filter: particles weighted by the first observation.

    With ``key = fold_in(k, 0)``, and ``fold_in(k, t)`` for step ``t``, the steps equal
    ``particle_filter(k, ...)``.

    Args:
      key: one typed key.
      model: the state-space model.
      y: the first observation, any pytree.
      n: number of particles.
      observed: bool ``()``, false where ``y`` is missing; ``None`` means that it is there.
      functions: as in ``particle_filter``.
      axis_name: as in ``particle_filter``.

    Returns:
      ``(FilterState, FilterInfo)``.

    Raises:
      TypeError, ValueError: as ``particle_filter``.
    """
    options = _options(model, n, "systematic", 1.0, functions, axis_name)
    args = (keys_.check(key), y, _observed(observed, ()))
    return _compiled_init(*args, options=options)


def filter_step(
    key: jax.Array,
    model: StateSpaceModel,
    state: FilterState,
    y: Any,
    *,
    resample: str = "systematic",
    ess_threshold: float = 1.0,
    observed: ArrayLike | None = None,
    functions: Any = None,
    axis_name: str | None = None,
) -> tuple[FilterState, FilterInfo]:
    """One observation more: from step ``state.t`` to the next.

    Args:
      key: one typed key, another for each step.
      model: the state-space model.
      state: where the filter stands.
      y: the next observation, any pytree.
      resample: as in ``particle_filter``.
      ess_threshold: as in ``particle_filter``.
      observed: bool ``()``, false where ``y`` is missing; ``None`` means that it is there.
      functions: as in ``particle_filter``.
      axis_name: as in ``particle_filter``.

    Returns:
      ``(FilterState, FilterInfo)``.

    Raises:
      TypeError, ValueError: as ``particle_filter``, and where ``state`` does not hold one
        log-weight for each particle.

    Example:
      >>> import jax
      >>> model = StateSpaceModel(
      ...     init=jax.random.normal,
      ...     transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
      ...     log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ... )
      >>> state, _ = filter_init(jax.random.key(0), model, 0.3, 100)
      >>> state, info = filter_step(jax.random.key(1), model, state, 0.1)
      >>> state.log_weights.shape, int(state.t), 1 < float(info.ess) <= 100
      ((100,), 1, True)
    """
    x, log_weights, log_z, t = state
    log_weights = checks.floating("state.log_weights", log_weights)
    sizes = [jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(x)]
    if log_weights.ndim != 1 or any(size != log_weights.shape for size in sizes):
        raise ValueError(
            f"state.log_weights has shape {log_weights.shape} and state.x leading axes {sizes}; "
            "expected one log-weight for each particle"
        )
    local = log_weights.shape[0]
    n = local if axis_name is None else local * jax.lax.axis_size(axis_name)
    options = _options(model, n, resample, ess_threshold, functions, axis_name)
    state = FilterState(_strong(x), log_weights, jnp.asarray(log_z), jnp.asarray(t))
    args = (keys_.check(key), state, y, _observed(observed, ()))
    return _compiled_step(*args, options=options)


@compiled
def _run(
    key: jax.Array, observations: Any, observed: jax.Array | None, *, options: _Options
) -> Filter:
    steps = _steps(observations)
    keys = keys_.fold(key, steps)

    def at(tree: Any, t: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[t], tree)

    inputs = (keys, observations, observed)
    first, info = _init(keys[0], at(observations, 0), at(observed, 0), options)
    is_tree = options.store not in (None, "all")
    tree: PathTree | None = None
    if is_tree:
        capacity = options.store
        if not isinstance(capacity, int):
            capacity = default_capacity(options.n, steps)
        tree = tree_init(first.x, capacity)

    def kept(state: FilterState, info: FilterInfo) -> Any:
        genealogy = (state.x, info.ancestors) if options.store == "all" else None
        return state.log_z, info.ess, info.resampled, info.means, genealogy

    def body(carry: Any, inputs: Any) -> Any:
        state, tree = carry
        key, y, observed = inputs
        state, info = _step(key, state, y, observed, options)
        if tree is not None:
            tree = tree_update(tree, info.ancestors, state.x)
        return (state, tree), kept(state, info)

    rest = jax.tree.map(lambda leaf: leaf[1:], inputs)
    (last, tree), after = jax.lax.scan(body, (first, tree), rest)
    log_z, sizes, resampled, means, stored = jax.tree.map(
        lambda a, b: jnp.concatenate([a[None], b]), kept(first, info), after
    )
    genealogy: Any = tree if is_tree else (None if stored is None else Genealogy(*stored))
    return Filter(last.x, last.log_weights, last.log_z, log_z, sizes, resampled, means, genealogy)


def particle_filter(
    key: jax.Array,
    model: StateSpaceModel,
    observations: Any,
    n: int,
    *,
    resample: str = "systematic",
    ess_threshold: float = 1.0,
    observed: ArrayLike | None = None,
    functions: Any = None,
    store: str | int | None = None,
    axis_name: str | None = None,
) -> Filter:
    """Filter a series of observations with ``n`` weighted particles.

    The model's functions choose the filter: bootstrap with none of the optional ones, guided with
    ``propose`` (``propose_init`` for step 0), auxiliary with ``log_auxiliary``. Many filters at
    once: ``vmap`` over keys, observations or the parameters that the model closes over.

    Where every weight is zero at a step, or one is NaN, ``log_z``, means and log-weights are NaN
    from that step on, and under ``checkify.checkify`` an error tells the step (with its default
    ``user_checks``; ``index_checks`` takes the slots that a resampler drops for errors).

    Args:
      key: one typed key.
      model: the state-space model. Compilations are kept for it: make it once, or inside ``jit``.
      observations: ``(steps, ...)``, any pytree with that leading axis.
      n: number of particles, over all devices.
      resample: scheme, a name that ``jaxgen.particles.resample`` knows.
      ess_threshold: resample where the effective sample size is below this share of ``n``, in
        (0, 1]; 1 resamples at each step (with ``observed``, where weights differ at all).
      observed: bool ``(steps,)``, false where the observation is missing. Its value is then
        ignored (write any finite number), the transition is drawn from, and no weight changes.
      functions: what to average over the weighted particles at each step: ``f(x)`` of one
        particle, returning any pytree of arrays, or a pytree of such functions. As with the
        model, a function made anew compiles anew.
      store: ``"all"`` keeps every step's particles and ancestors, ``steps x n``; ``"tree"`` only
        those with descendants at the end, in a buffer of about ``steps + 3 n log n`` (an integer
        is another size of that buffer; see ``genealogy``); ``None`` nothing.
      axis_name: inside ``shard_map``, the mapped axis over which particles are split. ``n`` must
        be a multiple of its size.

    Returns:
      ``Filter``.

    Raises:
      TypeError: a log-density of integer dtype, a traced ``ess_threshold``, something else than
        functions in ``functions``.
      ValueError: ``n < 1``, ``ess_threshold`` outside (0, 1], an unknown scheme, a model function
        that returns something else than the particle's own structure, shapes and dtypes or than
        a scalar log-density, observations of unequal lengths, ``observed`` of another shape.

    Example:
      >>> import jax
      >>> model = StateSpaceModel(
      ...     init=jax.random.normal,
      ...     transition=lambda key, x, t: 0.9 * x + 0.5 * jax.random.normal(key),
      ...     log_potential=lambda x, y, t: -0.5 * (y - x) ** 2,
      ... )
      >>> y = jax.numpy.array([0.3, 0.1, -0.4])
      >>> done = particle_filter(jax.random.key(0), model, y, 1000, functions=lambda x: x)
      >>> done.means.shape, done.ess.shape, done.x.shape
      ((3,), (3,), (1000,))
    """
    steps = _steps(observations)
    if store is not None and not (isinstance(store, int) and not isinstance(store, bool)):
        checks.one_of("store", store, ("all", "tree"))
    if axis_name is not None and store not in (None, "all"):
        raise ValueError(f"store is {store!r} with axis_name; expected None or 'all'")
    if isinstance(store, int):
        checks.positive_int("store", store, least=n)
    options = _options(model, n, resample, ess_threshold, functions, axis_name, store)
    args = (keys_.check(key), _strong(observations), _observed(observed, (steps,)))
    return _run(*args, options=options)
