r"""Changing the resolution of images by two: FIR filters, means, nearest neighbours.

A FIR filter ``k`` (Karras et al., StyleGAN2, 2020; Zhang, 2019) is normalised to sum one and
applied along each axis::

    down:  y[n] = sum_j k[j] x[2 n + p - j]            up:  y[n] = 2 sum_j k[j] (z x)[n + p - j]

where ``z x`` has a zero after every pixel, and pixels outside the image are zero. The factor two
per axis (four in all) makes up for the zeros, so that constants stay constants in the interior in
both directions. With the symmetric kernel (1, 3, 3, 1) ``up`` is four times the transpose of
``down``.

Everything is written as sums of shifted slices: XLA fuses them, and on a CPU they beat a grouped
convolution by far.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

FIR_KERNEL = (1.0, 3.0, 3.0, 1.0)


def fir_down(x: jax.Array, kernel: Sequence[float] = FIR_KERNEL) -> jax.Array:
    """Filter and keep every second pixel.

    Args:
        x: ``(n, h, w, c)``, with even ``h`` and ``w``.
        kernel: static filter taps along one axis, at least 2, with a sum other than zero.

    Returns:
        ``(n, h/2, w/2, c)`` in the dtype of ``x``.

    Raises:
        ValueError: wrong rank, an odd side, or a kernel that cannot be normalised.
    """
    _check_image(x, even=True)
    taps = _normalised(kernel)
    spare = len(taps) - 2
    for axis in (1, 2):
        x = _filter(x, axis, taps, before=(spare + 1) // 2, after=spare // 2, stride=2)
    return x


def fir_up(x: jax.Array, kernel: Sequence[float] = FIR_KERNEL) -> jax.Array:
    """Put zeros between the pixels and filter, with a gain of two per axis.

    Args:
        x: ``(n, h, w, c)``.
        kernel: static filter taps along one axis, at least 2, with a sum other than zero.

    Returns:
        ``(n, 2h, 2w, c)`` in the dtype of ``x``.

    Raises:
        ValueError: wrong rank, or a kernel that cannot be normalised.
    """
    _check_image(x)
    taps = 2 * _normalised(kernel)
    spare = len(taps) - 2
    for axis in (1, 2):
        x = _filter(x, axis, taps, before=(spare + 1) // 2 + 1, after=spare // 2, dilation=2)
    return x


def mean_down(x: jax.Array) -> jax.Array:
    """Average blocks of two by two pixels: ``(n, h, w, c)`` to ``(n, h/2, w/2, c)``.

    Raises:
        ValueError: wrong rank or an odd side.
    """
    _check_image(x, even=True)
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def nearest_up(x: jax.Array) -> jax.Array:
    """Repeat every pixel two by two: ``(n, h, w, c)`` to ``(n, 2h, 2w, c)``.

    Raises:
        ValueError: wrong rank.
    """
    _check_image(x)
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


def space_to_depth(x: jax.Array, block: int) -> jax.Array:
    """Fold blocks of pixels into channels: ``(n, h, w, c)`` to ``(n, h/b, w/b, b b c)``.

    Raises:
        ValueError: wrong rank, or a side that ``block`` does not divide.
    """
    _check_image(x)
    n, h, w, c = x.shape
    if h % block or w % block:
        raise ValueError(f"x: expected sides divisible by {block}, received {x.shape}")
    x = x.reshape(n, h // block, block, w // block, block, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, h // block, w // block, block * block * c)


def depth_to_space(x: jax.Array, block: int) -> jax.Array:
    """Undo `space_to_depth`: ``(n, h, w, b b c)`` to ``(n, b h, b w, c)``.

    Raises:
        ValueError: wrong rank, or channels that ``block * block`` does not divide.
    """
    _check_image(x)
    n, h, w, c = x.shape
    if c % (block * block):
        raise ValueError(f"x: expected channels divisible by {block * block}, received {x.shape}")
    x = x.reshape(n, h, w, block, block, c // (block * block))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, h * block, w * block, c // (block * block))


def fir_pad(x: jax.Array, kernel: Sequence[float], extra: int) -> jax.Array:
    """Filter at full rate, ready for a strided convolution without padding of its own.

    Filtering and a strided convolution of ``extra + 1`` taps share one padding, as NCSN++ does
    when it shrinks its input pyramid.

    Args:
        x: ``(n, h, w, c)``.
        kernel: static filter taps along one axis.
        extra: taps of the convolution to come, less one.

    Returns:
        ``(n, h + extra - 1, w + extra - 1, c)`` in the dtype of ``x``.
    """
    _check_image(x)
    taps = _normalised(kernel)
    spare = len(taps) - 2 + extra
    for axis in (1, 2):
        x = _filter(x, axis, taps, before=(spare + 1) // 2, after=spare // 2)
    return x


def _filter(
    x: jax.Array,
    axis: int,
    taps: np.ndarray,
    *,
    before: int,
    after: int,
    stride: int = 1,
    dilation: int = 1,
) -> jax.Array:
    """True convolution along one axis of the padded, zero-stuffed signal."""
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (before, after + dilation - 1, dilation - 1)
    padded = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
    valid = padded.shape[axis] - len(taps) + 1
    total = jnp.zeros((), x.dtype)
    for start, tap in enumerate(taps[::-1]):
        window = jax.lax.slice_in_dim(padded, start, start + valid, stride, axis)
        term = window * jnp.asarray(tap, x.dtype)
        total = term if start == 0 else total + term
    return total


def _normalised(kernel: Sequence[float]) -> np.ndarray:
    taps = np.asarray(kernel, np.float64)
    if taps.ndim != 1 or len(taps) < 2 or not np.isfinite(taps).all() or taps.sum() == 0:
        raise ValueError(
            "kernel: expected at least two finite taps along one axis with a sum other than zero, "
            f"received {kernel!r}"
        )
    return taps / taps.sum()


def _check_image(x: jax.Array, *, even: bool = False) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: expected shape (n, h, w, c), received {x.shape}")
    if even and (x.shape[1] % 2 or x.shape[2] % 2):
        raise ValueError(f"x: expected even height and width, received {x.shape}")
