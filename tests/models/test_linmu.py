"""LinMU's block: against its definition, its teacher, and itself token by token."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from kernels_pallas.block_sparse_attention import Bidirectional
from tokenlab import config
from tokenlab.cache import FullCache, Recurrent
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.models import (
    MMATE,
    Attention,
    FlexMA,
    Grid,
    LowRank,
    RMSNorm,
    Window,
    linmu,
    llama,
    with_teacher,
)
from tokenlab.models.grid import AXES

HEADS, KV_HEADS, DIM = 4, 2, 16
ATTENTION = Attention(num_heads=HEADS, num_kv_heads=KV_HEADS, qkv_bias=True)
GRID = Grid(frames=2, height=3, width=4, start=2)
WINDOW = Window(frames=1, height=2, width=2)
BLOCK = MMATE(attention=ATTENTION, grid=GRID, window=WINDOW, chunk=8, fastest="row", shifted=True)


def rows(lengths, width, prompts, seed=0, dtype=jnp.float32):
    """One row of documents of ``lengths``, of which the first ``prompts`` tokens are given."""
    positions, segments, prompt = np.zeros((1, width), int), np.zeros((1, width), int), []
    at = 0
    for number, (length, given) in enumerate(zip(lengths, prompts, strict=True), start=1):
        positions[0, at : at + length] = np.arange(length)
        segments[0, at : at + length] = number
        prompt += [i < given for i in range(length)]
        at += length
    prompt = np.asarray([prompt + [False] * (width - at)])
    x = np.random.default_rng(seed).normal(size=(1, width, DIM))
    return {
        "x": jnp.asarray(x, dtype),
        "positions": jnp.asarray(positions, jnp.int32),
        "segments": jnp.asarray(segments, jnp.int32),
        "prompt": jnp.asarray(prompt),
    }


def initialised(module, seed=0, **arrays):
    """Parameters larger than at the start of training, so that no term hides behind another."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), **arrays))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes),
    )


def started(model):
    """Parameters as at the start of training."""
    ids = jnp.zeros((1, 8), int)
    init = jax.jit(functools.partial(model.init, positions=ids, segments=ids + 1))
    return nn.meta.unbox(init(jax.random.key(0), ids)["params"])


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x, positions, segments, prompt=None, cache=None):
    return module.apply(
        {"params": params},
        x, positions=positions, segments=segments, prompt=prompt, cache=cache,
    )  # fmt: skip


ONE = rows([30], 34, [27])


@pytest.fixture(scope="module")
def params():
    return initialised(BLOCK, **ONE)


def mixed(params, arrays, module=BLOCK):
    return np.asarray(run(module, params, **arrays)[0])


# ---- against the definition


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def scanned_by_hand(params, x, prompt, order, heads=HEADS, kv_heads=KV_HEADS):
    """FlexMA of one document, in float64, one token of one head at a time."""

    def project(name):
        return x @ params[name]["kernel"] + params[name].get("bias", 0)

    width, groups = DIM // heads, heads // kv_heads
    q = project("q").reshape(len(x), heads, width)
    k, v = (np.repeat(project(n).reshape(len(x), kv_heads, width), groups, axis=1) for n in "kv")
    decay = np.exp(-np.log1p(np.exp(project("decay"))) * np.exp(params["log_rate"]))
    gate = np.where(prompt[:, None], sigmoid(project("gate")), 1.0)
    y = np.zeros((len(x), heads, width))
    for h in range(heads):
        state = np.zeros((width, width))
        for i in order:
            state = decay[i, h] * state + np.outer(k[i, h], v[i, h])
            y[i, h] += gate[i, h] * (state.T @ q[i, h])
        state = np.zeros((width, width))
        for i in order[::-1]:
            if prompt[i]:
                state = decay[i, h] * state + np.outer(k[i, h], v[i, h])
                y[i, h] += (1 - gate[i, h]) * (state.T @ q[i, h])
    y /= np.sqrt((y**2).mean(axis=-1, keepdims=True) + 1e-5)
    return (y * params["norm"]["scale"]).reshape(len(x), DIM) @ params["out"]["kernel"]


def windows_by_hand(params, x, grid, window, shifted):
    """Softmax attention of one document's patches among all others of their box."""

    def project(name):
        return x @ params[name]["kernel"] + params[name].get("bias", 0)

    def turned(z, position):
        half = len(z) // 2
        angle = position * 10_000.0 ** (-np.arange(half) / half)
        first, second = z[:half], z[half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle),
             second * np.cos(angle) + first * np.sin(angle)]
        )  # fmt: skip

    width, groups = DIM // HEADS, HEADS // KV_HEADS
    q, k, v = (project(name).reshape(len(x), -1, width) for name in "qkv")
    places = list(np.ndindex(grid.shape))

    def box(place):
        shift = [
            w // 2 if shifted and w < n else 0
            for w, n in zip(window.shape, grid.shape, strict=True)
        ]
        return tuple((p + s) // w for p, s, w in zip(place, shift, window.shape, strict=True))

    out = np.zeros((len(x), HEADS, width))
    for a, place in enumerate(places):
        near = [grid.start + b for b, other in enumerate(places) if box(other) == box(place)]
        i = grid.start + a
        for h in range(HEADS):
            query = turned(q[i, h], i)
            scores = np.asarray([query @ turned(k[j, h // groups], j) for j in near])
            weights = np.exp((scores - scores.max()) / math.sqrt(width))
            out[i, h] = weights / weights.sum() @ v[near, h // groups]
    return out.reshape(len(x), DIM) @ params["out"]["kernel"]


def scan_order(grid, fastest, length):
    axes = {"column": (0, 1, 2), "row": (0, 2, 1), "frame": (1, 2, 0)}[fastest]
    sorted_places = sorted(np.ndindex(grid.shape), key=lambda place: [place[axis] for axis in axes])
    patches = [grid.start + int(np.ravel_multi_index(p, grid.shape)) for p in sorted_places]
    return [*range(grid.start), *patches, *range(grid.end, length)]


@pytest.mark.parametrize("fastest", AXES)
@pytest.mark.parametrize("shifted", [False, True])
def test_equals_its_definition_in_numpy(params, fastest, shifted):
    module = BLOCK.clone(fastest=fastest, shifted=shifted)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, prompt = np.asarray(ONE["x"][0, :30], np.float64), np.asarray(ONE["prompt"][0, :30])
    flex = scanned_by_hand(wide["flex"], x, prompt, scan_order(GRID, fastest, 30))
    local = windows_by_hand(wide["local"]["softmax"], x, GRID, WINDOW, shifted)
    weights = sigmoid(x @ wide["combine"]["kernel"] + wide["combine"]["bias"])
    found = mixed(params, ONE, module)[0]
    np.testing.assert_allclose(
        found[:30], weights[:, :1] * flex + weights[:, 1:] * local, atol=5e-5
    )
    np.testing.assert_array_equal(found[30:], 0)


def test_no_decay_without_a_norm_is_unnormalised_linear_attention():
    """And with all decayed, a token reads what it wrote itself."""
    module = FlexMA(attention=ATTENTION, grid=GRID, chunk=8, normalised=False)
    arrays = {"vision": jnp.zeros((1, 34), bool)} | ONE
    params = initialised(module, **arrays)

    @jax.jit
    def out(log_rate):
        changed = params | {"log_rate": jnp.full((HEADS,), log_rate)}
        return module.apply({"params": changed}, **arrays | {"prompt": None})[0][0, :30]

    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(ONE["x"][0, :30], np.float64)
    q, k, v = (x @ wide[n]["kernel"] + wide[n]["bias"] for n in "qkv")
    q, k, v = (each.reshape(30, -1, DIM // HEADS) for each in (q, k, v))
    k, v = (np.repeat(each, HEADS // KV_HEADS, axis=1) for each in (k, v))
    scores = np.einsum("ihe,jhe->hij", q, k)
    for log_rate, shown in ((-1e9, np.tril(np.ones((30, 30)))), (1e9, np.eye(30))):
        y = np.einsum("hij,jhe->ihe", scores * shown, v).reshape(30, DIM)
        np.testing.assert_allclose(out(log_rate), y @ wide["out"]["kernel"], rtol=1e-4, atol=1e-4)


# ---- against its teacher


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


# ---- token by token


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


# ---- costs


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


def test_query_and_key_norms_of_the_teacher_are_taken():
    module = BLOCK.clone(attention=ATTENTION.clone(qk_norm=RMSNorm()))
    params = initialised(module, **ONE)
    assert params["flex"]["q_norm"]["scale"].shape == (DIM // HEADS,)
    assert np.isfinite(mixed(params, ONE, module)).all()
