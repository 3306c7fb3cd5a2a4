"""jaxgen profile: what it prints against what can be counted by hand, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from jaxgen.cli import profile
from jaxgen.cli.errors import CommandError
from jaxgen.train.recipes.profiling import (
    Span,
    _flops_asked,
    busy_seconds,
    operations,
    read_spans,
)

pytestmark = pytest.mark.usefixtures("compile_once")

SMALL = ["--data", "moons", "--width", "16", "--blocks", "1", "--batch-size", "64", "--quiet"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, compile_once):
    """A folder of a run, the one made by profiling it on two devices, and what was printed."""
    from jaxgen.train.recipes import run as runs
    from jaxgen.train.recipes.config import ScoreConfig

    root = tmp_path_factory.mktemp("profile")
    config = ScoreConfig(data="moons", width=16, blocks=1, batch_size=64, out=str(root / "run"))
    runs._make_folder(runs.prepare(config))
    (root / "run" / "checkpoints").mkdir()
    before = sorted(path.name for path in (root / "run").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *args, **_: lines.extend(map(str, args)))
        assert profile.run([str(root / "run"), "--steps", "4", "--mesh", "data=8", "--quiet"]) == 0
    return root / "run", before, "\n".join(lines)


@pytest.fixture(scope="module")
def summary(made):
    return json.loads((made[0] / "profile" / "summary.json").read_text())


def test_the_summary_holds_what_can_be_counted(summary):
    # Dense layers of an MLP of one block: two after the eight time features, the input's, two and
    # FiLM, the output's.
    embedding = 8 * 16 + 16 + 16 * 16 + 16
    network = 2 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 32 + 32 + 16 * 2 + 2
    assert summary["parameters"] == embedding + network
    # Parameters, their average and two moments in float32, and a few counters.
    state = 4 * 4 * summary["parameters"]
    memory = summary["memory"]
    assert state <= memory["state"] <= state + 64
    # The whole state is written in place (its key, of 8 bytes, too).
    assert memory["reused"] >= memory["state"]
    assert memory["peak"] >= memory["temporary"] + memory["state"]
    # A forward pass takes two operations for each weight and example, a backward pass up to four;
    # each of the eight devices has eight of the 64 examples.
    products = 2 * 8 * summary["parameters"]
    assert 2 * products < summary["flops_per_step"] < 6 * products
    assert summary["batch_size"] == 64 and summary["mesh"] == {"data": 8}


def test_times_add_up(summary):
    seconds = dict(summary["seconds"])
    total = seconds.pop("to_first_step")
    assert total == pytest.approx(sum(seconds.values()), abs=1e-3)
    step = summary["step_ms"]
    assert 0 < step["p10"] <= step["median"] <= step["p90"]
    rate = summary["examples_per_second"]
    assert 64e3 / step["p90"] / 4 < rate < 64e3 / step["p10"] * 4
    assert 0 <= summary["input_wait_share"] <= 1 and 0 < summary["device_busy_share"] <= 1
    assert sum(each["share"] for each in summary["layers"]) == pytest.approx(1, abs=0.01)


def test_operations_are_named_by_their_layers(summary):
    layers = {each["layer"] for each in summary["layers"]}
    assert {"MLP/Dense_2", "MLP/Dense_2, backward", "update of the state"} <= layers, layers
    # Each device runs an operation once a step, or more often where it is in a loop.
    assert min(each["calls"] for each in summary["operations"]) >= 4


def test_a_run_is_left_as_it_was(made):
    folder, before, _ = made
    names = sorted(path.name for path in folder.iterdir() if path.name != "profile")
    assert names == before and not list((folder / "checkpoints").iterdir())
    assert (folder / "profile" / "operations.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_printed_says_where_to_look(made):
    printed = made[2]
    for words in ("to the first step", "waiting for input", "written in place", "MLP/Dense_2"):
        assert words in printed, printed
    assert "mesh data=8" in printed and "summary.json" in printed


def test_a_trace_knows_how_often_a_product_ran(tmp_path):
    product = jax.jit(lambda x: x @ x)
    x = np.ones((64, 64), np.float32)
    product(x).block_until_ready()
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            product(x).block_until_ready()
    (path,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    spans = read_spans(path)
    found = operations(spans)
    assert found[0].calls == 3
    # On one thread at a time what is busy is what the operations take.
    assert sum(busy_seconds(spans).values()) == pytest.approx(
        sum(each.seconds for each in found), rel=1e-6
    )


def test_self_time_and_busy_time_of_spans_set_by_hand():
    spans = [
        Span("a", "1", "loop", 0, 100),
        Span("a", "1", "body", 10, 60),
        Span("a", "1", "dot", 20, 40),
        Span("a", "1", "body", 60, 90),
        Span("a", "2", "dot", 80, 130),
        Span("b", "1", "dot", 500, 510),
    ]
    found = {each.name: (each.calls, round(1e9 * each.seconds)) for each in operations(spans)}
    assert found == {"loop": (1, 20), "body": (2, 60), "dot": (3, 80)}
    assert {k: round(1e9 * v) for k, v in busy_seconds(spans).items()} == {"a": 130, "b": 10}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "1"], "at least 2"),
        (["--rule", "kernel=-,fsdp"], "--mesh too"),
        (["--mesh", "data=3"], "multiplies to 3"),
        (["--mesh", "data=8", "--batch-size", "63"], "63"),
        (["no-such-folder"], "holds no run"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CommandError, ValueError), match=says):
        profile.run([*SMALL, *words])
    assert not list(tmp_path.glob("**/*.pb"))


def test_a_runs_folder_is_not_written_over(made):
    with pytest.raises(CommandError, match="holds a run"):
        profile.run([*SMALL, "--out", str(made[0])])


def test_what_is_asked_for_is_counted_before_compiling():
    lowered = jax.jit(lambda a, b: a @ b).lower(np.ones((8, 16), "f"), np.ones((16, 4), "f"))
    assert _flops_asked(lowered, 2) == 8 * 16 * 4


def test_operations_that_run_as_one_are_explained(summary):
    one = {"name": "command_buffer_1", "source": "", "seconds": 1.0, "share": 1.0, "calls": 4}
    assert "xla_gpu_enable_command_buffer" in profile._text({**summary, "operations": [one]})
    assert "xla_gpu_enable_command_buffer" not in profile._text(summary)
