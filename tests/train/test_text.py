"""Runs on text: the split, the vocabulary, the figures, and everything that can go wrong."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from jaxgen.cli import main
from jaxgen.train import text as texts
from jaxgen.train.data import DataError
from jaxgen.train.recipes.run import open_run, open_text_run
from jaxgen.train.recipes.text import bits_per_char, draw_text, ngram_bits
from jaxgen.train.report import read_lines

SETTINGS = {
    "process": "absorbing",
    "length": 16,
    "width": 16,
    "blocks": 1,
    "batch-size": 8,
    "warmup-steps": 2,
    "report-every": 2,
    "eval-samples": 3,
    "eval-likelihood": 9,
    "solver-steps": 20,
}
SMALL = ("--quiet", *(str(w) for name, value in SETTINGS.items() for w in (f"--{name}", value)))


pytestmark = pytest.mark.usefixtures("compile_once")


def written(folder, n=200):
    """A small text of words, in a file."""
    rng = np.random.default_rng(0)
    words = ["a", "boat", "sank", "near", "the", "quiet", "shore", "é"]
    path = folder / "words.txt"
    path.write_text(" ".join(words[i] for i in rng.integers(0, 8, n)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of 4 steps, and the file that it learned."""
    folder = tmp_path_factory.mktemp("text")
    path = written(folder)
    out = folder / "run"
    assert main(["train", *SMALL, "--data", f"text:{path}", "--steps", "4", "--out", str(out)]) == 0
    return out, path


def refused(capsys, *words):
    """The one line on standard error of a command that cannot be carried out."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# --- text as data -------------------------------------------------------------------------------


def test_held_out_text_is_not_seen_in_training():
    # Every character of this text is another one, so that what was seen can be told.
    words = "".join(chr(0x4E00 + i) for i in range(8000))
    data = np.frombuffer(words.encode("utf-32-le"), np.uint32)
    made = load(words, held_out=0.2)
    seen = set(made.vocabulary.characters)
    hidden = made.held_out_tokens == len(made.vocabulary) - 1
    assert hidden.all()
    assert len(seen) + len(made.held_out_tokens) == len(data)
    assert 0.15 < len(made.held_out_tokens) / len(data) < 0.25
    # Examples overlap within a stretch and never join two.
    rows = [made.vocabulary.decode(row) for row in made.train.x.tolist()]
    assert all(row in words for row in rows)
    starts = sorted(words.index(row) for row in rows)
    assert min(np.diff(starts)) == 4
    assert set("".join(rows)) == seen
    assert made.held_out.x.shape[1] == 16


def load(words, **options):
    """A text given as it is."""
    original = texts._standard_library
    texts._standard_library = lambda: words
    try:
        return texts.load_text("text", **({"length": 16, "held_out": 0.15, "seed": 0} | options))
    finally:
        texts._standard_library = original


def test_another_seed_holds_out_other_stretches_and_the_same_one_the_same():
    words = "".join(chr(0x4E00 + i) for i in range(8000))
    a, b, c = (load(words, seed=seed).vocabulary.characters for seed in (0, 0, 1))
    assert a == b != c


def test_a_vocabulary_encodes_and_decodes(tmp_path):
    vocabulary = texts.Vocabulary("\n abß", "0" * 64, 16)
    ids = vocabulary.encode("ab ß\nz")
    assert ids.tolist() == [2, 3, 1, 4, 0, 5]
    assert vocabulary.decode(ids) == "ab ß\n" + texts.UNKNOWN
    assert len(vocabulary) == 6
    assert texts.read_vocabulary(tmp_path) is None
    texts.write_vocabulary(tmp_path, vocabulary)
    assert texts.read_vocabulary(tmp_path) == vocabulary
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(DataError, match="no vocabulary"):
        texts.read_vocabulary(tmp_path)


def test_the_text_of_the_standard_library():
    made = texts.load_text("text", length=64, held_out=0.15, seed=0)
    assert made.characters > 300_000
    assert made.train.x.dtype == np.uint8
    assert "statement" in made.vocabulary.decode(made.train_tokens[:100_000].tolist())
    assert not np.isin(made.held_out.x, [len(made.vocabulary) - 1]).any()


def test_ngrams_by_their_definition():
    rng = np.random.default_rng(4)
    both = np.cumsum(rng.integers(0, 3, 400)) % 4
    learned, hidden = both[:300], both[300:]

    def p(context, c):
        """Of ``c`` after the longest context, by counts of the training text."""
        lower = p(context[1:], c) if context else 1 / 4
        n = len(context)
        after = [learned[i + n] for i in range(300 - n) if tuple(learned[i : i + n]) == context]
        kinds = len(set(after))
        return (after.count(c) + kinds * lower) / (len(after) + kinds) if after else lower

    for order, bits in enumerate(ngram_bits(learned, hidden, 4, 3), 1):
        # The first of the hidden ones see the end of what was learned.
        told = [p(tuple(both[i - order + 1 : i]), both[i]) for i in range(300, 400)]
        np.testing.assert_allclose(bits, -np.log2(told).mean(), rtol=1e-12)


def test_ngrams_of_a_text_that_is_known():
    # A cycle: with one symbol of context the next is certain, but for what is kept for others.
    learned, hidden = np.arange(3000) % 3, np.arange(300) % 3
    bits = ngram_bits(learned, hidden, 3, 3)
    assert bits[0] == pytest.approx(math.log2(3), abs=1e-3)
    assert max(bits[1:]) < 0.02
    # By hand: N(h, c) = 1000, T(h) = 1, p' = 1/3.
    assert bits[1] == pytest.approx(-math.log2((1000 + 1 / 3) / 1001), rel=0.1)
    coin = np.random.default_rng(0).integers(0, 2, 40_000)
    fair = ngram_bits(coin[:20_000], coin[20_000:], 2, 4)
    assert min(fair) > 0.995 and max(fair) < 1.01


# --- a run --------------------------------------------------------------------------------------


def test_the_folder_of_a_run(made):
    out, _ = made
    assert {p.name for p in out.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "curves.png",
        "metrics.json",
        "metrics.jsonl",
        "samples.png",
        "samples.txt",
        "text.json",
    }
    figures = json.loads((out / "metrics.json").read_text())
    size = figures["text"]["vocabulary"]
    # The network is hardly trained: close to uniform over its tokens, and the unknown one is one.
    assert abs(figures["bits_per_char"] - math.log2(size)) < 1
    assert 0 < figures["bits_per_char_standard_error"] < 0.5
    assert figures["baselines"]["5_gram"] < figures["baselines"]["characters"] < math.log2(size)
    assert figures["samples"]["count"] == 3 and figures["samples"]["evaluations"] <= 16
    first = read_lines(out / "metrics.jsonl")[0]
    # The loss is in bits per character from the first step on.
    assert abs(first["loss"] - math.log2(size)) < 1.5
    assert (out / "samples.txt").read_text().count("---") == 3
    for name in ("samples.png", "curves.png"):
        assert (out / name).stat().st_size > 5000


def test_the_bound_of_a_network_that_knows_nothing_is_uniform(made):
    run = open_text_run(made[0], text=True)
    zero = jax.tree.map(np.zeros_like, run.params)
    figures = bits_per_char(jax.random.key(0), run.experiment, zero, 20)
    assert figures["bits_per_char"] == pytest.approx(
        math.log2(len(run.experiment.vocabulary)), 1e-4
    )
    assert figures["bits_per_char_standard_error"] < 1e-4
    assert figures["likelihood"]["examples"] == min(20, len(run.experiment.held_out))


def test_samples_are_printed_and_do_not_change_with_their_number(made, capsys):
    out, path = made
    content = path.read_bytes()
    path.unlink()  # sampling needs no text
    try:
        assert main(["sample", str(out), "--n", "2", "--prompt", "a boat"]) == 0
        two = capsys.readouterr().out
        assert main(["sample", str(out), "--n", "9", "--prompt", "a boat", "--top-k", "99"]) == 0
        nine = capsys.readouterr().out
    finally:
        path.write_bytes(content)
    assert two.split("--- ")[1:3] == nine.split("--- ")[1:3]
    assert two.count("a boat") == 2
    assert "2 texts of 16 characters" in two and "evaluations for each text" in two
    file = out.parent / "three.txt"
    assert main(["sample", str(out), "--n", "3", "--top-p", "0.5", "--out", str(file)]) == 0
    assert file.read_text(encoding="utf-8").count("---") == 3
    assert str(file) in capsys.readouterr().out


def test_going_on_evaluating_and_extending(made, capsys, tmp_path):
    out, path = made
    longer = tmp_path / "longer"
    shutil.copytree(out, longer)
    words = ["train", *SMALL, "--data", f"text:{path}", "--out", str(longer)]
    assert main([*words, "--steps", "4"]) == 0
    assert "has finished at step 4" in capsys.readouterr().out
    assert main([*words, "--steps", "6"]) == 0
    said = capsys.readouterr().out
    assert "bits per character" in said and "5-gram" in said and "samples.txt" in said
    assert [line["step"] for line in read_lines(longer / "metrics.jsonl")] == [2, 4, 6]
    assert open_text_run(longer, text=False).step == 6
    assert main(["evaluate", str(longer), "--n", "2", "--solver", "euler", "--steps", "7"]) == 0
    assert "2, averaged parameters (EMA 0.999), euler, 7 steps" in capsys.readouterr().out


def test_a_prompt_that_fills_the_text_costs_nothing(made):
    run = open_text_run(made[0], text=False)
    prompt = "the quiet shore "
    drawn = draw_text(jax.random.key(0), run.experiment, run.params, 2, steps=20, prompt=prompt)
    assert drawn.texts == [prompt, prompt]
    assert drawn.how["evaluations"] == 0 and drawn.how["calls"] == 0
    assert (drawn.unmasked_at == -1).all()


def test_absorbing_without_data_takes_the_standard_library(tmp_path, monkeypatch, capsys):
    from jaxgen.cli.train import _parse

    monkeypatch.chdir(tmp_path)
    assert _parse(["--process", "absorbing"]).run.data == "text"
    assert _parse(["--process", "absorbing", "--data", "text:a.txt"]).run.data == "text:a.txt"
    said = refused(capsys, "train", "--process", "absorbing", "--data", "digits")
    assert "give --data text" in said


def test_texts_that_cannot_be_used(tmp_path, capsys):
    def train(name, content):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        return refused(
            capsys, "train", *SMALL, "--data", f"text:{tmp_path / name}", "--out", tmp_path / "out"
        )

    assert "does not exist" in train("none.txt", None)
    assert "not text in UTF-8 (byte 0xe9 at 3)" in train(
        "latin.txt", "caf\xe9 ".encode("latin-1") * 400
    )
    assert "zero bytes" in train("wide.txt", "abc ".encode("utf-16-le") * 400)
    assert "expected at least 640" in train("short.txt", b"too short")
    assert "holds 0 characters" in train("empty.txt", b"")
    assert "the one character" in train("same.txt", b"a" * 4000)
    said = refused(capsys, "train", *SMALL, "--data", f"text:{tmp_path}", "--out", tmp_path / "out")
    assert "is no file" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--share 0.1", "share is 0.1, which is not for text"),
        ("--fokker-planck 0.1", "fokker_planck is 0.1"),
        ("--labels", "labels is True"),
        ("--prediction noise", "prediction is 'noise'"),
        ("--solver ddim", "solver 'ddim' is not for text"),
        ("--width 33", "width is 33"),
        ("--length 1", "length is 1"),
        ("--process-args beta_max=3", "process_args do not suit absorbing"),
        ("--process-args eps=0.1 sigma_max=3", "leave one out"),
        ("--process-args eps", "expected name=number"),
        ("--held-out 0", "held_out is 0.0"),
        ("--process vp", "give --process absorbing"),
    ],
)
def test_settings_that_are_not_for_text(tmp_path, capsys, flags, said):
    path, out = written(tmp_path), tmp_path / "out"
    words = [*SMALL, "--data", f"text:{path}", "--out", out, *flags.split()]
    assert said in refused(capsys, "train", *words)
    assert not out.exists()


def test_settings_that_are_for_text_only(tmp_path, capsys):
    for flags in (("--length", "32"), ("--discrete-loss", "k_dce")):
        said = refused(capsys, "train", "--data", "moons", *flags, "--out", tmp_path / "out")
        assert "is for text" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--prompt xyz", "holds 'x', which the run's text does not"),
        ("--prompt aaaaaaaaaaaaaaaaa", "the run writes texts of 16"),
        ("--top-p 0", "top_p is 0"),
        ("--top-k 0", "top_k is 0"),
        ("--solver ddim", "solver 'ddim' is not for text"),
        ("--steps 0", "--steps is 0"),
        ("--n 0", "--n is 0"),
        ("--label 3", "--label is not for text"),
        ("--steer anneal=2", "--steer is not for text"),
        ("--out x.npz", "should end in .txt or .png"),
    ],
)
def test_samples_that_cannot_be(made, capsys, words, said):
    assert said in refused(capsys, "sample", made[0], *words.split())


def test_other_commands_refuse_a_run_on_text(made, capsys):
    for command in ("compare", "search", "inpaint"):
        assert "holds a run on text" in refused(capsys, command, made[0])
    with pytest.raises(ValueError, match="holds a run on text"):
        open_run(made[0])


def test_another_text_is_refused(made, capsys):
    out, path = made
    content = path.read_bytes()
    path.write_bytes(content + b"more words\n")
    try:
        words = ("train", *SMALL, "--data", f"text:{path}", "--steps", "9", "--out", out)
        assert "is another text than" in refused(capsys, *words)
        assert "is another text than" in refused(capsys, "evaluate", out)
    finally:
        path.write_bytes(content)
