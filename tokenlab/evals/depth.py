"""What depth tokens are given, what their targets cost, and whether it follows difficulty."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float, Int
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.data.tasks import Task
from tokenlab.evals.base import Evaluation
from tokenlab.models import ModelOutput, Transformer
from tokenlab.tokenizers.base import Tokenizer

_STREAM = zlib.crc32(b"depth")  # no source draws its rows from this seed

_ARRAYS = ("tokens", "positions", "segments", "targets")


_SHARE, _NATS = "share_at_depth_", "nats_at_depth_"


def token_depth(out: ModelOutput) -> Float[Array, "B T"]:
    """The recursions that a model reports of each token, else its block applications."""
    recursions = out.trace.figures.get("recursions")
    return out.trace.depth.astype(jnp.float32) if recursions is None else recursions[0]


class DepthHistogram(NamedTuple):
    """How many tokens were given each depth, and what their targets cost.

    Attributes:
        depth: the depths that occur, in whole numbers, from the least.
        share: share of the tokens that were given each.
        nats: mean loss of their targets.
    """

    depth: Int[np.ndarray, " K"]
    share: Float[np.ndarray, " K"]
    nats: Float[np.ndarray, " K"]

    @classmethod
    def of(
        cls, depth: Float[np.ndarray, "*N"] | Int[np.ndarray, "*N"], nats: Float[np.ndarray, "*N"]
    ) -> DepthHistogram:
        """Counts tokens that have these depths, to be rounded, and losses."""
        rounded = np.rint(np.ravel(depth)).astype(np.int64)
        levels, place, counts = np.unique(rounded, return_inverse=True, return_counts=True)
        sums = np.bincount(place, weights=np.ravel(nats).astype(np.float64), minlength=len(levels))
        return cls(levels, counts / max(1, counts.sum()), sums / counts)

    @classmethod
    def read(cls, figures: Mapping[str, float]) -> DepthHistogram:
        """What :meth:`figures` wrote, among others; of no depth where it wrote nothing."""
        names = [name.removeprefix(_SHARE) for name in figures if name.startswith(_SHARE)]
        depth = np.sort(np.asarray(names, np.int64))
        sides = [[figures[f"{side}{level}"] for level in depth] for side in (_SHARE, _NATS)]
        return cls(depth, *(np.asarray(side, np.float64) for side in sides))

    def figures(self) -> dict[str, float]:
        """``share_at_depth_N`` and ``nats_at_depth_N``; none where all tokens have one depth."""
        if len(self.depth) < 2:
            return {}
        sides = {_SHARE: self.share, _NATS: self.nats}
        return {
            f"{side}{level}": float(value)
            for side, values in sides.items()
            for level, value in zip(self.depth, values, strict=True)
        }


class Fit(NamedTuple):
    """How far depth follows features.

    Attributes:
        r_squared: share of the variance of depth that a linear regression on all features explains.
        spearman: rank correlation of depth with each feature.
    """

    r_squared: float
    spearman: Float[np.ndarray, " F"]


def depth_fit(
    depth: Float[np.ndarray, " N"], features: Float[np.ndarray, "N F"] | Int[np.ndarray, "N F"]
) -> Fit:
    """Spearman's rank correlations, and R^2 of the least-squares fit with an intercept.

    Where depth or a feature does not vary, nothing follows anything: its figures are 0.

    Args:
        depth: of each token.
        features: its difficulty, or several features of what it predicts.
    """
    depth, features = np.asarray(depth, np.float64), np.asarray(features, np.float64)
    count = features.shape[1]
    varies = len(depth) > 1 and np.ptp(depth) > 0
    if not varies:
        return Fit(0.0, np.zeros(count))
    design = np.column_stack([np.ones(len(depth)), features])
    rest = depth - design @ np.linalg.lstsq(design, depth, rcond=None)[0]
    ranks = [
        scipy.stats.spearmanr(depth, column).statistic if np.ptp(column) > 0 else 0.0
        for column in features.T
    ]
    return Fit(float(1 - rest @ rest / np.sum((depth - depth.mean()) ** 2)), np.asarray(ranks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthAllocation(Evaluation):
    """Accuracy and depth on the rows of a task, each answer predicted from the true text before it.

    ``depth`` of a token is the number of recursions that the model reports for it, expected or
    entered, otherwise that of its block applications. Figures: ``accuracy`` and ``mean_depth`` of
    the answers' tokens, also ``accuracy_at_N`` and ``depth_at_N`` of those of difficulty N;
    ``nats`` of each, and ``late_nats`` of those in the later half of their row's; where their depth
    varies, the share of them at each depth and their loss, as :class:`DepthHistogram` names them;
    ``filler_depth`` of all other tokens; ``spearman`` and ``r_squared`` of depth on difficulty over
    the answers that are right, of which there are ``right``. Where the task has features, also
    ``GROUP_r_squared`` of depth on each group of them, and ``spearman_NAME`` of each.

    Attributes:
        task: makes the rows.
        rows: how many.
        batch_size: rows of a pass.
        twin: whether the model's causal twin is measured, as it decodes, or the model as it trains.
        seed: of the rows.
    """

    task: Task
    rows: int = 256
    batch_size: int = 64
    twin: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows % self.batch_size:
            raise ValueError(f"rows {self.rows} is not a multiple of batch_size {self.batch_size}")

    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """See the class.

        Raises:
            UserError: the model was trained with another tokenizer than the task's.
        """
        if tokenizer.fingerprint != self.task.tokenizer.fingerprint:
            raise UserError(f"the tokenizer is not the alphabet of {self.task}; use its tokenizer")
        network = cast(Transformer, model)
        network = network.causal_twin() if self.twin else network
        sample = self.task.sample(seed=(_STREAM, self.seed), count=self.rows)
        found = []
        for start in range(0, self.rows, self.batch_size):
            part = slice(start, start + self.batch_size)
            arrays = [getattr(sample, name)[part] for name in _ARRAYS]
            found.append(_predicted(network, params, *arrays))
        best, nats, depth = (np.concatenate(each) for each in zip(*found, strict=True))
        asked = sample.weights > 0
        order = np.cumsum(asked, axis=1)
        late = asked & (2 * order > order[:, -1:])
        right = (best == sample.targets)[asked]
        difficulty, given = sample.difficulty[asked], depth[asked].astype(np.float64)
        fit = depth_fit(given[right], difficulty[right, None])
        figures = {
            "accuracy": float(right.mean()),
            "right": int(right.sum()),
            "nats": float(nats[asked].mean()),
            "late_nats": float(nats[late].mean()),
            "mean_depth": float(given.mean()),
            "filler_depth": float(depth[(sample.segments > 0) & ~asked].mean()),
            "spearman": float(fit.spearman[0]),
            "r_squared": fit.r_squared,
        }
        for level in np.unique(difficulty).tolist():
            here = difficulty == level
            figures[f"accuracy_at_{level}"] = float(right[here].mean())
            figures[f"depth_at_{level}"] = float(given[here].mean())
        figures |= DepthHistogram.of(given, nats[asked]).figures()
        for group, features in self.task.features(sample).items():
            of_right = {name: values[asked][right] for name, values in features.items()}
            figures |= _followed(group, given[right], of_right)
        return {name: value for name, value in figures.items() if math.isfinite(value)}


def _followed(
    group: str, depth: Float[np.ndarray, " N"], features: Mapping[str, Int[np.ndarray, " N"]]
) -> dict[str, float]:
    """How far depth follows a group of features, together and each alone."""
    fit = depth_fit(depth, np.stack(list(features.values()), axis=1))
    each = zip(features, fit.spearman.tolist(), strict=True)
    return {f"{group}_r_squared": fit.r_squared} | {f"spearman_{name}": by for name, by in each}


@functools.partial(jax.jit, static_argnums=0)
def _predicted(
    model: Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> tuple[Int[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """The likeliest token behind each, the nats of the true one, and the depth of each."""
    view = View(model=model, params=params)
    out = view(tokens, positions=positions, segments=segments)
    logits = view(out.hidden, method="logits")
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return jnp.argmax(logits, axis=-1), -logp[..., 0], token_depth(out)
