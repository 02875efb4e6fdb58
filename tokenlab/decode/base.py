"""The decoder family: what owns a decode loop, and what it returns."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from tokenlab.core.arrays import Float, Int, PRNGKeyArray
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.core.ledger import Ledger
from tokenlab.decode.processors import Processor
from tokenlab.models import Transformer

# Called with the tokens so far [B, n] and the lengths [B]; may return rows to stop, bool [B].
OnTokens = Callable[[np.ndarray, np.ndarray], np.ndarray | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What a decoder wrote after each prompt.

    Attributes:
        tokens: new tokens, the end token included where it was drawn; 0 after them.
        lengths: new tokens per row.
        logp_model: log-probability of each under the model, nats; 0 after the end.
        logp_behaviour: log-probability under what was sampled from, nats; 0 after the end.
        ledger: cost of all passes of the model that is decoded.
        others: cost of other models' passes, by view.
        statistics: what else a decoder counted, by name, per row.
    """

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]
    logp_model: Float[np.ndarray, "B N"]
    logp_behaviour: Float[np.ndarray, "B N"]
    ledger: Ledger
    others: dict[str, Ledger] = dataclasses.field(default_factory=dict)
    statistics: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int, new_tokens: int) -> Generation:
        """Nothing written yet, in arrays to write into."""
        shape = (rows, new_tokens)
        return cls(
            tokens=np.zeros(shape, np.int32),
            lengths=np.zeros(rows, np.int32),
            logp_model=np.zeros(shape, np.float32),
            logp_behaviour=np.zeros(shape, np.float32),
            ledger=Ledger(),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder(abc.ABC):
    """The decoder family: continues a ragged batch of prompts.

    Attributes:
        max_new_tokens: bound on the tokens written per row.
        end_ids: tokens that end a row.
    """

    max_new_tokens: int = 128
    end_ids: tuple[int, ...] = (2,)

    @abc.abstractmethod
    def __call__(
        self,
        view: View,
        prompts: Sequence[Sequence[int]],
        *,
        key: PRNGKeyArray,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """Writes up to ``max_new_tokens`` after every prompt.

        A row's tokens depend on its prompt, its number, the key and nothing else.

        Args:
            view: the model and its parameters.
            prompts: token ids, each at least one long.
            key: folded with the row number and the position.
            on_tokens: called now and then with the tokens so far ``[B, n]`` and the lengths; may
                return rows to stop, bool ``[B]``.

        Raises:
            UserError: there is no prompt, or one is empty, has an id that the model does not know,
                or does not fit the model's context with its answer.
        """

    @abc.abstractmethod
    def behind(self, processors: Sequence[Processor]) -> Decoder:
        """The same decoder whose logits go through ``processors`` before all others."""

    def _check(self, view: View, prompts: Sequence[Sequence[int]]) -> None:
        """What every decoder refuses."""
        check_prompts(cast(Transformer, view.model), prompts, self.max_new_tokens)


def check_prompts(model: Transformer, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Refuses prompts that a model cannot go on from by ``new`` tokens.

    Raises:
        UserError: as :meth:`Decoder.__call__`.
    """
    if len(prompts) == 0:
        raise UserError("there is no prompt to continue; give at least one")
    if min(len(prompt) for prompt in prompts) < 1:
        raise UserError("a prompt has no token; begin it with the tokenizer's bos_id")
    for prompt in prompts:
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise UserError(
                f"a prompt has token {min(prompt) if min(prompt) < 0 else max(prompt)}, and "
                f"the model knows 0 to {model.vocab_size - 1}; use the model's tokenizer"
            )
    longest = max(len(prompt) for prompt in prompts)
    if longest + new > model.max_length:
        raise UserError(
            f"a prompt of {longest} tokens and {new} new ones exceed the "
            f"model's context of {model.max_length}; shorten the prompt or max_new_tokens"
        )


def bucket(size: int) -> int:
    """The next power of two, at least 16: nearby sizes share a compiled function."""
    return max(16, 1 << (size - 1).bit_length())


def padded(prompts: Sequence[Sequence[int]], width: int) -> Int[np.ndarray, "B W"]:
    """Prompts as rows, zeros behind them."""
    rows = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows
