"""Every schedule in closed form, and the optimiser against a NumPy transcription."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tokenlab import config
from tokenlab.core.duration import Clock, Fraction, Tokens
from tokenlab.core.errors import UserError
from tokenlab.depth import Sequential
from tokenlab.models import llama
from tokenlab.train import optimizer
from tokenlab.train.optimizer import (
    SGD,
    AdamW,
    Constant,
    Cosine,
    Group,
    Muon,
    Optimizer,
    PowerDecay,
    Schedule,
    WarmupStableDecay,
    decayed,
)

TOTAL, PEAK = 100, 0.4
CLOCK = Clock(tokens_per_step=10, tokens_per_epoch=lambda: 250, total_steps=TOTAL)


def rise(step, warmup):
    return PEAK if step >= warmup else PEAK * step / warmup


def half_cosine(step, warmup, floor):
    if step < warmup:
        return rise(step, warmup)
    done = min(1.0, (step - warmup) / (TOTAL - warmup))
    return PEAK * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)


def plateau(step, warmup, decay, floor):
    left = max(0, TOTAL - step)
    if step < warmup or left >= decay:
        return rise(step, warmup)
    return PEAK * (floor + (1 - floor) * left / decay)


class Case(NamedTuple):
    """A schedule and its value at a step."""

    schedule: Schedule
    closed_form: Callable[[int], float]


TABLE = {
    Constant: (
        Case(Constant(peak=PEAK), lambda step: PEAK),
        Case(Constant(peak=PEAK, warmup=20), lambda step: rise(step, 20)),
    ),
    Cosine: (
        Case(Cosine(peak=PEAK), lambda step: half_cosine(step, 2, 0.1)),
        Case(Cosine(peak=PEAK, warmup=0), lambda step: half_cosine(step, 0, 0.1)),
        Case(
            Cosine(peak=PEAK, warmup=Tokens(count=200), floor=0.0),
            lambda step: half_cosine(step, 20, 0.0),
        ),
    ),
    PowerDecay: (
        Case(PowerDecay(peak=PEAK), lambda step: PEAK / (step + 1)),
        Case(PowerDecay(peak=PEAK, exponent=0.5), lambda step: PEAK / math.sqrt(step + 1)),
    ),
    WarmupStableDecay: (
        Case(WarmupStableDecay(peak=PEAK), lambda step: plateau(step, 2, 20, 0.0)),
        Case(WarmupStableDecay(peak=PEAK, warmup=0), lambda step: plateau(step, 0, 20, 0.0)),
        Case(WarmupStableDecay(peak=PEAK, decay=0), lambda step: plateau(step, 2, 0, 0.0)),
        Case(
            WarmupStableDecay(peak=PEAK, warmup=10, decay=Fraction(of_run=0.5), floor=0.25),
            lambda step: plateau(step, 10, 50, 0.25),
        ),
    ),
}
OPTIMIZERS = {SGD, AdamW, Muon}
CASES = [case for cases in TABLE.values() for case in cases]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.schedule))


def public(family):
    return {
        member
        for member in vars(optimizer).values()
        if inspect.isclass(member) and issubclass(member, family) and not inspect.isabstract(member)
    }


def test_the_tables_hold_every_public_member():
    assert public(Schedule) == set(TABLE)
    assert public(Optimizer) == OPTIMIZERS


@every
def test_equals_the_closed_form_from_the_first_step_to_the_end(case):
    steps = np.arange(TOTAL + 1)
    found = jax.jit(jax.vmap(case.schedule.build(CLOCK)))(steps)
    expected = [case.closed_form(step) for step in steps.tolist()]
    np.testing.assert_allclose(np.broadcast_to(found, steps.shape), expected, rtol=2e-5, atol=1e-8)


@every
def test_the_object_is_its_own_config(case):
    optimizers = [
        member(learning_rate=case.schedule, trained=("block_*",)) for member in OPTIMIZERS
    ]
    for part in (case.schedule, *optimizers):
        loaded = config.load(config.dump(part))
        assert loaded == part and hash(loaded) == hash(part)


def test_methods_from_papers_name_them():
    for member in (WarmupStableDecay, *OPTIMIZERS):
        assert "Reference: " in inspect.getdoc(member) and "arXiv:" in inspect.getdoc(member)


# ---------------------------------------------------------------- AdamW


def adamw_by_hand(part, rates, params, gradients):
    """The published update over dicts of float64 arrays; names that end in * are spared."""
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for count, (rate, raw) in enumerate(zip(rates, gradients, strict=True), start=1):
        norm = math.sqrt(sum((g**2).sum() for g in raw.values()))
        clip = part.clip_norm
        factor = 1.0 if clip is None or norm < clip else clip / norm
        for name, gradient in raw.items():
            g = gradient * factor
            first[name] = part.b1 * first[name] + (1 - part.b1) * g
            second[name] = part.b2 * second[name] + (1 - part.b2) * g**2
            m = first[name] / (1 - part.b1**count)
            v = second[name] / (1 - part.b2**count)
            decay = 0.0 if name.endswith("*") else part.weight_decay
            update = m / (np.sqrt(v) + part.epsilon) + decay * params[name]
            params = params | {name: params[name] - rate * update}
    return params


def nested(flat):
    """The layout of a model: norms hold a ``scale``, some layers a ``bias``."""
    return {
        "block_0": {"mixer_norm": {"scale": flat["norm*"]}, "out": {"kernel": flat["kernel"]}},
        "head": {"bias": flat["bias*"]},
        "embedding": flat["embedding"],
    }


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_adamw_equals_the_published_update(clip):
    part = AdamW(
        learning_rate=Constant(peak=PEAK, warmup=4), b1=0.8, b2=0.9, epsilon=1e-3,
        weight_decay=0.3, clip_norm=clip,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"norm*": (3,), "kernel": (3, 4), "bias*": (4,), "embedding": (5, 3)}
    params, *gradients = (
        {name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(6)
    )
    transform = part.build(CLOCK)
    step = jax.jit(lambda g, s, p: transform.update(g, s, p))
    found = jax.tree.map(jnp.float32, nested(params))
    state = transform.init(found)
    for gradient in gradients:
        updates, state = step(jax.tree.map(jnp.float32, nested(gradient)), state, found)
        found = optax.apply_updates(found, updates)
    rates = [PEAK * count / 4 for count in range(4)] + [PEAK]
    expected = nested(adamw_by_hand(part, rates, params, gradients))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("scan", [False, True])
def test_weight_decay_spares_norms_and_reaches_every_matrix(scan):
    model = llama(
        vocab_size=11, dim=8, num_layers=3, num_heads=2, num_kv_heads=1, hidden_dim=8,
        depth=Sequential(scan=scan),
    )  # fmt: skip
    tokens = jnp.zeros((1, 4), int)
    params = nn.meta.unbox(
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
        )["params"]
    )
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params)
    part = AdamW(learning_rate=Constant(peak=PEAK), weight_decay=0.5)
    transform = part.build(CLOCK)
    nothing = jax.tree.map(np.zeros_like, params)
    # With no gradient the whole update is the decay.
    updates, _ = jax.jit(lambda g, p: transform.update(g, transform.init(p), p))(nothing, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        expected = 0.0 if "norm" in name else -PEAK * 0.5
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=name)
    spared = [not leaf for leaf in jax.tree.leaves(decayed(params))]
    assert sum(spared) == (3 if scan else 7)


def test_an_update_is_bounded_by_the_clipped_gradient():
    part = AdamW(learning_rate=Constant(peak=1.0), b1=0.0, weight_decay=0.0, epsilon=1.0, b2=0.0)
    transform = part.build(CLOCK)
    params = {"kernel": jnp.zeros(3)}
    gradient = {"kernel": jnp.asarray([300.0, 0.0, 400.0])}
    updates, _ = transform.update(gradient, transform.init(params), params)
    # Clipped to (0.6, 0, 0.8); with no memory the update is g / (|g| + 1).
    expected = [-0.6 / 1.6, 0.0, -0.8 / 1.8]
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


# ---------------------------------------------------------------- Muon


def orthogonalised(matrix):
    """Five Newton-Schulz steps of the published quintic, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon_by_hand(part, rates, matrix, gradients):
    """Nesterov momentum (bias-corrected, as Optax does), orthogonalised, scaled, decayed."""
    momentum, beta = np.zeros_like(matrix), part.momentum
    for count, (rate, gradient) in enumerate(zip(rates, gradients, strict=True), start=1):
        momentum = beta * momentum + (1 - beta) * gradient
        ahead = beta * momentum / (1 - beta ** (count + 1))
        ahead += (1 - beta) * gradient / (1 - beta**count)
        update = 0.2 * math.sqrt(max(matrix.shape)) * orthogonalised(ahead)
        matrix = matrix - rate * (update + part.weight_decay * matrix)
    return matrix


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_muon_equals_the_published_update_and_leaves_the_rest_to_adamw(shape):
    shared = {"learning_rate": Constant(peak=PEAK, warmup=4), "weight_decay": 0.3}
    part, adamw = (member(clip_norm=None, **shared) for member in (Muon, AdamW))
    rng = np.random.default_rng(0)

    def tree():
        """A stack of two matrices, a norm of the same two layers, and an embedding."""
        return {
            "block": {
                "out": {"kernel": rng.normal(size=(2, *shape))},
                "mixer_norm": {"scale": rng.normal(size=(2, 3))},
            },
            "embedding": rng.normal(size=(5, 3)),
        }

    params, *gradients = (tree() for _ in range(6))
    found = {}
    for one in (part, adamw):
        transform = one.build(CLOCK)
        step = jax.jit(transform.update)
        value = jax.tree.map(jnp.float32, params)
        state = transform.init(value)
        for gradient in gradients:
            updates, state = step(jax.tree.map(jnp.float32, gradient), state, value)
            value = optax.apply_updates(value, updates)
        found[type(one)] = value
    rates = [PEAK * count / 4 for count in range(4)] + [PEAK]
    for layer in range(2):
        kernels = [tree["block"]["out"]["kernel"][layer] for tree in (params, *gradients)]
        expected = muon_by_hand(part, rates, kernels[0], kernels[1:])
        kernel = found[Muon]["block"]["out"]["kernel"][layer]
        np.testing.assert_allclose(kernel, expected, rtol=1e-3, atol=1e-4)
    for value in found.values():
        del value["block"]["out"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[Muon], found[AdamW]
    )


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize("member", [AdamW, Muon])
def test_what_is_not_trained_stays_and_the_rest_moves_as_if_alone(member):
    rng = np.random.default_rng(0)

    def tree():
        return {
            name: {"kernel": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)}
            for name in ("block_0", "block_1", "head")
        }

    params, gradient = tree(), tree()
    part = member(learning_rate=Constant(peak=PEAK), trained=("block_*/kernel",))
    transform = part.build(CLOCK)
    state = transform.init(params)
    updates, _ = jax.jit(transform.update)(gradient, state, params)
    assert not np.any(updates["head"]["kernel"])
    blocks, pushed = ({k: v for k, v in t.items() if k != "head"} for t in (params, gradient))
    whole = member(learning_rate=Constant(peak=PEAK)).build(CLOCK)
    expected, _ = jax.jit(whole.update)(pushed, whole.init(blocks), blocks)
    for name, leaf in expected.items():
        np.testing.assert_allclose(updates[name]["kernel"], leaf["kernel"], rtol=1e-6)
    # Nothing is kept for what is frozen.
    kept = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert kept <= 2 * 2 * 16 + 8
    assert config.load(config.dump(part)) == part
    with pytest.raises(UserError, match=r"names no parameter by nothing/\*"):
        dataclasses.replace(part, trained=("*", "nothing/*")).build(CLOCK).init(params)


def test_a_group_moves_by_its_own_rule_and_the_rest_as_if_it_were_not_there():
    rng = np.random.default_rng(0)

    def tree():
        names = ("balance", "kernel", "fixed")
        return {name: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for name in names}

    params, gradient = tree(), tree()
    own = SGD(learning_rate=Constant(peak=1e-3), sign=True)
    part = AdamW(
        learning_rate=Constant(peak=PEAK),
        trained=("kernel",),
        groups=(Group(parameters=("bal*",), optimizer=own),),
    )
    transform = part.build(CLOCK)
    updates, _ = jax.jit(transform.update)(gradient, transform.init(params), params)
    expected = -1e-3 * np.sign(gradient["balance"])
    np.testing.assert_allclose(updates["balance"], expected, rtol=1e-6)
    assert not np.any(updates["fixed"])
    alone = AdamW(learning_rate=Constant(peak=PEAK)).build(CLOCK)
    one, pushed = {"kernel": params["kernel"]}, {"kernel": gradient["kernel"]}
    whole, _ = alone.update(pushed, alone.init(one), one)
    np.testing.assert_allclose(updates["kernel"], whole["kernel"], rtol=1e-6)
    assert config.load(config.dump(part)) == part
    with pytest.raises(UserError, match="names no parameter by nobody"):
        nobody = Group(parameters=("nobody",), optimizer=own)
        dataclasses.replace(part, groups=(nobody,)).build(CLOCK).init(params)


def test_gradient_descent_is_clipped_where_it_says_so():
    transform = SGD(learning_rate=Constant(peak=1.0), clip_norm=0.5).build(CLOCK)
    gradient = {"kernel": jnp.asarray([3.0, 0.0, 4.0])}
    updates, _ = transform.update(gradient, transform.init(gradient), gradient)
    np.testing.assert_allclose(updates["kernel"], [-0.3, 0.0, -0.4], rtol=1e-5)


@pytest.mark.parametrize("sign", [False, True])
def test_gradient_descent_is_the_gradient_or_its_sign(sign):
    transform = SGD(learning_rate=Constant(peak=PEAK), sign=sign).build(CLOCK)
    gradient = {"kernel": jnp.asarray([3.0, -0.5, 0.0])}
    updates, _ = transform.update(gradient, transform.init(gradient), gradient)
    step = np.sign(gradient["kernel"]) if sign else np.asarray(gradient["kernel"])
    np.testing.assert_allclose(updates["kernel"], -PEAK * step, rtol=1e-6)
