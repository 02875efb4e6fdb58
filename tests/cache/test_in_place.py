"""A decoding step writes its entries where they go and copies no cache."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.depth.looped import model_of, params_of
from tokenlab.cache import FullCache, PagedCache, RingCache, SinkCache, base, paged
from tokenlab.core.context import View
from tokenlab.decode import Autoregressive, DepthBatched, Greedy, autoregressive, depth_batched
from tokenlab.depth import Sequential

PROMPTS = np.random.default_rng(0).integers(0, 20, (5, 7)).tolist()
CACHES = {
    "full": FullCache(),
    "ring": RingCache(budget=11),
    "sink": SinkCache(budget=11),
    "paged": PagedCache(page=4),
}
MODELS = {
    "plain": lambda: model_of().clone(depth=Sequential()),
    "loop": lambda: model_of("all"),
    "shared keys": lambda: model_of("routed", "shared"),
    "hybrid keys": lambda: model_of("routed", "hybrid"),
}


def copies(module, run):
    """Copies, in the compiled loop, of arrays as large as a pool of keys."""
    pools = {leaf.size for leaf in jax.tree.leaves(run.state.cache) if leaf.ndim == 4}
    text = module._decode.lower(run.static, run.params, run.state, 8, False).compile().as_text()
    assert "while(" in text
    entry = text[text.index("\nENTRY") :]
    found = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", text.replace(entry, ""))
    return [one for one in found if np.prod([int(n) for n in one.split(",")]) in pools]


@pytest.mark.parametrize(
    ("model", "cache"),
    [
        *itertools.product(MODELS, ("full",)),
        *itertools.product(("plain",), ("ring", "sink", "paged")),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in itertools.product(MODELS, ("ring", "sink"))
            if pair[0] != "plain"
        ),
    ],
)
def test_rows(model, cache):
    network = MODELS[model]()
    view = View(model=network, params=params_of(network))
    decoder = Autoregressive(max_new_tokens=8, sampler=Greedy(), cache=CACHES[cache])
    assert copies(autoregressive, decoder._run(view, PROMPTS, jax.random.key(0))) == []


def test_depths():
    network = model_of("routed")
    view = View(model=network, params=params_of(network))
    decoder = DepthBatched(max_new_tokens=8, sampler=Greedy(), batch=2)
    assert copies(depth_batched, decoder._run(view, PROMPTS, jax.random.key(0))) == []


@pytest.mark.parametrize("cache", [FullCache(), PagedCache(page=5)])
def test_copies_are_seen(cache, monkeypatch):
    """What the others would say if a cache might be written before it has been read."""
    for module in (base, paged):
        monkeypatch.setattr(module, "zeros_behind", jnp.zeros_like)
    network = model_of().clone(depth=Sequential())
    view = View(model=network, params=params_of(network))
    decoder = Autoregressive(max_new_tokens=9, sampler=Greedy(), cache=cache)
    assert copies(autoregressive, decoder._run(view, PROMPTS, jax.random.key(0)))
