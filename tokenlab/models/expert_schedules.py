"""How many experts each layer has: the schedule family, and the model that follows one."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence

from tokenlab.core.errors import UserError
from tokenlab.models.experts import MixtureOfExperts
from tokenlab.models.transformer import Block, Transformer, layered

_CLOSE = 1e-9  # what rounding may have taken from a half


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSchedule(abc.ABC):
    """The expert schedule family: experts of layer l as a function of ``t = l / (L - 1)``.

    Counts are rounded, halves up. One layer alone has ``t = 0``.

    Reference: Gülmez, "DynaMoE: Dynamic Token-Level Expert Activation with Layer-Wise Adaptive
    Capacity for Mixture-of-Experts Neural Networks", 2026, arXiv:2603.01697.

    Differences from the paper: the names are the paper's, the formulas ours.

    Attributes:
        fewest: experts of the smallest layer.
        most: experts of the largest layer.
    """

    fewest: int = 2
    most: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most:
            raise UserError(
                f"{type(self).__name__} has fewest={self.fewest}, most={self.most}; "
                "use 1 <= fewest <= most"
            )

    def __call__(self, num_layers: int) -> tuple[int, ...]:
        """Experts of each layer, from the first."""
        span = max(1, num_layers - 1)
        exact = (
            self.fewest + (self.most - self.fewest) * self.share(layer / span)
            for layer in range(num_layers)
        )
        return tuple(math.floor(count + 0.5 + _CLOSE) for count in exact)

    @abc.abstractmethod
    def share(self, t: float) -> float:
        """Where between fewest (0) and most (1) a layer at depth ``t``, 0 to 1, lies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformExperts(ExpertSchedule):
    """The mean of both in every layer."""

    def share(self, t: float) -> float:
        """One half."""
        return 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescendingExperts(ExpertSchedule):
    """From the most to the fewest."""

    def share(self, t: float) -> float:
        """``1 - t``."""
        return 1 - t


@dataclasses.dataclass(frozen=True, kw_only=True)
class AscendingExperts(ExpertSchedule):
    """From the fewest to the most."""

    def share(self, t: float) -> float:
        """``t``."""
        return t


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidExperts(ExpertSchedule):
    """The most in the middle."""

    def share(self, t: float) -> float:
        """``1 - |2 t - 1|``."""
        return 1 - abs(2 * t - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InversePyramidExperts(ExpertSchedule):
    """The fewest in the middle."""

    def share(self, t: float) -> float:
        """``|2 t - 1|``."""
        return abs(2 * t - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveExperts(ExpertSchedule):
    """One period of a sine around the mean."""

    def share(self, t: float) -> float:
        """``(1 + sin 2πt) / 2``."""
        return 0.5 + 0.5 * math.sin(2 * math.pi * t)


def rescaled(counts: Sequence[int], total: int) -> tuple[int, ...]:
    """Counts in about the same proportions whose sum is ``total``, none below 1.

    Each layer has one, and every further one goes where most is missing of the exact share, to the
    earlier layer where it is the same.

    Args:
        counts: experts of each layer.
        total: wanted sum.

    Raises:
        UserError: that is fewer than one for every layer.
    """
    if total < len(counts):
        raise UserError(f"{total} experts do not suffice for {len(counts)} layers; use more")
    shares = [count * total / sum(counts) for count in counts]
    given = [1] * len(counts)
    for _ in range(total - len(counts)):
        missing = [round(share - has, 9) for share, has in zip(shares, given, strict=True)]
        given[missing.index(max(missing))] += 1
    return tuple(given)


def with_expert_schedule(
    model: Transformer, schedule: ExpertSchedule, *, total: int | None = None
) -> Transformer:
    """The model with as many experts in every layer as a schedule says.

    Args:
        model: its one kind of block has a ``MixtureOfExperts``, whose number of experts is
            replaced.
        schedule: experts of every layer.
        total: rescale to this sum over the layers, at which schedules have equally many
            parameters; None leaves them as they are.

    Raises:
        UserError: the layers are of several kinds, or have no experts.
    """
    block = model.block
    if not isinstance(block, Block) or not isinstance(block.feedforward, MixtureOfExperts):
        raise UserError("an expert schedule needs one Block whose feedforward is MixtureOfExperts")
    counts = schedule(model.num_layers)
    if total is not None:
        counts = rescaled(counts, total)
    mixture = block.feedforward
    blocks = tuple(block.clone(feedforward=mixture.clone(num_experts=count)) for count in counts)
    return model.clone(block=layered(blocks))
