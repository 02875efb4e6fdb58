"""Rotary settings of configuration files, in the old form and the new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenlab.core.errors import UserError
from tokenlab.models import Attention, LinearScaling, Llama3Scaling, RotaryScaling

_LLAMA3 = {
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}


def rotary_of(
    config: Mapping[str, Any], kind: str, *, sliding: bool
) -> tuple[float, RotaryScaling | None]:
    """Base and scaling of the layers of one kind.

    Args:
        config: with ``rope_parameters``, of all layers or by kind; or else with ``rope_theta``,
            ``rope_scaling`` and, for layers with a window, ``rope_local_base_freq``.
        kind: a value of ``layer_types``.
        sliding: whether these layers have a window.

    Raises:
        UserError: the scaling is one that the library does not compute, or none is given.
    """
    settings = config.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in settings.values()):
        if kind not in settings:
            raise UserError(f"rope_parameters say nothing of layers of kind {kind}")
        settings = settings[kind]
    local = config.get("rope_local_base_freq") if sliding else None
    if settings:
        base = settings.get("rope_theta", config.get("rope_theta", 10_000.0))
    elif local is not None:
        base = local
    else:
        base = config.get("rope_theta", 10_000.0)
        settings = config.get("rope_scaling") or {}
    return float(base), _scaling(settings)


def rotary_settings(kinds: Mapping[str, Attention], *, by_kind: bool) -> dict[str, Any]:
    """What :func:`rotary_of` reads, in both forms, so that old readers understand it too.

    Args:
        kinds: the attention of every kind of layer.
        by_kind: whether the kinds may differ.
    """
    new = {name: _setting(mixer) for name, mixer in kinds.items()}
    full = kinds.get("full_attention", next(iter(kinds.values())))
    old: dict[str, Any] = {"rope_theta": full.rope_base}
    if full.rope_scaling is not None:
        old["rope_scaling"] = {k: v for k, v in _setting(full).items() if k != "rope_theta"}
    if not by_kind:
        return {"rope_parameters": _setting(full), **old}
    if "sliding_attention" in kinds:
        old["rope_local_base_freq"] = kinds["sliding_attention"].rope_base
    return {"rope_parameters": new, **old}


def _setting(mixer: Attention) -> dict[str, Any]:
    base, scaling = {"rope_theta": mixer.rope_base}, mixer.rope_scaling
    if scaling is None:
        return {"rope_type": "default", **base}
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor, **base}
    if isinstance(scaling, Llama3Scaling):
        given = {key: getattr(scaling, name) for name, key in _LLAMA3.items()}
        return {"rope_type": "llama3", **given, **base}
    raise UserError(f"{type(scaling).__name__} is in no published family; use another scaling")


def _scaling(settings: Mapping[str, Any]) -> RotaryScaling | None:
    kind = settings.get("rope_type", settings.get("type", "default"))
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("rotary positions of a part of each head are not supported")
    try:
        match kind:
            case "default":
                return None
            case "linear":
                return LinearScaling(factor=settings["factor"])
            case "llama3":
                return Llama3Scaling(**{name: settings[key] for name, key in _LLAMA3.items()})
    except KeyError as error:
        raise UserError(f"rotary scaling {kind!r} lacks {error}; the file is not whole") from None
    raise UserError(f"rotary scaling {kind!r} is not supported, only default, linear and llama3")
