"""Eight virtual CPU devices, strict rank promotion and no network, for every test.

Nearly all of the suite's time is XLA's compilation of small programs, so that they are compiled
without LLVM's optimisations, and under jaxlib 0.10 without MLIR's emitters of fused loops: each
halves the time. To test what users run, give the level by hand:
``XLA_FLAGS=--xla_backend_optimization_level=3 pytest``.
"""

import os
from importlib import metadata

_flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    # A busy machine may keep one of eight devices from a collective for longer than 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
]
_is_as_for_users = "--xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
# jaxlib 0.12 does not know the flag, and stops at one that it does not know.
if metadata.version("jaxlib").startswith("0.10.") and not _is_as_for_users:
    _flags.append("--xla_cpu_use_fusion_emitters=false")

# Read by jaxlib when the first backend starts, so it must stand before any import of jax.
for _flag in _flags:
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("MPLBACKEND", "agg")

import json
import pathlib
import socket
import subprocess
import sys
import time

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse connections that leave the machine."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"tests must not use the network, tried {address!r}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """Share compilations among runs that differ in folders and lengths only."""
    from jax.experimental.compilation_cache import compilation_cache

    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.05,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def compiled_for_tpu():
    """Run a test's file as a program where the TPU's compiler works; what it prints last, as JSON.

    A process of its own: the compiler needs its environment before jax starts, and lets one process
    in at a time on a machine.
    """
    from jaxgen.train.topology import environment, parse_topology

    root = pathlib.Path(__file__).parents[1]

    def run(file):
        variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        variables |= environment(parse_topology("v5e:2x2"))
        paths = filter(None, (str(root), os.getenv("PYTHONPATH")))
        variables["PYTHONPATH"] = os.pathsep.join(paths)
        for _ in range(60):
            done = subprocess.run(
                [sys.executable, file], env=variables, capture_output=True, text=True, check=False
            )
            if done.returncode == 0 or "lockfile" not in done.stderr:
                break
            time.sleep(5)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
