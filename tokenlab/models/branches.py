"""Branches behind every token of rows: what a model reads there, and the streams they end with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_attention import Branching, RangeRule
from tokenlab.core.arrays import (
    Array,
    Bool,
    Float,
    Hidden,
    Int,
    Positions,
    PRNGKeyArray,
    Scalar,
    Segments,
)
from tokenlab.core.errors import UserError
from tokenlab.depth import DepthTrace, Recursive, Sequential
from tokenlab.models.attention import Attention
from tokenlab.models.passes import Passes
from tokenlab.models.transformer import Block, BlockPattern, ModelOutput, Transformer, layered

# The stream of a row and that of its thoughts to the mixture, and the share of the latter.
Mixed = Callable[[Hidden, Hidden], tuple[Hidden, Float[Array, "B T"]]]


@flax.struct.dataclass
class Thoughts:
    """What a model makes of rows with S thoughts behind every token, and M tokens said after each.

    Streams are normalised, ready for the head, and stand where their target is predicted: that of
    ``after[s, m, b, t]`` is the batch's ``targets[b, t]``, and the thought is of position t - m.

    Attributes:
        before: the stream without a thought.
        after: the stream with what the thought left mixed into it.
        there: whether position t - m is of the same document.
        share: of the thought in the mixture, float32; not bounded.
        drawn: tokens of the thought behind each token.
        drawing: streams from which they were drawn.
        output: of the first thought, for the ledger.
    """

    before: Hidden
    after: Float[Array, "S M B T D"]
    there: Bool[Array, "M B T"]
    share: Float[Array, "S M B T"]
    drawn: Int[Array, "S N B T"]
    drawing: Float[Array, "S N B T D"]
    output: ModelOutput


@flax.struct.dataclass
class Row:
    """Rows of a pass.

    Attributes:
        positions: of each token in its document.
        segments: document of each token, 0 for padding.
        x: what enters the stack.
    """

    positions: Positions
    segments: Segments
    x: Hidden


class Branches:
    """Rows, ``samples`` times each, and the branch that grows behind every token of them.

    With ``read`` the rows are single tokens, and what they have behind them is in its cache.
    """

    def __init__(
        self,
        module: Transformer,
        row: Row,
        *,
        train: bool,
        samples: int = 1,
        read: ModelOutput | None = None,
    ) -> None:
        block = None if read is not None else _branching(module, row.x.shape[1])
        self.module, self.samples, self.before = module, samples, read
        self.passes = Passes(module, train=train, block=block)
        self.row = jax.tree.map(lambda x: jnp.tile(x, (samples, *[1] * (x.ndim - 1))), row)
        self.cache = None if read is None else read.cache
        self.x: list[Float[Array, "C T D"]] = []
        self.segments: list[Int[Array, "C T"]] = []
        self.drawn: list[Int[Array, "C T"]] = []
        self.asked = 0  # times that each token of a row is projected to the vocabulary
        self.depth: Any = 0
        self.flops: Any = jnp.float32(0)
        self.pairs: Any = jnp.float32(0)

    def read(self, mark: Float[Array, " D"]) -> None:
        """Every branch goes on with the same vector."""
        self._grow(jnp.broadcast_to(mark, self.row.x.shape), self.row.segments)

    def read_row(self, ahead: int) -> None:
        """Every branch goes on with the token so far ahead of where it leaves its document."""
        segments = self.row.segments
        same = _shifted(segments, ahead) == segments
        self._grow(_shifted(self.row.x, ahead), jnp.where(same, segments, 0))

    def draw(self, key: PRNGKeyArray | None) -> None:
        """Every branch goes on with a token that the model draws, or with the most likely one."""
        hidden = self._run(frozen=True).hidden[:, -self.row.x.shape[1] :]
        keys = None if key is None else jax.random.split(key, len(hidden))

        def choose(row: tuple[Array, ...]) -> Int[Array, " T"]:
            logits = self.passes.logits(row[0][None])[0]
            if len(row) == 1:
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return jax.random.categorical(row[1], logits, axis=-1).astype(jnp.int32)

        # A row at a time, so that no logits of a whole batch are made.
        ids = jax.lax.map(choose, (hidden,) if keys is None else (hidden, keys))
        self.asked += self.samples
        self.drawn.append(ids)
        self._grow(self.module.embed(ids), self.row.segments)

    def thoughts(self, talk: int, mixed: Mixed) -> Thoughts:
        """The streams of a last pass, after which ``talk`` tokens are said."""
        samples, count = self.samples, len(self.drawn)
        (batch, length), dim = self._shape(), self.module.dim
        out = self._run()
        found = out.hidden.reshape(samples, batch, -1, length, dim)
        if self.before is None:
            before, found = found[:, :, 0], found[:, :, 1:]
        else:
            before = self.before.hidden[None]
        segments, after, there, share = self.row.segments[:batch], [], [], []
        for ahead in range(talk):
            thought = _shifted(found[:, :, ahead - talk].reshape(-1, length, dim), -ahead)
            stream, part = mixed(before.reshape(-1, length, dim), thought)
            after.append(stream.reshape(samples, batch, length, dim))
            share.append(part.reshape(samples, batch, length))
            there.append((segments > 0) & (_shifted(segments, -ahead) == segments))
        drawn = jnp.zeros((samples, 0, batch, length), jnp.int32)
        if count:
            drawn = jnp.stack([x.reshape(samples, batch, length) for x in self.drawn], axis=1)
        return Thoughts(
            before=before[0],
            after=jnp.stack(after, axis=1),
            there=jnp.stack(there),
            share=jnp.stack(share, axis=1),
            drawn=drawn,
            drawing=jnp.moveaxis(found[:, :, :count], 2, 1),
            output=ModelOutput(hidden=after[0][0], trace=self._trace(out.trace)),
        )

    def operations(self) -> Scalar:
        """Of all passes, and of the vocabulary as often as it is asked."""
        rows = self.module.head.rows(self.module.vocab_size)
        valid = jnp.sum(self.row.segments[: self._shape()[0]] > 0)
        return self.flops + valid * (2.0 * self.asked * rows * self.module.dim)

    def _shape(self) -> tuple[int, int]:
        rows, length = self.row.segments.shape
        return rows // self.samples, length

    def _grow(self, x: Float[Array, "C T D"], segments: Int[Array, "C T"]) -> None:
        self.x.append(x)
        self.segments.append(segments)

    def _run(self, *, frozen: bool = False) -> ModelOutput:
        """A pass over the branches so far, and over the rows where no cache has them."""
        rule, row, cache = Branching(), self.row, self.cache
        x, segments = list(self.x), list(self.segments)
        positions = [row.positions + ahead for ahead in range(1, len(x) + 1)]
        if cache is None:
            x, positions = [row.x, *x], [row.positions, *positions]
            branches = (rule.branch(each, row.positions) for each in segments)
            segments = [rule.trunk(row.segments), *branches]
        where = {
            "positions": jnp.concatenate(positions, axis=1),
            "segments": jnp.concatenate(segments, axis=1),
        }
        entering = jnp.concatenate(x, axis=1)
        nothing = jnp.zeros(entering.shape[:2], jnp.int32)
        after = None if cache is None else cache.draft()
        out = self.passes.run(nothing, entering, frozen=frozen, cache=after, **where)
        model, trace = self.passes.model, out.trace
        if cache is None:
            flops, pairs = model.work(trace, **where)
            self.flops, self.pairs = self.flops + flops, self.pairs + pairs
        else:  # which counts pairs itself
            runs = jnp.sum(trace.active, axis=(1, 2), dtype=jnp.float32)
            self.flops += trace.flops + model.flops(runs, jnp.zeros(len(model.block.kinds())))
            assert out.cache is not None
            self.cache = out.cache.forget()
        batch, length = self._shape()
        self.depth += trace.depth.reshape(self.samples, batch, -1, length).sum(axis=(0, 2))
        return out

    def _trace(self, trace: DepthTrace) -> DepthTrace:
        """The rows' own, to which the depth and the work of their thoughts are added."""
        batch, length = self._shape()
        active = trace.active[:, :batch, :length]
        if self.cache is not None:
            return DepthTrace(depth=self.depth, active=active)
        row = jax.tree.map(lambda x: x[:batch], self.row)
        flops, pairs = self.passes.model.work(
            DepthTrace(depth=trace.depth[:batch, :length], active=active),
            positions=row.positions,
            segments=Branching().trunk(row.segments),
        )
        return DepthTrace(
            depth=self.depth,
            active=active,
            flops=self.operations() - flops,
            pairs=self.pairs - pairs,
        )


def _branching(model: Transformer, length: int) -> Block | BlockPattern:
    """The layers, for rows with branches.

    Raises:
        UserError: the depth program or a mixer knows no branches, or rows are too long.
    """
    if type(model.depth) not in (Sequential, Recursive):
        raise UserError(
            f"{type(model.depth).__name__} may choose among tokens, and branches would compete; "
            "use Sequential or Recursive"
        )
    if length >= (1 << 16) - 1:
        raise UserError(f"rows of {length} tokens have too many branches; use fewer than 65535")

    def branching(kind: Block) -> Block:
        mixer = kind.mixer
        known = isinstance(mixer, Attention) and isinstance(mixer.rule, RangeRule)
        if not known or mixer.prefill is not None:
            raise UserError(
                f"{type(mixer).__name__} does not tell which keys a branch may see; use Attention "
                "with a rule of ranges, such as Causal, and prefill=None"
            )
        return kind.clone(mixer=mixer.clone(rule=Branching(within=mixer.rule)))

    return layered([branching(kind) for kind in model.block.kinds()])


def _shifted(x: Array, ahead: int) -> Array:
    """``y[:, t] = x[:, t + ahead]``, zero where there is none."""
    length = x.shape[1]
    width = [(0, 0), (max(-ahead, 0), max(ahead, 0))] + [(0, 0)] * (x.ndim - 2)
    start = max(ahead, 0)
    return jnp.pad(x, width)[:, start : start + length]
