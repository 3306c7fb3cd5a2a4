r"""Measurement operators y = f(x) of inverse problems: what was done to one event, and a way back.

Each is a frozen pytree: ``f(x)`` measures one event without a batch (``vmap`` for a batch), and for
a linear f(x) = A x

    f.pinv(y, c) = A^T (A A^T + c I)^{-1} y                                                 (1)

At the ridge c = 0 this is the pseudo-inverse: an image to start from, and the projection of PiGDM
(Song et al., ICLR 2023). With noise of deviation s in y it is, at c = s^2/r^2, the posterior mean
under the prior N(0, r^2 I), the proximal map of DiffPIR (Zhu et al., arXiv 2305.08995).
``f.transpose(y)`` is A^T y. An operator that is not linear has a ``pinv`` that is a rough way back,
described where it stands, and no transpose.

The methods of this room take any differentiable function of one event in place of an operator;
those that need a pseudo-inverse say so. Events are images ``(h, w, c)`` or ``(h, w)``, or have one
axis.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks
from jaxgen.core.arrays import at_least_f32, matmul, varying_zeros

__all__ = [
    "Operator",
    "average_pool",
    "blur",
    "compose",
    "gaussian_blur",
    "grayscale",
    "hdr",
    "linear",
    "mask",
    "phase_retrieval",
]

_pytree = functools.partial(jax.tree_util.register_dataclass)


def _static(**options: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """What every operator has (module docstring); made by the functions of this file."""

    @property
    def is_linear(self) -> bool:
        """Whether ``transpose`` and equation (1) hold."""
        return True

    def __call__(self, x: jax.Array) -> jax.Array:
        """The measurement of one event."""
        raise NotImplementedError

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        """Equation (1) for one measurement; ``ridge`` is c, ``()`` and at least 0."""
        raise NotImplementedError

    def transpose(self, y: jax.Array) -> jax.Array:
        """``A^T y`` of one measurement."""
        raise TypeError(f"{type(self).__name__} is not linear and has no transpose")

    def observed(self, y: jax.Array) -> jax.Array:
        """The measurement without what is not looked at."""
        return y


def _space(ndim: int) -> tuple[int, ...]:
    """The axes of space: the first two, or the only one."""
    return tuple(range(min(ndim, 2)))


# --- mask ---------------------------------------------------------------------------------------


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Mask(Operator):
    """See ``mask``."""

    known: jax.Array
    valid: jax.Array

    def _fit(self, name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = self.known.shape
        if len(shape) > x.ndim or any(
            a not in (1, b) for a, b in zip(shape[::-1], x.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"the mask has shape {shape}, which does not broadcast to {name} of shape {x.shape}"
            )
        wide = (1,) * (x.ndim - len(shape)) + shape
        return self.known.reshape(wide), self.valid.reshape(wide)

    def _keep(self, name: str, x: jax.Array) -> jax.Array:
        known, valid = self._fit(name, x)
        return jnp.where(valid, jnp.where(known, x, jnp.zeros_like(x)), jnp.nan).astype(x.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._keep("x", x)

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        return (self._keep("y", y) / (1 + ridge)).astype(y.dtype)

    def transpose(self, y: jax.Array) -> jax.Array:
        return self._keep("y", y)

    def observed(self, y: jax.Array) -> jax.Array:
        return self._keep("y", y)


def mask(m: ArrayLike) -> Mask:
    """Keep the entries where ``m`` is 1; the measurement is of the event's shape, else zero.

    Entries of a measurement where ``m`` is 0 are not looked at, and may be anything.

    Args:
      m: 1 where an entry is observed and 0 elsewhere, bool, integer or floating; broadcasts to the
        event from the right.

    Raises:
      ValueError: other values than 0 and 1 (traced: NaN there, and an error under ``checkify``).

    Warns:
      UserWarning: nothing is observed.

    Example:
      >>> import jax.numpy as jnp
      >>> mask(jnp.array([1, 0]))(jnp.array([3.0, 4.0])).tolist()
      [3.0, 0.0]
    """
    known = checks.concrete(m)
    if known is not None:
        if not np.all((known == 0) | (known == 1)):
            raise ValueError("m has other values than 0 and 1; expected 1 where x is observed")
        if not known.any():
            warnings.warn("m observes nothing: the measurement says nothing of x", stacklevel=2)
    given = jnp.asarray(m)
    valid = (given == 0) | (given == 1)
    checks.debug_check(jnp.all(valid), "m has other values than 0 and 1")
    return Mask(given == 1, valid)


# --- averages -----------------------------------------------------------------------------------


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class AveragePool(Operator):
    """See ``average_pool``."""

    factor: int = _static()

    def __call__(self, x: jax.Array) -> jax.Array:
        space = _space(x.ndim)
        if not space or any(x.shape[a] % self.factor for a in space):
            raise ValueError(
                f"x has shape {x.shape}; expected sides that {self.factor} divides, for an average "
                f"over blocks of {self.factor}"
            )
        shape: tuple[int, ...] = ()
        for a in space:
            shape += (x.shape[a] // self.factor, self.factor)
        blocks = x.reshape(shape + x.shape[len(space) :])
        return jnp.mean(blocks, axis=tuple(2 * a + 1 for a in space)).astype(x.dtype)

    def _up(self, y: jax.Array) -> jax.Array:
        for a in _space(y.ndim):
            y = jnp.repeat(y, self.factor, axis=a)
        return y

    def _cells(self, y: jax.Array) -> int:
        return self.factor ** len(_space(y.ndim))

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        # A A^T is 1/cells.
        return (self._up(y) / (1 + ridge * self._cells(y))).astype(y.dtype)

    def transpose(self, y: jax.Array) -> jax.Array:
        return self._up(y) / self._cells(y)


def average_pool(factor: int) -> AveragePool:
    """Means over blocks of ``factor`` pixels a side: ``(h, w, c) -> (h/factor, w/factor, c)``.

    The pseudo-inverse repeats each mean over its block.

    Raises:
      ValueError: ``factor < 1``; when called, sides that it does not divide.
    """
    return AveragePool(checks.positive_int("factor", factor))


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Grayscale(Operator):
    """See ``grayscale``."""

    weights: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim < 1 or x.shape[-1:] != self.weights.shape:
            raise ValueError(
                f"x has shape {x.shape}; expected a last axis of {self.weights.shape[0]} channels"
            )
        return matmul(x, self.weights.astype(x.dtype))[..., None]

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        return (self.transpose(y) / (jnp.sum(self.weights**2) + ridge)).astype(y.dtype)

    def transpose(self, y: jax.Array) -> jax.Array:
        if y.ndim < 1 or y.shape[-1] != 1:
            raise ValueError(f"y has shape {y.shape}; expected a last axis of 1, the grey level")
        return y * self.weights.astype(y.dtype).reshape((1,) * (y.ndim - 1) + self.weights.shape)


def grayscale(weights: ArrayLike | tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)) -> Grayscale:
    """A weighted mean of the channels: ``(*space, c) -> (*space, 1)``.

    Args:
      weights: ``(c,)``, the plain mean of three channels by default.

    Raises:
      ValueError: ``weights`` has another number of axes than one.
    """
    weights = jnp.asarray(weights, float)
    if weights.ndim != 1:
        raise ValueError(f"weights has shape {weights.shape}; expected (channels,)")
    return Grayscale(weights)


# --- blur ---------------------------------------------------------------------------------------


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Blur(Operator):
    """See ``blur``."""

    kernel: jax.Array
    cut: float

    def _response(self, x: jax.Array) -> jax.Array:
        """The operator's eigenvalues: the transform of the kernel, its middle at the origin."""
        ndim, sides = self.kernel.ndim, self.kernel.shape
        if x.ndim < ndim or any(k > n for k, n in zip(sides, x.shape, strict=False)):
            raise ValueError(
                f"the event has shape {x.shape}; expected {ndim} axes of space, each at least as "
                f"long as the kernel of shape {sides}"
            )
        pads = [(0, n - k) for k, n in zip(sides, x.shape, strict=False)]
        centred = jnp.roll(
            jnp.pad(self.kernel.astype(at_least_f32(x.dtype)), pads),
            [-(k // 2) for k in sides],
            axis=tuple(range(ndim)),
        )
        response = jnp.fft.fftn(centred)
        return response.reshape(response.shape + (1,) * (x.ndim - ndim))

    def _filter(self, x: jax.Array, response: jax.Array) -> jax.Array:
        axes = tuple(range(self.kernel.ndim))
        wide = x.astype(at_least_f32(x.dtype))
        return jnp.fft.ifftn(jnp.fft.fftn(wide, axes=axes) * response, axes=axes).real.astype(
            x.dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._filter(x, self._response(x))

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        response = self._response(y)
        power = jnp.abs(response) ** 2
        square = power + ridge
        lost = square < self.cut**2 * jnp.max(power)
        inverse = jnp.where(lost, 0.0, jnp.conj(response) / jnp.where(lost, 1.0, square))
        return self._filter(y, inverse)

    def transpose(self, y: jax.Array) -> jax.Array:
        return self._filter(y, jnp.conj(self._response(y)))


def blur(kernel: ArrayLike, *, cut: float = 0.03) -> Blur:
    """Convolution of the first axes with a kernel, around the edges (periodic).

    Args:
      kernel: ``(k,)`` or ``(k, l)``, its middle at ``k // 2``; not normalised here.
      cut: frequencies that the kernel leaves less than this share of its strongest (and no ridge
        lifts) are taken for lost: ``pinv`` is zero there, so that noise is amplified at most
        ``1/cut`` times, and ``A pinv(A x)`` is ``A x`` but for them.

    Raises:
      ValueError: a kernel of other than one or two axes; when called, an event smaller than it.
    """
    kernel = jnp.asarray(kernel, float)
    if kernel.ndim not in (1, 2):
        raise ValueError(f"kernel has shape {kernel.shape}; expected (k,) or (k, l)")
    return Blur(kernel, cut)


def gaussian_blur(std: float, *, size: int | None = None, cut: float = 0.03) -> Blur:
    """Blur of images by a normalised Gaussian kernel, around the edges (periodic).

    Args:
      std: in pixels.
      size: side of the kernel; odd, by default out to three deviations.
      cut: see ``blur``.

    Raises:
      ValueError: ``std <= 0`` or an even ``size``.
    """
    if not std > 0:
        raise ValueError(f"std is {std}; expected a positive number of pixels")
    size = 2 * math.ceil(3 * std) + 1 if size is None else checks.positive_int("size", size)
    if size % 2 == 0:
        raise ValueError(f"size is {size}; expected an odd number of pixels")
    line = np.exp(-0.5 * ((np.arange(size) - size // 2) / std) ** 2)
    line /= line.sum()
    return blur(np.outer(line, line), cut=cut)


# --- any matrix, and one after the other --------------------------------------------------------


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Linear(Operator):
    """See ``linear``."""

    left: jax.Array
    values: jax.Array
    right: jax.Array
    event: tuple[int, ...] = _static()

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.shape != self.event:
            raise ValueError(f"x has shape {x.shape}; expected the event {self.event}")
        inner = self.values * matmul(self.right, x.reshape(-1))
        return matmul(self.left, inner).astype(x.dtype)

    def _back(self, y: jax.Array, gains: jax.Array) -> jax.Array:
        if y.shape != self.left.shape[:1]:
            raise ValueError(f"y has shape {y.shape}; expected {self.left.shape[:1]}")
        x = matmul(self.right.T, gains * matmul(self.left.T, y))
        return x.reshape(self.event).astype(y.dtype)

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        # As numpy.linalg.pinv does, what is below rounding counts as zero.
        size = max(self.left.shape[0], self.right.shape[1])
        floor = size * jnp.finfo(self.values.dtype).eps * jnp.max(self.values)
        square = self.values**2 + ridge
        lost = square <= floor**2
        return self._back(y, jnp.where(lost, 0.0, self.values / jnp.where(lost, 1.0, square)))

    def transpose(self, y: jax.Array) -> jax.Array:
        return self._back(y, self.values)


def linear(matrix: ArrayLike, event: tuple[int, ...] | None = None) -> Linear:
    """``A x`` of the flattened event: ``(*event) -> (m,)``. A is kept as its singular values.

    Args:
      matrix: A, real ``(m, d)``.
      event: the event's shape, ``(d,)`` if ``None``.

    Raises:
      ValueError: not two axes, or an event of another size than ``d``.
      TypeError: a complex matrix; give a function of the event instead.
    """
    matrix = jnp.asarray(matrix)
    if jnp.iscomplexobj(matrix):
        raise TypeError(f"matrix has dtype {matrix.dtype}; expected a real one")
    if matrix.ndim != 2:
        raise ValueError(f"matrix has shape {matrix.shape}; expected (m, d)")
    event = (matrix.shape[1],) if event is None else tuple(event)
    if math.prod(event) != matrix.shape[1]:
        raise ValueError(f"event is {event}; expected {matrix.shape[1]} entries, as columns")
    left, values, right = jnp.linalg.svd(
        matrix.astype(at_least_f32(matrix.dtype)), full_matrices=False
    )
    return Linear(left, values, right, event)


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Compose(Operator):
    """See ``compose``."""

    parts: tuple[Operator, ...]
    iterations: int = _static()

    @property
    def is_linear(self) -> bool:
        """Whether every part is."""
        return all(part.is_linear for part in self.parts)

    def __call__(self, x: jax.Array) -> jax.Array:
        for part in reversed(self.parts):
            x = part(x)
        return x

    def transpose(self, y: jax.Array) -> jax.Array:
        for part in self.parts:
            y = part.transpose(y)
        return y

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        if not self.is_linear:
            for part in self.parts:
                y = part.pinv(y, ridge)
            return y

        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        return _least_squares(self, self.transpose, wide, ridge, self.iterations).astype(y.dtype)

    def observed(self, y: jax.Array) -> jax.Array:
        return self.parts[0].observed(y)


def compose(*parts: Operator, iterations: int = 50) -> Compose:
    """Operators one after the other, the last one first: ``compose(f, g)(x) = f(g(x))``.

    The pseudo-inverse of linear parts solves equation (1) by conjugate gradients on the least
    squares of x, where few ``iterations`` leave out what the parts damp most, and noise would swell
    most. If one is not linear it goes back part by part, which is exact only where each part's is.

    Args:
      *parts: at least one.
      iterations: of conjugate gradients.

    Raises:
      ValueError: no parts.
      TypeError: a part that is no operator.
    """
    if not parts:
        raise ValueError("compose got no operators; expected at least one")
    for part in parts:
        if not isinstance(part, Operator):
            raise TypeError(f"compose got {part!r}; expected operators of this file")
    return Compose(tuple(parts), checks.positive_int("iterations", iterations))


def _least_squares(
    forward: Callable[[jax.Array], jax.Array],
    back: Callable[[jax.Array], jax.Array],
    y: jax.Array,
    ridge: ArrayLike,
    iterations: int,
) -> jax.Array:
    """``(A^T A + ridge)^{-1} A^T y`` from zero, until the slope is rounding.

    Equation (1) by conjugate gradients, on x and not on y: a y that A cannot reach (noise where
    rows of A depend on each other) has no place in its equations.
    """

    def norm2(v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(v) ** 2)

    slope = back(y)
    start = norm2(slope)
    ridge = jnp.asarray(ridge, start.dtype)
    least = jnp.finfo(start.dtype).eps ** 2 * start

    def advance(_: Any, state: Any) -> Any:
        x, gap, p, square = state
        # So turned, NaN goes on, to every entry.
        going = ~(square <= least)
        image = forward(p)
        length = norm2(image) + ridge * norm2(p)
        step = jnp.where(going, square / jnp.where(going, length, 1.0), 0.0)
        x, gap = x + step * p, gap - step * image
        r = back(gap) - ridge * x
        new = norm2(r)
        keep = jnp.where(going, new / jnp.where(going, square, 1.0), 0.0)
        return x, gap, r + keep * p, jnp.where(going, new, square)

    x = varying_zeros(slope.shape, slope.dtype, slope)
    return jax.lax.fori_loop(0, iterations, advance, (x, y, slope, start))[0]


# --- not linear ---------------------------------------------------------------------------------


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class HDR(Operator):
    """See ``hdr``."""

    @property
    def is_linear(self) -> bool:
        """It clips."""
        return False

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.clip(2 * x, -1, 1)

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        return (2 * y / (4 + ridge)).astype(y.dtype)


def hdr() -> HDR:
    """High dynamic range: ``clip(2 x, -1, 1)`` of values in [-1, 1].

    ``pinv`` is that of ``2 x``: ``y/2`` at ridge 0, half of the truth where it was clipped.
    """
    return HDR()


@_pytree
@dataclasses.dataclass(frozen=True, eq=False)
class PhaseRetrieval(Operator):
    """See ``phase_retrieval``."""

    pad: int = _static()

    @property
    def is_linear(self) -> bool:
        """Magnitudes are not."""
        return False

    def __call__(self, x: jax.Array) -> jax.Array:
        space = _space(x.ndim)
        pads = [(self.pad, self.pad) if a in space else (0, 0) for a in range(x.ndim)]
        wide = jnp.pad(x.astype(at_least_f32(x.dtype)), pads)
        return jnp.abs(jnp.fft.fftn(wide, axes=space, norm="ortho")).astype(x.dtype)

    def pinv(self, y: jax.Array, ridge: ArrayLike = 0.0) -> jax.Array:
        space = _space(y.ndim)
        if any(y.shape[a] <= 2 * self.pad for a in space):
            raise ValueError(f"y has shape {y.shape}; expected sides above 2 pad = {2 * self.pad}")
        inner = tuple(
            slice(self.pad, n - self.pad) if a in space else slice(None)
            for a, n in enumerate(y.shape)
        )
        back = jnp.fft.ifftn(y.astype(at_least_f32(y.dtype)), axes=space, norm="ortho")
        return (jnp.abs(back)[inner] / (1 + ridge)).astype(y.dtype)


def phase_retrieval(pad: int = 0) -> PhaseRetrieval:
    """Magnitudes of the orthonormal Fourier transform of the event with a border of zeros.

    The sign, and shifts within the border, are lost: try several keys and keep the one of least
    residual. ``pinv`` is ``|ifft(y)|`` without the border, a place to start.

    Args:
      pad: zeros on each side.

    Raises:
      ValueError: ``pad < 0``.
    """
    return PhaseRetrieval(checks.positive_int("pad", pad, least=0))
