"""Checkpoints that know nothing of devices: saved on eight, read on one, two, four, two processes.

Parameters and optimiser state are compared to the bit, and the examples read by what each is
numbered: none lost, none read twice.
"""

import shutil

import distributed_worker as worker
import jax
import numpy as np
import pytest
from test_distributed import finish, launch

from jaxgen import train
from jaxgen.train import mesh as meshes

KINDS = ["dense", "shared"]


def on(description):
    """A mesh over as many of the devices as its sizes multiply to."""
    sizes = [int(part.partition("=")[2]) for part in description.split(",")]
    return meshes.make_mesh(description, jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """A run of three steps on 4 x 2 devices: its kind, folder, state and what it read."""
    out, seen = tmp_path_factory.mktemp(request.param), []
    start, step, _, layout = worker.model(request.param)
    state = train.fit(
        start(),
        step,
        worker.batches(seen=seen),
        3,
        out=out,
        progress=False,
        mesh=on("data=4,fsdp=2"),
        layout=layout,
    )
    return request.param, out, state, seen


def split(state):
    """Bytes of the largest leaf of the optimiser's state that one device holds, and of it all."""
    leaf = max(jax.tree.leaves(state.opt_state), key=lambda leaf: leaf.size)
    return leaf.addressable_shards[0].data.size, leaf.size


@pytest.mark.parametrize("description", ["data=1", "data=2", "fsdp=2", "data=2,fsdp=2", "fsdp=8"])
def test_on_other_devices(saved, description):
    kind, out, state, _ = saved
    start, _, _, layout = worker.model(kind)
    part, whole = split(state)
    assert part == whole // 2 >= 512
    like, mesh = jax.eval_shape(start), on(description)
    wanted = meshes.state_shardings(like, mesh)
    found = train.restore(out / "checkpoints", like, sharding=wanted, layout=layout)
    for a, b in zip(worker.bits(found), worker.bits(state), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    # It lies where the rules say, not where it lay.
    part, whole = split(found)
    assert part * mesh.shape.get("fsdp", 1) == whole
    same = jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), found, wanted
    )
    assert all(jax.tree.leaves(same))


def test_a_run_goes_on_from_mesh_to_mesh(tmp_path):
    start, step, _, _ = worker.model()
    seen = []
    for count, description in ((2, "data=4,fsdp=2"), (4, "data=1"), (7, "fsdp=4")):
        state = train.fit(
            start(),
            step,
            worker.batches(seen=seen),
            count,
            out=tmp_path,
            progress=False,
            mesh=on(description),
        )
        assert int(state.examples) == len(seen) == 16 * count
    read = worker.batches()(0)
    expected = [n for batch, _ in zip(read, range(7), strict=False) for n in batch["label"]]
    assert seen == expected
    # 112 examples of 96: an epoch holds each of them once.
    assert sorted(seen[:96]) == list(range(96))


def test_across_two_processes_and_back(saved, tmp_path):
    """Two processes read what eight devices wrote, to the bit, go on, and one device reads that."""
    kind, out, state, _ = saved
    # The other tests read the fixture's folder.
    out = shutil.copytree(out, tmp_path / "run")
    np.savez(out / "expected.npz", *worker.bits(state))
    started = launch(2, out, steps=5, kind=kind, mesh="fsdp=2", check=str(out / "expected.npz"))
    finish(started)
    start, _, _, layout = worker.model(kind)
    found = train.restore(out / "checkpoints", jax.eval_shape(start), layout=layout)
    with np.load(out / "end.npz", allow_pickle=False) as file:
        ends = [file[name] for name in file.files][:-1]
    for a, b in zip(worker.bits(found), ends, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert int(found.step) == 5 and int(found.examples) == 80
    seen = [np.load(out / f"seen-{i}.npy").reshape(2, 8) for i in range(2)]
    read = worker.batches()(48)
    for parts in zip(*seen, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), next(read)["label"])
