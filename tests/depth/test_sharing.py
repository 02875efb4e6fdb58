"""Orders of shared layers, and looped models that begin as trained ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab.core.errors import UserError
from tokenlab.depth import MixtureOfRecursions, Recursive, share_layers
from tokenlab.models import llama

LAYERS = 8
WHERE = {"positions": jnp.arange(6)[None], "segments": jnp.ones((1, 6), jnp.int32)}
TOKENS = jnp.asarray([[1, 5, 2, 2, 7, 3]])
ORDERS = {
    "cycle": (2, (0, 1, 2, 3, 0, 1, 2, 3)),
    "sequence": (2, (0, 0, 1, 1, 2, 2, 3, 3)),
    "middle_cycle": (3, ("first", 0, 1, 0, 1, 0, 1, "last")),
    "middle_sequence": (3, ("first", 0, 0, 0, 1, 1, 1, "last")),
}


def model_of(**rest):
    return llama(
        vocab_size=11, dim=8, num_layers=LAYERS, num_heads=2, num_kv_heads=1, hidden_dim=8, **rest
    )


@functools.cache
def started(model):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS, **WHERE))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes),
    )


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params):
    return model.apply({"params": params}, TOKENS, **WHERE).hidden


@pytest.mark.parametrize("sharing", ORDERS)
def test_layers_run_in_the_order_of_their_name(sharing):
    recursions, order = ORDERS[sharing]
    looped = model_of(depth=Recursive(recursions=recursions, sharing=sharing))
    params = started(looped)
    spread = {name: value for name, value in params.items() if not name.startswith("block")}
    spread |= {f"block_{i}": params[f"block_{name}"] for i, name in enumerate(order)}
    np.testing.assert_allclose(
        hidden(looped, params), hidden(model_of(), spread), rtol=1e-5, atol=1e-5
    )
    places = looped.depth.places(LAYERS)
    for i, each in enumerate(places):
        assert [at for at, name in enumerate(order) if name == i] == list(each)


@pytest.mark.parametrize("how", ["average", "stepwise", "lower"])
@pytest.mark.parametrize("sharing", ORDERS)
def test_equal_layers_make_an_equal_model(sharing, how):
    recursions, order = ORDERS[sharing]
    plain = model_of()
    params = dict(started(plain))
    for i, name in enumerate(order):
        if name not in ("first", "last"):
            params[f"block_{i}"] = params["block_3"]
    depth = Recursive(recursions=recursions, sharing=sharing)
    begun = share_layers(params, depth=depth, num_layers=LAYERS, how=how)
    looped = model_of(depth=depth)
    assert jax.tree.map(jnp.shape, begun) == jax.tree.map(jnp.shape, started(looped))
    np.testing.assert_allclose(hidden(looped, begun), hidden(plain, params), rtol=1e-4, atol=1e-5)


def test_where_shared_layers_come_from():
    params = started(model_of())
    kernel = lambda tree: tree["mixer"]["out"]["kernel"]  # noqa: E731

    def begun(how, sharing="middle_cycle"):
        depth = Recursive(recursions=3, sharing=sharing)
        return share_layers(params, depth=depth, num_layers=LAYERS, how=how)

    def mean(*layers):
        return sum(kernel(params[f"block_{i}"]) for i in layers) / len(layers)

    expected = {
        ("average", "middle_cycle"): (mean(1, 3, 5), mean(2, 4, 6)),
        ("average", "middle_sequence"): (mean(1, 2, 3), mean(4, 5, 6)),
        ("stepwise", "middle_cycle"): (mean(1), mean(6)),
        ("lower", "middle_cycle"): (mean(1), mean(2)),
    }
    for (how, sharing), layers in expected.items():
        found = begun(how, sharing)
        for i, layer in enumerate(layers):
            np.testing.assert_allclose(kernel(found[f"block_{i}"]), layer, rtol=1e-6)
        np.testing.assert_array_equal(kernel(found["block_first"]), mean(0))
        np.testing.assert_array_equal(kernel(found["block_last"]), mean(7))
    with pytest.raises(UserError, match="not block_0 to block_8; give those of Sequential"):
        share_layers(params, depth=Recursive(recursions=3), num_layers=9)


def test_keys_of_other_layers_are_not_shared():
    depth = MixtureOfRecursions(recursions=3, sharing="middle_sequence", keys="shared")
    with pytest.raises(UserError, match="needs the same layers in each recursion"):
        started(model_of(depth=depth))
