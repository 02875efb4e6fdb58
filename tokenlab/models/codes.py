"""Which tokens share a row of the vocabulary projection, and what sharing costs at least."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float, Int, PRNGKeyArray

Codes = Int[np.ndarray, " V"]
Counts = Float[np.ndarray, " V"] | Int[np.ndarray, " V"]


def contiguous_codes(vocabulary: int, count: int) -> Codes:
    """Equal runs of ids share a code; the identity where there are as many codes as tokens."""
    return (np.arange(vocabulary) * count // vocabulary).astype(np.int32)


def random_codes(vocabulary: int, count: int, *, seed: int) -> Codes:
    """As many tokens in each code as in any other, to one."""
    return np.random.default_rng(seed).permutation(contiguous_codes(vocabulary, count))


def frequency_codes(
    counts: Counts, count: int, *, bins: Literal["size", "mass", "head"] = "size"
) -> Codes:
    """Tokens of like frequency share a code.

    Args:
        counts: how often each token occurs.
        count: number of codes.
        bins: ``"size"``: of equally many tokens; ``"mass"``: of about equal total frequency, none
            empty; ``"head"``: the most frequent tokens alone, all others in the last code.
    """
    vocabulary = len(counts)
    order = np.argsort(-np.asarray(counts, np.float64), kind="stable")
    if bins == "size":
        places = contiguous_codes(vocabulary, count)
    elif bins == "head":
        places = np.minimum(np.arange(vocabulary), count - 1)
    else:
        places = _equal_masses(np.asarray(counts, np.float64)[order], count)
    codes = np.zeros(vocabulary, np.int32)
    codes[order] = places
    return codes


def _equal_masses(counts: Counts, count: int) -> Codes:
    """Each code takes tokens until it has its share of what is left."""
    places = np.zeros(len(counts), np.int32)
    code, filled, left = 0, 0.0, float(counts.sum())
    for i, weight in enumerate(counts):
        places[i] = code
        filled += weight
        behind = len(counts) - i - 1
        if code < count - 1 and (filled >= left / (count - code) or behind < count - code):
            code, filled, left = code + 1, 0.0, left - filled
    return places


def k_means(
    vectors: Float[Array, "V D"], count: int, *, key: PRNGKeyArray, steps: int = 25
) -> tuple[Int[Array, " V"], Float[Array, "K D"]]:
    """Lloyd's algorithm: the nearest centre of each vector, and the centres, means of theirs.

    Centres start as distinct vectors. A centre that has lost all its vectors moves to the vector
    that lies furthest from its own centre.

    Reference: Stuart P. Lloyd, "Least Squares Quantization in PCM", IEEE Transactions on
    Information Theory 28(2), 1982.

    Args:
        vectors: what is grouped, such as a trained output embedding.
        count: number of centres, at most as many as vectors.
        key: of the first centres.
        steps: rounds of assignment and means.
    """
    vectors = jnp.asarray(vectors, jnp.float32)
    first = jax.random.choice(key, vectors.shape[0], (count,), replace=False)

    def step(centres: Array, _: None) -> tuple[Array, None]:
        codes, distance = _nearest(vectors, centres)
        size = jnp.zeros((count,)).at[codes].add(1.0)
        means = jnp.zeros_like(centres).at[codes].add(vectors) / jnp.maximum(size, 1.0)[:, None]
        furthest = vectors[jnp.argsort(-distance)]
        dead = size == 0
        rank = jnp.maximum(jnp.cumsum(dead) - 1, 0)
        return jnp.where(dead[:, None], furthest[rank], means), None

    centres, _ = jax.lax.scan(step, vectors[first], length=steps)
    return _nearest(vectors, centres)[0], centres


def _nearest(
    vectors: Float[Array, "V D"], centres: Float[Array, "K D"]
) -> tuple[Int[Array, " V"], Float[Array, " V"]]:
    squares = jnp.sum(centres**2, axis=1)[None] - 2.0 * vectors @ centres.T
    codes = jnp.argmin(squares, axis=1)
    distance = jnp.take_along_axis(squares, codes[:, None], axis=1)[:, 0]
    return codes, distance + jnp.sum(vectors**2, axis=1)


def unigram_floor(counts: Counts, codes: Codes) -> float:
    """Nats per token that any model loses whose tokens of one code are equally likely.

    ``Σ_c p(c) KL(p(· | c) || uniform)``, a lower bound for any text with these counts: divergence
    is convex, so that contexts only add to it.

    Args:
        counts: how often each token occurs.
        codes: the code of each token.
    """
    p = np.asarray(counts, np.float64) / np.sum(counts, dtype=np.float64)
    size = np.bincount(codes)
    mass = np.bincount(codes, weights=p)
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] * size[codes[seen]] / mass[codes[seen]])))


def projection_gap(
    log_p: Float[Array, "N V"], targets: Int[Array, " N"], codes: Int[Array, " V"]
) -> Float[Array, " N"]:
    """Nats that tying the tokens of each code costs the distributions ``log_p``, per target.

    ``log n_{M(y)} + log p(y | code(y), context)``: the mean over a text is the loss of the best
    tied approximation of an untied model beyond the model's own.

    Args:
        log_p: log-probabilities of an untied model.
        targets: the tokens that came.
        codes: the code of each token.
    """
    count = log_p.shape[1]
    size = jnp.zeros((count,)).at[codes].add(1.0)
    mass = jnp.zeros((count, log_p.shape[0])).at[codes].add(jnp.exp(log_p).T)
    code = codes[targets]
    own = jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    whole = jnp.take_along_axis(mass, code[None], axis=0)[0]
    return jnp.log(size[code]) + own - jnp.log(whole)


def with_codes(params: PyTree, codes: Codes, codebook: Float[Array, "K D"] | None = None) -> PyTree:
    """Parameters of a model with a ``VQHead``, with this map and, where given, these rows.

    Args:
        params: of the model.
        codes: the code of each token.
        codebook: the rows; None keeps those there are.

    Raises:
        ValueError: the sizes are not those of the head.
    """
    head = dict(params["head"])
    count = head["codebook"].shape[0]
    if head["codes"].shape != codes.shape or not 0 <= int(codes.max()) < count:
        raise ValueError(
            f"codes {codes.shape} up to {int(codes.max())} do not fit a head of"
            f" {head['codes'].shape[0]} tokens and {count} codes"
        )
    head["codes"] = jnp.asarray(codes, jnp.float32)
    if codebook is not None:
        if codebook.shape != head["codebook"].shape:
            raise ValueError(f"codebook {codebook.shape} is not {head['codebook'].shape}")
        head["codebook"] = jnp.asarray(codebook, jnp.float32)
    return {**params, "head": head}


def code_entropy(counts: Counts, codes: Codes) -> float:
    """Nats of ``H(code) + E[log n_code]``: the best a tied model does on independent tokens."""
    p = np.asarray(counts, np.float64) / np.sum(counts, dtype=np.float64)
    mass, size = np.bincount(codes, weights=p), np.bincount(codes)
    seen = mass > 0
    return float(np.sum(mass[seen] * (np.log(size[seen]) - np.log(mass[seen]))))
