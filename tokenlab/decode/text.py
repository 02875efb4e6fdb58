"""Text in, text out: stop strings, streaming, and the samples of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tokenlab.core.context import View
from tokenlab.core.duration import Duration, Fraction
from tokenlab.core.errors import UserError
from tokenlab.core.rng import stream
from tokenlab.decode.autoregressive import Autoregressive
from tokenlab.decode.base import Decoder, Generation
from tokenlab.decode.constraints import Constraint
from tokenlab.decode.processors import FirstTokens, Temperature, TopP
from tokenlab.decode.samplers import Categorical
from tokenlab.tokenizers.base import Tokenizer


class Completion(NamedTuple):
    """The text written after one prompt, up to and without the stop string."""

    prompt: str
    text: str


def complete(
    view: View,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    decoder: Decoder,
    seed: int = 0,
    stop: Sequence[str] = (),
    constraints: Sequence[Constraint] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> tuple[list[Completion], Generation]:
    """Continues texts.

    Args:
        view: the model and its parameters.
        tokenizer: of that model.
        prompts: texts; each is read as the beginning of a document.
        decoder: how tokens are written.
        seed: of the draws.
        stop: a row ends where one of these is first complete in what it wrote.
        constraints: conditions on what is written.
        on_text: called with a row number and the piece of text that is new, as it appears.
            What could still become a stop string is held back.

    Returns:
        Completions, and the tokens and costs behind them.

    Raises:
        UserError: a stop string is empty, no text satisfies a constraint, or the decoder refuses
            the prompts.
    """
    if "" in stop:
        raise UserError("a stop string is empty; leave it out to write without one")
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    shown = [0] * len(prompts)
    held = max((len(s) for s in stop), default=1) - 1

    def texts(tokens: np.ndarray, lengths: np.ndarray) -> list[tuple[str, bool]]:
        return [
            _cut(tokenizer.decode(row[:length].tolist()), stop)
            for row, length in zip(tokens, lengths, strict=True)
        ]

    def on_tokens(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        found = texts(tokens, lengths)
        for row, (text, stopped) in enumerate(found):
            ready = len(text) if stopped else max(0, len(text.rstrip("\ufffd")) - held)
            if on_text is not None and ready > shown[row]:
                on_text(row, text[shown[row] : ready])
                shown[row] = ready
        return np.asarray([stopped for _, stopped in found])

    # A vocabulary may be padded beyond the tokenizer's, with ids that stand for nothing.
    known = FirstTokens(count=tokenizer.vocab_size)
    bound = [constraint.bind(tokenizer) for constraint in constraints]
    decoder = decoder.behind((known, *bound))
    watched = on_tokens if stop or on_text is not None else None
    generation = decoder(view, ids, key=stream(seed, "generate"), on_tokens=watched)
    found = texts(generation.tokens, generation.lengths)
    for row, (text, _) in enumerate(found):
        if on_text is not None and len(text) > shown[row]:
            on_text(row, text[shown[row] :])
    completions = [Completion(p, text) for p, (text, _) in zip(prompts, found, strict=True)]
    return completions, generation


def _cut(written: bytes, stop: Sequence[str]) -> tuple[str, bool]:
    """Text before the stop string that is complete first, and whether there was one."""
    text = written.decode("utf-8", errors="replace")
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Text that a run writes as it trains, to be read by a person.

    Attributes:
        prompts: beginnings to continue; an empty one starts a document.
        decoder: how they are continued.
        every: distance between samples; the last step always has some.
    """

    prompts: tuple[str, ...] = ("",)
    decoder: Autoregressive = Autoregressive(
        sampler=Categorical(processors=(Temperature(value=0.8), TopP(p=0.95)))
    )
    every: Duration = Fraction(of_run=1.0)

    def __call__(self, view: View, tokenizer: Tokenizer, *, seed: int) -> list[Completion]:
        """Continues the prompts."""
        return complete(view, tokenizer, self.prompts, decoder=self.decoder, seed=seed)[0]
