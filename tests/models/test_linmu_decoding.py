"""LinMU's block token by token, and what it costs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.mmate import (
    ATTENTION,
    DIM,
    GRID,
    HEADS,
    KV_HEADS,
    WINDOW,
    initialised,
    rows,
)
from tokenlab.cache import FullCache, Recurrent
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.models import (
    MMATE,
    Grid,
    Window,
    linmu,
    llama,
)

MODEL = linmu(
    llama(
        vocab_size=19, dim=DIM, num_layers=3, num_heads=HEADS, num_kv_heads=KV_HEADS, hidden_dim=8
    ),
    grid=GRID, window=WINDOW, chunk=8,
)  # fmt: skip


@functools.cache
def model_params():
    ids = jnp.zeros((1, 8), int)
    return initialised(MODEL, tokens=ids, positions=ids, segments=ids + 1)


def test_prefill_and_steps_equal_one_pass():
    """Two rows whose prompts differ in length, padded, and one matrix per head and layer."""
    params, rng = model_params(), np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 19, (2, 36)))
    prompts = np.asarray([30, 27])
    positions = jnp.broadcast_to(jnp.arange(36)[None], (2, 36))
    prompt = positions < prompts[:, None]

    @jax.jit
    def forward(ids, positions, segments, cache=None, **rest):
        return MODEL.apply(
            {"params": params}, ids, positions=positions, segments=segments, cache=cache, **rest
        )

    whole = forward(ids, positions, jnp.ones_like(ids), prompt=prompt).hidden
    cache = MODEL.empty_cache(Recurrent(), batch=2, capacity=64)
    shapes = {leaf.shape for state in cache.states for leaf in jax.tree.leaves(state)}
    assert shapes == {(2, HEADS, DIM // HEADS, DIM // HEADS)} and len(cache.states) == 3
    first = forward(ids[:, :30], positions[:, :30], prompt[:, :30].astype(jnp.int32), cache)
    for row, length in enumerate(prompts):
        np.testing.assert_allclose(first.hidden[row, :length], whole[row, :length], atol=2e-5)
    cache = first.cache
    for step in range(6):
        at = jnp.asarray(prompts + step)[:, None]
        token = jnp.take_along_axis(ids, at, axis=1)
        out = forward(token, at, jnp.ones_like(at), cache)
        wanted = jnp.take_along_axis(whole, at[..., None], axis=1)
        np.testing.assert_allclose(out.hidden, wanted, atol=5e-5)
        cache = out.cache
    assert jax.tree.map(jnp.shape, cache.states) == jax.tree.map(jnp.shape, first.cache.states)


def test_the_decoder_writes_what_a_pass_over_the_whole_row_calls_likeliest():
    view = View(model=MODEL, params=model_params())
    prompts = [np.random.default_rng(i).integers(3, 19, n).tolist() for i, n in ((0, 27), (1, 29))]
    decoder = Autoregressive(max_new_tokens=4, sampler=Greedy(), cache=Recurrent(), slots=1)
    written = decoder(view, prompts, key=jax.random.key(0))

    @jax.jit
    def likeliest(ids, length):
        positions = jnp.arange(ids.shape[1])[None]
        prompt, segments = positions < length, (positions < length + 4).astype(jnp.int32)
        out = view(ids, positions=positions, segments=segments, prompt=prompt)
        return jnp.argmax(view(out.hidden, method="logits"), axis=-1)

    for prompt, tokens in zip(prompts, written.tokens, strict=True):
        length = len(prompt)
        ids = np.pad([*prompt, *tokens], (0, 36 - length - 4))[None]
        found = likeliest(ids, length)[0, length - 1 : length + 3]
        np.testing.assert_array_equal(found, tokens)
    # 4 heads of 4 x 4 are as many numbers as 4 entries of 2 keys and 2 values of width 4.
    assert written.ledger.cache_entries == 2 * 3 * 4
    assert written.ledger.cache_bytes == 2 * 3 * HEADS * (DIM // HEADS) ** 2 * 4


LENGTHS = jnp.asarray([3])


def test_decoding_that_would_be_another_model_is_refused():
    view = View(model=MODEL, params=model_params())

    def decode(**options):
        decoder = Autoregressive(max_new_tokens=2, **options)
        decoder(view, [[3] * 12], key=jax.random.key(0))

    with pytest.raises(UserError, match="cache=Recurrent"):
        decode(cache=FullCache())
    with pytest.raises(UserError, match="prefill_chunk=None"):
        decode(cache=Recurrent(), prefill_chunk=4)
    with pytest.raises(UserError, match="drafts"):
        Recurrent().truncate(MODEL.empty_cache(Recurrent(), batch=1, capacity=9).states[0], LENGTHS)


def products(jaxpr):
    """Floating-point operations of the matrix products of a program, loops included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(left[axis] for axis in contract)
            )
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += equation.params.get("length", 1) * products(inner)
    return total


def test_work_doubles_exactly_with_the_number_of_patches():
    """And that of the teacher's attention more than doubles."""

    def work(frames, module):
        arrays = rows([frames * 16], frames * 16, [frames * 16])
        params = initialised(module, **arrays)
        traced = jax.make_jaxpr(lambda x: module.apply({"params": params}, **arrays | {"x": x}))
        return products(traced(arrays["x"]).jaxpr)

    def block(frames, **rest):
        grid = Grid(frames=frames, height=4, width=4)
        return MMATE(
            attention=ATTENTION.clone(impl="ref"), grid=grid, chunk=16,
            window=Window(frames=2, height=2, width=2), **rest,
        )  # fmt: skip

    for rest in ({}, {"fastest": "frame"}, {"branches": "flex"}, {"branches": "local"}):
        counts = [work(frames, block(frames, **rest)) for frames in (2, 4, 8)]
        assert counts[1] == 2 * counts[0] and counts[2] == 2 * counts[1], rest
    full = [work(frames, ATTENTION.clone(impl="ref")) for frames in (4, 8)]
    assert full[1] > 2.5 * full[0]


def test_the_ledger_counts_the_products_that_are_computed():
    grid = Grid(frames=2, height=4, width=4)
    module = MMATE(
        attention=ATTENTION.clone(impl="ref"), grid=grid, chunk=16,
        window=Window(frames=1, height=2, width=2),
    )  # fmt: skip
    arrays = rows([32], 32, [32])
    params = initialised(module, **arrays)
    traced = jax.make_jaxpr(lambda x: module.apply({"params": params}, **arrays | {"x": x}))
    where = {name: arrays[name] for name in ("positions", "segments")}
    everywhere = jnp.ones((1, 1, 32), bool)
    pairs = module.pairs(active=everywhere, read=everywhere, **where)
    assert float(pairs) == 32 * 4
    counted = 32 * module.flops(DIM) + float(pairs) * module.flops_per_pair(DIM)
    assert products(traced(arrays["x"]).jaxpr) == counted
