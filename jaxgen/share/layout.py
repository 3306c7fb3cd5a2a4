r"""Layouts: which slot, sign and scale of a pool makes each weight, as static data.

The n selected weights of a pytree stand in one fixed order, leaf after leaf, and weight i is

    theta_i = lambda_l(i) g(i) psi_h(i),    i = 0 .. n - 1,

psi the pool of m numbers, h(i) its slot, g(i) a hashed sign, lambda_l = C_l / pool_std with C_l
the standard deviation that leaf l starts with. The schemes differ in h:

- ``"stable"`` (STABLE-RPS, Desai and Shrivastava, ICLR 2024, arXiv 2310.11611): i = q m + t,
  h(i) = (u(q) + t) mod m. Each partition q is a rotation of the pool, every slot has floor(n/m) or
  ceil(n/m) weights, and at m = n the map is a permutation: the dense model.
- ``"roast"`` (ROAST, Desai et al., ICML 2023): each chunk of a matrix is a window of the pool at a
  hashed start.
- ``"hashednet"`` (Chen et al., 2015, arXiv 1504.04788): each weight has a hashed slot of its own.

With tiles (``tile=(bk, bn)``) a leaf is taken as a matrix, padded to whole tiles and ordered tile
by tile, the pool is a whole number of tiles and every rotation too. Nothing here touches a device:
layouts are made from shapes, so that a model too large to build can be planned.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from jaxgen.core.checks import one_of, positive_int
from jaxgen.core.topk import count_kept
from jaxgen.share.hashing import P, fmix32, mersenne31
from jaxgen.share.scales import Scale, leaf_scale

__all__ = ["Kept", "Layout", "Spec", "leaf", "plan"]

Scheme = Literal["stable", "roast", "hashednet"]
_SCHEMES = ("stable", "roast", "hashednet")
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Spec:
    """One shared leaf: all that says how the pool makes it.

    Attributes:
      path: its name, such as ``"dense/kernel"``.
      shape: its shape; as a matrix ``(prod(shape[:-1]), shape[-1])``.
      offset: the global index of its first weight, padding counted.
      scale: lambda, by which a slot is multiplied.
      m: slots of the pool.
      scheme: ``"stable"``, ``"roast"`` or ``"hashednet"``.
      tile: ``(bk, bn)`` of its order, or ``None`` for row-major.
      sign: whether weights have hashed signs.
      seed: of the hashes.
    """

    path: str
    shape: tuple[int, ...]
    offset: int
    scale: float
    m: int
    scheme: Scheme
    tile: tuple[int, int] | None
    sign: bool
    seed: int

    @property
    def size(self) -> int:
        """Number of weights, without padding."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """The leaf's shape as a matrix."""
        return math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles down and across."""
        assert self.tile is not None
        (rows, columns), (bk, bn) = self.matrix, self.tile
        return -(-rows // bk), -(-columns // bn)

    @property
    def padded(self) -> int:
        """Number of weights with the padding to whole tiles."""
        return self.size if self.tile is None else math.prod(self.grid) * math.prod(self.tile)

    @property
    def unit(self) -> int:
        """Slots that a rotation moves together: a tile under ``"stable"``, else one."""
        return math.prod(self.tile) if self.tile and self.scheme == "stable" else 1

    @property
    def units(self) -> int:
        """The pool's length in units."""
        return self.m // self.unit

    def key(self, name: int, low: int = 0) -> int:
        """A hash key in ``[low, P)``, the same for every leaf of the layout."""
        return low + int(fmix32(fmix32(name, 0x5EED), self.seed)) % (P - low)

    def shift(self, q: Any) -> Any:
        """u(q): by how many units partition ``q`` rotates the pool; numpy, JAX or a kernel."""
        return mersenne31(q, self.key(1, 1), self.key(2)) % np.uint32(self.units)

    @property
    def sign_seed(self) -> int:
        """The word that seeds the signs."""
        return int(fmix32(fmix32(3, 0x5EED), self.seed))


@dataclasses.dataclass(frozen=True)
class Kept:
    """A leaf that passes through as it is: its name, shape, dtype and the reason."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    reason: str

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How a pytree of parameters lives in a pool: static and hashable, made by ``plan``.

    Attributes:
      leaves: the shared leaves, in the order of the tree.
      kept: the leaves that pass through.
      order: per leaf of the tree, its name, in order.
      m: slots of the pool.
      scheme: ``"stable"``, ``"roast"`` or ``"hashednet"``.
      tile: ``(bk, bn)``, or ``None``.
      pool_std: standard deviation of a new pool.
      structure: the tree's structure; ``None`` for a layout read from JSON, whose trees are then
        nested dicts by name.
    """

    leaves: tuple[Spec, ...]
    kept: tuple[Kept, ...]
    order: tuple[str, ...]
    m: int
    scheme: Scheme
    tile: tuple[int, int] | None
    pool_std: float
    sign: bool
    seed: int
    structure: Any = None

    @property
    def n(self) -> int:
        """Number of shared weights, without padding."""
        return sum(spec.size for spec in self.leaves)

    @property
    def padded(self) -> int:
        """Number of shared weights with the padding to whole tiles."""
        return self.leaves[-1].offset + self.leaves[-1].padded

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: equal where every weight is made from the same slot.

        Scales and the names and shapes of what passes through count too, the reasons for it do not.
        """
        data = json.loads(self.to_json())
        data["kept"] = [entry[:3] for entry in data["kept"]]
        text = json.dumps(data, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout) or self.fingerprint != other.fingerprint:
            return False
        # A structure compares with no None.
        if self.structure is None or other.structure is None:
            return self.structure is other.structure
        return bool(self.structure == other.structure)

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.structure))

    def to_json(self) -> str:
        """The layout as one line of JSON; ``from_json`` reads it."""
        return json.dumps(
            {
                "format": _FORMAT,
                "scheme": self.scheme,
                "m": self.m,
                "tile": self.tile,
                "pool_std": self.pool_std,
                "sign": self.sign,
                "seed": self.seed,
                "order": self.order,
                "leaves": [[s.path, s.shape, s.scale] for s in self.leaves],
                "kept": [[k.path, k.shape, k.dtype, k.reason] for k in self.kept],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str, like: Any = None) -> "Layout":
        """Read a layout.

        Args:
          text: what ``to_json`` gave.
          like: a pytree (arrays or shapes) with the structure of the parameters; without it
            ``expand`` gives nested dicts by name, as Flax's parameters are and Haiku's are not.

        Raises:
          ValueError: no layout, a layout of another format, or ``like`` has other leaves.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']}; expected {_FORMAT}")
            tile = None if data["tile"] is None else (int(data["tile"][0]), int(data["tile"][1]))
            one_of("scheme", data["scheme"], _SCHEMES)
            common = {
                "m": int(data["m"]),
                "scheme": data["scheme"],
                "tile": tile,
                "sign": bool(data["sign"]),
                "seed": int(data["seed"]),
            }
            leaves = _specs([(p, tuple(s), float(c)) for p, s, c in data["leaves"]], common)
            kept = tuple(Kept(p, tuple(s), d, r) for p, s, d, r in data["kept"])
            order = tuple(data["order"])
            pool_std = float(data["pool_std"])
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no layout: {error!r}") from error
        structure = None
        if like is not None:
            structure = jax.tree.structure(like)
            if (names := tuple(named_leaves(like))) != order:
                other = sorted(set(names) ^ set(order)) or ["their order"]
                raise ValueError(f"like has other leaves than the layout: {', '.join(other)}")
        return cls(leaves, kept, order, pool_std=pool_std, structure=structure, **common)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name, such as ``"dense/kernel"``.

    Raises:
      ValueError: two leaves come to the same name.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"two leaves are named {name}; expected names that differ")
        named[name] = leaf
    return named


def _specs(leaves: list[tuple[str, tuple[int, ...], float]], common: dict) -> tuple[Spec, ...]:
    offset, specs = 0, []
    for path, shape, scale in leaves:
        specs.append(Spec(path=path, shape=shape, offset=offset, scale=scale, **common))
        offset += specs[-1].padded
    return tuple(specs)


def _reason_kept(
    path: str, leaf: Any, select: Callable[[str, Any], bool] | None, min_size: int
) -> str | None:
    """Why a leaf passes through, or ``None`` where it is shared."""
    if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
        return f"dtype {leaf.dtype}"
    size = math.prod(leaf.shape)
    if size == 0:
        return "no entries"
    if select is not None:
        return None if select(path, leaf) else "not selected"
    if len(leaf.shape) < 2:
        return "one axis" if leaf.shape else "a scalar"
    return f"fewer than {min_size} entries" if size < min_size else None


def plan(
    tree: Any,
    budget: int | float,
    *,
    scheme: Scheme = "stable",
    tile: tuple[int, int] | None = None,
    chunk: int | tuple[int, int] = 32,
    min_size: int = 0,
    select: Callable[[str, Any], bool] | None = None,
    count: Literal["selected", "all"] = "selected",
    other: Literal["pass", "error"] = "pass",
    scale: Scale = None,
    pool_std: float = 0.04,
    sign: bool = True,
    seed: int = 0,
) -> Layout:
    """Lay a pytree of parameters out in a pool of a given size.

    Args:
      tree: parameters, or their shapes (``jax.eval_shape``); no array is made.
      budget: slots of the pool: an ``int`` counts, a ``float`` is a share in (0, 1] of the selected
        weights (with tiles, padding counted and rounded up to a tile).
      scheme: ``"stable"``, ``"roast"`` or ``"hashednet"``; see the module.
      tile: ``(bk, bn)`` orders each leaf by tiles for the kernels, ``"stable"`` alone; multiples of
        (8, 128) suit a TPU, (64, 64) a GPU.
      chunk: of ``"roast"`` alone: ``(bk, bn)``, or an int for pieces of a row.
      min_size: by default leaves with fewer entries pass through.
      select: ``f(path, leaf) -> bool``, which floating leaves are shared; by default those of two
        or more axes.
      count: ``"all"`` counts what passes through within the budget.
      other: whether integer and complex leaves ``"pass"`` through or are an ``"error"``.
      scale: the standard deviations C that leaves start with: ``"std"`` measures them, ``"flax"``,
        ``"equinox"`` and ``"torch"`` are the defaults of those libraries by fan-in, a function
        ``f(path, leaf)``, or a mapping by path (give these for layers stacked by ``nn.scan``, whose
        axis looks like fan-in). ``None`` measures arrays (a constant leaf passes
        through) and takes ``"flax"`` for shapes.
      pool_std: standard deviation of a new pool.
      sign: give each weight a hashed sign.
      seed: of the hashes, in ``[0, 2^32)``.

    Returns:
      A static, hashable layout.

    Raises:
      ValueError: a budget out of range (below one, above the weights, less than a tile or chunk,
        2^31 slots or more), nothing selected, two leaves of one name, an unknown option, a scale
        that is not positive.
      TypeError: a leaf that is no array, or of another dtype under ``other="error"``.

    Source: Desai and Shrivastava (2024), with the references of the module.

    Example:
      >>> shapes = {"w": jax.ShapeDtypeStruct((64, 32), np.float32)}
      >>> plan(shapes, 0.25).m
      512
    """
    budget = budget.item() if isinstance(budget, np.generic) else budget
    one_of("scheme", scheme, _SCHEMES)
    one_of("count", count, ("selected", "all"))
    one_of("other", other, ("pass", "error"))
    if not 0 < pool_std < math.inf:
        raise ValueError(f"pool_std is {pool_std}; expected a positive number")
    if not 0 <= positive_int("seed", seed, least=0) < 2**32:
        raise ValueError(f"seed is {seed}; expected an integer in [0, 2^32)")
    order = _order(scheme, tile, chunk)
    shared, kept, names = [], [], []
    for path, entry in named_leaves(tree).items():
        if not hasattr(entry, "shape") or not hasattr(entry, "dtype"):
            raise TypeError(
                f"{path or 'the tree'} is {type(entry).__name__}; expected an array or a shape: "
                "partition other leaves out (equinox.partition), or use share_callable"
            )
        names.append(path)
        why = _reason_kept(path, entry, select, min_size)
        if why is not None and why.startswith("dtype") and other == "error":
            raise TypeError(f"{path} has {why}; expected floating leaves only")
        std = leaf_scale(scale, path, entry) if why is None else 0.0
        if why is None and std == 0:
            why = "constant"
        if why is None:
            shared.append((path, tuple(entry.shape), std / pool_std))
        else:
            kept.append(Kept(path, tuple(entry.shape), str(entry.dtype), why))
    if not shared:
        listed = "; ".join(f"{k.path}: {k.reason}" for k in kept) or "the tree is empty"
        raise ValueError(f"no leaf is selected to be shared ({listed})")
    common = {"m": 1, "scheme": scheme, "tile": order, "sign": sign, "seed": seed}
    specs = _specs(shared, common)
    rest = sum(k.size for k in kept) if count == "all" else 0
    m = _slots(budget, specs, rest, scheme)
    return Layout(
        leaves=tuple(dataclasses.replace(s, m=m) for s in specs),
        kept=tuple(kept),
        order=tuple(names),
        m=m,
        scheme=scheme,
        tile=order,
        pool_std=float(pool_std),
        sign=bool(sign),
        seed=int(seed),
        structure=jax.tree.structure(tree),
    )


def _order(scheme: str, tile: Any, chunk: Any) -> tuple[int, int] | None:
    """The tile of the leaves' order."""
    if scheme != "stable" and tile is not None:
        raise ValueError(f"tile is {tile}, which scheme {scheme!r} does not take; expected None")
    if scheme == "hashednet":
        return None
    if scheme == "roast":
        tile = chunk if isinstance(chunk, tuple | list) else (1, chunk)
    if tile is None:
        return None
    name = "chunk" if scheme == "roast" else "tile"
    if not isinstance(tile, tuple | list) or len(tile) != 2:
        raise ValueError(f"{name} is {tile}; expected (rows, columns)")
    return positive_int(f"{name}[0]", tile[0]), positive_int(f"{name}[1]", tile[1])


def _slots(budget: int | float, specs: tuple[Spec, ...], rest: int, scheme: str) -> int:
    """The pool's length that a budget means."""
    tile = specs[0].tile
    unit = math.prod(tile) if tile else 1
    padded = specs[-1].offset + specs[-1].padded
    n = sum(s.size for s in specs)
    if scheme == "roast":
        m = count_kept("budget", budget, n + rest) - rest
        if m < unit:
            raise ValueError(
                f"budget comes to a pool of {m} slots, less than one chunk of {unit}; raise the "
                "budget or lower chunk"
            )
    elif isinstance(budget, float):
        m = count_kept("budget", budget, padded + rest) - rest
        m = min(-(-m // unit) * unit, padded) if m > 0 else m
    else:
        m = count_kept("budget", budget, padded + rest) - rest
        if 0 < m < unit:
            raise ValueError(
                f"budget comes to a pool of {m} slots, less than one tile of {unit}; raise the "
                "budget or lower tile"
            )
        m = m // unit * unit
    if m < 1:
        raise ValueError(
            f"budget comes to {m} slots, the {rest} entries that pass through counted; raise it"
        )
    if m >= 2**31:
        raise ValueError(f"budget comes to {m} slots; expected less than 2^31 for one pool")
    return m


def leaf(layout: Layout, path: str) -> Spec:
    """The static description of one shared leaf, as ``hashed_matmul`` takes it.

    Args:
      layout: from ``plan``.
      path: the leaf's name, such as ``"dense/kernel"``.

    Raises:
      ValueError: no shared leaf has this name.
    """
    for spec in layout.leaves:
        if spec.path == path:
            return spec
    raise ValueError(
        f"no shared leaf is named {path!r}; expected one of "
        f"{', '.join(s.path for s in layout.leaves)}"
    )
