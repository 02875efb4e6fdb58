"""TokenFormer: projections that attend over learned tokens, to which more can be appended."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Hidden, PRNGKeyArray
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import parameter
from tokenlab.models.attention import Attention
from tokenlab.models.layers import FeedForward
from tokenlab.models.transformer import Block, Transformer

Scores = Float[Array, "B T N"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterWeights(abc.ABC):
    """The family of what takes the place of the softmax over learned tokens.

    Reference: Wang, Fan, Naeem, Xian, Lenssen, Wang, Tombari, Schiele, "TokenFormer: Rethinking
    Transformer Scaling with Tokenized Model Parameters", 2024, arXiv:2410.23168.
    """

    @abc.abstractmethod
    def __call__(self, scores: Scores, *, count: int) -> Scores:
        """Weights of the values.

        Args:
            scores: products with the keys, float32.
            count: n of the scale, the learned tokens that there are or were at first.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormedGelu(ParameterWeights):
    """``gelu(a sqrt(n) / |a|)``: it does not change where all scores grow by one factor."""

    def __call__(self, scores: Scores, *, count: int) -> Scores:
        """Scores of one length, then the nonlinearity."""
        return nn.gelu(_of_length(scores, count**0.5), approximate=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeluNormed(ParameterWeights):
    """``g sqrt(n) / |g|`` with ``g = gelu(a)``."""

    def __call__(self, scores: Scores, *, count: int) -> Scores:
        """The nonlinearity, then weights of one length."""
        return _of_length(nn.gelu(scores, approximate=False), count**0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledSoftmax(ParameterWeights):
    """``n softmax(a)``."""

    def __call__(self, scores: Scores, *, count: int) -> Scores:
        """The softmax over the learned tokens."""
        return count * nn.softmax(scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainGelu(ParameterWeights):
    """``gelu(a)``: a perceptron with one hidden layer and no biases."""

    def __call__(self, scores: Scores, *, count: int) -> Scores:
        """The nonlinearity alone."""
        return nn.gelu(scores, approximate=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainScores(ParameterWeights):
    """``a``: a linear map of rank n at most."""

    def __call__(self, scores: Scores, *, count: int) -> Scores:
        """The scores as they are."""
        return scores


def _of_length(x: Scores, length: float) -> Scores:
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * (length * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)))


class Pattention(nn.Module):
    """Attention of tokens over n learned keys and values: ``weights(x K^T) V``, in the stream.

    Reference: as ``ParameterWeights``: arXiv:2410.23168, equations 3 to 6.

    Differences from the paper: none known. Scores of 0 alone stay 0, without an epsilon.

    Attributes:
        tokens: n.
        weights: of the values, from the scores; float32.
        scaled_as: n of the scale, where tokens were added since; None is ``tokens``.
        value_std: of the values at the start; the paper's is ``2 / (layers * sqrt(width))``.
    """

    tokens: int
    weights: ParameterWeights = NormedGelu()
    scaled_as: int | None = None
    value_std: float = 0.02

    @nn.compact
    def __call__(self, x: Hidden, *, features: int) -> Float[Array, "B T F"]:
        """Projects the last axis.

        Args:
            x: the tokens.
            features: output width F.
        """
        init, axes = nn.initializers.normal, ("mlp", "embed")
        keys = parameter(self, "keys", init(0.02), (self.tokens, x.shape[-1]), axes)
        values = parameter(self, "values", init(self.value_std), (self.tokens, features), axes)
        flat = x.reshape(-1, x.shape[-1])
        scores = jnp.matmul(flat, keys.T.astype(x.dtype), preferred_element_type=jnp.float32)
        scores = scores.reshape(*x.shape[:-1], self.tokens)
        weights = self.weights(scores, count=self.scaled_as or self.tokens).astype(x.dtype)
        out = weights.reshape(-1, self.tokens) @ values.astype(x.dtype)
        return out.reshape(*x.shape[:-1], features)

    @nn.nowrap
    def flops(self, width: int, features: int) -> int:
        """Operations of a token, from one width to another."""
        return 2 * self.tokens * (width + features)


class PattentionFeedForward(FeedForward):
    """A feed-forward layer that is one attention over learned tokens.

    Reference: as ``ParameterWeights``: arXiv:2410.23168.

    Attributes:
        pattention: the learned tokens.
    """

    pattention: Pattention

    @nn.compact
    def __call__(
        self, x: Hidden, *, valid: Bool[Array, "B T"] | None = None, train: bool = False
    ) -> Hidden:
        """Applies it to every token."""
        return self.pattention(x, features=x.shape[-1])

    @nn.nowrap
    def flops(self, dim: int) -> int:
        """Scores and values."""
        return self.pattention.flops(dim, dim)


class PattentionAttention(Attention):
    """Attention whose queries, keys, values and output are attention over learned tokens.

    Reference: as ``ParameterWeights``: arXiv:2410.23168.

    Differences from the paper: heads are turned whole, not a quarter of them; as many learned
    tokens for each of the four, as in all its models.

    Attributes:
        pattention: the learned tokens, of each of the four by itself.
    """

    pattention: Pattention = Pattention(tokens=64)

    def __post_init__(self) -> None:
        if self.qkv_bias:
            raise ValueError("PattentionAttention has no biases; leave qkv_bias=False")
        super().__post_init__()

    def _projected(
        self, x: Hidden, features: int, *, name: str, axes: tuple[str, str], bias: bool = False
    ) -> Float[Array, "B T F"]:
        return self.pattention.copy(parent=self, name=name)(x, features=features)

    def flops(self, dim: int, *, projects: bool = True) -> int:
        """Queries and output, and keys and values where tokens get them."""
        width = self.width(dim)
        total = 2 * self.pattention.flops(dim, self.num_heads * width)
        if projects:
            total += 2 * self.pattention.flops(dim, self.num_kv_heads * width)
        return total


def token_former(
    *,
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    tokens: int,
    hidden_tokens: int,
    weights: ParameterWeights = NormedGelu(),
    **rest,
) -> Transformer:
    """A Transformer whose projections attend over learned tokens, tied embeddings.

    Args:
        vocab_size: rows of the embedding.
        dim: width.
        num_layers: layers.
        num_heads: heads of queries, keys and values.
        tokens: learned tokens of each projection of the attention; the paper has ``dim``.
        hidden_tokens: learned tokens of the feed-forward layer; the paper has ``4 dim``.
        weights: in the place of the softmax over learned tokens.
        **rest: fields of ``Transformer``.
    """

    def learned(count: int) -> Pattention:
        return Pattention(tokens=count, weights=weights, value_std=2 / (num_layers * dim**0.5))

    block = Block(
        mixer=PattentionAttention(
            num_heads=num_heads, num_kv_heads=num_heads, pattention=learned(tokens)
        ),
        feedforward=PattentionFeedForward(pattention=learned(hidden_tokens)),
    )
    return Transformer(vocab_size=vocab_size, dim=dim, num_layers=num_layers, block=block, **rest)


def grown(
    model: Transformer,
    params: PyTree,
    *,
    factor: int = 2,
    key: PRNGKeyArray,
    keep_scale: bool = True,
) -> tuple[Transformer, PyTree]:
    """The model with ``factor`` times as many learned tokens, and its parameters.

    New keys are 0 and new values drawn as at the start, so with the scale kept the function is the
    same, and the gradient reaches the new keys first. What an optimiser knew of the parameters is
    of another shape: begin it anew.

    Args:
        model: with one kind of block, of ``PattentionAttention`` and ``PattentionFeedForward``.
        params: its parameters.
        factor: by which n grows.
        key: of the new values.
        keep_scale: whether scores are scaled as before; otherwise by the new n, which changes the
            function.

    Raises:
        UserError: the model has no learned tokens.
    """
    block = model.block
    if not (
        isinstance(block, Block)
        and isinstance(block.mixer, PattentionAttention)
        and isinstance(block.feedforward, PattentionFeedForward)
    ):
        raise UserError("only a model of learned tokens grows; make one with token_former(...)")

    def more(part: Pattention) -> Pattention:
        scale = (part.scaled_as or part.tokens) if keep_scale else None
        return part.clone(tokens=factor * part.tokens, scaled_as=scale)

    flat: dict[Any, Any] = dict(flax.traverse_util.flatten_dict(params))
    for number, (path, leaf) in enumerate(sorted(flat.items())):
        if path[-1] not in ("keys", "values"):
            continue
        shape = (*leaf.shape[:-2], (factor - 1) * leaf.shape[-2], leaf.shape[-1])
        new = jnp.zeros(shape, leaf.dtype)
        if path[-1] == "values":
            part = block.feedforward if "feedforward" in path else block.mixer
            draw = jax.random.normal(jax.random.fold_in(key, number), shape, leaf.dtype)
            new = part.pattention.value_std * draw
        flat[path] = jnp.concatenate([leaf, new], axis=-2)
    blocks = block.clone(
        mixer=block.mixer.clone(pattention=more(block.mixer.pattention)),
        feedforward=block.feedforward.clone(pattention=more(block.feedforward.pattention)),
    )
    return model.clone(block=blocks), flax.traverse_util.unflatten_dict(flat)
