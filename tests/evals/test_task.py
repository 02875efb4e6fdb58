"""Accuracy by generation is what the task's checker says of greedy completions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab.core.errors import UserError
from tokenlab.data.tasks import Addition, AssociativeRecall
from tokenlab.decode import Generation
from tokenlab.evals import TaskAccuracy, task
from tokenlab.models import llama
from tokenlab.tokenizers import ByteTokenizer


class Student:
    """Stands in for the decoder; adds well where no carry is handed on, badly elsewhere."""

    def __init__(self, **options):
        self.options = options

    def __call__(self, view, prompts, *, key):
        alphabet = ADDITION.tokenizer
        answers = []
        for prompt in prompts:
            a, b = map(int, alphabet.decode(prompt).decode().rstrip("=").split("+"))
            digits = zip(str(a).zfill(2), str(b).zfill(2), strict=True)
            chained = a % 10 + b % 10 > 9 and sum(map(int, next(digits))) == 9
            answers.append([*alphabet.encode(str(a + b + chained).zfill(3)), alphabet.eos_id])
        tokens = np.array(answers, np.int32)
        nothing = np.zeros(tokens.shape, np.float32)
        return Generation(
            tokens=tokens,
            lengths=np.full(len(answers), tokens.shape[1]),
            logp_model=nothing,
            logp_behaviour=nothing,
            ledger=None,
        )


ADDITION = Addition(digits=2, chained=0.5)


@pytest.mark.parametrize("batch_size", [64, 7])
def test_accuracy_is_known_for_a_student_whose_mistakes_are_known(monkeypatch, batch_size):
    monkeypatch.setattr(task, "Autoregressive", Student)
    evaluation = TaskAccuracy(task=ADDITION, problems=64, batch_size=batch_size)
    figures = evaluation(model=nn.Module(), params={}, tokenizer=ADDITION.tokenizer)
    assert figures["accuracy_at_0"] == figures["accuracy_at_1"] == 1
    assert figures["accuracy_at_2"] == 0
    assert 0.1 < figures["accuracy"] < 0.95
    error = math.sqrt(figures["accuracy"] * (1 - figures["accuracy"]) / 64)
    assert figures["standard_error"] == pytest.approx(error)


def test_an_untrained_model_scores_what_its_argmax_gets():
    recall = AssociativeRecall(keys=2, values=2, pairs=2, queries=1)
    model = llama(
        vocab_size=recall.tokenizer.vocab_size, dim=8, num_layers=1, num_heads=2, num_kv_heads=1,
        hidden_dim=8,
    )  # fmt: skip
    tokens = jnp.zeros((1, 4), int)
    params = nn.meta.unbox(
        model.init(jax.random.key(5), tokens, positions=tokens, segments=tokens + 1)["params"]
    )
    evaluation = TaskAccuracy(task=recall, problems=40, batch_size=16)
    figures = evaluation(model=model, params=params, tokenizer=recall.tokenizer)
    right = 0
    for problem in recall.problems(seed=(task._STREAM, 0), count=40):
        ids = jnp.asarray([problem.prompt])
        positions = jnp.arange(ids.shape[1])[None]
        out = model.apply({"params": params}, ids, positions=positions, segments=jnp.ones_like(ids))
        logits = model.apply({"params": params}, out.hidden[:, -1:], method="logits")
        right += int(jnp.argmax(logits)) == problem.answer[0]
    assert figures["accuracy"] == pytest.approx(right / 40)


def test_another_tokenizer_is_refused():
    with pytest.raises(UserError, match="alphabet"):
        TaskAccuracy(task=ADDITION)(model=nn.Module(), params={}, tokenizer=ByteTokenizer())


def test_problems_are_not_those_of_training():
    trained = {tuple(p.prompt) for p in Addition(digits=6).problems(seed=0, count=2000)}
    asked = Addition(digits=6).problems(seed=(task._STREAM, 0), count=200)
    assert not trained & {tuple(problem.prompt) for problem in asked}
