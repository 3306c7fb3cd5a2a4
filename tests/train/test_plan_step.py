"""Plans of compiled steps against hand counts and against the arrays themselves, on 8 devices."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxgen import train
from jaxgen.cli import main
from jaxgen.train import mesh as meshes
from jaxgen.train import topology
from jaxgen.train.hlo import read_hlo
from jaxgen.train.recipes.config import ConfigError, ScoreConfig
from jaxgen.train.recipes.plan import RunPlan, plan_run
from jaxgen.train.step_plan import (
    Memory,
    StepPlan,
    describe_plan,
    largest_batch,
    plan_program,
    plan_step,
)

N, D, H, OUT = 64, 24, 96, 8
WEIGHTS = D * H + H * OUT


def loss_fn(key, params, batch):
    hidden = jnp.tanh(batch["x"] @ params["first"])
    return jnp.mean((hidden @ params["last"] - batch["y"]) ** 2, -1)


ADAM = optax.adam(1e-3)
BATCH = {
    "x": jax.ShapeDtypeStruct((N, D), jnp.float32),
    "y": jax.ShapeDtypeStruct((N, OUT), jnp.float32),
}


def create():
    params = {"first": jnp.ones((D, H)), "last": jnp.ones((H, OUT))}
    return train.TrainState.create(jax.random.key(0), params, ADAM)


# The state is four times the weights; a gradient more fills this, and leaves no room to work in.
CHIP = dataclasses.replace(topology.CHIPS["v5e"], hbm=5 * 4 * WEIGHTS)


def plan_on(words, **options):
    step = train.make_train_step(loss_fn, ADAM, **options)
    return plan_step(step, jax.eval_shape(create), BATCH, meshes.make_mesh(words), chip=CHIP)


@pytest.fixture(scope="module")
def data8():
    return plan_on("data=8")


@pytest.fixture(scope="module")
def fsdp8():
    return plan_on("fsdp=8")


# --- a two-layer network against hand counts ------------------------------------------------------


def hand_count(n):
    """Forward two products; backward two for the weights and one for the hidden layer."""
    return 2 * n * (2 * D * H + 3 * H * OUT)


def test_flops_of_a_two_layer_network_are_the_hand_count(data8):
    assert data8.matmul_flops == hand_count(N // 8)
    # All else is element by element: of weights (norm, clipping, Adam, the average) fewer than 60
    # operations each, of activations fewer than 40.
    elementwise = 60 * WEIGHTS + 40 * (N // 8) * (D + H + OUT)
    assert data8.matmul_flops < data8.flops < data8.matmul_flops + elementwise
    assert data8.unknown_loops == 0


def test_a_loop_counts_as_often_as_it_runs(data8):
    four = plan_on("data=8", accumulate=4, per_example=True)
    assert four.matmul_flops == data8.matmul_flops
    # The gradient leaves the loop before it is exchanged.
    assert sum(each.bytes for each in four.collectives) == 4 * WEIGHTS + 4
    assert 0.8 * data8.flops < four.flops < 1.5 * data8.flops


@pytest.mark.parametrize(
    ("groups", "padding", "stride", "spread", "apart", "pairs"),
    [
        # Of 6 places: 6 x 3 pairs less those that meet the padding, one at either end.
        (1, (1, 1), 1, 1, 1, 16),
        (4, (1, 1), 1, 1, 1, 16),
        # 0, 2, 4, with a last element of padding.
        (1, (0, 1), 2, 1, 1, 8),
        # Zeros between: places 0 to 10 of data at 0, 2, ..., 10; 6 meet one, 5 meet two.
        (1, (1, 1), 1, 2, 1, 16),
        (1, (2, 2), 1, 1, 2, 14),
    ],
)
def test_flops_of_convolutions_are_the_hand_count(groups, padding, stride, spread, apart, pairs):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            (padding, padding),
            lhs_dilation=(spread, spread),
            rhs_dilation=(apart, apart),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((2, 6, 6, 16), (3, 3, 16 // groups, 32))
    ]
    gradient = jax.jit(jax.grad(lambda *args: jnp.sum(convolve(*args) ** 2), argnums=(0, 1)))
    hand = 2 * 2 * (16 // groups) * 32 * pairs**2
    forward = read_hlo(jax.jit(convolve).lower(*shapes).compile().as_text())
    assert forward.matmul_flops == hand
    # The two of the gradient meet the same pairs.
    assert read_hlo(gradient.lower(*shapes).compile().as_text()).matmul_flops == 3 * hand


def test_every_round_of_a_loop_moves_its_bytes():
    mesh = meshes.make_mesh("data=1", jax.devices()[:1])
    x = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=meshes.replicated(mesh))

    def plan_of(rounds):
        def run(x):
            return jax.lax.fori_loop(0, rounds, lambda _, y: jnp.tanh(y @ x), x)

        return plan_program(jax.jit(run).lower(x), {"x": x}, mesh, batch=1)

    few, many = plan_of(10), plan_of(100)
    for name in ("flops", "matmul_flops", "bytes_moved"):
        assert 9 * getattr(few, name) < getattr(many, name) <= 10 * getattr(few, name)
    # Three arrays of the product, two of the rest, at least; no more than thrice that.
    assert 1 < many.bytes_moved / (100 * 5 * 4 * 32 * 32) < 3


def test_the_roofline_is_by_the_published_figures(data8):
    roofline, memory = data8.roofline, data8.memory
    wire = sum(each.wire_bytes for each in data8.collectives)
    assert roofline.compute == pytest.approx(data8.flops / 197e12)
    assert roofline.hbm == pytest.approx(data8.bytes_moved / 819e9)
    assert roofline.ici == pytest.approx(wire / 200e9)
    # The state in and out, the batch in; metrics out, and a few addresses.
    ends = 2 * memory.arguments - memory.parts["batch"]
    assert ends - 8 <= roofline.hbm_least * 819e9 < ends + 400


def test_data_parallelism_exchanges_the_gradient_once(data8):
    (only,) = data8.collectives
    assert only.kind == "all-reduce"
    # The gradient, and the loss.
    assert only.bytes == 4 * WEIGHTS + 4
    assert only.wire_bytes == pytest.approx(2 * 7 / 8 * only.bytes, abs=1)


def shard_bytes(tree, device):
    arrays = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    shards = [s for x in arrays for s in x.addressable_shards if s.device == device]
    return sum(shard.data.nbytes for shard in shards)


@pytest.mark.parametrize("words", ["data=8", "fsdp=8", "data=2,fsdp=4"])
def test_bytes_of_the_state_are_those_of_the_arrays(request, words):
    mesh = meshes.make_mesh(words)
    known = {"data=8": "data8", "fsdp=8": "fsdp8"}
    plan = request.getfixturevalue(known[words]) if words in known else plan_on(words)
    state = meshes.place(create(), mesh)
    batch = meshes.shard_batch(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), BATCH), mesh)
    device = mesh.devices.flat[0]
    parts = {
        "weights": state.params,
        "optimiser": state.opt_state,
        "average": state.ema,
        "batch": batch,
    }
    assert plan.memory.parts == {name: shard_bytes(tree, device) for name, tree in parts.items()}
    # On a CPU nothing is padded: all that goes in is these, the key and four counters.
    rest = shard_bytes([state.step, state.examples, state.skipped, state.skipped_in_a_row], device)
    assert plan.memory.arguments == sum(plan.memory.parts.values()) + rest + 8


def test_memory_falls_as_the_mesh_says(data8, fsdp8):
    # The last layer is too small to be split.
    split, whole = 4 * D * H, 4 * H * OUT
    assert whole < 4 * 1024 < split
    assert data8.memory.parts["weights"] == split + whole
    assert fsdp8.memory.parts["weights"] == split // 8 + whole
    assert fsdp8.memory.parts["average"] == fsdp8.memory.parts["weights"]
    assert fsdp8.memory.arguments < data8.memory.arguments
    for plan in (data8, fsdp8):
        memory = plan.memory
        assert memory.peak >= memory.arguments + memory.outputs + memory.temporary
        assert memory.working == memory.peak - memory.arguments > 0
        # The state takes the place of the one before.
        assert memory.outputs < 400
    # Temporaries alone would fit, and so would arguments.
    assert data8.memory.temporary < data8.memory.arguments < CHIP.hbm < data8.memory.peak
    assert fsdp8.fits and not data8.fits


def test_plans_survive_json(data8):
    chip = topology.CHIPS["v5e"]
    roofline = train.step_plan.Roofline(compute=1.0, hbm=3.0, hbm_least=0.5, ici=2.0)
    plan = dataclasses.replace(data8, roofline=roofline, hbm=chip.hbm, fits=True)
    whole = RunPlan(plan, None, plan, 3)
    values = json.loads(json.dumps(whole.to_dict()))
    assert RunPlan.from_dict(values) == whole
    assert values["step"]["roofline"]["estimate"] == 3.0 and roofline.bound_by == "HBM"
    assert values["step"]["roofline"]["lower_bound"] == 2.0 and values["step"]["chips"] == 8
    said = describe_plan(plan, chip)
    assert "mesh data=8 of 8 devices, batch 64" in said and "fits: the peak is" in said
    assert max(map(len, said.splitlines())) <= 100
    refused = dataclasses.replace(plan, memory=None, fits=False, refusal="too much")
    assert "DOES NOT FIT: too much" in describe_plan(refused)


def test_what_cannot_be_planned():
    mesh, state = meshes.make_mesh("data=8"), jax.eval_shape(create)
    step = train.make_train_step(loss_fn, ADAM)
    odd = jax.tree.map(lambda x: jax.ShapeDtypeStruct((12, *x.shape[1:]), x.dtype), BATCH)
    with pytest.raises(ValueError, match="does not divide over the 8 parts"):
        plan_step(step, state, odd, mesh)
    with pytest.raises(ValueError, match="matches none"):
        plan_step(step, state, BATCH, mesh, rules=["nothing=replicate"])


# --- collectives ----------------------------------------------------------------------------------


def test_every_kind_of_collective_in_a_loop():
    mesh = meshes.make_mesh("data=2,fsdp=4")

    def body(x, _):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        part = jax.lax.psum_scatter(whole, "fsdp", tiled=True)
        turned = jax.lax.all_to_all(part, "fsdp", 0, 0, tiled=True)
        moved = jax.lax.ppermute(turned, "data", [(0, 1), (1, 0)])
        return moved / jax.lax.psum(moved, "data"), None

    def run(x):
        return jax.lax.scan(body, x, None, length=3)[0]

    inside = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"),
                                   check_vma=False))  # fmt: skip
    x = jax.ShapeDtypeStruct((64, 5), jnp.float32)
    counts = read_hlo(inside.lower(x).compile().as_text())
    found = {each.kind: each for each in counts.collectives}
    part = 4 * 16 * 5
    expected = {
        "all-reduce": (part, part),
        "all-gather": (4 * part, 3 * part),
        "reduce-scatter": (4 * part, 3 * part),
        "all-to-all": (part, 3 * part // 4),
        "collective-permute": (part, part),
    }
    assert found.keys() == expected.keys() and counts.unknown_loops == 0
    for kind, (size, wire) in expected.items():
        each = found[kind]
        assert (each.count, each.bytes, each.wire_bytes) == (3, 3 * size, 3 * wire), kind


# As the TPU's compiler writes: no trip count, groups by mesh axes, an operation spread over several
# asynchronous fusions, an all-reduce fused with the slice after it, layouts with parentheses.
TPU_TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%start (p: f32[4,8]) -> f32[16,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.1 = f32[16,8]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%between (q: f32[4,8]) -> f32[16,8] {
  %q = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = f32[16,8]{1,0:T(8,128)S(1)} all-gather(%q), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%all-reduce-scatter.3 (r: f32[16,8]) -> f32[2,8] {
  %r = f32[16,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.4 = f32[16,8]{1,0:T(8,128)} all-reduce(%r), channel_id=9, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = f32[2,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.4, %zero, %zero)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%body (s: (s32[], /*index=1*/f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[]{:T(128)}, /*index=1*/f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %fusion.1 = f32[16,8]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%start
  %fusion.2 = f32[16,8]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%between
  %fusion.3 = f32[2,8]{1,0:T(8,128)} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.3
  %dot.1 = f32[4,4]{1,0:T(4,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %out = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%next, %x)
}

%condition (s.1: (s32[], f32[4,8])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %limit = s32[]{:T(128)} constant(11)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (v: f32[4,8]) -> f32[4,8] {
  %v = f32[4,8]{1,0:T(8,128)} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %start.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%first, %v)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%start.1), condition=%condition, body=%body
  %y = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %ps = (f32[4,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)}) collective-permute-start(%y), \
channel_id=3, source_target_pairs={{0,1},{1,0}}
  ROOT %pd = f32[4,8]{1,0:T(8,128)} collective-permute-done(%ps)
}
"""


def test_the_text_of_the_tpu_compiler():
    counts = read_hlo(TPU_TEXT)
    # From 1 in steps of 2 below 11: five rounds.
    assert counts.matmul_flops == 5 * 2 * 4 * 4 * 8 and counts.flops_in_loops == 5
    found = {c.kind: (c.count, c.bytes, c.wire_bytes) for c in counts.collectives}
    x = 4 * 4 * 8
    assert found == {
        "all-gather": (5, 5 * 4 * x, 5 * 3 * x),
        "reduce-scatter": (5, 5 * 4 * x, round(5 * 4 * x * 7 / 8)),
        "collective-permute": (1, x, x),
    }
    assert counts.unknown_loops == 0 and counts.bytes_in_loops > 1
    # Groups as a number of them and their size.
    pairs = read_hlo(TPU_TEXT.replace("{{0,1,2,3,4,5,6,7}}", "[4,2]<=[8]"))
    assert [each.wire_bytes for each in pairs.collectives][1] == 5 * 4 * x // 2
    # An unknown first value: once, and it says so.
    once = read_hlo(TPU_TEXT.replace("s32[]{:T(128)} constant(1)", "s32[]{:T(128)} parameter(1)"))
    assert once.unknown_loops == 1 and once.matmul_flops == counts.matmul_flops // 5
    with pytest.raises(ValueError, match="no HLO module"):
        read_hlo("nothing")


# --- the largest batch ----------------------------------------------------------------------------


def fake(batch, peak):
    memory = None if math.isinf(peak) else Memory({}, 0, 0, 0, 0, int(peak))
    return StepPlan("", {"data": 8}, batch, None, 10**9, memory, 0.0, 0, 0.0, (), 0, None, 0.0)


@pytest.mark.parametrize(
    "peak",
    [
        lambda n: 1e8 + 1e4 * n,  # a straight line
        lambda n: 1e8 + 1e4 * max(n - 5000, 0) + n,  # flat at first
        lambda n: 1e8 + 30 * n**1.5,
        lambda n: 1e8 + 1e4 * n if n < 30_000 else math.inf,  # the compiler refuses
        lambda n: 1e8 + 9e6 * n if n <= 100 else math.inf,  # all but small ones
    ],
)
@pytest.mark.parametrize("start", [8, 1024, 10**6])
def test_the_largest_batch_is_found_in_a_few_compilations(peak, start):
    asked = []

    def plan_at(n):
        asked.append(n)
        return fake(n, peak(n))

    best, compiles = largest_batch(plan_at, fake(start, peak(start)), 8)
    assert compiles == len(asked) < 12 and len(set(asked)) == len(asked)
    assert all(n % 8 == 0 for n in asked)
    assert peak(best.batch) <= 10**9
    above = best.batch + best.batch // 8 + 8
    assert peak(above) > 10**9


def test_no_batch_fits_or_none_is_known():
    best, compiles = largest_batch(lambda n: fake(n, 2e9), fake(64, 2e9), 8)
    assert best is None and compiles <= 4
    with pytest.raises(ValueError, match="hbm is not known"):
        largest_batch(lambda n: fake(n, 1), dataclasses.replace(fake(8, 1), hbm=None), 8)


# --- topologies, and the command ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["v5e:3x3", "v5e", "cpu:0", "cpu:x", "cpu:99999", "v9:2x2", "", "v4:2x2"]
)
def test_unknown_topologies_list_the_known_ones(name):
    with pytest.raises(ValueError, match=r"v4:2x2x1.*v5e:1x1.*v5p.*v6e.*cpu:1"):
        topology.parse_topology(name)


def test_topologies(monkeypatch):
    assert topology.parse_topology("v5e:16x16").size == 256
    assert topology.parse_topology("v5p:2x2x4").size == 16
    eight = topology.parse_topology("cpu:8")
    assert topology.topology_devices(eight) == jax.devices("cpu")[:8]
    with pytest.raises(ValueError, match="has 8 CPU devices; start it with XLA_FLAGS"):
        topology.topology_devices(topology.parse_topology("cpu:64"))
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxgen\[tpu-compile\]"):
        topology.environment(topology.parse_topology("v5e:2x2"))
    with pytest.raises(ConfigError, match="tpu-compile"):
        plan_run(ScoreConfig(), "v5e:2x2")


TINY = ["--data", "moons", "--width", "8", "--blocks", "1", "--batch-size", "8"]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["--topology", "cpu:2", "--mesh", "data=2", "--json", str(out)]
    assert main(["plan", *TINY, *words]) == 0
    said = capsys.readouterr()
    assert "compiling the training step for cpu:2, batch 8" in said.err
    assert "cpu:2: training step of MLP for moons" in said.out and "all-reduce" in said.out
    plan = RunPlan.from_dict({k: v for k, v in json.loads(out.read_text()).items()
                              if k != "topology"}).step  # fmt: skip
    # The gradient and the loss, as of every run in this form.
    (only,) = plan.collectives
    assert only.bytes == plan.memory.parts["weights"] + 4 and plan.fits is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--topology", "v5e:3x3"), "expected a kind and a size"),
        (("--topology", "cpu:2", "--largest-batch"), "no memory of its own"),
        (("--topology", "cpu:2", "--json", "no/folder/p.json"), "no folder"),
        (("--sampler",), "give --topology"),
        (("--share", "0.1", "--mesh", "data=2"), "--mesh is for a step"),
        (("--share", "0.1", "--rule", "pool=replicate"), "--rule is for a step"),
    ],
)
def test_commands_that_cannot_be_carried_out(capsys, words, part):
    assert main(["plan", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--topology", "cpu:4", "--mesh", "data=3"), "multiplies to 3, and there are 4"),
        (("--topology", "cpu:4", "--batch-size", "6"), "does not divide over the 4 parts"),
        (("--topology", "cpu:4", "--batch-size", "8", "--accumulate", "4"), "leaves 2 examples"),
        (("--topology", "cpu:4", "--rule", "kernel=-,foo"), "names the axis 'foo'"),
        (("--topology", "cpu:4", "--data", "nowhere"), "does not exist"),
    ],
)
def test_what_the_other_process_finds_wrong(capsys, words, part):
    assert main(["plan", "--data", "moons", *words]) == 2
    assert part in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_every_device_draws_its_part_of_the_samples():
    config = ScoreConfig(data="moons", width=32, blocks=1, batch_size=64)
    one, two = (
        plan_run(config, f"cpu:{n}", mesh=f"data={n}", sampler=True).sampler for n in (1, 2)
    )
    # All but the products of the network's weights with the times, the same for all.
    assert two.matmul_flops == pytest.approx(one.matmul_flops / 2, rel=0.1)
    assert two.memory.outputs < 0.6 * one.memory.outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--data", "text", "--process", "absorbing", "--width", "32", "--blocks", "1"],
        ["--share", "0.1", "--width", "8", "--blocks", "1", "--channel-mults", "1"],
        ["--labels", "--width", "8", "--blocks", "1", "--channel-mults", "1", "--accumulate", "2"],
    ],
    ids=["text", "shared", "labels"],
)
def test_every_kind_of_run_and_its_sampler(words, capsys):
    assert (
        main(["plan", *words, "--topology", "cpu:4", "--mesh", "data=2,fsdp=2", "--sampler"]) == 0
    )
    assert "sampler of" in capsys.readouterr().out
