"""A language model that thinks behind every token before it says the next one."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.cache import Cache
from tokenlab.core.arrays import (
    Array,
    Float,
    Hidden,
    Positions,
    PRNGKeyArray,
    Prompt,
    Segments,
    Tokens,
)
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import parameter, taken_over
from tokenlab.models.adapters import drawn
from tokenlab.models.branches import Branches, Row, Thoughts
from tokenlab.models.layers import Linear
from tokenlab.models.passes import Passes
from tokenlab.models.transformer import ModelOutput, Transformer

# Marks are kept this much smaller than they are read: small steps of an optimiser move them far.
_LOUD = 100.0


class ThinkingTransformer(Transformer):
    """Thinks ``thought`` tokens behind every token of a row, all rows at once, and mixes them in.

    Behind position i the model reads a mark, draws a thought token by token, and reads a second
    mark. This branch sees the row up to i and itself, nothing of other thoughts. The stream ``h'``
    that it ends with is mixed into that of the row: ``(1 - w) h + w h'`` with ``w = MLP([h; h'])``,
    zero at first, so that the model begins as the plain one. A thought is of the most likely tokens
    unless there is a random stream ``thoughts``, as in training.

    :meth:`think` serves training: several thoughts of each position, behind each of which the model
    goes on with the tokens of the row. Its losses are ``BeforeThought``, ``AfterThought`` and
    ``ThoughtPolicy``. Decoding thinks behind the last token and forgets the thought.

    Reference: Zelikman, Harik, Shao, Jayasiri, Haber, Goodman, "Quiet-STaR: Language Models Can
    Teach Themselves to Think Before Speaking", 2024, arXiv:2403.09629.

    Differences from the paper: marks are vectors outside the vocabulary, so they cannot be drawn;
    training and decoding draw as many tokens; each drawn token costs a pass over rows and branches
    in training, which keeps no keys between them.

    Attributes:
        thought: tokens of a thought between its marks.
        talk: tokens said after a thought in training, the next one among them.
        samples: thoughts of a position in training.
        kind: whether thoughts are drawn, or are the first mark again and again (pause tokens).
    """

    thought: int = 1
    talk: int = 2
    samples: int = 2
    kind: Literal["drawn", "pauses"] = "drawn"

    def __post_init__(self) -> None:
        if self.thought < 0 or min(self.talk, self.samples) < 1:
            raise ValueError(
                f"thought {self.thought}, talk {self.talk}, samples {self.samples}: "
                "use 0 or more tokens of a thought, and 1 or more of the others"
            )
        super().__post_init__()

    def setup(self) -> None:
        """Creates the embedding, the marks and the mixing head."""
        super().setup()
        small = nn.initializers.normal(0.02 / _LOUD)
        self.marks = parameter(self, "marks", small, (2, self.dim), ("positions", "embed"))
        self.mix_first = Linear(self.dim, bias=True)
        self.mix_second = Linear(self.dim, bias=True)
        self.mix_last = Linear(1, axes=("embed", "norm"), zero=True)

    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Positions,
        segments: Segments,
        cache: Cache | None = None,
        train: bool = False,
        prompt: Prompt | None = None,
        embeddings: Hidden | None = None,
    ) -> ModelOutput:
        """The mixed stream; see ``Transformer.__call__`` for the arguments.

        Raises:
            UserError: a prompt is marked; or a cache is given several tokens behind its first, or a
                draft; or the model's depth program or mixers know no branches.
        """
        if self.is_initializing():
            nothing = jnp.zeros((1, 1, self.dim), self.dtype)
            self.mixed(nothing, nothing)
            return super().__call__(
                tokens, positions=positions, segments=segments, embeddings=embeddings
            )
        if prompt is not None:
            raise UserError("a model that thinks reads prompts as text; leave out their marks")
        x = self.embed(tokens) if embeddings is None else embeddings.astype(self.dtype)
        row = Row(positions, segments, x)
        if cache is None:
            return self._thinking(Branches(self, row, train=train), talk=1).output
        if cache.stage == "draft" or (cache.stage == "next" and tokens.shape[1] > 1):
            raise UserError(
                "a model that thinks reads a prompt in one pass and goes on by single tokens; "
                "use prefill_chunk=None, and no drafts"
            )
        read = Passes(self, train=train).run(
            tokens, x, positions=positions, segments=segments, cache=cache
        )
        behind = read if cache.stage == "next" else None
        branches = Branches(self, row, train=train, read=behind)
        hidden = self._thinking(branches, talk=1).output.hidden
        trace = dataclasses.replace(read.trace, flops=read.trace.flops + branches.operations())
        after = read.cache if behind is None else branches.cache
        return ModelOutput(hidden=hidden, trace=trace, cache=after)

    def think(
        self,
        tokens: Tokens,
        *,
        positions: Positions,
        segments: Segments,
        train: bool = False,
        embeddings: Hidden | None = None,
    ) -> Thoughts:
        """``samples`` thoughts behind every token, and ``talk`` tokens behind each of them."""
        x = self.embed(tokens) if embeddings is None else embeddings.astype(self.dtype)
        row = Row(positions, segments, x)
        branches = Branches(self, row, train=train, samples=self.samples)
        branches.asked += self.samples * (self.talk + self.thought * (self.kind == "drawn"))
        return self._thinking(branches, talk=self.talk)

    def mixed(self, before: Hidden, after: Hidden) -> tuple[Hidden, Float[Array, "B T"]]:
        """The stream of the row with that of the thought mixed in, and the share of the latter."""
        x = jnp.concatenate([before, after], axis=-1)
        x = nn.relu(self.mix_second(nn.relu(self.mix_first(x))))
        share = self.mix_last(x)[..., 0].astype(jnp.float32)
        return before + (share[..., None] * (after - before)).astype(before.dtype), share

    def _thinking(self, branches: Branches, *, talk: int) -> Thoughts:
        marks = (_LOUD * self.embedding_scale * self.marks).astype(self.dtype)
        key = self.make_rng("thoughts") if self.has_rng("thoughts") else None
        branches.read(marks[0])
        for number in range(self.thought):
            if self.kind == "pauses":
                branches.read(marks[0])
            else:
                branches.draw(None if key is None else jax.random.fold_in(key, number))
        branches.read(marks[1])
        for ahead in range(1, talk):
            branches.read_row(ahead)
        return branches.thoughts(talk, self.mixed)


def thinking(
    model: Transformer, params: PyTree, *, like: int, key: PRNGKeyArray, **fields: Any
) -> tuple[ThinkingTransformer, PyTree]:
    """The same function, in a model that can learn to think.

    Args:
        model: a published model or one that was trained here.
        params: its parameters, which are copied.
        like: the token as which both marks begin; the paper takes a dash.
        key: of the first values of the mixing head.
        fields: of ``ThinkingTransformer``.

    Returns:
        The model and its parameters.
    """
    shared = {field.name for field in dataclasses.fields(Transformer)} - {"parent", "name"}
    made = ThinkingTransformer(**{name: getattr(model, name) for name in shared}, **fields)
    params = taken_over(drawn(made, key), params)
    mark = params["embedding"][like].astype(jnp.float32) / _LOUD
    return made, params | {"marks": jnp.stack([mark, mark])}
