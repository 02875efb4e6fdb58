"""Every public sequence-parallel attention against one device, and what all of them promise."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenlab.attention
from kernels_pallas.block_sparse_attention import NOTHING
from tokenlab import config
from tokenlab.attention import RingAttention, SequenceAttention, TokenRing, step_cost, zigzag
from tokenlab.attention.ring import merged

# Collective permutes of a forward pass on P devices.
TABLE = {RingAttention: lambda p: 2 * (p - 1), TokenRing: lambda p: 3 * (p - 1)}
every = pytest.mark.parametrize("member", TABLE)


def test_the_table_holds_every_public_member():
    assert {
        member
        for member in vars(tokenlab.attention).values()
        if inspect.isclass(member) and issubclass(member, SequenceAttention)
    } - {SequenceAttention} == set(TABLE)


SCRIPT = """
import functools, re
import jax, jax.numpy as jnp, numpy as np
from tokenlab.attention import RingAttention, TokenRing
from tokenlab.core.errors import UserError
from tokenlab.train.mesh import MeshShape, placed_on

P = jax.device_count()
B, T, H, K, E = 2, 4 * P, 4, 2, 8
keys = jax.random.split(jax.random.key(0), 5)
q, out_gradient = (jax.random.normal(key, (B, T, H, E)) for key in keys[:2])
k, v = (jax.random.normal(key, (B, T, K, E)) for key in keys[2:4])
by_lse, other = jax.random.normal(keys[4], (B, T, H)), q + 1
# A row of two documents with padding behind them, and a whole row.
second = T // 2 - 3
segments = np.ones((B, T), int)
segments[0, second:], segments[0, T - 5:] = 2, 0
positions = np.stack([np.r_[np.arange(second), np.arange(T - second)], np.arange(T)])
real = segments > 0
# What a query that sees nothing has as its log-sum-exp is a bound and no number.
by_lse = jnp.where(real[..., None], by_lse, 0.0)
tokens = {{"positions": jnp.asarray(positions), "segments": jnp.asarray(segments)}}

@functools.partial(jax.jit, static_argnums=0)
def both(part, q, k, v):
    run = functools.partial(part, **tokens, scale=0.4)
    out, pull_back = jax.vjp(lambda q, k, v: run(q=q, k=k, v=v), q, k, v)
    return out, pull_back((out_gradient.astype(out[0].dtype), by_lse))

def same(found, expected, tolerance):
    (out, lse), gradients = found
    (wanted, wanted_lse), wanted_gradients = expected
    np.testing.assert_allclose(out, wanted, atol=tolerance)
    np.testing.assert_allclose(np.asarray(lse)[real], np.asarray(wanted_lse)[real], atol=tolerance)
    assert not np.any(np.asarray(out)[~real]) and np.all(np.asarray(lse)[~real] < -1e29)
    for a, b in zip(gradients, wanted_gradients):
        np.testing.assert_allclose(a, b, atol=3 * tolerance)

for causal, shape in {cases}:
    expected = both({name}(causal=causal, impl="ref"), q, k, v)
    with placed_on(MeshShape(**shape).build()):
        same(both({name}(causal=causal), q, k, v), expected, 1e-5)
        before = both._cache_size()
        both({name}(causal=causal), other, k, v)
        assert both._cache_size() == before
ring = {name}()
with placed_on(MeshShape(sequence=P, data=1).build()):
    forward = jax.jit(lambda q, k, v: ring(q=q, k=k, v=v, **tokens, scale=0.4))
    text = forward.lower(q, k, v).compile().as_text()
    permutes = re.findall(r"= (\\w+)\\[([\\d,]*)\\]\\S* collective-permute(?:-start)?\\(", text)
    print("permutes", len(permutes), *sorted({{shape for _, shape in permutes}}))
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out, lse = forward(*low)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    wide = [x.astype(jnp.float32) for x in low]
    np.testing.assert_allclose(np.asarray(out, np.float32), forward(*wide)[0], atol=0.03)
    exact = np.asarray(forward(*wide)[1])
    np.testing.assert_allclose(np.asarray(lse)[real], exact[real], atol=0.03)
    try:
        odd = {{name: x[:, : T - P] for name, x in tokens.items()}}
        ring(q=q[:, : T - P], k=k[:, : T - P], v=v[:, : T - P], **odd, scale=0.4)
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("member", "devices"),
    [
        (TokenRing, 4),
        pytest.param(RingAttention, 4, marks=pytest.mark.slow),
        pytest.param(RingAttention, 8, marks=pytest.mark.slow),
        pytest.param(TokenRing, 8, marks=pytest.mark.slow),
    ],
)
def test_equals_one_device_forward_and_backward(member, devices):
    """Results, log-sum-exps and gradients; alone on the sequence axis, and beside other axes."""
    alone = {"sequence": devices, "data": 1}
    cases = [(True, alone), (False, alone)]
    if devices == 8:
        cases = [(True, alone), (True, {"sequence": 2, "data": 2, "tensor": 2})]
    printed = run_on_devices(devices, SCRIPT.format(name=member.__name__, cases=cases))
    count, *sizes = re.search(r"permutes (.*)", printed)[1].split()
    assert int(count) == TABLE[member](devices)
    kv, heads = "2,4,2,8", "2,4,4,8"  # rows, tokens of a device, heads, width
    assert sizes == ([kv] if member is RingAttention else ["2,4,4", heads])
    assert f"pad them to a multiple of {2 * devices}" in printed


def inputs(rows=2, length=12):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (rows, length, heads, 8))
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    )
    positions = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
    return {"q": q, "k": k, "v": v, "positions": positions, "segments": jnp.ones_like(positions)}


@every
@pytest.mark.parametrize("causal", [True, False])
def test_one_device_is_plain_attention(member, causal):
    arrays = inputs()
    out, log_sum_exp = member(causal=causal)(**arrays, scale=0.4)
    q, k, v = (np.asarray(arrays[name], np.float64) for name in "qkv")
    scores = 0.4 * np.einsum("btkge,bske->bkgts", q.reshape(2, 12, 2, 2, 8), k)
    scores = np.where(np.tril(np.ones((12, 12), bool)) | (not causal), scores, -np.inf)
    total = np.exp(scores).sum(axis=-1)
    expected = np.einsum("bkgts,bske->btkge", np.exp(scores) / total[..., None], v)
    np.testing.assert_allclose(out, expected.reshape(out.shape), atol=1e-5)
    log_total = np.moveaxis(np.log(total), -1, 1).reshape(log_sum_exp.shape)
    np.testing.assert_allclose(log_sum_exp, log_total, atol=1e-5)


@every
def test_fully_masked_is_zero_and_finite(member):
    arrays = inputs() | {"segments": jnp.zeros((2, 12), int)}

    def of(q):
        out, _ = member()(**(arrays | {"q": q}), scale=0.4)
        return out

    out, pull_back = jax.vjp(of, arrays["q"])
    assert not np.any(out) and not np.any(pull_back(jnp.ones_like(out))[0])


@every
def test_the_object_is_its_own_config(member):
    part = member(causal=False)
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)
    doc = inspect.getdoc(member)
    assert "Reference: " in doc and "arXiv:" in doc and "Differences from the paper" in doc


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_merging_is_in_any_order_and_nothing_is_its_identity(seed):
    rng = np.random.default_rng(seed)
    parts = [
        (jnp.asarray(rng.normal(size=(1, 3, 2, 4)), jnp.float32),
         jnp.asarray(5 * rng.normal(size=(1, 3, 2)), jnp.float32))
        for _ in range(5)
    ]  # fmt: skip

    def all_of(parts):
        whole = parts[0]
        for part in parts[1:]:
            whole = merged(whole, part)
        return whole

    expected = all_of(parts)
    shuffled = all_of([parts[i] for i in rng.permutation(5)])
    tree = merged(merged(parts[0], parts[1]), merged(parts[2], merged(parts[3], parts[4])))
    nothing = (jnp.zeros_like(parts[0][0]), jnp.full_like(parts[0][1], NOTHING))
    for other in (shuffled, tree, merged(nothing, expected), merged(expected, nothing)):
        for a, b in zip(other, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_zigzag_balances_the_causal_pairs():
    """T=32 on 4 devices: contiguous parts have 36, 100, 164 and 228 pairs."""

    def pairs(order):
        return [int(sum(part + 1)) for part in np.split(order, 4)]

    assert pairs(np.arange(32)) == [36, 100, 164, 228]
    assert pairs(zigzag(32, 4)) == [132, 132, 132, 132]


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_two_products_of_a_step_see_what_is_causal_and_nothing_else(devices):
    """Counts of every pair of tokens over all steps, from the schedule alone."""
    length = 4 * devices
    parts = np.split(zigzag(length, devices), devices)
    seen = np.zeros((length, length), int)
    for device, own in enumerate(parts):
        seen[np.ix_(own, own)] += own[:, None] >= own[None]
        for step in range(1, devices):
            owner = (device + step) % devices
            (q_low, q_high), (k_low, k_high) = (np.split(parts[i], 2) for i in (owner, device))
            seen[np.ix_(q_high, k_low)] += 1
            pair = (q_low, k_low) if owner > device else (q_high, k_high)
            seen[np.ix_(*pair)] += 1
    np.testing.assert_array_equal(seen, np.tril(np.ones((length, length), int)))


def test_bytes_of_a_step_are_those_of_the_formulas():
    n, h, e = 128, 8, 64
    ring = step_cost(RingAttention(), tokens=n, heads=h, kv_heads=h, width=e, flops=1, bandwidth=1)
    ours = step_cost(TokenRing(), tokens=n, heads=h, kv_heads=h, width=e, flops=1, bandwidth=1)
    assert (ring.forward_bytes, ring.backward_bytes) == (2 * 2 * n * h * e, 0)
    assert (ours.forward_bytes, ours.backward_bytes) == (2 * n * h * e, 2 * n * h * (e + 2))
    assert ours.warning == "" and ring.compute_seconds == 2 * n**2 * h * e


def test_the_report_warns_where_heads_share_keys():
    """Queries and results are smaller only where ``2 Hkv > H (1 + 1/Dh)``, floats of one size."""
    for heads, kv_heads, width in [(8, 8, 64), (8, 4, 64), (9, 3, 64), (6, 4, 16), (8, 5, 4)]:
        cost = step_cost(
            TokenRing(), tokens=1, heads=heads, kv_heads=kv_heads, width=width, flops=1,
            bandwidth=1, itemsize=4,
        )  # fmt: skip
        assert (cost.warning == "") == (2 * kv_heads >= heads * (1 + 1 / width))
    assert (
        "9 query heads share 3 key heads"
        in step_cost(
            TokenRing(), tokens=1, heads=9, kv_heads=3, width=64, flops=1, bandwidth=1
        ).warning
    )
