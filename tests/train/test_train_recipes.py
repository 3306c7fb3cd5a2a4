"""The score-based recipe: configurations, the untrained network's exact Gaussian, figures."""

import dataclasses
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.train.data import Dataset, load
from jaxgen.train.recipes import evaluate as evaluation
from jaxgen.train.recipes.classifier import train_judge
from jaxgen.train.recipes.config import (
    ConfigError,
    ScoreConfig,
    from_mapping,
    read_yaml,
    resolve,
    write_yaml,
)
from jaxgen.train.recipes.score import build, make_process

HINTS = typing.get_type_hints(ScoreConfig)


def experiment(data, **changes):
    config = ScoreConfig(data=data, width=8, blocks=1, channel_mults=(1,), dropout=0.0)
    dataset = load(data)
    return build(resolve(dataclasses.replace(config, **changes), dataset.event), dataset)


@pytest.fixture(scope="module")
def digits():
    return experiment("digits")


@pytest.fixture(scope="module")
def moons():
    return experiment("moons")


# --- configuration ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    config=st.builds(
        ScoreConfig,
        data=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1),
        process=st.sampled_from(typing.get_args(HINTS["process"])),
        steps=st.none() | st.integers(1, 10**6),
        seed=st.integers(0, 2**32),
        share=st.none() | st.floats(1e-9, 1) | st.integers(1, 10**9).map(float),
        learning_rate=st.none() | st.floats(1e-12, 1e12),
        attention=st.lists(st.integers(1, 64)).map(tuple),
        channel_mults=st.none() | st.lists(st.integers(1, 8), min_size=1).map(tuple),
        process_args=st.lists(st.sampled_from(["beta_max=15", "x: [1, 'no'"])).map(tuple),
        labels=st.booleans(),
        out=st.none() | st.sampled_from(["runs/x", "yes", "1e3", "null"]),
    )
)
def test_yaml_there_and_back(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    write_yaml(path, config)
    again = read_yaml(path, ScoreConfig())
    assert again == config and hash(again) == hash(config)


def test_yaml_by_hand_is_cast_to_the_fields_types(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-3\nema: 0\nchannel_mults: [1, 2]\nsteps: null\n")
    config = read_yaml(path, ScoreConfig(steps=5))
    assert config.learning_rate == 1e-3 and config.ema == 0.0 and isinstance(config.ema, float)
    assert config.channel_mults == (1, 2) and config.steps is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepps: 3", "unknown field 'stepps'"),
        ("steps: many", "steps to 'many'"),
        ("steps: 1.5", "steps to 1.5"),
        ("steps: true", "steps to True"),
        ("labels: 1", "labels to 1; expected bool"),
        ("process: vpp", "expected one of vp, sub_vp"),
        ("channel_mults: 3", "channel_mults to 3"),
        ("- a\n- b", "holds list"),
        ("a: [", "is no YAML"),
        ("data: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_yaml(path, ScoreConfig())


def test_resolve_leaves_no_choice_open_and_keeps_what_is_given():
    for event in ((8, 8, 1), (28, 28, 1), (30, 30, 3), (31, 31, 3), (2,)):
        resolved = resolve(ScoreConfig(width=24), event)
        values = dataclasses.asdict(resolved)
        assert resolved.width == 24
        unset = {name for name, value in values.items() if value is None}
        assert unset == {"share", "fokker_planck", "length", "image_size"}
    assert resolve(ScoreConfig(), (8, 8, 1)).out == "runs/digits-vp"
    assert resolve(ScoreConfig(data="a/photos", process="ve"), (8, 8, 1)).out == "runs/photos-ve"
    for share, name in ((0.1, "0.1"), (1.0, "1"), (1234567.0, "1234567")):
        assert resolve(ScoreConfig(share=share), (8, 8, 1)).out == f"runs/digits-vp-share{name}"
    config = ScoreConfig(share=0.5, share_scheme="roast")
    assert resolve(config, (8, 8, 1)).out == "runs/digits-vp-share0.5-roast"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"ema": 1.0}, "ema"),
        ({"held_out": 1.0}, "held_out"),
        ({"accumulate": 3, "batch_size": 8}, "divisor"),
        ({"patch": 3}, "sides divide by"),
    ],
)
def test_values_out_of_range(changes, words):
    with pytest.raises(ConfigError, match=words):
        resolve(ScoreConfig(**changes), (8, 8, 1))


@pytest.mark.parametrize(
    "arguments", [("beta_max",), ("beta_max=x",), ("nothing=3",), ("beta_max=0.01",)]
)
def test_bad_process_arguments(arguments):
    with pytest.raises(ConfigError, match="process_args"):
        make_process("vp", arguments)


def test_process_arguments_arrive():
    sde = make_process("ve", ("sigma_max=7", "sigma_min=0.1"))
    np.testing.assert_allclose(sde.sigma(1.0), 7.0, rtol=1e-6)


def test_data_that_do_not_suit():
    with pytest.raises(ConfigError, match="has none"):
        experiment("swissroll", labels=True)
    odd = Dataset("odd", np.zeros((9, 2, 2), np.uint8), levels=256)
    with pytest.raises(ConfigError, match="no network"):
        build(resolve(ScoreConfig(), odd.event), odd)
    with pytest.raises(ConfigError, match="held_out"):
        experiment("digits", held_out=1e-6)


# --- losses and figures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"process": p} for p in typing.get_args(HINTS["process"]) if p != "absorbing"]
    + [
        {"prediction": p, "weighting": "simple", "times": "stratified"}
        for p in typing.get_args(HINTS["prediction"])
        if p != "edm"
    ],
    ids=lambda c: "-".join(c.values()),
)
def test_every_process_and_prediction_has_a_finite_loss_and_gradient(key, changes):
    made = experiment("moons", **changes)
    params = made.init(key)
    batch = {"x": jnp.asarray(made.train.x[:32])}

    @jax.jit
    def slope(params):
        return jax.value_and_grad(lambda p: jnp.mean(made.loss(key, p, batch)))(params)

    loss, grad = slope(params)
    assert np.isfinite(loss) and loss > 0
    norm = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(grad)) ** 0.5
    assert np.isfinite(norm) and norm > 1e-4


def test_loss_of_the_untrained_denoiser_is_one(digits):
    # F = 0 is the best Gaussian's denoiser; EDM's weight makes its error's target unit variance.
    params = digits.init(jax.random.key(0))
    batch = {"x": jnp.asarray(digits.train.x[:512])}
    loss = np.asarray(jax.jit(digits.loss)(jax.random.key(1), params, batch))
    error = loss.std() / np.sqrt(len(loss))
    assert abs(loss.mean() - 1) < 4 * error, (loss.mean(), error)


@pytest.mark.parametrize("name", ["digits", "moons"])
def test_likelihood_of_the_untrained_denoiser_is_its_gaussians(request, name):
    # With F = 0 the flow is that of N(0, d^2 I), whose density is known.
    made = request.getfixturevalue(name)
    key, n = jax.random.key(2), 16
    figures = evaluation.likelihood(key, made, made.init(key), made.held_out, n)
    x = np.asarray(made.to_model(jax.random.split(key)[0], jnp.asarray(made.held_out.x[:n])))
    d = made.sigma_data
    nats = np.mean(-0.5 * (x / d) ** 2 - np.log(d) - 0.5 * np.log(2 * np.pi))
    if name == "digits":
        truth = -nats / np.log(2) + np.log2(17 / 2)
        got = figures["bits_per_dim"]
    else:
        truth, got = nats - np.log(made.train.scale), figures["log_prob_per_dim"]
    # 2e-3: the prior's mismatch at the end of time, and the solver's tolerance.
    np.testing.assert_allclose(got, truth, atol=2e-3)
    assert figures["likelihood"]["failed"] == 0 and figures["likelihood"]["examples"] == n


def test_samples_do_not_depend_on_their_number_and_say_how_they_were_made(moons):
    key = jax.random.key(3)
    params = moons.init(key)
    few = evaluation.draw(key, moons, params, 3, solver="ddim", steps=4)
    more = evaluation.draw(key, moons, params, evaluation.CHUNK + 2, solver="ddim", steps=4)
    np.testing.assert_allclose(few.x, more.x[:3], atol=1e-6)
    assert few.x.shape == (3, 2) and len(np.unique(more.x[:, 0])) == evaluation.CHUNK + 2
    assert few.how | {"last_time": 0} == {
        "solver": "ddim",
        "steps": 4,
        "grid": "log_snr",
        "evaluations": 4,
        "last_step": "solver",
        "last_time": 0,
    }


def test_samples_of_the_untrained_denoiser_are_its_gaussians(moons):
    key, steps, n = jax.random.key(4), 18, 2000
    x = evaluation.draw(key, moons, moons.init(key), n, solver="heun", steps=steps).x
    d = moons.sigma_data
    # Heun's own recursion on dx/ds = x s/(s^2 + d^2), exact for the field of this Gaussian:
    # at 18 steps it inflates the variance by 9 %, which the sampler must show too.
    first, last = (
        float(moons.sde.sigma(t) / moons.sde.alpha(t)) for t in (moons.sde.t_max, moons.sde.t_end)
    )
    ramp = np.linspace(first ** (1 / 7), last ** (1 / 7), steps + 1) ** 7
    scale = 1.0 / float(moons.sde.alpha(moons.sde.t_max))
    for s, r in itertools.pairwise(ramp):
        slope = s / (s**2 + d**2)
        end = 1 + (r - s) * slope
        scale *= 1 + (r - s) * 0.5 * (slope + end * r / (r**2 + d**2))
    truth = (scale * float(moons.sde.alpha(moons.sde.t_end))) ** 2
    error = truth * np.sqrt(2 / x.size)
    assert abs(x.var() - truth) < 4 * error, (x.var(), truth, error)
    assert abs(x.mean()) < 4 * np.sqrt(truth / x.size)


def test_labels_steer_and_are_hidden_in_training(key):
    made = experiment("gaussians", labels=True, label_dropout=0.5)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), made.init(key)
    )
    x, t = jnp.ones((4, 2)), jnp.full((4,), 0.5)
    apply = jax.jit(lambda label: made.field(params, label)(x, t))
    outs = [apply(jnp.full((4,), k, jnp.int32)) for k in (1, 8)]
    none = jax.jit(made.field(params))(x, t)
    assert float(jnp.max(jnp.abs(outs[0] - none))) > 1e-3
    np.testing.assert_allclose(outs[1], none, rtol=1e-5)
    batch = {"x": jnp.ones((64, 2)), "label": jnp.ones((64,), jnp.int32)}
    always = dataclasses.replace(made, config=dataclasses.replace(made.config, label_dropout=0.0))
    half, whole = (jax.jit(e.loss)(key, params, batch) for e in (made, always))
    hidden = int(np.sum(np.abs(np.asarray(half - whole)) > 1e-7))
    assert abs(hidden - 32) <= 4 * 4, hidden


def test_guidance_follows_the_library(key):
    made = experiment("gaussians", labels=True)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), made.init(key)
    )
    x, t = jnp.ones((4, 2)), jnp.full((4,), 0.5)
    guided = jax.jit(lambda w: evaluation.conditional_field(made, params, 2, w)(x, t))
    fields = [guided(w) for w in (0.0, 1.0, 3.0)]
    np.testing.assert_allclose(fields[2], fields[0] + 3 * (fields[1] - fields[0]), atol=1e-5)
    np.testing.assert_allclose(fields[0], jax.jit(made.field(params))(x, t), atol=1e-5)


@pytest.fixture(scope="module")
def judge(digits):
    return train_judge(jax.random.key(5), digits.train, digits.held_out, steps=60)


def test_the_judge_learns_digits(judge, digits):
    # Ten classes: chance is 0.1; a linear classifier gets about 0.95 on these digits.
    assert judge.accuracy > 0.9
    x = digits.train.to_unit(digits.train.x[:700])
    features, probabilities = judge.look(x)
    assert features.shape == (700, judge.feature_size)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(judge.look(x[300:309])[1], probabilities[300:309], atol=1e-5)


def test_the_judge_tells_data_from_noise(judge, digits):
    data = digits.train
    real = data.to_unit(data.x[:400])
    noise = np.random.default_rng(0).uniform(-1, 1, real.shape).astype(np.float32)
    good = evaluation.judged(judge, data, real)
    bad = evaluation.judged(judge, data, noise)
    assert good["frechet"]["model_to_data"] < 3 * good["frechet"]["data_to_data"]
    assert bad["frechet"]["model_to_data"] > 10 * bad["frechet"]["data_to_data"]
    assert good["frechet"]["count"] == bad["frechet"]["count"] == 400
    assert abs(sum(good["classifier"]["class_shares"]) - 1) < 1e-3
    assert good["classifier"]["smallest_class_share"] > 0.05
    one = evaluation.judged(judge, data, np.repeat(real[:1], 50, axis=0))
    assert one["classifier"]["smallest_class_share"] == 0.0


def test_labels_are_needed_to_judge(digits):
    with pytest.raises(ValueError, match="no labels"):
        train_judge(jax.random.key(0), dataclasses.replace(digits.train, label=None), digits.train)


def test_from_mapping_keeps_the_rest():
    base = ScoreConfig(seed=4)
    assert from_mapping({"steps": 3}, base) == dataclasses.replace(base, steps=3)
