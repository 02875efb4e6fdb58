"""Decoding reads the question into a capsule, each row its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.capsules import PLAIN, TASK, capsule, params_of, run
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, Greedy

PROMPTS = [problem.prompt for problem in TASK.problems(seed=2, count=3)]


@pytest.mark.parametrize("mode", ["parallel", "autoregressive"])
def test_decoding_reads_the_capsule_of_each_row(mode):
    """Ragged prompts, against passes over whole rows without a cache."""
    model = capsule(generate=mode)
    params = params_of(model)
    prompts = [PROMPTS[0], PROMPTS[1][2:], PROMPTS[2]]
    decoder = Autoregressive(max_new_tokens=4, sampler=Greedy(), end_ids=())
    view = View(model=model, params=params)
    written = decoder(view, prompts, key=jax.random.key(0))
    alone = decoder(view, prompts[1:2], key=jax.random.key(0))
    np.testing.assert_array_equal(alone.tokens[0], written.tokens[1])
    for prompt, tokens in zip(prompts, written.tokens, strict=True):
        row = list(prompt)
        for token in tokens:
            padded = np.zeros((1, 16), int)
            padded[0, : len(row)] = row
            batch = {
                "tokens": jnp.asarray(padded),
                "positions": jnp.arange(16)[None],
                "segments": (jnp.arange(16)[None] < len(row)).astype(jnp.int32),
            }
            hidden = np.asarray(run(model, params, batch).hidden[0, len(row) - 1])
            assert int(np.argmax(np.asarray(params["embedding"]) @ hidden)) == token
            row.append(int(token))
    planned = decoder(View(model=PLAIN, params=params_of(PLAIN)), prompts, key=jax.random.key(0))
    assert written.ledger.flops > planned.ledger.flops


def test_prompts_in_parts_are_refused():
    model = capsule()
    view = View(model=model, params=params_of(model))
    for chunk in (1, 4):
        decoder = Autoregressive(max_new_tokens=2, prefill_chunk=chunk)
        with pytest.raises(UserError, match="prefill_chunk"):
            decoder(view, PROMPTS, key=jax.random.key(0))
