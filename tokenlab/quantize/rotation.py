"""Orthogonal changes of basis that spread outliers: random Hadamard matrices."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from tokenlab.core.arrays import Float, Int


@functools.cache
def hadamard_matrix(size: int) -> Int[np.ndarray, "N N"] | None:
    """A matrix of ones and minus ones with ``H Hᵀ = size``, or None where none is known here.

    Sylvester's doubling of a base matrix of order 1 or ``q + 1``, q a prime that is 3 modulo 4,
    or ``2 (q + 1)``, q a prime that is 1 modulo 4 (Paley's two constructions). So there is one
    for 12, 20, 28, 36, 44, 60, ... and powers of two times these: 576 is 16 times 36, and 1536 is
    128 times 12.

    Args:
        size: order, 1 or more.
    """
    base, doublings = size, 0
    while True:
        made = _paley(base) if base > 1 else np.ones((1, 1), np.int64)
        if made is not None:
            for _ in range(doublings):
                made = np.kron(np.array([[1, 1], [1, -1]]), made)
            return made
        if base % 2:
            return None
        base, doublings = base // 2, doublings + 1


def _paley(order: int) -> Int[np.ndarray, "N N"] | None:
    """Paley's matrix of this order, or None."""
    first, second = order - 1, order // 2 - 1
    if order % 4 == 0 and _is_prime(first) and first % 4 == 3:
        core = _residues(first)
        skew = np.block([[np.zeros((1, 1)), np.ones((1, first))], [-np.ones((first, 1)), core]])
        return (skew + np.eye(order)).astype(np.int64)
    if order % 4 == 0 and _is_prime(second) and second % 4 == 1:
        core = _residues(second)
        edge = np.ones((1, second))
        conference = np.block([[np.zeros((1, 1)), edge], [edge.T, core]])
        blocks = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        made = np.kron(conference, blocks[0]) + np.kron(np.eye(second + 1), blocks[1])
        return made.astype(np.int64)
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _residues(prime: int) -> Int[np.ndarray, "Q Q"]:
    """Whether i - j is a square modulo a prime: 1, -1, and 0 on the diagonal."""
    sign = np.full(prime, -1)
    sign[np.arange(prime) ** 2 % prime] = 1
    sign[0] = 0
    place = np.arange(prime)
    return sign[(place[:, None] - place[None, :]) % prime]


def random_orthogonal(size: int, rng: np.random.Generator) -> Float[np.ndarray, "N N"]:
    """A Hadamard matrix of random signs, over its norm.

    Where none is known, the largest power of two that divides the size has one, and the odd rest
    a random rotation; their Kronecker product mixes all.

    Args:
        size: order.
        rng: draws signs, and the rest.

    Returns:
        Float64; ``x @ Q`` rotates rows.
    """
    signs = rng.choice([-1.0, 1.0], size)
    made = hadamard_matrix(size)
    if made is not None:
        return signs[:, None] * made / np.sqrt(size)
    power = size & -size
    found, triangle = np.linalg.qr(rng.normal(size=(size // power, size // power)))
    rest = found * np.sign(np.diagonal(triangle))  # uniform over all rotations
    return signs[:, None] * np.kron(rest, hadamard_matrix(power) / np.sqrt(power))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """The bases of QuaRot, in which a model computes the same and its outliers are spread.

    The stream is rotated by one random Hadamard matrix for all layers. Each head of the values is
    rotated by one of its width; before the output projection heads are mixed by another, and the
    hidden layer of the feed-forward part is rotated before ``down``, both while the model runs.

    Reference: Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman,
    "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, arXiv:2404.00456.

    Differences from the paper: any width (:func:`random_orthogonal`); embeddings are not centred,
    which is exact for LayerNorm only.

    Attributes:
        seed: of the random signs.
    """

    seed: int = 0

    def of(
        self, *, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, hidden_dim: int
    ) -> dict[str, tuple[Float[np.ndarray, "I I"] | None, Float[np.ndarray, "O O"] | None]]:
        """Bases ``(A, B)`` of each projection, whose rotated kernel is ``Aᵀ W B``; None is 1.

        Args:
            dim: width of the stream.
            num_heads: query heads.
            num_kv_heads: key and value heads.
            head_dim: width of a head.
            hidden_dim: width of the feed-forward layer.
        """
        rng = np.random.default_rng(self.seed)
        stream, head = random_orthogonal(dim, rng), random_orthogonal(head_dim, rng)
        heads, hidden = random_orthogonal(num_heads, rng), random_orthogonal(hidden_dim, rng)
        return {
            "mixer/q": (stream, None),
            "mixer/k": (stream, None),
            "mixer/v": (stream, np.kron(np.eye(num_kv_heads), head)),
            "mixer/out": (np.kron(heads, head), stream),
            "feedforward/gate": (stream, None),
            "feedforward/up": (stream, None),
            "feedforward/down": (hidden, stream),
        }
