"""LinMU's block ``MMATE``: against its teacher, who sees whom, and what all mixers promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse_attention import Bidirectional
from tests.models.mmate import (
    ATTENTION,
    BLOCK,
    DIM,
    GRID,
    HEADS,
    KV_HEADS,
    ONE,
    WINDOW,
    initialised,
    mixed,
    rows,
    run,
    scan_order,
    started,
)
from tokenlab import config
from tokenlab.models import (
    Grid,
    LowRank,
    RMSNorm,
    Window,
    grid,
    linmu,
    llama,
    local_windows,
    with_teacher,
)
from tokenlab.models.grid import AXES


@pytest.fixture(scope="module")
def params():
    return initialised(BLOCK, **ONE)


def test_one_window_alone_is_the_teachers_attention_without_its_mask():
    """α = 0 and β = 1 on vision alone, at initialisation."""
    grid = Grid(frames=2, height=3, width=4)
    arrays = rows([24], 24, [24])
    teacher = llama(
        vocab_size=7, dim=DIM, num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, hidden_dim=8
    )
    student = linmu(teacher, grid=grid, window=Window(frames=4, height=8, width=8))
    tokens = {"positions": arrays["positions"], "segments": arrays["segments"]}
    ids = jnp.zeros((1, 24), int)
    theirs = initialised(teacher, tokens=ids, **tokens)
    ours = with_teacher(initialised(student, seed=1, tokens=ids, **tokens), theirs)
    weights = {"kernel": jnp.zeros((DIM, 2)), "bias": jnp.asarray([-100.0, 100.0])}
    mine = ours["block_0"]["mixer"] | {"combine": weights}
    found = mixed(mine, arrays, student.block.mixer)
    unmasked = teacher.block.mixer.clone(rule=Bidirectional())
    expected, _ = run(unmasked, theirs["block_0"]["mixer"], arrays["x"], **tokens)
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_a_student_has_all_that_its_teacher_has():
    teacher = llama(
        vocab_size=11, dim=DIM, num_layers=7, num_heads=HEADS, num_kv_heads=KV_HEADS, hidden_dim=8
    )
    student = linmu(teacher, grid=GRID, window=WINDOW, adapter=LowRank(rank=2))
    assert config.load(config.dump(student)) == student
    mixers = [block.mixer for block in student.block.kinds()]
    assert [mixer.shifted for mixer in mixers] == [False, True] * 3
    assert [mixer.fastest for mixer in mixers] == [*AXES] * 2
    tokens = jnp.zeros((1, 8), int)
    theirs, ours = (
        initialised(model, seed=seed, tokens=tokens, positions=tokens, segments=tokens + 1)
        for seed, model in enumerate((teacher, student))
    )
    taken = with_teacher(ours, theirs)
    for i in range(7):
        layer, wanted, mine = taken[f"block_{i}"], theirs[f"block_{i}"], ours[f"block_{i}"]
        for name in ("q", "k", "v", "out"):
            for branch in (layer["mixer"]["flex"], layer["mixer"]["local"]["softmax"]):
                np.testing.assert_array_equal(
                    branch[name]["kernel"], wanted["mixer"][name]["kernel"]
                )
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(
                layer["feedforward"][name]["kernel"], wanted["feedforward"][name]["kernel"]
            )
        jax.tree.map(
            np.testing.assert_array_equal, layer["mixer"]["combine"], mine["mixer"]["combine"]
        )
    np.testing.assert_array_equal(taken["embedding"], theirs["embedding"])
    leaves = jax.tree.leaves((taken, theirs))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_at_the_start_both_branches_weigh_one_half_and_adapters_change_nothing():
    teacher = llama(
        vocab_size=11, dim=DIM, num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, hidden_dim=8
    )
    student = linmu(teacher, grid=GRID, window=WINDOW, adapter=LowRank())
    layer = started(student)["block_0"]
    module, both = student.block.mixer, layer["mixer"]
    arrays = {name: array[:, :30] for name, array in ONE.items()}
    flex, local = (
        mixed({name: both[name]}, arrays, module.clone(branches=name)) for name in ("flex", "local")
    )
    np.testing.assert_allclose(mixed(both, arrays, module), 0.5 * (flex + local), atol=1e-6)
    np.testing.assert_array_equal(local[:, :2], 0)
    plain = {n: {"kernel": layer["feedforward"][n]["kernel"]} for n in ("gate", "up", "down")}
    np.testing.assert_array_equal(
        student.block.feedforward.apply({"params": layer["feedforward"]}, arrays["x"]),
        teacher.block.feedforward.apply({"params": plain}, arrays["x"]),
    )


# ---- who sees whom


def influence(params, arrays, module=BLOCK):
    """``[T, T]``: whether the output of a row's token changes with another token."""

    def out(x):
        return run(module, params, **arrays | {"x": x})[0][0].sum(axis=-1)

    slopes = jax.jit(jax.jacobian(out))(arrays["x"])
    return np.asarray(jnp.any(slopes[:, 0] != 0, axis=-1))


def test_what_is_generated_is_causal_and_the_prompt_is_read_both_ways(params):
    seen = influence(params, ONE)
    assert seen[:27, :27].all() and not seen[:27, 27:].any()
    np.testing.assert_array_equal(seen[27:30, :30], np.tril(np.ones((30, 30)))[27:])
    assert not seen[30:].any() and not seen[:, 30:].any()


def test_without_a_prompt_all_of_it_is_causal(params):
    seen = influence(params, ONE | {"prompt": None})
    np.testing.assert_array_equal(seen[:30, :30], np.tril(np.ones((30, 30))))


def test_documents_of_a_row_are_apart(params):
    """The second has no room for a span in its prompt, the third has one."""
    together = rows([27, 9, 28], 70, [26, 5, 27])
    found = mixed(params, together)
    at = 0
    for length, given in ((27, 26), (9, 5), (28, 27)):
        alone = rows([length], 40, [given])
        alone["x"] = jnp.pad(together["x"][:, at : at + length], ((0, 0), (0, 40 - length), (0, 0)))
        np.testing.assert_allclose(
            mixed(params, alone)[:, :length], found[:, at : at + length], atol=1e-5
        )
        at += length


def test_the_order_of_a_scan_and_its_inverse_are_the_identity():
    x = jax.random.normal(jax.random.key(0), (1, 34, 3))
    where = {"positions": ONE["positions"]}
    vision = GRID.spans(ONE["prompt"], segments=ONE["segments"], **where)
    np.testing.assert_array_equal(np.flatnonzero(vision[0]), np.arange(GRID.start, GRID.end))
    for fastest in AXES:
        order = GRID.order(fastest)
        there = GRID.permuted(x, order, vision=vision, **where)
        np.testing.assert_array_equal(there[0, :30], x[0, scan_order(GRID, fastest, 30)])
        back = GRID.permuted(there, np.argsort(order), vision=vision, **where)
        np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [WINDOW, Window(frames=2, height=2, width=3), Window()])
def test_every_patch_is_in_one_window(window, shifted):
    patches = GRID.windows(window, shifted=shifted)
    assert sorted(patches[patches >= 0]) == list(range(GRID.size))
    for box in patches:
        places = np.stack(np.unravel_index(box[box >= 0], GRID.shape))
        assert (np.ptp(places, axis=1) < window.shape).all()


def test_the_state_space_starts_within_ten_times_the_attention_it_replaces():
    teacher = llama(
        vocab_size=11, dim=64, num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, hidden_dim=8
    )
    grid = Grid(height=8, width=8)
    student = linmu(teacher, grid=grid, window=Window(frames=1, height=4, width=4))
    x = jax.random.normal(jax.random.key(1), (4, 64, 64))
    positions = jnp.broadcast_to(jnp.arange(64)[None], (4, 64))
    where = {"positions": positions, "segments": jnp.ones_like(positions)}
    theirs = started(teacher)
    mine = with_teacher(started(student), theirs)["block_0"]["mixer"]["flex"]
    block = student.block.mixer.clone(branches="flex")
    flex, _ = run(block, {"flex": mine}, x, **where, prompt=positions < 64)
    attention, _ = run(teacher.block.mixer, theirs["block_0"]["mixer"], x, **where)
    # Means over many values are small; normalised heads are not.
    loudness = float(jnp.sqrt(jnp.mean(flex**2) / jnp.mean(attention**2)))
    assert 1 < loudness < 10


# ---- what all mixers promise


def test_bfloat16_stays_near_float32(params):
    low = ONE | {"x": ONE["x"].astype(jnp.bfloat16)}
    out, _ = run(BLOCK, params, **low)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(out, np.float32),
        mixed(params, ONE),
        atol=0.05 * np.abs(mixed(params, ONE)).max(),
    )


def test_gradients_are_finite_where_nothing_is_valid(params):
    nothing = ONE | {"segments": jnp.zeros((1, 34), jnp.int32)}

    def loss(params):
        return jnp.sum(run(BLOCK, params, **nothing)[0] ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("shifted", [False, True])
def test_gradients_by_gathers_are_those_by_scatters(monkeypatch, params, shifted):
    """Three documents, two with a span, text before and behind them, and padding."""
    arrays, block = rows([27, 9, 28], 70, [26, 5, 27]), BLOCK.clone(shifted=shifted)
    weight = jax.random.normal(jax.random.key(4), arrays["x"].shape)

    def gradients():
        def loss(params, x):
            return jnp.sum(run(block, params, **arrays | {"x": x})[0] * weight)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, arrays["x"])

    ours = gradients()
    for module in (grid, local_windows):
        monkeypatch.setattr(module, "exchanged", module.exchanged.__wrapped__)
    for one, other in zip(*map(jax.tree.leaves, (ours, gradients())), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


def test_query_and_key_norms_of_the_teacher_are_taken():
    module = BLOCK.clone(attention=ATTENTION.clone(qk_norm=RMSNorm()))
    params = initialised(module, **ONE)
    assert params["flex"]["q_norm"]["scale"].shape == (DIM // HEADS,)
    assert np.isfinite(mixed(params, ONE, module)).all()
