r"""Pairs of noise and data that a flow maps onto each other, in chunks and on the disk.

Reflow (Liu, Gong and Liu, arXiv 2209.03003, section 2) and distillation to one step (SlimFlow,
Zhu, Liu and Liu, arXiv 2407.12718, section 3) learn from pairs (x0, x1) of a trained teacher: x1 is
where its ODE takes the noise x0. Any process with a Gaussian prior serves, by its probability flow;
the noise is handed on *standardised*, z of x_T = mu + prior_std z, so that a rectified student,
whose noise is N(0, I), can learn from the pairs of a VE or EDM teacher too.

With a folder each chunk is a file of plain arrays, put in place by rename when it is whole, beside
a manifest that says what made it. A run that was killed goes on with the chunks that it has::

    pairs/manifest.json            written first
    pairs/chunk_00000000.npz       pairs 0 to batch - 1
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgen.core import checks, keys
from jaxgen.core.arrays import cast_coefficient
from jaxgen.core.progress import meter
from jaxgen.process.linear import LinearSDE
from jaxgen.process.schedules import rectified
from jaxgen.score.prediction import PREDICTIONS, Field, from_flow
from jaxgen.solve.registry import resolve
from jaxgen.solve.sample import sample
from jaxgen.solve.transport import decode, encode, plan_solve

__all__ = ["Pairs", "reflow_pairs", "scaled_noise", "standard_noise"]

FORMAT = "jaxgen reflow pairs"
VERSION = 1
MANIFEST = "manifest.json"

DIRECTIONS = ("from_noise", "to_noise")

# Sets the key of a noisy solver's own noise apart from those of the pairs.
_SOLVER = 0xFFFFFFFF


class Pairs(NamedTuple):
    """Partners: ``x1[i]`` is where the flow takes ``x0[i]``.

    Attributes:
      x0: standardised noise ``(n, *event)``.
      x1: data, like ``x0``.
    """

    x0: Any
    x1: Any


def standard_noise(sde: LinearSDE, x: jax.Array) -> jax.Array:
    """``z`` of the prior's ``x = mu + prior_std z``, like ``x``."""
    mu = sde.centre(x)
    centred = x if mu is None else x - mu
    return (centred / cast_coefficient(_prior_std(sde), x)).astype(x.dtype)


def _prior_std(sde: LinearSDE) -> jax.Array:
    return sde.sigma(sde.t_max) if sde.prior_std is None else jnp.asarray(sde.prior_std)


def scaled_noise(sde: LinearSDE, z: jax.Array) -> jax.Array:
    """The prior's sample of standard noise, ``mu + prior_std z``, like ``z``."""
    mu, x = sde.centre(z), cast_coefficient(_prior_std(sde), z) * z
    return (x if mu is None else mu + x).astype(z.dtype)


def reflow_pairs(
    key: jax.Array,
    field: Field,
    shape: tuple[int, ...],
    n: int,
    *,
    sde: LinearSDE | None = None,
    prediction: str | None = None,
    solver: str | diffrax.AbstractSolver | None = None,
    steps: int | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    direction: Literal["from_noise", "to_noise"] = "from_noise",
    data: ArrayLike | None = None,
    folder: str | os.PathLike[str] | None = None,
    made_for: str = "",
    progress: bool | None = False,
) -> Iterator[Pairs]:
    """The pairs of a flow, chunk by chunk.

    Pair ``i`` is made of ``fold_in(key, i)``, whatever the size of a chunk, and more pairs are the
    same ones and others. The arguments are checked here, not at the first chunk.

    Args:
      key: typed key; not used by ``direction="to_noise"``, but part of what a folder is known by.
      field: the teacher. A callable that is a pytree (``jax.tree_util.Partial``, an Equinox module)
        hands its arrays over as arguments; what a closure holds is compiled in.
      shape: of a chunk, ``(batch, *event)``; the last chunk is cut to what is left.
      n: pairs in all.
      sde: the teacher's process. ``None``: the field is a velocity in flow time, noise at 0.
      prediction: what the field predicts, one of ``score.PREDICTIONS``; ``"velocity"`` by default.
      solver: ``None`` for adaptive steps (Tsit5 at ``rtol`` and ``atol``, per example), another
        adaptive Runge-Kutta solver of diffrax, or with ``steps`` whatever ``solve.sample`` takes.
      steps: of a solver on a fixed grid; a name alone has its own default.
      rtol: relative tolerance of adaptive steps. From large noise (``ve``, ``edm``) a loose one
        steps over the bend near the data: at 1e-3 one pair in fourteen was wrong.
      atol: absolute tolerance of adaptive steps.
      direction: ``"from_noise"``, or ``"to_noise"``, the codes of given data, by adaptive steps.
      data: for ``"to_noise"``, ``(n, *event)``.
      folder: where the chunks are kept; ``None`` keeps none.
      made_for: names the teacher in the folder's manifest, such as a digest of its parameters: a
        field itself cannot be compared.
      progress: as ``core.progress.meter`` takes it; chunks on the disk count as done.

    Yields:
      ``Pairs`` of NumPy arrays. Where a solve failed, its x1 (x0 for ``"to_noise"``) is NaN.

    Raises:
      ValueError: an unknown name, ``n`` below 1, shapes that do not fit, a fixed grid for
        ``"to_noise"``, or a folder that holds other pairs or something else.
      TypeError: a raw key, or something that is no solver.
      OSError: the folder cannot be written.

    Example:
      >>> import jax, numpy as np
      >>> flow = lambda x, t: 0 * x + 1.0
      >>> chunks = reflow_pairs(jax.random.key(0), flow, (4, 2), 6, solver="ddim", steps=5)
      >>> pairs = Pairs(*map(np.concatenate, zip(*chunks)))
      >>> pairs.x0.shape, bool(np.allclose(pairs.x1, pairs.x0 + 1, atol=1e-4))
      ((6, 2), True)
    """
    checks.one_of("direction", direction, DIRECTIONS)
    shape = tuple(shape)
    if len(shape) < 2:
        raise ValueError(f"shape is {shape}; expected (batch, *event), the batch a chunk's size")
    for size in (*shape, n):
        checks.positive_int("n, shape", size)
    keys.check(key)
    if sde is None:
        if prediction not in (None, "velocity"):
            raise ValueError(f"prediction is {prediction!r}; without sde the field is a velocity")
        # A pytree, so that a teacher's arrays stay arguments.
        field, sde = _FromFlow(field), rectified()
    prediction = "velocity" if prediction is None else prediction
    checks.one_of("prediction", prediction, PREDICTIONS)
    is_adaptive = solver is None or (
        steps is None and isinstance(solver, diffrax.AbstractAdaptiveSolver)
    )
    if is_adaptive:
        plan_solve(solver, None, 1, rtol, atol)
    else:
        solver_name, entry, _ = resolve(solver)
        steps = checks.positive_int("steps", entry.steps if steps is None else steps)
    if direction == "to_noise":
        if not is_adaptive:
            raise ValueError(
                f"solver is {solver!r} on a fixed grid; direction 'to_noise' needs adaptive steps: "
                "leave solver and steps out"
            )
        if data is None or jnp.shape(data) != (n, *shape[1:]):
            raise ValueError(
                f"data has shape {None if data is None else jnp.shape(data)}; expected "
                f"{(n, *shape[1:])}, the examples whose noise is asked for"
            )
        data = np.asarray(data)
    elif data is not None:
        raise ValueError("data is given; direction 'from_noise' draws its own noise")

    make = _maker(sde, prediction, solver, None if is_adaptive else steps, rtol, atol, shape)
    of: dict[str, Any] = {
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "generator": str(jax.random.key_impl(key)),
        "shape": list(shape),
        "direction": direction,
        "process": _identity(sde),
        "prediction": prediction,
        "solver": type(solver).__name__ if solver else "Tsit5",
        "tolerances": [float(rtol), float(atol)],
        "made_for": made_for,
    }
    if not is_adaptive:
        of |= {"solver": solver_name, "steps": steps, "tolerances": None}
    if data is not None:
        of["data"] = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
    store = None if folder is None else _Store(Path(folder), of, shape)

    def first_side(first: int) -> jax.Array | None:
        if data is None:
            return None
        # Filled up to a whole chunk, so that it compiles once.
        part = data[first : first + shape[0]]
        return jnp.asarray(np.concatenate([part, np.repeat(part[-1:], shape[0] - len(part), 0)]))

    # NumPy arrays in a pytree of a field would be taken for constants.
    given = jax.tree.map(lambda v: jnp.asarray(v) if isinstance(v, np.ndarray) else v, field)

    def chunks() -> Iterator[Pairs]:
        starts = range(0, n, shape[0])
        done = sum(min(shape[0], n - s) for s in starts if store is not None and store.has(s))
        with meter(n, initial=done, description="pairs", unit="pair", enabled=progress) as bar:
            for first in starts:
                found = None if store is None else store.read(first)
                if found is None:
                    made = make(given, key, jnp.int32(first), first_side(first))
                    found = Pairs(*(np.asarray(x) for x in made))
                    if store is not None:
                        store.write(first, found)
                    bar.update(min(shape[0], n - first))
                yield Pairs(*(x[: n - first] for x in found))

    return chunks()


class _FromFlow(eqx.Module):
    """``score.from_flow`` of a field that may be a pytree."""

    velocity: Any

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return from_flow(self.velocity)(x, t)


def _maker(
    sde: LinearSDE,
    prediction: str,
    solver: Any,
    steps: int | None,
    rtol: float,
    atol: float,
    shape: tuple[int, ...],
) -> Callable[..., Pairs]:
    """``make(field, key, first, x1 or None)``, one chunk of pairs from number ``first`` on."""
    adaptive: dict[str, Any] = {
        "prediction": prediction,
        "rtol": rtol,
        "atol": atol,
        "t_min": sde.t_end,
        "solver": solver,
    }

    @eqx.filter_jit
    def make(field: Field, key: jax.Array, first: jax.Array, x1: jax.Array | None) -> Pairs:
        if x1 is not None:
            code = encode(field, sde, x1, **adaptive).x
            return Pairs(standard_noise(sde, code), x1)
        own = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(shape[0]))
        z = jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(own)
        x = scaled_noise(sde, z)
        if steps is None:
            return Pairs(z, decode(field, sde, x, **adaptive).x)
        drawn = sample(
            jax.random.fold_in(key, _SOLVER),
            field,
            sde,
            shape,
            solver=solver,
            steps=steps,
            prediction=prediction,
            x_init=x,
            first_index=first,
        )
        return Pairs(z, drawn.x)

    return make


def _identity(sde: LinearSDE) -> dict[str, Any]:
    """What a process is known by in a manifest: its functions' names and its numbers."""

    def plain(value: Any) -> Any:
        if value is None:
            return None
        value = np.asarray(value)
        if value.size <= 16:
            return value.tolist()
        return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()

    numbers = {
        name: plain(getattr(sde, name)) for name in ("mu", "t_min", "t_max", "t_end", "prior_std")
    }
    kind = sde.kind or f"{sde.log_alpha_fn.__qualname__}, {sde.sigma_fn.__qualname__}"
    return {"kind": kind, "params": [plain(p) for p in sde.params], **numbers}


class _Store:
    """A folder of chunks, and the manifest of what made them."""

    def __init__(self, folder: Path, of: Mapping[str, Any], shape: tuple[int, ...]):
        self._folder, self._shape = folder, shape
        head = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **of}))
        manifest = folder / MANIFEST
        if manifest.exists():
            _check_manifest(manifest, head)
            return
        # A manifest that was being written when all was killed is nobody's.
        unfinished = {_temporary(manifest)}
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - unfinished):
            raise ValueError(f"{folder} exists and holds no pairs; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        _replace(manifest, lambda path: path.write_text(json.dumps(head, indent=1) + "\n"))

    def _path(self, first: int) -> Path:
        return self._folder / f"chunk_{first:08d}.npz"

    def has(self, first: int) -> bool:
        return self._path(first).exists()

    def read(self, first: int) -> Pairs | None:
        """The chunk, ``None`` where it is not there; a damaged one raises ``ValueError``."""
        path = self._path(first)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = Pairs(arrays["x0"], arrays["x1"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to make it again") from None
        if any(x.shape != self._shape for x in found):
            raise ValueError(f"{path} holds pairs of another shape; delete it to make it again")
        return found

    def write(self, first: int, pairs: Pairs) -> None:
        def save(path: Path) -> None:
            with open(path, "wb") as file:
                np.savez(file, x0=pairs.x0, x1=pairs.x1)
                file.flush()
                os.fsync(file.fileno())

        _replace(self._path(first), save)


def _check_manifest(path: Path, head: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of pairs; choose another folder")
    differ = [name for name in head if found.get(name) != head[name]]
    if differ:
        raise ValueError(
            f"{path.parent} holds other pairs ({', '.join(differ)} differ); choose another folder, "
            "or delete it"
        )


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write by rename, so that a reader sees the whole file or none."""
    temporary = _temporary(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
