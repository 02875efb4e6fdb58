"""What is in a capsule, for models that are known to have a plan or none in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab.core.errors import UserError
from tokenlab.data.tasks import TaskSource, WordArithmetic
from tokenlab.evals import PlanReadBack, plans, probed
from tokenlab.models import Attention, Block, CapsuleTransformer, SwiGLU, llama

TASK = WordArithmetic(plan="apart", clauses=2, least=1)
SIZES = {"batches": 2, "batch_size": 50}


def model():
    return CapsuleTransformer(
        vocab_size=TASK.tokenizer.vocab_size,
        dim=8,
        num_layers=1,
        block=Block(mixer=Attention(num_heads=1, num_kv_heads=1), feedforward=SwiGLU(hidden_dim=8)),
        slot_id=TASK.mark("<slot>"),
        bottleneck=2,
    )


def params_of(network):
    ids = jnp.zeros((1, 4), int)
    drawn = jax.jit(lambda key: network.init(key, ids, positions=ids, segments=ids + 1)["params"])
    return nn.meta.unbox(drawn(jax.random.key(0)))


def test_a_model_that_knows_nothing_has_the_nats_of_a_guess():
    network = model()
    params = jax.tree.map(jnp.zeros_like, params_of(network))  # all logits are zero
    found = PlanReadBack(data=TaskSource(task=TASK), entropy=TASK.plan_entropy, **SIZES)(
        model=network, params=params, tokenizer=TASK.tokenizer
    )
    rows = TaskSource(task=TASK).batches(tokenizer=TASK.tokenizer, batch_size=50, seed=0)
    lengths = [(batch["plan"][:, 1:] > 0).sum() for batch, _ in zip(rows, range(2), strict=False)]
    guess = np.log(TASK.tokenizer.vocab_size) * sum(lengths) / 100
    assert found["nats"] == pytest.approx(guess, rel=1e-5)
    assert found["information"] == pytest.approx(TASK.plan_entropy - guess, rel=1e-4)
    assert found["exact"] == 0.0


def test_what_the_model_writes_freely_is_compared_with_the_plan(monkeypatch):
    """A model that always writes one plan is right as often as that plan comes up."""
    network, params = model(), params_of(model())
    always = [*TASK.tokenizer.encode("add "), TASK.mark("<think>"), TASK.mark("<think>")]

    def logits(self, latents, *, plan):
        place = np.arange(plan.shape[1])
        sure = 9.0 * np.eye(TASK.tokenizer.vocab_size)[np.array(always)[place]]
        return jnp.broadcast_to(sure, (*plan.shape, sure.shape[1])).astype(np.float32)

    monkeypatch.setattr(CapsuleTransformer, "plan_logits", logits)
    jax.clear_caches()
    found = PlanReadBack(data=TaskSource(task=TASK), **SIZES)(
        model=network, params=params, tokenizer=TASK.tokenizer
    )
    rows = TaskSource(task=TASK).batches(tokenizer=TASK.tokenizer, batch_size=50, seed=0)
    wanted = [*always[:2], 0]
    right = [(b["plan"][:, 1:] == wanted).all(axis=1) for b, _ in zip(rows, range(2), strict=False)]
    assert found["exact"] == pytest.approx(np.mean(right)) and 0 < found["exact"] < 0.5
    assert plans._read._cache_size() == 1


def test_a_probe_finds_what_is_linear_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, size=(400, 2)) + 20
    told = np.eye(4)[ids - 20].reshape(400, -1) @ rng.normal(size=(8, 8))
    assert probed(latents=told, plans=ids) == 1.0
    assert probed(latents=rng.normal(size=(400, 3)), plans=ids) < 0.2
    nothing = probed(latents=np.zeros((400, 0)), plans=ids)
    assert nothing == pytest.approx(1 / 16, abs=0.06)


def test_models_and_rows_without_plans_are_refused():
    network = model()
    plain = llama(
        vocab_size=TASK.tokenizer.vocab_size, dim=8, num_layers=1, num_heads=1, num_kv_heads=1,
        hidden_dim=8,
    )  # fmt: skip
    evaluation = PlanReadBack(data=TaskSource(task=TASK), **SIZES)
    with pytest.raises(UserError, match="CapsuleTransformer"):
        evaluation(model=plain, params={}, tokenizer=TASK.tokenizer)
    none = PlanReadBack(data=TaskSource(task=WordArithmetic()), **SIZES)
    with pytest.raises(UserError, match="no plan"):
        none(model=network, params={}, tokenizer=WordArithmetic().tokenizer)
