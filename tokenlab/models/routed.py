"""Stand-ins for the units of a model that is there already, and fixing what each token gets."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Int, PRNGKeyArray
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import taken_over
from tokenlab.depth import Sequential
from tokenlab.models.adapters import drawn
from tokenlab.models.attention import Attention
from tokenlab.models.stand_ins import RoutedFeedForward, RoutedMixer, StandIns
from tokenlab.models.transformer import Block, Transformer, layered
from tokenlab.routing import GIVEN, FixedOption, OptionRouter


class Unit(NamedTuple):
    """A part of a layer that has stand-ins.

    Attributes:
        layer: number of the layer.
        part: ``"mixer"`` or ``"feedforward"``.
        options: how many there are to choose among.
    """

    layer: int
    part: str
    options: int


def with_stand_ins(
    model: Transformer,
    *,
    mixer: StandIns | None = None,
    feedforward: StandIns | None = None,
    router: OptionRouter | None = None,
    capacity: float | None = None,
) -> Transformer:
    """The model with cheaper stand-ins for its units; of one that has them, with these instead.

    With ``FixedOption()``, which is what it gets where no router is given, it is the same function
    on parameters from :func:`with_base`.

    Args:
        model: any ``Transformer``, such as a published one.
        mixer: stand-ins for the attention of each layer; None leaves it as it is.
        feedforward: stand-ins for the feed-forward layer; None leaves it as it is.
        router: what chooses, for each unit by itself.
        capacity: share of a row's tokens that there are slots for outside training.

    Raises:
        UserError: a mixer that is to have stand-ins is not attention.
    """
    options = {"router": FixedOption() if router is None else router, "capacity": capacity}

    def routed(kind: Block) -> Block:
        attention, layer = unrouted(kind)
        if mixer is not None:
            if not isinstance(attention, Attention):
                raise UserError(f"{type(attention).__name__} has no stand-ins; set mixer=None")
            kind = kind.clone(mixer=RoutedMixer(unit=attention, stand_ins=mixer, **options))
        if feedforward is not None:
            part = RoutedFeedForward(unit=layer, stand_ins=feedforward, **options)
            kind = kind.clone(feedforward=part)
        return kind

    kinds = tuple(routed(kind) for kind in model.block.kinds())
    return model.clone(block=layered(kinds))


def unrouted(kind: Block):
    """The mixer and the feed-forward layer of a block, without stand-ins."""
    mixer, feedforward = kind.mixer, kind.feedforward
    return (
        mixer.unit if isinstance(mixer, RoutedMixer) else mixer,
        feedforward.unit if isinstance(feedforward, RoutedFeedForward) else feedforward,
    )


def with_base(model: Transformer, base: PyTree, *, key: PRNGKeyArray) -> PyTree:
    """Parameters of a model of :func:`with_stand_ins`: copies of ``base``, and what that lacks.

    Args:
        model: the model.
        base: those of the model it was made of, or those that another stage has left, of which
            stand-ins and routers are taken as well.
        key: draws the parameters that ``base`` has not.
    """

    @jax.jit  # so that nothing is drawn that is thrown away
    def taken(base: PyTree) -> PyTree:
        return taken_over(taken_over(drawn(model, key), base, within=("/unit/",)), base)

    return taken(base)


def units(model: Transformer) -> tuple[Unit, ...]:
    """The units that have stand-ins, in the order in which a token comes to them."""
    kinds = model.block.kinds()
    found = []
    for i in range(model.num_layers):
        kind = kinds[i % len(kinds)]
        for part in ("mixer", "feedforward"):
            module = getattr(kind, part)
            if isinstance(module, RoutedMixer | RoutedFeedForward):
                found.append(Unit(i, part, 1 + len(module.stand_ins)))
    return tuple(found)


def given_options(
    model: Transformer, options: Int[Array, " U"] | Int[Array, "U B T"]
) -> dict[str, PyTree]:
    """What fixes the option of each unit, for ``View(given=...)``; routers are not asked then.

    Args:
        model: with unrolled layers.
        options: of each of ``units(model)``, for all tokens or for each.

    Raises:
        UserError: there are not as many units, or layers are scanned and cannot be told apart.
    """
    found = units(model)
    if len(found) != len(options):
        raise UserError(f"options for {len(options)} units, but the model has {len(found)}")
    if isinstance(model.depth, Sequential) and model.depth.scan:
        raise UserError("options are given by layer; take models.unrolled(model, params)")
    collection: dict[str, dict[str, dict[str, Array]]] = {}
    for unit, option in zip(found, options, strict=True):
        collection.setdefault(f"block_{unit.layer}", {})[unit.part] = {"option": option}
    return {GIVEN: collection}
