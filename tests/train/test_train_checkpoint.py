"""Checkpoints: bit for bit there and back, and a clear refusal of everything else."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import train
from jaxgen.train.manifest import step_folder

CONFIG = {"lr": 0.5, "data": "digits", "shape": [8, 8]}


def params(width=3):
    return {
        "dense": {"kernel": jnp.linspace(-1, 1, 8 * width).reshape(8, width), "bias": jnp.ones(3)},
        "half": jnp.array([1.5, jnp.nan, -jnp.inf], jnp.bfloat16),
        "none": jnp.zeros((0, 4)),
        "a.b/c d": jnp.float32(3),
    }


OPTIMIZER = optax.chain(optax.add_noise(0.1, 0.5, key=3), optax.adam(1e-3))


def make(width=3, step=7):
    state = train.TrainState.create(jax.random.key(5), params(width), OPTIMIZER)
    return state.replace(step=jnp.int32(step), examples=jnp.uint32(4_000_000_000))


def raw(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert raw(x).tobytes() == raw(y).tobytes()


def contents(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Two finished steps, 6 and 7."""
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with train.Saver(folder, config=CONFIG) as saver:
        saver.save(make(step=6))
        saver.save(make(step=7))
    return folder


@pytest.fixture
def saved(pristine, tmp_path):
    """A copy of them, to break."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def largest(saved, step=7):
    files = [p for p in (step_folder(saved, step) / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_there_and_back(pristine):
    like = jax.tree.map(jnp.zeros_like, make().params)
    like = make().replace(params=like)
    assert_same_bits(train.restore(pristine, like), make())
    assert_same_bits(train.restore(pristine, like, step=6), make(step=6))


def test_like_may_be_shapes(pristine):
    like = jax.eval_shape(make)
    state = train.restore(pristine, like)
    assert_same_bits(state, make())
    assert jax.random.key_impl(state.key) == jax.random.key_impl(make().key)
    jax.random.uniform(state.key)


def test_the_manifest_tells_what_is_there(pristine):
    body = train.read_manifest(pristine)
    assert body["step"] == 7
    assert body["config"] == CONFIG
    assert body["leaves"]["params/dense/kernel"] == {"shape": [8, 3], "dtype": "float32"}
    assert body["leaves"]["params/half"] == {"shape": [3], "dtype": "bfloat16"}
    assert body["leaves"]["opt_state/1/0/mu/dense/bias"]["shape"] == [3]
    assert body["keys"] == {
        "key": "threefry2x32",
        "opt_state/0/rng_key": "threefry2x32",
    }
    on_disk = {
        p.relative_to(step_folder(pristine, 7)).as_posix()
        for p in contents(pristine)
        if "00000007" in str(p) and p.name != "manifest.json"
    }
    assert set(body["files"]) == on_disk
    assert train.saved_steps(pristine) == [6, 7]
    assert train.latest_valid(pristine) == 7


def test_onto_eight_devices_and_back(pristine, tmp_path):
    mesh = train.data_mesh()
    everywhere = train.replicated(mesh)
    state = train.restore(pristine, jax.eval_shape(make), sharding=everywhere)
    assert_same_bits(state, make())
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert len(state.params["dense"]["kernel"].addressable_shards) == 8

    rows = train.batch_sharding(mesh)
    shardings = jax.tree.map(lambda x: rows if x.shape == (8, 3) else everywhere, make())
    split = train.restore(pristine, make(), sharding=shardings)
    assert split.params["dense"]["kernel"].addressable_shards[0].data.shape == (1, 3)
    train.save(tmp_path / "split", split)
    assert_same_bits(train.restore(tmp_path / "split", jax.eval_shape(make)), make())
    # A tree of shardings may be a prefix, and arrays bring their own.
    prefix = jax.tree.map(lambda _: everywhere, make()).replace(params=everywhere)
    assert_same_bits(train.restore(pristine, make(), sharding=prefix), make())
    two = train.replicate(make(), train.data_mesh(jax.devices()[:2]))
    assert train.restore(pristine, two).step.sharding == two.step.sharding


def test_any_pytree_with_a_step(tmp_path):
    class Carried(NamedTuple):
        step: Any
        pair: Any

    tree = Carried(jnp.int32(1), (jnp.arange(3), [jnp.float32(2)]))
    train.save(tmp_path, tree, config=CONFIG)
    assert_same_bits(train.restore(tmp_path, tree), tree)


def test_a_flipped_bit(saved):
    path = largest(saved)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = contents(saved)
    with pytest.raises(train.CheckpointDamaged, match=r"SHA-256") as error:
        train.restore(saved, make())
    assert path.name in str(error.value)
    assert "newest step that holds is 6" in str(error.value)
    assert not isinstance(error.value, train.CheckpointTruncated)
    assert train.latest_valid(saved) == 6
    assert_same_bits(train.restore(saved, make(), step=6), make(step=6))
    assert contents(saved) == before


def test_every_flipped_bit_of_a_step_is_seen(saved):
    rng = np.random.default_rng(0)
    for path, data in contents(step_folder(saved, 7)).items():
        if not data:
            continue
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        assert train.latest_valid(saved) == 6, path
        path.write_bytes(data)
    assert train.latest_valid(saved) == 7


def test_truncated(saved):
    path = largest(saved)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(train.CheckpointTruncated, match=r"truncated: .* bytes where") as error:
        train.restore(saved, make())
    assert path.name in str(error.value) and "holds is 6" in str(error.value)
    path.unlink()
    with pytest.raises(train.CheckpointTruncated, match="is missing"):
        train.restore(saved, make())


def test_nothing_holds(saved):
    for step in (6, 7):
        largest(saved, step).write_bytes(b"")
    with pytest.raises(train.CheckpointTruncated, match="No other step"):
        train.restore(saved, make())
    assert train.latest_valid(saved) is None


def test_a_manifest_that_was_edited(saved):
    path = step_folder(saved, 7) / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"lr": 0.5', '"lr": 0.25'))
    with pytest.raises(train.CheckpointDamaged, match="changed after it was written"):
        train.restore(saved, make())
    path.write_text(text[:100])
    with pytest.raises(train.CheckpointDamaged, match="no longer JSON"):
        train.restore(saved, make())
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(train.CheckpointDamaged):
        train.restore(saved, make())


def test_foreign(saved):
    path = step_folder(saved, 7) / "manifest.json"
    body = json.loads(path.read_text())
    for text in ('{"model": "other"}', "[1, 2]"):
        path.write_text(text)
        with pytest.raises(train.CheckpointForeign, match="not written by jaxgen"):
            train.restore(saved, make())
    from jaxgen.train import manifest

    body["version"] += 1
    body["sha256"] = manifest._checksum(body)
    path.write_text(json.dumps(body))
    with pytest.raises(train.CheckpointForeign, match="newer"):
        train.restore(saved, make())


def test_missing(tmp_path, pristine):
    with pytest.raises(train.CheckpointMissing, match="none"):
        train.restore(tmp_path / "nowhere", make())
    with pytest.raises(train.CheckpointMissing, match=r"step 8.*6, 7"):
        train.restore(pristine, make(), step=8)
    assert train.latest_valid(tmp_path) is None
    assert not (tmp_path / "nowhere").exists()


def test_mismatch_names_the_paths_and_casts_nothing(pristine):
    like = jax.eval_shape(make)
    p = dict(like.params)
    p["dense"] = {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32), "scale": p["dense"]["bias"]}
    p["half"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(train.CheckpointMismatch) as error:
        train.restore(pristine, like.replace(params=p))
    lines = set(map(str.strip, str(error.value).splitlines()))
    assert "params/dense/kernel: float32[8, 3] in the checkpoint, float32[8, 4] asked for" in lines
    assert "params/half: bfloat16[3] in the checkpoint, float32[3] asked for" in lines
    assert "params/dense/scale: missing from the checkpoint" in lines
    assert "params/dense/bias: in the checkpoint only" in lines
    other = jax.random.key(0, impl="rbg")
    with pytest.raises(train.CheckpointMismatch, match=r"key: key<fry>"):
        train.restore(pristine, make().replace(key=other))


def test_nothing_is_overwritten(saved):
    before = contents(saved)
    with pytest.raises(train.CheckpointExists, match="nothing is overwritten"):
        train.save(saved, make())
    assert contents(saved) == before
    own = saved / "step_00000009"
    own.mkdir()
    (own / "thesis.tex").write_text("mine")
    with pytest.raises(train.CheckpointForeign, match="not written by jaxgen"):
        train.save(saved, make(step=9))
    assert (own / "thesis.tex").read_text() == "mine"
    train.save(saved, make(step=10), keep=1)
    assert (own / "thesis.tex").read_text() == "mine"
    (saved / "step_00000011").write_text("a file")
    with pytest.raises(train.CheckpointForeign):
        train.save(saved, make(step=11))


def test_an_unfinished_step_is_ignored_and_then_replaced(saved):
    folder = step_folder(saved, 7)
    (folder / "manifest.json").unlink()
    largest(saved).write_bytes(b"half")
    (folder / "manifest.json.tmp").write_text("{")
    (folder / "state.orbax-checkpoint-tmp").mkdir()
    assert train.saved_steps(saved) == [6]
    assert_same_bits(train.restore(saved, make()), make(step=6))
    train.save(saved, make())
    assert_same_bits(train.restore(saved, make()), make())
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "state"]


def test_keep(saved):
    (saved / "step_00000003" / "state").mkdir(parents=True)
    with train.Saver(saved, keep=2) as saver:
        for step in (8, 9):
            saver.save(make(step=step))
    assert sorted(os.listdir(saved)) == ["step_00000008", "step_00000009"]
    assert train.latest_valid(saved) == 9


def test_saving_does_not_disturb_a_state_that_is_then_donated(tmp_path):
    add = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)

    class Big(NamedTuple):
        step: Any
        x: Any

    big = Big(jnp.int32(0), jnp.zeros(1 << 20))
    with train.Saver(tmp_path) as saver:
        for _ in range(3):
            saver.save(big)
            for _ in range(5):
                big = add(big)
    for step in (0, 5, 10):
        x = np.asarray(train.restore(tmp_path, big, step=step).x)
        assert x.min() == x.max() == step


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train.save(tmp_path / "file" / "checkpoints", make())
    with pytest.raises(TypeError, match="JSON"):
        train.save(tmp_path / "c", make(), config={"f": jnp.sin})
    assert not (tmp_path / "c").exists()


FULL = """
    import resource, signal, sys
    import jax.numpy as jnp
    from typing import Any, NamedTuple
    from jaxgen import train

    class Big(NamedTuple):
        step: Any
        x: Any

    train.save(sys.argv[1], Big(jnp.int32(1), jnp.zeros(10)))
    # No file may grow beyond this: what a full disk looks like from inside.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    noise = jnp.sin(jnp.arange(1e6) ** 2)
    try:
        train.save(sys.argv[1], Big(jnp.int32(2), noise))
    except OSError as error:
        print("OSError", error.errno, error.filename, error)
    print(train.saved_steps(sys.argv[1]), train.latest_valid(sys.argv[1]))
"""


def test_a_full_disk(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(train.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().splitlines()
    assert first.startswith("OSError") and "step_00000002" in first and "cannot save" in first
    assert last == "[1] 1"
    assert os.listdir(tmp_path) == ["step_00000001"]
