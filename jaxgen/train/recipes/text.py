r"""The text recipe: characters hidden by the absorbing process, and a transformer that finds them.

A run learns the conditionals of ``score.radd_loss``, in bits per character, without time in the
network. Its figure is the bound on held-out text: ``k_dce`` over several k for each example, which
is unbiased and exact for the model that writes in a random order. It stands beside what simple
models of the same training text reach on the same held-out text: the frequencies of characters, an
interpolated 5-gram (Witten and Bell, 1991) and lzma (what the held-out text adds to the compressed
training text). Those see all the text to the left, the network an example of ``length`` characters.
"""

import dataclasses
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.nets.radd import RADDTransformer
from jaxgen.process.absorbing import METHODS, Absorbing, absorbing
from jaxgen.score.discrete import Conditionals, radd_loss
from jaxgen.solve.discrete import radd_sample
from jaxgen.train.data import DataError, Dataset
from jaxgen.train.manifest import replace_text
from jaxgen.train.recipes import pictures
from jaxgen.train.recipes.config import ConfigError, Resolved, ScoreConfig
from jaxgen.train.recipes.evaluate import rounded
from jaxgen.train.recipes.score import Experiment
from jaxgen.train.text import Text, Vocabulary, is_text, load_text

__all__ = [
    "TextDrawn",
    "TextExperiment",
    "baselines",
    "bits_per_char",
    "build_text",
    "draw_text",
    "evaluate_text",
    "load_for",
    "write_samples",
]

Say = Callable[[str], None]

# Sequences that are sampled, and examples that are measured, at a time; draws of each of these.
CHUNK = 8
DRAWS = 16
# Channels of an attention head.
_HEAD = 32
_GRAM = 5


@dataclasses.dataclass(frozen=True, eq=False)
class TextExperiment(Experiment):
    """Everything that a run on text is made of; made by ``build_text``.

    Attributes:
      sde: the absorbing process.
      vocabulary: the characters.
      text: the text itself; ``None`` where a run is only sampled from.
    """

    sde: Absorbing  # type: ignore[assignment]
    vocabulary: Vocabulary = dataclasses.field(kw_only=True)
    text: Text | None = None

    def init_network(self, key: jax.Array) -> Any:
        """The network's first parameters."""
        return self.net.init(key, jnp.zeros((1, self.vocabulary.length), jnp.int32))

    def conditionals(self, params: Any, *, dropout_key: jax.Array | None = None) -> Conditionals:
        """The network with these parameters: ids ``(n, l)`` to logits ``(n, l, V)``."""
        train = dropout_key is not None and self.config.dropout > 0
        rngs = {"dropout": dropout_key} if train else None
        return lambda x: self.net.apply(params, x, train, rngs=rngs)

    def loss(self, key: jax.Array, params: Any, batch: Any) -> jax.Array:
        """Losses ``(n,)`` of a batch of examples, in bits per character."""
        key_dropout, key_loss = jax.random.split(key)
        kind = self.config.discrete_loss
        losses = radd_loss(
            key_loss,
            self.conditionals(params, dropout_key=key_dropout),
            self.sde,
            batch["x"].astype(jnp.int32),
            kind=kind,
            draws="stratified" if kind.startswith("t_") else "decoupled",
        )
        return losses / (self.vocabulary.length * math.log(2))


def load_for(config: ScoreConfig, length: int) -> Text:
    """The text that a configuration names.

    Raises:
      ConfigError: the process, the data or a setting that do not go together.
      DataError: see ``load_text``.
    """
    if not is_text(config.data):
        raise ConfigError(
            f"process absorbing is for text, and data is {config.data!r}; give --data text "
            "(Python's help topics) or --data text:FILE"
        )
    if not 0 < config.held_out < 1:
        raise ConfigError(f"held_out is {config.held_out}; expected a share between 0 and 1")
    plain = ScoreConfig()
    for name in (
        "share",
        "fokker_planck",
        "labels",
        "image_size",
        "attention",
        "prediction",
        "weighting",
        "times",
    ):
        value = getattr(config, name)
        if value != getattr(plain, name):
            raise ConfigError(f"{name} is {value!r}, which is not for text; leave it out")
    if length < 2:
        raise ConfigError(f"length is {length}; expected at least 2")
    return load_text(config.data, length=length, held_out=config.held_out, seed=config.seed)


def build_text(config: Resolved, vocabulary: Vocabulary, text: Text | None) -> TextExperiment:
    """The experiment of a configuration and its characters.

    Raises:
      ConfigError: they do not fit together.
    """
    if config.solver not in METHODS:
        raise ConfigError(
            f"solver {config.solver!r} is not for text; choose one of {', '.join(METHODS)}"
        )
    heads = max(1, config.width // _HEAD)
    if config.width % (2 * heads):
        raise ConfigError(
            f"width is {config.width}; expected a multiple of {2 * heads} for {heads} heads of "
            "attention"
        )
    net = RADDTransformer(
        len(vocabulary),
        config.width,
        config.blocks,
        heads,
        config.dropout,
        None if config.precision == "float32" else jnp.dtype(config.precision),
        remat=config.remat,
    )
    empty = Dataset(config.data, np.zeros((0, vocabulary.length), np.uint8))
    return TextExperiment(
        config,
        empty if text is None else text.train,
        empty if text is None else text.held_out,
        net,
        _process(len(vocabulary), config.process_args),
        sigma_data=1.0,
        vocabulary=vocabulary,
        text=text,
    )


def _process(vocabulary: int, arguments: tuple[str, ...]) -> Absorbing:
    """``eps=`` for the log-linear schedule, ``sigma_min= sigma_max=`` for the geometric one."""
    numbers: dict[str, Any] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            raise ConfigError(f"process_args holds {argument!r}; expected name=number") from None
    schedule = "geometric" if numbers.keys() & {"sigma_min", "sigma_max"} else "log_linear"
    if schedule == "geometric" and "eps" in numbers:
        raise ConfigError(
            "process_args holds eps= of the log-linear schedule beside sigma_min= or sigma_max= of "
            "the geometric one; leave one out"
        )
    try:
        return absorbing(vocabulary, schedule, **numbers)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"process_args do not suit absorbing: {error}") from None


# --- samples ------------------------------------------------------------------------------------


class TextDrawn(NamedTuple):
    """Sampled text.

    Attributes:
      texts: the samples.
      unmasked_at: int32 ``(n, length)``, the step in which each character appeared, -1 for a
        prompt's.
      how: solver, steps, mean evaluations and calls, as plain values.
    """

    texts: list[str]
    unmasked_at: np.ndarray
    how: dict[str, Any]


def prompt_tokens(vocabulary: Vocabulary, prompt: str) -> np.ndarray:
    """The prompt's ids, and masks after it, int32 ``(length,)``.

    Raises:
      DataError: it is too long, or holds a character that the run does not know.
    """
    if len(prompt) > vocabulary.length:
        raise DataError(
            f"the prompt has {len(prompt)} characters; the run writes texts of {vocabulary.length}"
        )
    unknown = [c for c in prompt if c not in vocabulary.characters]
    if unknown:
        raise DataError(f"the prompt holds {unknown[0]!r}, which the run's text does not")
    tokens = np.full(vocabulary.length, len(vocabulary), np.int32)
    tokens[: len(prompt)] = vocabulary.encode(prompt)
    return tokens


def draw_text(
    key: jax.Array,
    experiment: TextExperiment,
    params: Any,
    n: int,
    *,
    solver: str = "tweedie",
    steps: int,
    prompt: str = "",
    top_p: float | None = None,
    top_k: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> TextDrawn:
    """Sample texts in chunks of one size; the first ``k`` of ``n`` are the same whatever ``n``.

    Args:
      key: typed key.
      experiment: what was trained.
      params: parameters of the network, usually the averaged ones.
      n: number of texts.
      solver: ``"tweedie"`` or ``"euler"``.
      steps: its steps.
      prompt: what every text begins with.
      top_p: draw from the likeliest characters of this mass only.
      top_k: draw from so many likeliest characters only.
      advance: called with the number of texts done after each chunk.

    Raises:
      DataError: see ``prompt_tokens``. ValueError: a number or name out of range.
    """
    vocabulary = experiment.vocabulary
    tokens = prompt_tokens(vocabulary, prompt)

    @jax.jit
    def chunk(key: jax.Array, params: Any, first: jax.Array) -> Any:
        return radd_sample(
            key,
            experiment.conditionals(params),
            experiment.sde,
            (CHUNK, vocabulary.length),
            steps,
            method=solver,
            prompt=tokens,
            top_p=top_p,
            top_k=top_k,
            first_index=first,
        )

    x, at, nfe, calls = [], [], [], []
    for first in range(0, n, CHUNK):
        out = jax.device_get(chunk(key, params, jnp.int32(first)))
        take = min(CHUNK, n - first)
        x.append(out.x[:take])
        at.append(out.unmasked_at[:take])
        nfe.append(out.nfe[:take])
        calls.append(int(out.calls))
        if advance is not None:
            advance(take)
    how = {
        "solver": solver,
        "steps": steps,
        "evaluations": rounded(np.concatenate(nfe).mean()),
        "calls": sum(calls),
        "chunk": CHUNK,
    }
    texts = [vocabulary.decode(row) for row in np.concatenate(x).tolist()]
    return TextDrawn(texts, np.concatenate(at), how)


def write_samples(out: Path, drawn: TextDrawn, title: str) -> None:
    """Write ``samples.txt``, and ``samples.png``, which shows when each character appeared."""
    replace_text(out / "samples.txt", joined(drawn.texts))
    pictures.draw_text(out / "samples.png", title, drawn.texts[:12], drawn.unmasked_at[:12])


def joined(texts: list[str]) -> str:
    """Texts under each other, with a line between them."""
    return "".join(f"--- {i + 1}\n{text}\n" for i, text in enumerate(texts))


# --- figures ------------------------------------------------------------------------------------


def bits_per_char(
    key: jax.Array, experiment: TextExperiment, params: Any, n: int
) -> dict[str, Any]:
    """The bound on ``n`` held-out examples, in bits per character, with its standard error.

    Each example is masked ``DRAWS`` times, with numbers k of masks spread evenly. The standard
    error, over examples, is of the text and of the masks.
    """
    data = experiment.held_out.x
    n = min(n, len(data))
    # Spread over the stretches.
    chosen = data[np.linspace(0, len(data) - 1, n).round().astype(int)]

    @jax.jit
    def chunk(params: Any, keys: jax.Array, x: jax.Array) -> jax.Array:
        def one(key: jax.Array, x: jax.Array) -> jax.Array:
            losses = radd_loss(
                key,
                experiment.conditionals(params),
                experiment.sde,
                jnp.broadcast_to(x, (DRAWS, *x.shape)),
                kind="k_dce",
                draws="decoupled",
            )
            return losses.mean()

        return jax.vmap(one)(keys, x)

    values = []
    for first in range(0, n, CHUNK):
        x = np.resize(chosen[first : first + CHUNK], (CHUNK, data.shape[1])).astype(np.int32)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(first, first + CHUNK))
        values.append(np.asarray(chunk(params, keys, jnp.asarray(x)))[: n - first])
    bits = np.concatenate(values).astype(np.float64) / (data.shape[1] * math.log(2))
    return {
        "bits_per_char": rounded(bits.mean()),
        "bits_per_char_standard_error": rounded(bits.std() / np.sqrt(n)),
        "likelihood": {
            "examples": n,
            "length": data.shape[1],
            "failed": int((~np.isfinite(bits)).sum()),
            "bound": f"k_dce, {DRAWS} masks of each example",
        },
    }


def baselines(text: Text) -> dict[str, float | None]:
    """What simple models of the training text need for the held-out text, in bits per character."""
    size = len(text.vocabulary)
    learned = text.train_tokens.astype(np.int64)
    hidden = text.held_out_tokens.astype(np.int64)
    words = [text.vocabulary.decode(part.tolist()).encode() for part in (learned, hidden)]
    added = len(lzma.compress(words[0] + words[1])) - len(lzma.compress(words[0]))
    grams = ngram_bits(learned, hidden, size, _GRAM)
    return {
        "characters": rounded(grams[0]),
        f"{_GRAM}_gram": rounded(grams[-1]),
        "lzma": rounded(8 * added / len(hidden)),
    }


def ngram_bits(learned: np.ndarray, hidden: np.ndarray, size: int, order: int) -> list[float]:
    """Cross-entropy of ``hidden``, in bits, under the n-grams of ``learned`` for n = 1 .. order.

    Interpolated after Witten and Bell: with N(h) the count of a context, T(h) the number of
    different symbols after it, and p' the model of one symbol less,
    ``p(c | h) = (N(h, c) + T(h) p'(c)) / (N(h) + T(h))``, from the uniform law on.
    """
    both = np.concatenate([learned, hidden])
    m = len(learned)
    context = np.zeros(len(both), np.int64)
    p = np.full(len(hidden), 1.0 / size)
    bits = []
    for n in range(1, order + 1):
        _, gram = np.unique(context * size + both, return_inverse=True)
        # A gram that begins before the text, or in the other part, belongs to no one.
        own = np.arange(len(both)) >= n - 1
        seen = np.flatnonzero(own[:m])
        counts = np.bincount(gram[seen], minlength=gram.max() + 1)
        after = np.bincount(context[seen], minlength=context.max() + 1)
        kinds, first = np.unique(gram[seen], return_index=True)
        del kinds
        different = np.bincount(context[seen][first], minlength=context.max() + 1)
        h = context[m:]
        known = after[h] > 0
        mixed = (counts[gram[m:]] + different[h] * p) / np.maximum(after[h] + different[h], 1)
        p = np.where(known, mixed, p)
        bits.append(float(-np.log2(p).mean()))
        # The last n symbols, up to the one before.
        context = np.concatenate([[0], gram[:-1]])
    return bits


def evaluate_text(
    key: jax.Array, experiment: TextExperiment, params: Any, *, say: Say = lambda line: None
) -> tuple[dict[str, Any], TextDrawn]:
    """All figures of a run on text, and some samples.

    Args:
      key: typed key; the figures are a function of it and of the parameters.
      experiment: what was trained, with its text.
      params: parameters of the network, usually the averaged ones.
      say: called with a line at the start of each part.
    """
    config, text = experiment.config, experiment.text
    if text is None:
        raise ValueError("experiment has no text; expected one that was made with it")
    key_bound, key_draw = jax.random.split(key)
    seconds: dict[str, float] = {}
    start = time.monotonic()

    def took(name: str) -> None:
        nonlocal start
        seconds[name] = round(time.monotonic() - start, 2)
        start = time.monotonic()

    n = min(config.eval_likelihood, len(experiment.held_out))
    say(f"bound on {n} held-out examples")
    figures = bits_per_char(key_bound, experiment, params, n)
    took("likelihood")
    figures["baselines"] = baselines(text)
    took("baselines")
    say(f"drawing {config.eval_samples} samples")
    drawn = draw_text(
        key_draw,
        experiment,
        params,
        config.eval_samples,
        solver=config.solver,
        steps=config.solver_steps,
    )
    took("samples")
    figures["text"] = {
        "sha256": text.vocabulary.sha256,
        "characters": text.characters,
        "vocabulary": len(text.vocabulary),
    }
    figures["samples"] = {"count": len(drawn.texts), "ema": config.ema, **drawn.how}
    figures["seconds"] = seconds
    return figures, drawn
