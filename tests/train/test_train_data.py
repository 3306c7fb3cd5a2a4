"""Data sets, the held-out split, and an order that one position determines."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.train.data import NAMES, DataError, Dataset, batches, load
from jaxgen.train.toys import TOYS


def numbered(n):
    return Dataset(
        "numbered", np.arange(n, dtype=np.float32)[:, None], np.arange(n, dtype=np.int32)
    )


def ids(batch):
    np.testing.assert_array_equal(batch["x"][:, 0], batch["label"])
    return batch["label"].tolist()


def read(data, position, size, count, **options):
    source = batches(data, size, seed=options.pop("seed", 3), **options)(position)
    return [ids(batch) for batch in itertools.islice(source, count)]


def flat(parts):
    return list(itertools.chain.from_iterable(parts))


sizes = st.integers(1, 23)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), size=sizes, seed=st.integers(0, 2**32))
def test_every_epoch_holds_every_example_once(n, size, seed):
    epochs = 3
    count = -(-epochs * n // size)
    order = flat(read(numbered(n), 0, size, count, seed=seed))[: epochs * n]
    for epoch in range(epochs):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), first=sizes, then=sizes, steps=st.integers(0, 9))
def test_going_on_is_exact_at_any_batch_size(n, first, then, steps):
    data = numbered(n)
    before = flat(read(data, 0, first, steps)) if steps else []
    after = flat(read(data, first * steps, then, 4))
    whole = flat(read(data, 0, 1, len(before) + len(after)))
    assert before + after == whole


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 40),
    share=st.integers(1, 6),
    processes=st.integers(1, 5),
    start=st.integers(0, 100),
)
def test_processes_share_each_global_batch(n, share, processes, start):
    data, size = numbered(n), share * processes
    whole = read(data, start, size, 3)
    parts = [read(data, start, size, 3, process=p, processes=processes) for p in range(processes)]
    assert [flat(part[k] for part in parts) for k in range(3)] == whole


def test_order_changes_with_the_seed_and_the_epoch():
    data = numbered(64)
    one, two = read(data, 0, 64, 2)
    (other,) = read(data, 0, 64, 1, seed=4)
    assert one != two and one != other and two != other
    # A seed's second epoch is not the next seed's first.
    assert two != other


def test_position_may_be_an_array_of_the_training_state():
    data = numbered(10)
    assert read(data, jax.numpy.uint32(4), 3, 1) == read(data, 4, 3, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 5, "processes": 2}, "divides evenly"),
        ({"batch_size": 4, "processes": 2, "process": 2}, "process"),
    ],
)
def test_bad_batches(options, words):
    with pytest.raises(ValueError, match=words):
        batches(numbered(4), seed=0, **options)


def test_split_is_a_partition_that_the_seed_determines():
    data = numbered(40)
    train, held = data.split(0.25, 7)
    assert len(held) == 10
    assert sorted(train.label.tolist() + held.label.tolist()) == list(range(40))
    np.testing.assert_array_equal(held.label, data.split(0.25, 7)[1].label)
    assert held.label.tolist() != data.split(0.25, 8)[1].label.tolist()
    with pytest.raises(ValueError, match="fraction"):
        data.split(0.001, 0)


@settings(max_examples=30, deadline=None)
@given(levels=st.integers(2, 256), value=st.integers(0, 255))
def test_cells_there_and_back(levels, value):
    value %= levels
    data = Dataset("cells", np.full((2, 1), value, np.uint8), levels=levels)
    centre = data.to_unit(data.x)
    np.testing.assert_allclose(centre, (2 * value + 1) / levels - 1, rtol=1e-6, atol=1e-7)
    for inside in (-0.98, 0.0, 0.98):
        np.testing.assert_array_equal(data.from_unit(centre + inside / levels), data.x)
    assert data.from_unit(np.array([[7.0], [-7.0], [np.nan]])).max() <= levels - 1


def test_floats_there_and_back():
    data = load("moons")
    unit = data.to_unit(data.x)
    assert abs(unit.mean()) < 1e-3 and abs(unit.std() - 1) < 1e-3
    np.testing.assert_allclose(data.from_unit(unit), data.x, atol=1e-5)


def test_digits():
    data = load("digits")
    assert data.x.shape == (1797, 8, 8, 1) and data.x.dtype == np.uint8
    assert (data.levels, data.num_classes, int(data.x.max())) == (17, 10, 16)
    assert np.bincount(data.label).min() >= 170


def test_mnist5k():
    data = load("mnist5k")
    assert data.x.shape == (5000, 28, 28, 1) and data.levels == 256
    np.testing.assert_array_equal(np.bincount(data.label), np.full(10, 500))


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_deterministic_and_finite(name):
    one, two = load(name), load(name)
    np.testing.assert_array_equal(one.x, two.x)
    assert one.x.shape == (20_000, 2) and np.isfinite(one.x).all()
    assert (one.label is None) == (one.num_classes is None)


def test_toys_have_the_moments_of_their_definitions():
    n = 20_000
    ring = load("gaussians").x
    # Radius^2 of a Gaussian of deviation s about a point at r: mean r^2 + 2 s^2.
    square = (ring**2).sum(axis=1)
    assert abs(square.mean() - (4 + 2 * 0.04)) < 4 * square.std() / np.sqrt(n)
    board = np.floor(load("checkerboard").x).astype(int)
    assert (board.sum(axis=1) % 2 == 0).all() and len(np.unique(board, axis=0)) == 8
    assert set(np.unique(board)) == {-2, -1, 0, 1}
    roll = load("swissroll").x
    assert abs(np.linalg.norm(roll, axis=1).mean() - 3 * np.pi) < 0.1


def test_folder_of_images(tmp_path):
    from PIL import Image

    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for i in range(2):
            pixels = np.full((6, 8), 10 * i + (100 if kind == "dogs" else 0), np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{i}.png")
    data = load(str(tmp_path))
    assert data.x.shape == (4, 6, 8, 1) and data.levels == 256 and data.num_classes == 2
    assert data.label.tolist() == [0, 0, 1, 1] and data.x[:, 0, 0, 0].tolist() == [0, 10, 100, 110]
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "cats" / "9.png")
    with pytest.raises(DataError, match="--image-size"):
        load(str(tmp_path))
    assert load(str(tmp_path), image_size=4).x.shape == (5, 4, 4, 3)
    (tmp_path / "cats" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        load(str(tmp_path), image_size=4)


def test_npz(tmp_path):
    path = tmp_path / "a.npz"
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 4, 4), np.uint8)
    np.savez(path, images=grey, labels=np.arange(5))
    data = load(str(path))
    assert data.x.shape == (5, 4, 4, 1) and data.levels == 256 and data.num_classes == 5
    np.savez(path, x=rng.normal(size=(6, 3)))
    data = load(str(path))
    assert data.event == (3,) and data.levels is None and data.x.dtype == np.float32
    np.savez(path, x=rng.uniform(2, 4, size=(6, 4, 4, 3)))
    unit = load(str(path)).to_unit(load(str(path)).x)
    assert abs(unit.min() + 1) < 1e-6 and abs(unit.max() - 1) < 1e-6


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.array([{"a": 1}], dtype=object)}, "plain arrays"),
        ({"z": np.ones((3, 2))}, "no array named"),
        ({"x": np.ones((3, 2))}, "vary"),
        ({"x": np.array([[np.nan], [1.0]])}, "NaN"),
        ({"x": np.ones((3, 2), np.int64)}, "uint8 or floats"),
        ({"x": np.eye(3)[:, 0]}, "expected"),
        ({"x": np.eye(3), "y": np.array([0, 1])}, "labels"),
        ({"x": np.eye(3), "y": np.array([0.0, 1.0, 2.0])}, "labels"),
        ({"x": np.eye(3), "y": np.array([0, -1, 2])}, "labels"),
    ],
)
def test_bad_npz(tmp_path, arrays, words):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=words):
        load(str(path))


def test_what_is_not_there(tmp_path):
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 broken")
    for name, words in (
        ("nowhere", ", ".join(NAMES)),
        (str(tmp_path / "t.txt"), "neither"),
        (str(tmp_path), "0 images"),
        (str(tmp_path / "b.npz"), "cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            load(name)
