r"""Sampling by absorbing discrete diffusion, calling the network only where a token unmasks.

A step from t down to s unmasks each masked token with probability rho (``process.absorbing``,
equations 3 and 4) and gives it a value from the conditional c(v | unmasked tokens). Whether a token
unmasks does not depend on the network (c is normalised, the mask has no part in it), so that the
step in which each token will unmask is drawn first, from its exact law

    P(token unmasks in step i) = rho_i prod_{j < i} (1 - rho_j),

and the network is called only at a sequence's own busy steps: l tokens have at most l of them,
whatever the number of steps (Ou et al., arXiv 2406.03736, section 3.2; ``expected_nfe`` gives their
mean). The sequences of a batch need not be at the same step: each call takes every sequence to its
own next busy step, and a batch costs as many calls as its busiest sequence.

Two remarks. With ``cache=False`` the network is called at every step, as samplers that know nothing
of this do; the tokens are the same. And a network conditioned on time may skip quiet steps in the
same way (``takes_level=True``): what it cannot do is keep its output from one step to the next, as
the eager count of the paper does.

Writing in a given order (``ordered_sample``) is the same loop with one token for each step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import batch_event, varying_zeros
from jaxgen.core.categorical import check_filters, filter_logits
from jaxgen.process.absorbing import METHODS, Absorbing, check_tokens
from jaxgen.score.discrete import Conditionals, log_conditionals, written_at

__all__ = ["DiscreteSample", "ordered_sample", "radd_sample"]


class DiscreteSample(NamedTuple):
    """Sampled sequences.

    Attributes:
      x: int32 ``(n, l)`` or ``(l,)``. A position whose conditional was no number holds the mask.
      nfe: int32 ``(n,)`` or ``()``, evaluations that each sequence needed.
      calls: int32 ``()``, calls of the network with the whole batch.
      unmasked_at: int32 like ``x``, the step (from 0) in which each token unmasked; -1 for those
        of the prompt.
    """

    x: jax.Array
    nfe: jax.Array
    calls: jax.Array
    unmasked_at: jax.Array


def _start(
    process: Absorbing,
    shape: tuple[int, ...],
    prompt: ArrayLike | None,
    prompt_mask: ArrayLike | None,
) -> jax.Array:
    """The first tokens: masks, but where the prompt stands."""
    if prompt is None:
        if prompt_mask is not None:
            raise ValueError("prompt_mask is given without a prompt; give both, or neither")
        return jnp.full(shape, process.mask, jnp.int32)
    tokens, fits = check_tokens("prompt", prompt, process.mask)
    if tokens.shape not in (shape, shape[-1:]):
        raise ValueError(f"prompt has shape {tokens.shape}; expected {shape} or {shape[-1:]}")
    # A prompt that is no token spoils its whole sequence, visibly.
    x = jnp.where(fits[..., None], tokens, process.mask + 1)
    if prompt_mask is not None:
        chosen = jnp.asarray(prompt_mask)
        if chosen.dtype != bool:
            raise TypeError(f"prompt_mask has dtype {chosen.dtype}; expected bool")
        if chosen.shape not in (shape, shape[-1:]):
            raise ValueError(
                f"prompt_mask has shape {chosen.shape}; expected {shape} or {shape[-1:]}"
            )
        x, chosen = jnp.broadcast_to(x, shape), jnp.broadcast_to(chosen, shape)
        x = jnp.where(chosen | (x > process.mask), x, process.mask)
    return jnp.broadcast_to(x, shape)


def _draw(key: jax.Array, log_cond: jax.Array, mask: int) -> jax.Array:
    """A token for each position of one sequence; the mask where the conditional is no number."""
    gumbel = jax.random.gumbel(key, log_cond.shape, log_cond.dtype)
    tokens = jnp.argmax(log_cond + gumbel, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(jnp.isnan(log_cond), axis=-1), mask, tokens)


def _write(
    own_keys: jax.Array,
    field: Conditionals,
    process: Absorbing,
    x: jax.Array,
    at: jax.Array,
    steps: int,
    lam_of: Callable[[jax.Array, jax.Array], jax.Array] | None,
    top_p: ArrayLike | None,
    top_k: int | None,
    cache: bool,
) -> DiscreteSample:
    """Unmask each masked token of ``x`` ``(n, l)`` at its step ``at``, in ``[0, steps)``."""
    at = jnp.where(x == process.mask, at, -1)
    # Under ``shard_map`` the loop's state varies as what is drawn does.
    none = varying_zeros((), jnp.int32, x, at, jax.random.key_data(own_keys))
    x, first = x + none, jnp.zeros(x.shape[:1], jnp.int32) + none
    pending = x == process.mask

    def tokens(step: jax.Array, x: jax.Array, pending: jax.Array) -> jax.Array:
        lam = None if lam_of is None else lam_of(step, pending)
        log_cond = filter_logits(log_conditionals(field, process, x, lam), top_p=top_p, top_k=top_k)
        step_keys = jax.vmap(jax.random.fold_in)(own_keys, step)
        return jax.vmap(lambda k, c: _draw(k, c, process.mask))(step_keys, log_cond)

    # The state: tokens, who still waits, evaluations of each, calls.
    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def is_busy(state: State) -> jax.Array:
        return jnp.any(state[1])

    def jump(state: State) -> State:
        """Every sequence that has one left to its own next busy step."""
        x, pending, nfe, calls = state
        own = jnp.any(pending, axis=-1)
        step = jnp.min(jnp.where(pending, at, steps), axis=-1)
        step = jnp.where(own, step, 0)
        now = pending & (at == step[:, None])
        x = jnp.where(now, tokens(step, x, pending), x)
        return x, pending & ~now, nfe + own.astype(jnp.int32), calls + 1

    def walk(step: jax.Array, state: State) -> State:
        """One step of all sequences, with a call whether or not it is needed."""
        x, pending, nfe, calls = state
        now = pending & (at == step)
        same = jnp.full(x.shape[:1], step, jnp.int32)
        x = jnp.where(now, tokens(same, x, pending), x)
        return x, pending & ~now, nfe, calls + 1

    state: State = (x, pending, first, none)
    if cache:
        x, _, nfe, calls = jax.lax.while_loop(is_busy, jump, state)
    else:
        any_masked = jnp.any(pending, axis=-1)
        count = jnp.where(jnp.any(any_masked), steps, 0)
        x, _, _, calls = jax.lax.fori_loop(0, count, walk, state)
        nfe = jnp.where(any_masked, steps, 0).astype(jnp.int32)
    return DiscreteSample(x, nfe, calls, at)


def _run(
    key: jax.Array,
    field: Conditionals,
    process: Absorbing,
    shape: tuple[int, ...],
    event_ndim: int | None,
    first_index: ArrayLike,
    x: jax.Array,
    steps_of: Callable[[jax.Array], jax.Array],
    steps: int,
    lam_of: Callable[[jax.Array, jax.Array], jax.Array] | None,
    top_p: ArrayLike | None,
    top_k: int | None,
    cache: bool,
) -> DiscreteSample:
    """``_write`` on a batch, or on one sequence as a batch of one."""
    check_filters(top_p, top_k)
    batch = batch_event(shape, event_ndim)[0]
    key = keys.check(key)
    if batch:
        indices = jnp.asarray(first_index) + keys.first_index(batch[0]) + jnp.arange(batch[0])
        own = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
        return _write(own, field, process, x, steps_of(own), steps, lam_of, top_p, top_k, cache)

    def alone(x: jax.Array, *lam: jax.Array) -> jax.Array:
        return jnp.asarray(field(x[0], *(value[0] for value in lam)))[None]

    own = key[None]
    out = _write(own, alone, process, x[None], steps_of(own), steps, lam_of, top_p, top_k, cache)
    return DiscreteSample(out.x[0], out.nfe[0], out.calls, out.unmasked_at[0])


def _sequence_shape(shape: Any, event_ndim: int | None) -> tuple[int, ...]:
    shape = tuple(shape)
    event = batch_event(shape, event_ndim)[1]
    if len(event) != 1 or not event[0]:
        raise ValueError(f"shape is {shape}; expected (n, length), or (length,) with event_ndim=1")
    return shape


# Set apart from the steps, which are folded in too.
_STEPS = 0x57E95


def radd_sample(
    key: jax.Array,
    field: Conditionals,
    process: Absorbing,
    shape: tuple[int, ...],
    steps: int,
    *,
    method: str = "tweedie",
    cache: bool = True,
    takes_level: bool = False,
    prompt: ArrayLike | None = None,
    prompt_mask: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    top_k: int | None = None,
    t_end: ArrayLike | None = None,
    first_index: ArrayLike = 0,
    event_ndim: int | None = None,
) -> DiscreteSample:
    """Sample sequences by the reverse of the absorbing process (module docstring).

    Args:
      key: typed key; sequence ``i`` of a batch uses ``fold_in(key, first_index + i)``, so that it
        does not change with its batch.
      field: logits of clean tokens, see ``score.discrete.log_conditionals``.
      process: the process.
      shape: ``(n, l)``, or ``(l,)`` with ``event_ndim=1``.
      steps: of the uniform time grid from 1 to ``t_end``, at least 1; the last unmasks all.
      method: ``"tweedie"``, exact for given conditionals, or ``"euler"``.
      cache: ``False`` calls the network at every step, for comparison; the same tokens, up to
        conditionals that round differently.
      takes_level: call ``field(x, lam)`` with the probability ``(n,)`` or ``()`` of being masked.
      prompt: ids in [0, V], of ``shape`` or ``(l,)``; masks are filled, the rest stays.
      prompt_mask: bool, of ``shape`` or ``(l,)``: where the prompt counts.
      top_p: draw from the likeliest tokens of this mass only, in (0, 1].
      top_k: draw from so many likeliest tokens only.
      t_end: last time, ``process.t_min`` if ``None``.
      first_index: see ``key``; may be traced.
      event_ndim: see ``shape``.

    Returns:
      A ``DiscreteSample``. Where everything stands already, ``nfe`` is 0. All masks where a traced
      ``t_end`` or the schedule is no number.

    Raises:
      ValueError: ``steps`` below 1, an unknown method, shapes that do not fit, a filter, a known
        ``t_end`` or a concrete id out of range. TypeError: a raw key, ids that are not integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgen.process.absorbing import absorbing
      >>> uniform = lambda x: jnp.zeros((*x.shape, 2))
      >>> out = radd_sample(jax.random.key(0), uniform, absorbing(2), (4, 8), 1000)
      >>> bool(jnp.all(out.x < 2)), bool(jnp.all(out.nfe <= 8))
      (True, True)
    """
    checks.one_of("method", method, METHODS)
    checks.positive_int("steps", steps)
    shape = _sequence_shape(shape, event_ndim)
    times = process.times(steps, t_end=t_end)[:-1]
    rho = process.unmask_schedule(steps, method=method, t_end=t_end)
    survival = jnp.cumprod(1 - rho)

    def steps_of(own: jax.Array) -> jax.Array:
        def one(k: jax.Array) -> jax.Array:
            u = jax.random.uniform(jax.random.fold_in(k, _STEPS), shape[-1:], survival.dtype)
            # Masked still after step i with probability survival[i]: count those above u.
            return jnp.searchsorted(-survival, -u, side="left").astype(jnp.int32)

        return jnp.clip(jax.vmap(one)(own), 0, steps - 1)

    def lam_of(step: jax.Array, pending: jax.Array) -> jax.Array:
        del pending
        return process.mask_probability(times[step])

    out = _run(
        key,
        field,
        process,
        shape,
        event_ndim,
        first_index,
        _start(process, shape, prompt, prompt_mask),
        steps_of,
        steps,
        lam_of if takes_level else None,
        top_p,
        top_k,
        cache,
    )
    # A time or a schedule that is no number would unmask all at once, which looks like text.
    return out._replace(x=jnp.where(jnp.all(jnp.isfinite(rho)), out.x, process.mask))


def ordered_sample(
    key: jax.Array,
    field: Conditionals,
    process: Absorbing,
    shape: tuple[int, ...],
    order: ArrayLike,
    *,
    takes_level: bool = False,
    prompt: ArrayLike | None = None,
    prompt_mask: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    top_k: int | None = None,
    first_index: ArrayLike = 0,
    event_ndim: int | None = None,
) -> DiscreteSample:
    """Sample sequences one token at a time in a given order: an any-order autoregressive model.

    Args:
      key: see ``radd_sample``.
      field: logits of clean tokens, see ``score.discrete.log_conditionals``.
      process: whose vocabulary it is.
      shape: ``(n, l)``, or ``(l,)`` with ``event_ndim=1``.
      order: positions in the order of their writing, a permutation of 0 .. l - 1, ``(l,)``, or of
        ``shape``. Those of the prompt are passed over.
      takes_level: call ``field(x, lam)`` with the share of tokens that are masked.
      prompt: see ``radd_sample``.
      prompt_mask: see ``radd_sample``.
      top_p: see ``radd_sample``.
      top_k: see ``radd_sample``.
      first_index: see ``radd_sample``.
      event_ndim: see ``shape``.

    Returns:
      A ``DiscreteSample``; ``nfe`` is the number of tokens written. An order that is no permutation
      (an error under checkify) gives masks.

    Raises:
      ValueError: see ``radd_sample``; a concrete order that is no permutation.
      TypeError: see ``radd_sample``; an order that is not integer.
    """
    shape = _sequence_shape(shape, event_ndim)
    rank, is_order = written_at(order, shape)
    length = shape[-1]
    x = _start(process, shape, prompt, prompt_mask)

    def steps_of(own: jax.Array) -> jax.Array:
        return rank.reshape((own.shape[0], length)).astype(jnp.int32)

    def lam_of(step: jax.Array, pending: jax.Array) -> jax.Array:
        del step
        return jnp.mean(pending, axis=-1, dtype=jnp.float32)

    out = _run(
        key,
        field,
        process,
        shape,
        event_ndim,
        first_index,
        x,
        steps_of,
        length,
        lam_of if takes_level else None,
        top_p,
        top_k,
        True,
    )
    return out._replace(x=jnp.where(is_order[..., None], out.x, process.mask))
