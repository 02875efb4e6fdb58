"""Drafters: what is proposed to the target; members that ask a smaller model."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.cache import Cache, FullCache
from tokenlab.core.arrays import Array, Float, Int, RowKeys
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode.passes import Spent, begin, logits_of, read
from tokenlab.decode.processors import History
from tokenlab.decode.samplers import Sampler
from tokenlab.decode.speculative.tree import Tree, Verdict
from tokenlab.depth import Sequential
from tokenlab.models import Transformer, for_decoding


class Draft(NamedTuple):
    """The model that a drafter asks.

    Attributes:
        model: static.
        params: its parameters.
    """

    model: Transformer
    params: PyTree


class Outcome(NamedTuple):
    """What a pass of the target showed.

    Attributes:
        tree: the draft.
        logits: of the target after the root and after each node.
        root: the token that the tree hangs on.
        verdict: what was taken.
        running: rows that are not done.
    """

    tree: Tree
    logits: Float[Array, "B M V"]
    root: Int[Array, " B"]
    verdict: Verdict
    running: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafter(abc.ABC):
    """The drafter family: proposes a tree of continuations for every row."""

    @property
    @abc.abstractmethod
    def nodes(self) -> int:
        """Nodes of a tree."""

    @property
    def depth(self) -> int:
        """Longest path of a tree."""
        return self.nodes

    @property
    def chains(self) -> int:
        """Independent chains that a tree consists of; 0 if it is another tree."""
        return 0

    def source(self, view: View, others: Mapping[str, View]) -> View | None:
        """The model that it asks, or None.

        Raises:
            UserError: it is not there, or has another vocabulary than ``view``.
        """
        return None

    @abc.abstractmethod
    def begin(
        self,
        draft: Draft | None,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, " B"],
        *,
        capacity: int,
        vocabulary: int,
    ) -> PyTree:
        """State after the prompts."""

    @abc.abstractmethod
    def propose(
        self,
        draft: Draft | None,
        state: PyTree,
        *,
        history: History,
        sampler: Sampler,
        keys: RowKeys,
    ) -> tuple[Tree, PyTree]:
        """A tree that continues each row.

        Args:
            draft: the model that it asks.
            state: own state.
            history: the tokens of the rows; trees hang on the last ones.
            sampler: of the target, whose processors also shape what is proposed.
            keys: one per row.
        """

    def learn(self, state: PyTree, outcome: Outcome) -> PyTree:
        """The state after the target has judged a tree; as it was, unless a member learns."""
        return state

    def spent(self, state: PyTree) -> tuple[Spent, Cache] | None:
        """Work of the model that it asks, or None."""
        return None


class Reader(flax.struct.PyTreeNode):
    """How far a draft model has read.

    Attributes:
        cache: its cache.
        lengths: tokens in it.
        spent: its work.
    """

    cache: Cache
    lengths: Int[Array, " B"]
    spent: Spent


Ask = Callable[[Reader, Tree], tuple[Float[Array, "B N V"], Reader]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDrafter(Drafter):
    """Drafters that ask a smaller model with the same tokenizer, or the first layers of the target.

    The model reads a draft under a mask of ancestors, so nothing of it stays in its cache.

    Attributes:
        view: name of the model among ``others``; None asks the target's first ``early_exit``
            layers.
        early_exit: layers of the target that draft, its norm and head behind them.
        temperature: of the draft, beside the sampler's processors.
    """

    view: str | None = "draft"
    early_exit: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if (self.view is None) == (self.early_exit is None):
            raise UserError("a drafter asks a view or an early exit: give one, the other None")
        if not self.temperature > 0:
            raise UserError(f"temperature {self.temperature} of a draft must be above 0")

    def source(self, view: View, others: Mapping[str, View]) -> View:
        """The smaller model."""
        target = cast(Transformer, view.model)
        if self.early_exit is not None:
            return first_layers(view, self.early_exit)
        if self.view not in others:
            known = ", ".join(others) or "none"
            raise UserError(f"there is no view {self.view!r} to draft with; there are: {known}")
        found = others[cast(str, self.view)]
        vocabulary = cast(Transformer, found.model).vocab_size
        if vocabulary != target.vocab_size:
            raise UserError(
                f"view {self.view!r} has a vocabulary of {vocabulary}, the target one of "
                f"{target.vocab_size}; a draft needs the target's tokenizer"
            )
        model, params = for_decoding(cast(Transformer, found.model), found.params)
        return View(model=model, params=params)

    def begin(
        self,
        draft: Draft | None,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, " B"],
        *,
        capacity: int,
        vocabulary: int,
    ) -> Reader:
        """Reads the prompts."""
        begun = begin(*cast(Draft, draft), FullCache(), tokens, lengths, capacity=capacity)
        return Reader(cache=begun.cache, lengths=lengths, spent=begun.spent)

    def spent(self, state: Reader) -> tuple[Spent, Cache]:
        """Of the smaller model."""
        return state.spent, state.cache

    def propose(
        self,
        draft: Draft | None,
        state: PyTree,
        *,
        history: History,
        sampler: Sampler,
        keys: RowKeys,
    ) -> tuple[Tree, PyTree]:
        """Reads what was accepted since, and grows a tree on it."""
        draft = cast(Draft, draft)
        logits, state = self._root(draft, state, history)
        tree = Tree.empty(len(logits), self.nodes, logits.shape[-1])
        first = self._shaped(logits, history, sampler)
        ask = functools.partial(self._after, draft, history, sampler)
        return self.grow(tree, first, ask=ask, state=state, keys=keys)

    @abc.abstractmethod
    def grow(
        self,
        tree: Tree,
        first: Float[Array, "B V"],
        *,
        ask: Ask,
        state: Reader,
        keys: RowKeys,
    ) -> tuple[Tree, Reader]:
        """Fills an empty tree.

        Args:
            tree: room for the nodes.
            first: what to draw from after the root.
            ask: reads a tree, gives what to draw from after each of its nodes.
            state: of the draft model.
            keys: one per row.
        """

    def _shaped(self, logits: Float[Array, "B V"], history: History, sampler: Sampler) -> Array:
        """Distribution that drafts are drawn from."""
        shaped, _, _ = sampler.shape(logits, sampler.init(batch=len(logits)), history=history)
        return jax.nn.softmax(shaped / self.temperature, axis=-1)

    def _root(self, draft: Draft, state: Reader, history: History) -> tuple[Array, Reader]:
        """Reads what was accepted since; gives the logits after the last token."""
        width = self.depth + 1
        positions = state.lengths[:, None] + jnp.arange(width)[None, :]
        segments = (positions < history.lengths[:, None]).astype(jnp.int32)
        at = jnp.minimum(positions, history.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(history.tokens, at, axis=1)
        out: Any = read(*draft, state.cache, tokens, positions=positions, segments=segments)
        last = jnp.maximum(history.lengths - state.lengths - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(out.hidden, last, axis=1)
        spent = state.spent.after(out, segments, len(tokens))
        state = Reader(cache=out.cache, lengths=history.lengths, spent=spent)
        return logits_of(*draft, hidden)[:, 0], state

    def _after(
        self, draft: Draft, history: History, sampler: Sampler, state: Reader, tree: Tree
    ) -> tuple[Float[Array, "B N V"], Reader]:
        """What to draw from after every node."""
        ancestors = tree.ancestors()
        depth = jnp.sum(ancestors, axis=2, dtype=jnp.int32)
        segments = tree.valid.astype(jnp.int32)
        out: Any = read(
            *draft, state.cache.draft(ancestors), tree.tokens,
            positions=history.lengths[:, None] - 1 + depth, segments=segments,
        )  # fmt: skip
        spent = state.spent.after(out, segments, tree.valid.size)
        logits = logits_of(*draft, out.hidden)
        flat = logits.reshape(-1, logits.shape[-1])
        chances = self._shaped(flat, path_histories(tree, history), sampler)
        return chances.reshape(logits.shape), state.replace(cache=out.cache.forget(), spent=spent)


def first_layers(view: View, count: int) -> View:
    """The first ``count`` layers of a model, with its norm and head.

    Raises:
        UserError: the model has no more layers than that, or is no plain stack.
    """
    model, params = for_decoding(cast(Transformer, view.model), view.params)
    if not isinstance(model.depth, Sequential):
        raise UserError(f"{type(model.depth).__name__} has no early exit; draft with a view")
    if not 1 <= count < model.num_layers:
        raise UserError(
            f"early_exit {count} must be from 1 to {model.num_layers - 1} of the target's layers"
        )
    return View(model=model.clone(num_layers=count), params=params)


def path_histories(tree: Tree, history: History) -> History:
    """The history at every node, rows and nodes as rows."""
    batch, nodes = tree.tokens.shape
    depth = tree.size
    each = jnp.broadcast_to(jnp.arange(nodes)[None], (batch, nodes))
    paths = jax.vmap(lambda node: tree.path(node, depth), in_axes=1, out_axes=1)(each)
    tokens = jnp.take_along_axis(tree.tokens[:, None], jnp.maximum(paths, 0), axis=2)
    count = jnp.sum(paths >= 0, axis=2)
    width = history.tokens.shape[1]
    rows = jnp.arange(batch)[:, None, None]
    place = history.lengths[:, None, None] + jnp.arange(depth)[None, None]
    place = jnp.where(paths >= 0, place, width)
    whole = jnp.repeat(history.tokens[:, None], nodes, axis=1)
    whole = whole.at[rows, jnp.arange(nodes)[None, :, None], place].set(tokens, mode="drop")
    return History(
        whole.reshape(batch * nodes, width),
        (history.lengths[:, None] + count).reshape(-1),
        jnp.repeat(history.prompts, nodes),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chains(ModelDrafter):
    """Independent chains drawn from the smaller model; one of them is plain speculation.

    Reference: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative
    Decoding", 2022, arXiv:2211.17192; several: Sun et al., "SpecTr: Fast Speculative Decoding via
    Optimal Transport", 2023, arXiv:2310.15141.

    Attributes:
        count: chains.
        length: tokens of each.
    """

    count: int = 1
    length: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1 or self.length < 1:
            raise UserError(f"{self.count} chains of {self.length} tokens must be at least 1 of 1")

    @property
    def nodes(self) -> int:
        """All tokens of all chains."""
        return self.count * self.length

    @property
    def depth(self) -> int:
        """Tokens of a chain."""
        return self.length

    @property
    def chains(self) -> int:
        """As many as there are."""
        return self.count

    def grow(
        self,
        tree: Tree,
        first: Float[Array, "B V"],
        *,
        ask: Ask,
        state: Reader,
        keys: RowKeys,
    ) -> tuple[Tree, Reader]:
        """One token of every chain at a time; node ``c * length + l`` is token l of chain c."""
        number = jnp.arange(self.nodes)
        parents = jnp.where(number % self.length, number - 1, -1)
        tree = tree._replace(parents=jnp.broadcast_to(parents, tree.parents.shape))
        chances = jnp.repeat(first[:, None], self.count, axis=1)
        for at in range(self.length):
            here = number[at :: self.length]
            if at:
                after, state = ask(state, tree)
                chances = after[:, here - 1]
            now = jax.vmap(jax.random.fold_in, (0, None))(keys, at)
            apart = jax.vmap(lambda key: jax.random.split(key, self.count))(now)
            drawn = jax.vmap(jax.vmap(jax.random.categorical))(apart, jnp.log(chances))
            tree = tree._replace(
                tokens=tree.tokens.at[:, here].set(drawn.astype(jnp.int32)),
                valid=tree.valid.at[:, here].set(True),
                proposals=cast(Array, tree.proposals).at[:, here].set(chances),
            )
        return tree, state
