"""The search for schedules: what it draws, what it selects, stopping and going on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import process, solve
from jaxgen.solve.evolution import EvolutionConfig, crossover, identity, mutate
from jaxgen.solve.ranking import RankingConfig, _features, _Network, fit_predictor, ranking_loss
from jaxgen.solve.schedule import baseline_schedules, schedule_nfe, validate_schedule
from jaxgen.solve.search import SearchConfig, evaluate_schedules, search, stack_schedules

SDE = process.vp()
SMALL = RankingConfig(steps=100, batch=16, width=16, hidden=(16,))
ANALYTIC = EvolutionConfig(afs=(0.4, 0.3, 0.3))


@pytest.fixture(scope="module")
def plain():
    return list(baseline_schedules(5, SDE).values())


def goal(s):
    """A metric with a known best: knots near given ones, data first, then noise."""
    steps = s.ptype.shape[-1]
    share = jnp.linspace(0, 1, steps + 1)[None] ** 2
    wanted = s.lam[:, :1] + share * (s.lam[:, -1:] - s.lam[:, :1])
    is_right = s.ptype == (jnp.arange(steps) < 2)[None]
    return jnp.sum((s.lam - wanted) ** 2, axis=1) + jnp.sum(~is_right, axis=1)


def run(population, score_fn=goal, key=0, **options):
    files = {k: options.pop(k) for k in ("archive", "made_for") if k in options}
    config = SearchConfig(**({"batch": 8, "budget": 120, "guided_after": None} | options))
    return search(jax.random.key(key), score_fn, population, config, progress=False, **files)


def test_it_comes_near_the_best_and_compiles_once(plain):
    score_fn = jax.jit(goal)
    found = run(plain, score_fn, budget=400)
    start = min(e.score for e in found.archive[:36])
    assert found.score < 0.15 * start and len(found.archive) == 400
    assert score_fn._cache_size() == 1
    assert found.score == min(e.score for e in found.archive)
    # In a batch of the search's size: another one rounds in another order.
    again = score_fn(stack_schedules([found.best] * 8))
    np.testing.assert_allclose(again, found.score, rtol=1e-6)
    again, other = run(plain, score_fn, budget=60), run(plain, score_fn, key=1, budget=60)
    assert [e.score for e in again.archive] == [e.score for e in found.archive[:60]]
    assert [e.score for e in again.archive] != [e.score for e in other.archive]


def test_every_schedule_has_as_many_evaluations_as_asked(plain):
    score_fn = jax.jit(goal)
    found = run(plain, score_fn, budget=300, evolution=ANALYTIC)
    assert {e.schedule.steps for e in found.archive} == {5, 6}
    for e in found.archive:
        assert int(schedule_nfe(e.schedule)) == 5
    assert score_fn._cache_size() == 2
    assert len({identity(e.schedule) for e in found.archive[36:]}) == 264


@pytest.mark.parametrize("guided", [False, True])
def test_killed_at_any_evaluation_it_goes_on_to_the_same_end(plain, tmp_path, guided):
    options = {"budget": 68, "evolution": ANALYTIC}
    if guided:
        options |= {"guided_after": 44, "guided_children": 12, "ranking": SMALL}
    whole = run(plain, **options)
    assert {e.origin for e in whole.archive} == {"start", "evolution"} | (
        {"guided"} if guided else set()
    )
    path = tmp_path / "archive.jsonl"
    calls, allowed = [0], [1]

    def dying(population):
        calls[0] += 1
        if calls[0] > allowed[0]:
            raise KeyboardInterrupt
        return goal(population)

    while True:
        try:
            found = run(plain, dying, archive=path, **options)
            break
        except KeyboardInterrupt:
            # In the middle of a generation of two kinds, and of a line.
            calls[0], allowed[0] = 0, 1 + allowed[0] % 3
            if path.exists():
                path.write_bytes(path.read_bytes() + b'{"score": 0.1, "orig')
    assert [e.score for e in found.archive] == [e.score for e in whole.archive]
    assert [e.origin for e in found.archive] == [e.origin for e in whole.archive]
    assert identity(found.best) == identity(whole.best)


def test_a_larger_budget_extends_a_smaller(plain, tmp_path):
    path = tmp_path / "archive.jsonl"
    run(plain, budget=41, archive=path)
    lines = path.read_text().splitlines()
    assert len(lines) == 42
    longer = run(plain, budget=70, archive=path)
    assert path.read_text().splitlines()[:42] == lines
    assert [e.score for e in longer.archive] == [e.score for e in run(plain, budget=70).archive]
    assert len(run(plain, budget=50, archive=path).archive) == 50


def test_what_is_not_finite_is_never_selected(plain):
    def broken(s):
        score = goal(s)
        return jnp.where(score < 20, jnp.where(s.ptype[:, 0] == 1, jnp.nan, -jnp.inf), score)

    found = run(plain, broken)
    assert found.score >= 20
    # A score of minus infinity is no number either.
    assert all(e.score >= 20 for e in found.archive)
    with pytest.raises(ValueError, match="none of the 40 scores is finite"):
        run(plain, lambda s: jnp.full(s.lam.shape[0], jnp.nan), budget=40)


def test_bad_input(plain, tmp_path):
    with pytest.raises(ValueError, match="init_population is empty"):
        run([])
    with pytest.raises(ValueError, match=r"returned shape \(\) for 8 schedules"):
        run(plain, lambda s: jnp.float32(0))
    with pytest.raises(TypeError, match="typed key"):
        search(jax.random.PRNGKey(0), goal, plain)
    with pytest.raises(ValueError, match="budget is 0"):
        SearchConfig(budget=0)
    with pytest.raises(ValueError, match="guided_after"):
        SearchConfig(guided_after=1)
    with pytest.raises(ValueError, match="types"):
        EvolutionConfig(types=(1.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="crossover"):
        EvolutionConfig(crossover=2.0)
    other = baseline_schedules(6, SDE)["data-2-bh2"]
    with pytest.raises(ValueError, match="5 and 6 steps"):
        crossover(jax.random.key(0), plain[0], other)
    with pytest.raises(ValueError, match="one number"):
        stack_schedules([plain[0], other])
    path = tmp_path / "archive.jsonl"
    run(plain, budget=40, archive=path)
    for options, part in (
        ({"key": 1}, "key differ"),
        ({"batch": 4}, "settings differ"),
        ({"made_for": "another run"}, "made_for differ"),
    ):
        with pytest.raises(ValueError, match=part):
            run(plain, archive=path, **({"budget": 40} | options))
    with pytest.raises(ValueError, match="start_population differ"):
        run(plain[:30], archive=path)
    lines = path.read_text().splitlines()
    record = json.loads(lines[3])
    record["schedule"]["order"][0] = 3
    path.write_text("\n".join([*lines[:3], json.dumps(record), *lines[4:]]) + "\n")
    with pytest.raises(ValueError, match="damaged at line 4"):
        run(plain, archive=path)
    path.write_text("a picture\n")
    with pytest.raises(ValueError, match="holds no search"):
        run(plain, archive=path)


def test_mutation_and_crossover_keep_what_they_must(plain):
    config = dataclasses.replace(ANALYTIC, types=(0.3, 0.3, 0.4))
    changed = dict.fromkeys(("lam", "ptype", "order", "est_order", "relax_kind", "corrector"), 0)
    schedule = plain[8]
    for i in range(100):
        new = mutate(jax.random.key(i), schedule, config)
        validate_schedule(new, statistics=True, x0_mean=0.0)
        assert int(schedule_nfe(new)) == 5
        assert new.lam[0] == schedule.lam[0] and new.lam[-1] == schedule.lam[-1]
        for name in changed:
            changed[name] += not np.array_equal(getattr(new, name), getattr(schedule, name))
    assert min(changed.values()) > 5, changed
    # One step, and that analytic, has no evaluation to give away.
    alone = dataclasses.replace(next(iter(baseline_schedules(1, SDE).values())), afs=np.int32(1))
    for i in range(20):
        assert (
            int(
                schedule_nfe(
                    mutate(jax.random.key(i), alone, dataclasses.replace(config, rate=1.0))
                )
            )
            == 0
        )
    assert identity(mutate(jax.random.key(3), schedule)) == identity(
        mutate(jax.random.key(3), schedule)
    )
    first = dataclasses.replace(plain[8], lam=np.float32([-5, -4, -3, -2, -1, 0]))
    second = plain[-1]
    kept = {"lam": set(), "ptype": set()}
    for i in range(40):
        child = crossover(jax.random.key(i), first, second, EvolutionConfig(mixing=0.0))
        validate_schedule(child)
        for name, from_first in kept.items():
            is_first = np.array_equal(getattr(child, name), getattr(first, name))
            assert is_first or np.array_equal(getattr(child, name), getattr(second, name))
            from_first.add(is_first)
    assert kept == {"lam": {True, False}, "ptype": {True, False}}


def test_scores_come_back_in_order_for_any_numbers_of_steps(plain):
    mixed = [plain[3], *list(baseline_schedules(6, SDE).values())[:3], plain[9], plain[20]]
    scores = evaluate_schedules(goal, mixed, 4)
    for schedule, value in zip(mixed, scores, strict=True):
        assert float(goal(stack_schedules([schedule]))[0]) == pytest.approx(value)


def test_the_ranking_loss_counts_pairs():
    scores = jnp.array([0.0, 0.1, 1.0])
    # Pairs (1.0, 0.0) and (1.0, 0.1); the closer pair does not count.
    predicted = jnp.array([0.0, 0.5, 0.3])
    expected = ((1 - 0.3) + (1 + 0.2)) / 2
    assert float(ranking_loss(predicted, scores)) == pytest.approx(expected)
    assert float(ranking_loss(predicted, jnp.zeros(3))) == 0.0


def test_the_predictor_learns_an_order_and_ignores_padding(plain):
    pool = [mutate(jax.random.key(i), plain[i % 36], ANALYTIC) for i in range(120)]

    def truth(s):
        return float(s.lam[2] - s.lam[0]) + 2.0 * float(np.sum(s.ptype))

    scores = np.array([truth(s) for s in pool])
    scores[5] = np.nan
    rank = fit_predictor(jax.random.key(0), pool[:80], scores[:80], SMALL, most_steps=6)
    given, wanted = rank(pool[80:]), scores[80:]
    signs = np.sign(given[:, None] - given[None]) * np.sign(wanted[:, None] - wanted[None])
    assert signs.sum() / np.abs(signs).sum() > 0.5
    with pytest.raises(ValueError, match="expected at most 6"):
        rank([baseline_schedules(8, SDE)["data-1-none"]])
    with pytest.raises(ValueError, match="at least two"):
        fit_predictor(jax.random.key(0), pool[:1], scores[:1])
    short, long = (_features(pool[:4], most, rank.ends) for most in (6, 9))
    a, b = (jax.jit(_Network(SMALL).apply)(rank.params, f) for f in (short, long))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert solve.RankingConfig is RankingConfig
