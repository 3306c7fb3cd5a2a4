"""``jaxgen version``: what a bug report should say."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Sequence

from jaxgen import __version__
from jaxgen.cli.flags import parse

__all__ = ["run", "versions"]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "diffrax", "equinox", "orbax-checkpoint", "grain")


@dataclasses.dataclass(frozen=True)
class Version:
    """Print the versions and devices that a bug report should name."""


def versions() -> dict[str, str]:
    """The versions of this library, Python and the packages that numbers depend on."""
    found = {"jaxgen": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def run(words: Sequence[str]) -> int:
    """Carry out ``jaxgen version``."""
    parse(Version, words, prog="jaxgen version")
    import jax

    for name, version in versions().items():
        print(f"{name:<18}{version}")
    print(f"{'platform':<18}{platform.platform()} ({platform.machine()})")
    for device in jax.devices():
        print(f"{'device':<18}{device.id} {device.platform} {device.device_kind}")
    return 0
