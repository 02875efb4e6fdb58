"""Which tensor of a published file is which parameter, in one table for both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.errors import UserError
from tokenlab.interop.families import Family
from tokenlab.models import Transformer

Form = Literal["plain", "transposed", "norm"]
Format = Literal["hf", "gguf"]


class TensorName(NamedTuple):
    """One parameter's name everywhere; ``{}`` stands for the number of a layer.

    Attributes:
        params: path in the parameter tree.
        hf: in safetensors files.
        gguf: in GGUF files.
        form: how a file holds it: as it is, as [out, in], or as a norm's scale.
    """

    params: str
    hf: str
    gguf: str
    form: Form


def _layer(params: str, hf: str, gguf: str, form: Form) -> TensorName:
    return TensorName(
        f"block_{{}}/{params}", f"model.layers.{{}}.{hf}.weight", f"blk.{{}}.{gguf}.weight", form
    )


def _bias(part: str) -> TensorName:
    return TensorName(
        f"block_{{}}/mixer/{part}/bias",
        f"model.layers.{{}}.self_attn.{part}_proj.bias",
        f"blk.{{}}.attn_{part}.bias",
        "plain",
    )


_COMMON = (
    TensorName("embedding", "model.embed_tokens.weight", "token_embd.weight", "plain"),
    TensorName("head/kernel", "lm_head.weight", "output.weight", "plain"),
    TensorName("norm/scale", "model.norm.weight", "output_norm.weight", "norm"),
    _layer("mixer_norm/scale", "input_layernorm", "attn_norm", "norm"),
    _layer("mixer/q/kernel", "self_attn.q_proj", "attn_q", "transposed"),
    _layer("mixer/k/kernel", "self_attn.k_proj", "attn_k", "transposed"),
    _layer("mixer/v/kernel", "self_attn.v_proj", "attn_v", "transposed"),
    _layer("mixer/out/kernel", "self_attn.o_proj", "attn_output", "transposed"),
    _bias("q"),
    _bias("k"),
    _bias("v"),
    _layer("mixer/q_norm/scale", "self_attn.q_norm", "attn_q_norm", "norm"),
    _layer("mixer/k_norm/scale", "self_attn.k_norm", "attn_k_norm", "norm"),
    _layer("feedforward/gate/kernel", "mlp.gate_proj", "ffn_gate", "transposed"),
    _layer("feedforward/up/kernel", "mlp.up_proj", "ffn_up", "transposed"),
    _layer("feedforward/down/kernel", "mlp.down_proj", "ffn_down", "transposed"),
)
_PLAIN = (_layer("feedforward_norm/scale", "post_attention_layernorm", "ffn_norm", "norm"),)
_GEMMA = (
    _layer("feedforward_norm/scale", "pre_feedforward_layernorm", "ffn_norm", "norm"),
    _layer("mixer_post_norm/scale", "post_attention_layernorm", "post_attention_norm", "norm"),
    _layer("feedforward_post_norm/scale", "post_feedforward_layernorm", "post_ffw_norm", "norm"),
)
# Constants that old files hold beside the parameters.
_CONSTANTS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Parameter(NamedTuple):
    """One parameter of a model, and its tensor in a file.

    Attributes:
        path: in the parameter tree.
        shape: its shape in the model.
        tensor: its name in the file.
        form: how the file holds it.
    """

    path: str
    shape: tuple[int, ...]
    tensor: str
    form: Form


def parameters(model: Transformer, family: Family, format: Format) -> Iterator[Parameter]:
    """All parameters of ``model`` with their tensors in a file of ``format``."""
    table = {name.params: name for name in (*_COMMON, *(_GEMMA if family.gemma else _PLAIN))}
    one = jnp.zeros((1, 1), jnp.int32)
    tree = jax.eval_shape(
        lambda: model.init(jax.random.key(0), one, positions=one, segments=one + 1)
    )["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree)):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        layer = re.match(r"block_(\d+)/", where)
        name = table[re.sub(r"^block_\d+/", "block_{}/", where)]
        tensor = getattr(name, format).format(*(layer.groups() if layer else ()))
        yield Parameter(where, leaf.shape, tensor, name.form)


def read_params(
    model: Transformer,
    family: Family,
    *,
    format: Format,
    names: Collection[str],
    read: Callable[[str], np.ndarray],
) -> PyTree:
    """The parameter tree of ``model`` from the tensors of a file.

    Matrices take the model's dtype; biases and norms stay float32.

    Args:
        model: says which parameters there are.
        family: says what the file calls them.
        format: of the file.
        names: of all tensors in the file.
        read: gives the tensor of a name.

    Raises:
        UserError: a tensor is missing, of another shape, or one too many.
    """
    params: dict = {}
    expected = list(parameters(model, family, format))
    for path, shape, tensor, form in expected:
        if tensor not in names:
            raise UserError(f"tensor {tensor!r} is missing; the checkpoint is not whole")
        value = read(tensor)
        if form == "transposed":
            value = _halves(value, path, model, family, format).T
        elif form == "norm" and family.gemma and format == "hf":
            value = np.float32(1) + value.astype(np.float32)
        if value.shape != shape:
            raise UserError(
                f"tensor {tensor!r} gives shape {value.shape}, and the configuration {shape}; "
                "they are not of one model"
            )
        dtype = model.dtype if value.ndim > 1 else "float32"
        branch, *rest = path.split("/")
        node = params
        for key in rest:
            node = node.setdefault(branch, {})
            branch = key
        node[branch] = jnp.asarray(np.ascontiguousarray(value), dtype)
    left = set(names) - {parameter.tensor for parameter in expected}
    _check_unused({name for name in left if not _CONSTANTS.fullmatch(name)}, format, read)
    return params


def _check_unused(names: Collection[str], format: Format, read: Callable) -> None:
    """Accepts a head that repeats the embedding it is tied to, and nothing else."""
    embedding, head = (getattr(name, format) for name in _COMMON[:2])
    for name in sorted(names):
        if name != head or not np.array_equal(read(head), read(embedding)):
            raise UserError(
                f"tensor {name!r} is not expected: the configuration describes another model"
            )


def written_params(
    model: Transformer, family: Family, params: PyTree
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a safetensors file, by name; the inverse of :func:`read_params`."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(params))
    }
    for path, shape, tensor, form in parameters(model, family, "hf"):
        if path not in leaves or leaves[path].shape != shape:
            raise UserError(f"parameter {path!r} of shape {shape} is missing; save whole ones")
        value = np.asarray(leaves[path])
        if form == "transposed":
            value = value.T
        elif form == "norm" and family.gemma:
            value = value - np.float32(1)
        yield tensor, np.ascontiguousarray(value)


def _halves(
    rows: np.ndarray, path: str, model: Transformer, family: Family, format: Format
) -> np.ndarray:
    """Undoes the order of rows in which rotary pairs are neighbours."""
    if not (family.permuted and format == "gguf" and path.split("/")[-2] in ("q", "k")):
        return rows
    width = model.attentions()[0].width(model.dim)
    pairs = rows.reshape(-1, width // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
