"""Gather and scatter-add by the real TPU compilers."""

import re

import jax
import jax.numpy as jnp
import pytest
from generations import every_generation

from kernels_pallas.common import aot
from kernels_pallas.token_routing import gather_tokens, scatter_add_tokens
from kernels_pallas.token_routing.specs import SHAPES

# The two widths of the named shapes, and both shares of tokens.
NAMED = {
    "float32": ("wide-2-of-3", "recursion-3-of-3"),
    "bfloat16": ("wide-1-of-3", "recursion-2-of-3"),
}
KERNELS = [
    "gather_tokens",
    "gather_tokens_backward",
    "scatter_add_tokens",
    "scatter_add_tokens_backward",
]


def _step(x, gate, index, count):
    """A step of a recursion over routed tokens, as it trains."""

    def loss(x, gate):
        x = 1.5 * x
        rows = gather_tokens(x=x, index=index, count=count)
        rows = jnp.tanh(rows)
        out = scatter_add_tokens(residual=x, y=rows, gate=gate, index=index, count=count)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return jax.value_and_grad(loss, (0, 1))(x, gate)


def _arguments(shape, dtype):
    return (
        jax.ShapeDtypeStruct((shape.batch, shape.length, shape.width), dtype),
        jax.ShapeDtypeStruct((shape.batch, shape.slots), jnp.float32),
        jax.ShapeDtypeStruct((shape.batch, shape.slots), jnp.int32),
        jax.ShapeDtypeStruct((shape.batch,), jnp.int32),
    )


@every_generation("float32", "bfloat16")
def test_it_compiles_for_every_generation(topology, dtype):
    for name in NAMED[dtype]:
        shape = SHAPES[name]
        compiled = aot.compile_tpu(_step, *_arguments(shape, dtype), topology=aot.TPUS[topology])
        text = compiled.as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == len(KERNELS)
        assert sorted(set(re.findall(r"(\w+)\)*/pallas_call", text))) == KERNELS
        # No one-hot: nothing has a token axis and a slot axis. (One width is that of the length.)
        if shape.width == shape.length:
            continue
        for dims in re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", text):
            assert not {str(shape.length), str(shape.slots)} <= set(dims.split(",")), dims


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_copied_where_the_residual_ends(dtype):
    shape = SHAPES["wide-2-of-3"]
    x, gate, index, count = _arguments(shape, dtype)
    y = jax.ShapeDtypeStruct((shape.batch, shape.slots, shape.width), dtype)

    def add(x, y, gate, index, count):
        out = scatter_add_tokens(residual=1.5 * x, y=y, gate=gate, index=index, count=count)
        return 0.5 * gather_tokens(x=out, index=index, count=count)

    text = aot.compile_tpu(add, x, y, gate, index, count).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    tokens = rf"\[{shape.batch},{shape.length},{shape.width}\]"
    assert re.search(rf"= \S+{tokens}\S* custom-call\(", text)
    assert not re.search(rf"= \S*{tokens}\S* copy\(", text)


def test_a_residual_that_is_needed_later_is_copied():
    """So the test above could fail."""
    shape = SHAPES["wide-2-of-3"]
    x, gate, index, count = _arguments(shape, "float32")

    def add(x, gate, index, count):
        y = gather_tokens(x=x, index=index, count=count)
        return x, scatter_add_tokens(residual=x, y=y, gate=gate, index=index, count=count)

    text = aot.compile_tpu(add, x, gate, index, count).as_text()
    tokens = rf"\[{shape.batch},{shape.length},{shape.width}\]"
    assert re.search(rf"= \S*{tokens}\S* copy\(", text)


def test_an_odd_length_of_bfloat16_takes_the_other_form():
    x = jax.ShapeDtypeStruct((2, 33, 128), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    count = jax.ShapeDtypeStruct((2,), jnp.int32)

    def gather(x, index, count):
        return gather_tokens(x=x, index=index, count=count)

    assert "tpu_custom_call" not in aot.compile_tpu(gather, x, index, count).as_text()
