"""What every room needs: argument checks, keys, array shapes and progress meters."""

from jaxgen.core import arrays, checks, keys, progress

__all__ = ["arrays", "checks", "keys", "progress"]
