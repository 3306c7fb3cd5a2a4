r"""Hashes of indices in 32-bit words, the same bits in numpy, in jitted JAX and inside a kernel.

Universal hashing modulo the Mersenne prime P = 2^31 - 1 (Carter and Wegman, 1979) needs products
of 62 bits, which JAX lacks without x64. With x = x1 2^16 + x0 and a = a1 2^16 + a0,

    a x = 2^32 a1 x1 + 2^16 (a1 x0 + a0 x1) + a0 x0,      2^32 = 2,  2^31 = 1   (mod P)

and every term and partial sum below fits an unsigned word once it is folded by
``v -> (v mod 2^31) + (v div 2^31)``.

All functions use ``+ - * & | ^ >> <<`` alone on uint32 words, so they trace anywhere; a numpy array
in gives a numpy array out.
"""

from typing import Any

import jax
import numpy as np

__all__ = ["P", "fmix32", "mersenne31", "quadratic31", "sign"]

P = 2**31 - 1


def _words(name: str, x: Any) -> Any:
    """``x`` as uint32 words: numpy for numpy and Python ints, else as JAX has it."""
    if isinstance(x, int | np.generic | np.ndarray):
        if np.asarray(x).dtype.kind not in "iu" or np.any(np.asarray(x) < 0):
            raise TypeError(f"{name} is no array of non-negative integers")
        if np.any(np.asarray(x) > 2**32 - 1):
            raise ValueError(f"{name} has values of more than 32 bits")
        return np.asarray(x).astype(np.uint32)
    if not jax.numpy.issubdtype(x.dtype, jax.numpy.integer):
        raise TypeError(f"{name} has dtype {x.dtype}; expected integers")
    return x.astype(np.uint32)


def _coefficient(name: str, value: Any, low: int) -> Any:
    """A key of the hash: a Python int in ``[low, P)``, or words that are known to be."""
    if isinstance(value, int) and not low <= value < P:
        raise ValueError(f"{name} is {value}; expected an integer in [{low}, {P})")
    return np.uint32(value) if isinstance(value, int) else value


def _fold(v: Any) -> Any:
    """A smaller word of the same residue: at most 2^31 for any word."""
    return (v & np.uint32(P)) + (v >> np.uint32(31))


def _times(a: Any, x: Any) -> Any:
    """``a x`` up to a multiple of P, at most 2^31, for words ``a < P`` and any ``x``."""
    half, low = np.uint32(16), np.uint32(0xFFFF)
    x = _fold(x)
    a1, a0, x1, x0 = a >> half, a & low, x >> half, x & low
    high = np.uint32(2) * a1 * x1
    middle = _fold(_fold(a1 * x0) + _fold(a0 * x1))
    shifted = (middle >> np.uint32(15)) + ((middle & np.uint32(0x7FFF)) << half)
    return _fold(_fold(high + _fold(shifted)) + _fold(a0 * x0))


def _reduced(v: Any) -> Any:
    """The residue in ``[0, P)`` of a word."""
    v = _fold(v)
    return v - np.uint32(P) * (v >= np.uint32(P)).astype(np.uint32)


def mersenne31(x: Any, a: int | Any, b: int | Any) -> Any:
    """``(a x + b) mod P``: a universal hash of single keys.

    On consecutive ``x`` it is an arithmetic progression, not a random function: see
    ``quadratic31`` and ``fmix32`` for element-wise hashing.

    Args:
      x: integers in ``[0, 2^32)``, any shape.
      a: multiplier in ``[1, P)``.
      b: offset in ``[0, P)``.

    Returns:
      uint32 in ``[0, P)``, of ``x``'s shape.

    Raises:
      TypeError: ``x`` is not of an integer dtype.
      ValueError: a key out of range, where it is a Python int.

    Example:
      >>> int(mersenne31(7, 3, 5))
      26
    """
    with np.errstate(over="ignore"):
        product = _times(_coefficient("a", a, 1), _words("x", x))
        return _reduced(product + _coefficient("b", b, 0))


def quadratic31(x: Any, a: int | Any, a2: int | Any, b: int | Any) -> Any:
    """``(a x + a2 x^2 + b) mod P``: spreads consecutive ``x`` as a random function would.

    Args:
      x: integers in ``[0, 2^32)``, any shape.
      a: multiplier of ``x``, in ``[0, P)``.
      a2: multiplier of ``x^2``, in ``[1, P)``.
      b: offset in ``[0, P)``.

    Returns:
      uint32 in ``[0, P)``, of ``x``'s shape.

    Raises:
      TypeError: ``x`` is not of an integer dtype.
      ValueError: a key out of range, where it is a Python int.

    Example:
      >>> int(quadratic31(7, 3, 2, 5))
      124
    """
    with np.errstate(over="ignore"):
        x = _words("x", x)
        inner = _reduced(_times(_coefficient("a2", a2, 1), x) + _coefficient("a", a, 0))
        return _reduced(_times(inner, x) + _coefficient("b", b, 0))


def fmix32(x: Any, seed: int | Any = 0) -> Any:
    """The finaliser of MurmurHash3 (Appleby) on ``x xor seed``: a bijection of 32-bit words.

    Args:
      x: integers in ``[0, 2^32)``, any shape.
      seed: a word.

    Returns:
      uint32, of ``x``'s shape.

    Raises:
      TypeError: ``x`` is not of an integer dtype.

    Example:
      >>> int(fmix32(1))
      1364076727
    """
    with np.errstate(over="ignore"):
        h = _words("x", x) ^ _words("seed", seed)
        h = h ^ (h >> np.uint32(16))
        h = h * np.uint32(0x85EBCA6B)
        h = h ^ (h >> np.uint32(13))
        h = h * np.uint32(0xC2B2AE35)
        return h ^ (h >> np.uint32(16))


def sign(x: Any, seed: int | Any = 0) -> Any:
    """A random sign of each ``x``: +1 or -1 by one bit of ``fmix32``.

    Args:
      x: integers in ``[0, 2^32)``, any shape.
      seed: a word.

    Returns:
      int32, of ``x``'s shape.

    Raises:
      TypeError: ``x`` is not of an integer dtype.

    Example:
      >>> sign(np.arange(4), 7).tolist()
      [1, 1, -1, -1]
    """
    bit = (fmix32(x, seed) & np.uint32(1)).astype(np.int32)
    return np.int32(1) - np.int32(2) * bit
