"""Published models compute what transformers computes, and go out as they came in."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import safetensors.numpy

from tokenlab import config
from tokenlab.cache import FullCache
from tokenlab.core.errors import UserError
from tokenlab.depth import Sequential
from tokenlab.interop import load_pretrained, save_pretrained
from tokenlab.interop.families import family_named, family_of
from tokenlab.models import BlockPattern, llama, unrolled

every = pytest.mark.parametrize("name", published.FAMILIES)


def logits_of(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    out = model.apply(
        {"params": params}, tokens, positions=positions, segments=jnp.ones_like(tokens)
    )
    return np.asarray(model.apply({"params": params}, out.hidden, method="logits"))


@every
def test_logits_are_those_of_transformers(name, tmp_path):
    model, params, _ = load_pretrained(published.folder(name, tmp_path / name))
    tokens, expected = published.expected(name)
    found = logits_of(model, params, tokens)
    assert np.abs(found - expected).max() < 1e-4
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


@every
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_row(name, tmp_path):
    model, params, _ = load_pretrained(published.folder(name, tmp_path / name))
    tokens, expected = published.expected(name)
    cache, found = model.empty_cache(FullCache(), batch=1, capacity=16), []

    @jax.jit
    def step(tokens, positions, cache):
        out = model.apply(
            {"params": params}, tokens, positions=positions, segments=jnp.ones_like(tokens),
            cache=cache,
        )  # fmt: skip
        return model.apply({"params": params}, out.hidden, method="logits"), out.cache

    for part in (slice(0, 6), *(slice(t, t + 1) for t in range(6, 14))):
        logits, cache = step(tokens[:, part], jnp.arange(14)[None, part], cache)
        found.append(np.asarray(logits))
    assert np.abs(np.concatenate(found, axis=1) - expected).max() < 1e-4


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_and_loading_keeps_every_bit(name, dtype, tmp_path):
    first = load_pretrained(published.folder(name, tmp_path / name), dtype=dtype)
    save_pretrained(tmp_path / "out", *first)
    again = load_pretrained(tmp_path / "out", dtype=dtype)
    assert again.model == first.model and again.tokenizer == first.tokenizer
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    dtypes = {leaf.ndim: str(leaf.dtype) for leaf in jax.tree.leaves(again.params)}
    assert dtypes == {1: "float32", 2: dtype}
    assert jax.tree.structure(again.params) == jax.tree.structure(first.params)


@every
def test_the_tensors_that_go_out_are_those_that_came_in(name, tmp_path):
    source = published.folder(name, tmp_path / name)
    save_pretrained(tmp_path / "out", *load_pretrained(source))
    before, after = (
        safetensors.numpy.load_file(folder / "model.safetensors")
        for folder in (source, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        # Beside 1, a float32 holds Gemma's scales to 2^-24.
        np.testing.assert_allclose(after[key], value.astype(np.float32), rtol=0, atol=2.0**-24)


@every
def test_a_configuration_survives_the_way_through_the_model(name):
    family = family_named(name)
    given = json.loads((published.FIXTURES / name / "config.json").read_text())
    model = family.model(given)
    assert family.model(family.config(model)) == model
    assert family_of(model) == family
    assert config.load(config.dump(model)) == model


def test_the_layers_of_gemma_take_turns(tmp_path):
    model = load_pretrained(published.folder("gemma3_text", tmp_path / "m")).model
    assert isinstance(model.block, BlockPattern) and len(model.block.blocks) == 3
    bases = [mixer.rope_base for mixer in model.attentions()]
    assert bases == [1e4, 1e4, 1e6, 1e4, 1e4]
    with pytest.raises(UserError, match="scan=True needs layers of one kind, not 3"):
        scanned = model.clone(depth=Sequential(scan=True))
        one = jnp.zeros((1, 4), int)
        jax.eval_shape(
            lambda: scanned.init(jax.random.key(0), one, positions=one, segments=one + 1)
        )


def test_the_ledger_counts_each_kind_of_layer(tmp_path):
    model, params, _ = load_pretrained(published.folder("gemma3_text", tmp_path / "m"))
    tokens, _ = published.expected("gemma3_text")
    where = {"positions": jnp.arange(14)[None], "segments": jnp.ones((1, 14), int)}
    trace = model.apply({"params": params}, tokens, **where).trace
    ledger = model.ledger(trace, **where)
    windowed, whole = sum(min(4, t + 1) for t in range(14)), 14 * 15 / 2
    assert float(ledger.attended_pairs) == 4 * windowed + whole
    assert float(ledger.block_tokens) == 5 * 14


def test_a_model_trained_here_goes_out_as_llama(tmp_path):
    model = llama(
        vocab_size=320, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=24,
        depth=Sequential(scan=True),
    )  # fmt: skip
    tokens = jnp.arange(8)[None]
    where = {"positions": tokens, "segments": jnp.ones_like(tokens)}
    params = model.init(jax.random.key(0), tokens, **where)["params"]
    save_pretrained(tmp_path / "out", model, params, published.tokenizer())
    found = load_pretrained(tmp_path / "out")
    plain = unrolled(model, jax.tree.map(jnp.asarray, params))
    assert found.tokenizer == published.tokenizer()
    np.testing.assert_allclose(
        logits_of(found.model, found.params, tokens), logits_of(*plain, tokens), atol=1e-5
    )


def test_a_sharded_checkpoint_is_read_whole(tmp_path):
    source = published.folder("qwen3", tmp_path / "m")
    whole = load_pretrained(source).params
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[number::2]}
        safetensors.numpy.save_file(part, source / file)
        weight_map |= dict.fromkeys(part, file)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(source).params, whole)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors is missing; fetch"):
        load_pretrained(source)


def edited(change):
    """Changes the configuration."""

    def apply(folder):
        path = folder / "config.json"
        given = json.loads(path.read_text())
        change(given)
        path.write_text(json.dumps(given))

    return apply


def reweighted(change):
    """Changes the tensors."""

    def apply(folder):
        path = folder / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)

    return apply


def cut(name, keep):
    def apply(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])

    return apply


EXTRA = "model.layers.0.self_attn.o_proj.bias"
LAST = "model.layers.1.mlp.up_proj.weight"
BROKEN = {
    "architecture": (
        edited(lambda c: c.update(model_type="mamba")),
        "architecture 'mamba' is not supported; these are: llama, qwen2, qwen3, gemma3_text",
    ),
    "truncated": (cut("model.safetensors", 5000), "is not a whole safetensors file"),
    "truncated header": (cut("model.safetensors", 5), "is not a whole safetensors file"),
    "missing tensor": (
        reweighted(lambda t: t.pop(LAST)),
        f"tensor '{LAST}' is missing; the checkpoint is not whole",
    ),
    "unexpected tensor": (
        reweighted(lambda t: t.update({EXTRA: np.zeros(16, np.float32)})),
        f"tensor '{EXTRA}' is not expected: the configuration describes another model",
    ),
    "shape": (
        edited(lambda c: c.update(intermediate_size=28)),
        r"down_proj.weight' gives shape \(24, 16\), and the configuration \(28, 16\)",
    ),
    "vocabulary": (
        lambda folder: (folder / "tokenizer.json").write_bytes(published.tokenizer_json(size=330)),
        r"has 330 ids and the embedding 320 rows; they are not of one model",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json is missing; name"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "model.safetensors is missing; fetch the whole checkpoint",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "tokenizer.json is missing; fetch the tokenizer",
    ),
    "no json": (cut("config.json", 40), r"config.json is not JSON"),
    "no width": (edited(lambda c: c.pop("hidden_size")), "no whole number 'hidden_size'"),
    "activation": (
        edited(lambda c: c.update(hidden_act="relu")),
        "hidden_act='relu' of a llama model is not supported, only 'silu'",
    ),
    "bias": (
        edited(lambda c: c.update(attention_bias=True)),
        "attention_bias=True of a llama model is not supported, only False",
    ),
    "yarn": (
        edited(lambda c: c.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})),
        "rotary scaling 'yarn' is not supported",
    ),
    "rotary": (
        edited(lambda c: c["rope_parameters"].pop("factor")),
        "rotary scaling 'llama3' lacks 'factor'",
    ),
    "part of a head": (
        edited(lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5)),
        "rotary positions of a part of each head are not supported",
    ),
    "another kind": (
        edited(lambda c: c.update(rope_parameters={"sliding_attention": {"rope_theta": 1e4}})),
        "rope_parameters say nothing of layers of kind full_attention",
    ),
    "heads": (
        edited(lambda c: c.update(num_key_value_heads=3)),
        "describes no model: num_heads 4 is not a multiple of num_kv_heads 3",
    ),
    "layer types": (
        edited(lambda c: c.update(layer_types=["full_attention", "linear_attention"])),
        "it must name 2, each full_attention or sliding_attention",
    ),
    "tokenizer": (cut("tokenizer.json", 40), r"tokenizer.json is not JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_loaded_says_why_in_one_line(case, tmp_path):
    folder = published.folder("llama", tmp_path / "m")
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"none is neither a folder with config.json nor a .gguf"):
        load_pretrained(tmp_path / "none")


def test_a_tied_head_may_be_stored_if_it_repeats_the_embedding(tmp_path):
    folder = published.folder("qwen2", tmp_path / "m")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    reweighted(lambda t: t.update({head: t[embedding]}))(folder)
    assert "head" not in load_pretrained(folder).params
    reweighted(lambda t: t.update({head: t[embedding] * 2}))(folder)
    with pytest.raises(UserError, match=r"tensor 'lm_head.weight' is not expected"):
        load_pretrained(folder)


def test_old_configurations_are_read(tmp_path):
    """The names that files had before ``rope_parameters`` and ``layer_types``."""
    folder = published.folder("gemma3_text", tmp_path / "m")
    new = load_pretrained(folder).model

    def age(given):
        del given["rope_parameters"], given["layer_types"]
        given |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
        given["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}

    edited(age)(folder)
    assert load_pretrained(folder).model == new


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_scale": 3.0}, "no published family computes what this model does"),
        ({"block.mixer.softcap": 5.0}, "no published family"),
        ({"depth": "Recursive(recursions=2, sharing='cycle')"}, "no published family"),
    ],
)
def test_a_model_of_no_family_is_not_written(change, message, tmp_path):
    model = llama(
        vocab_size=320, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=24
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        save_pretrained(tmp_path / "out", config.replace(model, change), {})
    assert not (tmp_path / "out").exists()


def test_half_a_parameter_tree_is_not_written(tmp_path):
    model, params, tokenizer = load_pretrained(published.folder("llama", tmp_path / "m"))
    del params["block_1"]
    with pytest.raises(UserError, match=r"parameter 'block_1/.*' of shape .* is missing"):
        save_pretrained(tmp_path / "out", model, params, tokenizer)
    shutil.rmtree(tmp_path / "m")
    assert not (tmp_path / "out").exists()
