"""Thinking in mixtures while the model is unsure, and in tokens once it is not."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Int, RowKeys
from tokenlab.decode.feeds import Fed, Feed
from tokenlab.decode.processors import History, RowLogits, entropy_of
from tokenlab.decode.samplers import Draw


class Switching(flax.struct.PyTreeNode):
    """Where each row stands.

    Attributes:
        explicit: whether tokens are fed, not mixtures.
        stay: steps since the last switch.
        reference: entropy at the last switch, nats.
        locked: whether the thoughts are over.
        switches: to explicit so far.
        latent: mixtures fed so far.
        queue: which of the cap's sequences is written: 0 none, 1 the close, 2 close and answer.
        place: how much of it is written.
        left: tokens until the row ends, -1 where that is open.
        modes: ``explicit`` after each of the first steps.
        entropies: of the predictions at them, nats.
    """

    explicit: Bool[Array, " B"]
    stay: Int[Array, " B"]
    reference: Float[Array, " B"]
    locked: Bool[Array, " B"]
    switches: Int[Array, " B"]
    latent: Int[Array, " B"]
    queue: Int[Array, " B"]
    place: Int[Array, " B"]
    left: Int[Array, " B"]
    modes: Bool[Array, "B R"]
    entropies: Float[Array, "B R"]


class Switch(NamedTuple):
    """Rows that switch in this step."""

    to_explicit: Bool[Array, " B"]
    to_latent: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchSignals:
    """What is mixed into the thought at a switch, so that the model sees that it happens.

    The expected embedding keeps a share ``s_t = s + (1 - s) t / horizon``; the rest is that of
    ``think`` where a row turns to mixtures, and of ``close`` where it turns to tokens.

    Attributes:
        to_latent: s towards mixtures; the paper tunes it from 0.1 to 1.
        to_explicit: s towards tokens.
        horizon: steps t after which nothing is mixed in.
        newline: the token mixed into the first thought, or None.
        first: share that the expected embedding keeps there.
    """

    to_latent: float = 1.0
    to_explicit: float = 0.7
    horizon: int = 32768
    newline: int | None = None
    first: float = 0.9

    def __post_init__(self) -> None:
        for name in ("to_latent", "to_explicit", "first"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be a share from 0 to 1")
        if self.horizon < 1:
            raise ValueError(f"horizon {self.horizon} must be at least 1")

    def kept(self, share: float, number: Int[Array, " B"]) -> Float[Array, " B"]:
        """What the expected embedding keeps at each row's step."""
        return share + (1 - share) * jnp.minimum(number / self.horizon, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchCap:
    """How often thoughts may turn to tokens before they are closed.

    From the ``most``-th turn on ``close`` is written next; after more than twice as many, ``close``
    and ``answer``, and the row ends ``budget`` tokens after the turn.

    Attributes:
        most: turns, at least 1.
        answer: ids that begin the answer, such as those of "The final answer is".
        budget: tokens after the last turn, those of the close and of ``answer`` included.
        locks: whether a close that is written in this way ends the thoughts as a drawn one does;
            in the released code it does not.
    """

    most: int
    answer: tuple[int, ...] = ()
    budget: int = 32
    locks: bool = False

    def __post_init__(self) -> None:
        if min(self.most, self.budget) < 1:
            raise ValueError(f"most {self.most} and budget {self.budget} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchingFeed(Feed):
    """Feeds expected embeddings while entropy rises, and tokens once it has fallen.

    ``H`` is the entropy of the model's own prediction. A row that thinks in mixtures turns to
    tokens where ``H`` is below what it was at the last switch; one that thinks in tokens turns back
    where ``H`` is above it, if the last switch is ``dwell`` steps ago and ``close`` was not drawn.
    What was drawn is written either way. Rows that have drawn ``close`` read tokens.

    Reference: Shi, Asi, Li, Yuan, Pan, Lee, Xiao, "SwiReasoning: Switch-Thinking in Latent and
    Explicit for Pareto-Superior Reasoning LLMs", 2025, arXiv:2510.05069, as its released code has
    it.

    Differences from the paper: tokens that a cap writes have probability one under what was sampled
    from, and their own under the model; a turn while some are still to be written begins anew.

    Attributes:
        think: the token that opens thoughts.
        close: the token that ends them.
        literal: tokens that are read as they are in every mode, such as mathematical symbols.
        dwell: steps in tokens before a row may turn back; None is for ever.
        begins_explicit: whether rows begin with tokens.
        signals: what is mixed in at a switch, or None.
        cap: bound on the turns, or None.
        record: steps whose mode and entropy the statistics have, as ``explicit`` and ``entropy``
            [B, record], beside ``switches``, ``latent_steps`` and ``reference``.
    """

    think: int
    close: int
    literal: tuple[int, ...] = ()
    dwell: int | None = 512
    begins_explicit: bool = False
    signals: SwitchSignals | None = SwitchSignals()
    cap: SwitchCap | None = None
    record: int = 0

    def __post_init__(self) -> None:
        if self.record < 0 or (self.dwell is not None and self.dwell < 0):
            raise ValueError(f"record {self.record} and dwell {self.dwell} must be 0 or more")

    def init(self, *, batch: int, vocabulary: int) -> Switching:
        """Nothing thought yet."""
        zero, no = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool)
        return Switching(
            explicit=no | self.begins_explicit,
            stay=zero,
            reference=jnp.zeros((batch,), jnp.float32),
            locked=no,
            switches=zero,
            latent=zero,
            queue=zero,
            place=zero,
            left=zero - 1,
            modes=jnp.zeros((batch, self.record), bool),
            entropies=jnp.zeros((batch, self.record), jnp.float32),
        )

    def statistics(self, state: Switching) -> dict[str, Array]:
        """Turns, mixtures, the last reference, and what is recorded."""
        counted = {
            "switches": state.switches,
            "latent_steps": state.latent,
            "reference": state.reference,
        }
        recorded = {"explicit": state.modes, "entropy": state.entropies} if self.record else {}
        return counted | recorded

    def __call__(
        self, draw: Draw, logits: RowLogits, state: Switching, *, history: History, keys: RowKeys
    ) -> Fed:
        """What is written, and the token or the mixture that is read."""
        number, entropy = history.lengths - history.prompts, entropy_of(logits)
        locked = state.locked | (draw.token == self.close)
        draw, state = self._queued(draw, logits, state)
        if self.cap is not None and self.cap.locks:
            locked |= draw.token == self.close
        state = state.replace(locked=locked)
        switch, state = self.switched(entropy=entropy, first=number == 0, state=state)
        stop = state.left == 0
        state = self._capped(switch, state)
        literal = jnp.isin(draw.token, jnp.asarray(self.literal, jnp.int32))
        mixed = ~(state.explicit | locked | literal)
        mixture = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        if self.signals is not None:
            mixed, mixture = self._signalled(switch, number, mixed, mixture)
        rows = jnp.arange(len(number))
        state = state.replace(
            latent=state.latent + mixed,
            modes=state.modes.at[rows, number].set(state.explicit, mode="drop"),
            entropies=state.entropies.at[rows, number].set(entropy, mode="drop"),
        )
        return Fed(draw, state, stop=stop, mixed=mixed, mixture=mixture)

    def switched(
        self, *, entropy: Float[Array, " B"], first: Bool[Array, " B"], state: Switching
    ) -> tuple[Switch, Switching]:
        """Which rows switch, and the state after it.

        Args:
            entropy: of the model's predictions, nats.
            first: rows at their first step, which never switch.
            state: before the step, but ``locked``, which counts its own token.
        """
        stay = jnp.where(first, 0, state.stay + 1)
        to_explicit = ~first & ~state.explicit & (entropy < state.reference)
        to_latent = ~first & state.explicit & (entropy > state.reference) & ~state.locked
        to_latent &= False if self.dwell is None else stay >= self.dwell
        switch = Switch(to_explicit, to_latent)
        either = to_explicit | to_latent
        return switch, state.replace(
            explicit=state.explicit ^ either,
            stay=jnp.where(either, 0, stay),
            reference=jnp.where(first | either, entropy, state.reference),
            switches=state.switches + to_explicit,
        )

    def _queued(self, draw: Draw, logits: RowLogits, state: Switching) -> tuple[Draw, Switching]:
        """The next token of the queue in place of the drawn one, where there is one."""
        if self.cap is None:
            return draw, state
        queue = jnp.asarray((self.close, *self.cap.answer), jnp.int32)
        lengths = jnp.asarray((0, 1, len(queue)), jnp.int32)
        forced = state.queue > 0
        token = jnp.where(forced, queue[state.place], draw.token)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=-1)
        place = state.place + forced
        over = place >= lengths[state.queue]
        return Draw(
            token=token,
            logp_model=jnp.where(forced, logp[:, 0], draw.logp_model),
            logp_behaviour=jnp.where(forced, 0.0, draw.logp_behaviour),
            possible=draw.possible | forced,
        ), state.replace(
            queue=jnp.where(over, 0, state.queue),
            place=jnp.where(over, 0, place),
            left=jnp.where(state.left > 0, state.left - 1, state.left),
        )

    def _capped(self, switch: Switch, state: Switching) -> Switching:
        """With what the cap has to be written next."""
        if self.cap is None:
            return state
        most = self.cap.most
        closes = switch.to_explicit & (state.switches >= most)
        answers = switch.to_explicit & (state.switches > 2 * most)
        return state.replace(
            queue=jnp.where(answers, 2, jnp.where(closes, 1, state.queue)),
            place=jnp.where(closes, 0, state.place),
            left=jnp.where(answers & (state.left < 0), self.cap.budget, state.left),
        )

    def _signalled(
        self,
        switch: Switch,
        number: Int[Array, " B"],
        mixed: Bool[Array, " B"],
        mixture: Float[Array, "B V"],
    ) -> tuple[Bool[Array, " B"], Float[Array, "B V"]]:
        """Thoughts with a token mixed in where rows switch, and where they begin."""
        signals = self.signals
        assert signals is not None
        parts = [
            (switch.to_latent, signals.kept(signals.to_latent, number), self.think),
            (switch.to_explicit, signals.kept(signals.to_explicit, number), self.close),
        ]
        if signals.newline is not None and not self.begins_explicit:
            parts.append(
                (number == 0, jnp.full_like(mixture[:, 0], signals.first), signals.newline)
            )
        for rows, kept, token in parts:
            one = jnp.arange(mixture.shape[1])[None] == token
            signalled = kept[:, None] * mixture + (1 - kept[:, None]) * one
            mixture = jnp.where(rows[:, None], signalled, mixture)
            mixed |= rows
        return mixed, mixture
