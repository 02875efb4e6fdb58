"""The families of published models: what a configuration file says, as a model and back.

A configuration is a mapping with the keys of a Hugging Face ``config.json``; what a GGUF file says
is turned into one first, so that each family is described once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kernels_pallas.block_sparse_attention import Causal, MaskRule, SlidingWindow
from tokenlab.core.errors import UserError
from tokenlab.depth import Sequential
from tokenlab.interop.rotary import rotary_of, rotary_settings
from tokenlab.models import (
    Attention,
    Block,
    GatedFeedForward,
    GeGLU,
    LinearHead,
    RMSNorm,
    SwiGLU,
    TiedHead,
    Transformer,
    layered,
)

_SLIDING, _FULL = "sliding_attention", "full_attention"
# Settings that would change the function, and the one value that this library computes.
_ONLY = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bidirectional_attention": False,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,  # transformers reads it for Gemma 3, and does not apply it
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one family of models apart.

    Attributes:
        name: ``model_type`` of a configuration file.
        architecture: class in ``transformers``.
        gguf: ``general.architecture`` of a GGUF file.
        feedforward: the feed-forward layer.
        activation: key and value of a configuration that name its nonlinearity.
        qkv_bias: whether queries, keys and values have biases.
        qk_norm: whether queries and keys are normalised.
        gemma: whether norms store their scale less one, updates are normalised too, embeddings
            are multiplied by the root of the width, and windows have a rotary base of their own.
        permuted: whether GGUF files hold rows of queries and keys as pairs, not as halves.
    """

    name: str
    architecture: str
    gguf: str
    feedforward: Callable[..., GatedFeedForward] = SwiGLU
    activation: tuple[str, str] = ("hidden_act", "silu")
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    permuted: bool = False

    def model(self, config: Mapping[str, Any]) -> Transformer:
        """The model that a configuration describes, float32.

        Raises:
            UserError: a setting is missing, or one that the library does not compute.
        """
        self._check(config)
        try:
            return self._model(config)
        except ValueError as error:
            raise UserError(f"the configuration describes no model: {error}") from None

    def _model(self, config: Mapping[str, Any]) -> Transformer:
        dim, layers = config["hidden_size"], config["num_hidden_layers"]
        kinds = [self._block(config, kind) for kind in _period(self._kinds(config))]
        head = TiedHead if config.get("tie_word_embeddings", self.gemma) else LinearHead
        return Transformer(
            vocab_size=config["vocab_size"],
            dim=dim,
            num_layers=layers,
            block=layered(kinds),
            depth=Sequential(),
            head=head(softcap=config.get("final_logit_softcapping")),
            norm=_norm(config),
            embedding_scale=math.sqrt(dim) if self.gemma else 1.0,
            max_length=config.get("max_position_embeddings", 2048),
        )

    def config(self, model: Transformer) -> dict[str, Any]:
        """The configuration of a model of this family."""
        kinds = model.block.kinds()
        full = next((kind for kind in kinds if _window(kind) is None), kinds[0])
        mixer = _attention(full)
        types = [_FULL if _window(kind) is None else _SLIDING for kind in kinds]
        windows = {window for kind in kinds if (window := _window(kind)) is not None}
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.name,
            "vocab_size": model.vocab_size,
            "hidden_size": model.dim,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": mixer.num_heads,
            "num_key_value_heads": mixer.num_kv_heads,
            "head_dim": mixer.width(model.dim),
            "intermediate_size": _feedforward(full).hidden_dim,
            "rms_norm_eps": model.norm.epsilon,
            "max_position_embeddings": model.max_length,
            "tie_word_embeddings": isinstance(model.head, TiedHead),
            self.activation[0]: self.activation[1],
        }
        if windows:
            config |= {"sliding_window": max(windows), "use_sliding_window": True}
        if windows or self.gemma:
            config["layer_types"] = [types[i % len(types)] for i in range(model.num_layers)]
        if self.gemma:
            scale = mixer.width(model.dim) ** -0.5 if mixer.scale is None else mixer.scale
            config["query_pre_attn_scalar"] = _whole(scale**-2)
            config["final_logit_softcapping"] = model.head.softcap
        by_kind = dict(zip(types, kinds, strict=True))
        rotary = {kind: _attention(block) for kind, block in by_kind.items()}
        return config | rotary_settings(rotary, by_kind=self.gemma)

    def _check(self, config: Mapping[str, Any]) -> None:
        needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        for key in [*needed, "vocab_size"]:
            if not isinstance(value := config.get(key), int) or value < 1:
                raise UserError(f"the configuration has no whole number {key!r}; it is not whole")
        key, value = self.activation
        for name, only in _ONLY.items() | {(key, value)}:
            if config.get(name, only) not in (only, None):
                raise UserError(
                    f"{name}={config[name]!r} of a {self.name} model is not supported, "
                    f"only {only!r}"
                )

    def _kinds(self, config: Mapping[str, Any]) -> list[str]:
        """The kind of attention of every layer."""
        layers = range(config["num_hidden_layers"])
        if config.get("layer_types"):
            kinds = list(config["layer_types"])
        elif self.gemma:
            every = config.get("sliding_window_pattern", 6)
            kinds = [_SLIDING if (i + 1) % every else _FULL for i in layers]
        elif config.get("use_sliding_window"):
            first = config.get("max_window_layers", len(layers))
            kinds = [_SLIDING if i >= first else _FULL for i in layers]
        else:
            kinds = [_FULL for _ in layers]
        unknown = set(kinds) - {_SLIDING, _FULL}
        if unknown or len(kinds) != len(layers):
            raise UserError(
                f"layer_types names {len(kinds)} layers of kinds {sorted(set(kinds))}; it must "
                f"name {len(layers)}, each {_FULL} or {_SLIDING}"
            )
        return kinds

    def _block(self, config: Mapping[str, Any], kind: str) -> Block:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        scalar = config.get("query_pre_attn_scalar", width)
        base, scaling = rotary_of(config, kind, sliding=kind == _SLIDING)
        rule: MaskRule = Causal()
        if kind == _SLIDING:
            if not config.get("sliding_window"):
                raise UserError(f"a layer is {_SLIDING}, and sliding_window is not given")
            rule = SlidingWindow(size=config["sliding_window"])
        return Block(
            mixer=Attention(
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=width,
                rope_base=base,
                rope_scaling=scaling,
                qk_norm=_norm(config) if self.qk_norm else None,
                rule=rule,
                qkv_bias=self.qkv_bias,
                scale=None if scalar == width else scalar**-0.5,
            ),
            feedforward=self.feedforward(hidden_dim=config["intermediate_size"]),
            norm=_norm(config),
            post_norm=_norm(config) if self.gemma else None,
        )


FAMILIES = (
    Family(name="llama", architecture="LlamaForCausalLM", gguf="llama", permuted=True),
    Family(name="qwen2", architecture="Qwen2ForCausalLM", gguf="qwen2", qkv_bias=True),
    Family(name="qwen3", architecture="Qwen3ForCausalLM", gguf="qwen3", qk_norm=True),
    Family(
        name="gemma3_text",
        architecture="Gemma3ForCausalLM",
        gguf="gemma3",
        feedforward=GeGLU,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        qk_norm=True,
        gemma=True,
    ),
)


def family_named(name: object) -> Family:
    """The family that a ``config.json`` calls so.

    Raises:
        UserError: there is none.
    """
    return _named(name, {family.name: family for family in FAMILIES})


def family_of_gguf(name: object) -> Family:
    """The family whose architecture a GGUF file calls so.

    Raises:
        UserError: there is none.
    """
    return _named(name, {family.gguf: family for family in FAMILIES})


def _named(name: object, families: Mapping[str, Family]) -> Family:
    if isinstance(name, str) and name in families:
        return families[name]
    known = ", ".join(families)
    raise UserError(f"architecture {name!r} is not supported; these are: {known}")


def family_of(model: Transformer) -> Family:
    """The family that can hold ``model`` whole: its configuration gives the same model back.

    Raises:
        UserError: there is none.
    """
    plain = _explicit(model)
    for family in FAMILIES:
        try:
            if family.model(family.config(plain)) == plain:
                return family
        except UserError:
            continue
    known = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"no published family computes what this model does; these are: {known}")


def _explicit(model: Transformer) -> Transformer:
    """The same function, written as a configuration gives it back."""

    def block(kind: Block) -> Block:
        mixer = _attention(kind)
        mixer = mixer.clone(head_dim=mixer.width(model.dim), impl=None)
        return kind.clone(mixer=mixer, dropout=0.0)

    kinds = tuple(map(block, model.block.kinds()))
    depth = model.depth
    if isinstance(depth, Sequential) and not depth.scan:
        depth = Sequential()
    return model.clone(
        block=layered(kinds),
        depth=depth,
        dtype="float32",
    )


def _attention(block: Block) -> Attention:
    if not isinstance(block.mixer, Attention):
        raise UserError(f"{type(block.mixer).__name__} is in no published family; use Attention")
    return block.mixer


def _feedforward(block: Block) -> GatedFeedForward:
    if not isinstance(block.feedforward, GatedFeedForward):
        raise UserError(f"{type(block.feedforward).__name__} is in no published family")
    return block.feedforward


def _norm(config: Mapping[str, Any]) -> RMSNorm:
    # One for each place: Linen takes a module that stands in two places for one set of parameters.
    return RMSNorm(epsilon=float(config.get("rms_norm_eps", 1e-6)))


def _window(block: Block) -> int | None:
    rule = _attention(block).rule
    return rule.size if isinstance(rule, SlidingWindow) else None


def _period(kinds: Sequence[str]) -> Sequence[str]:
    """The shortest beginning that, repeated, gives all kinds."""
    sizes = range(1, len(kinds) + 1)
    return next(kinds[:n] for n in sizes if all(k == kinds[i % n] for i, k in enumerate(kinds)))


def _whole(value: float) -> float | int:
    """``value``, as a whole number where rounding alone keeps it from being one."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value
