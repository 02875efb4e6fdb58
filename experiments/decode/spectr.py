"""SpecTr: several independent drafts, of which the target takes the first that passes.

Paper:    Sun et al., "SpecTr: Fast Speculative Decoding via Optimal Transport", 2023,
          arXiv:2310.15141.
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab study experiments/decode/spectr.py
Hardware: two CPU cores, eight minutes, of which six train target and draft once.
Expected: 2.21, 2.43, 2.64 and 2.82 tokens per pass of the target with one, two, four and eight
          drafts of four tokens, at temperature 1 and an unchanged likelihood under the target;
          four drafts write 20 % more than one (95 % interval 13 to 26 %).
"""

import dataclasses

import numpy as np

from tokenlab import config as configs
from tokenlab.core.rng import stream
from tokenlab.data import PackedText, TfdsCorpus
from tokenlab.decode import Autoregressive, Categorical, Decoder, FirstTokens
from tokenlab.decode.speculative import Chains, KSequential, Speculative
from tokenlab.evals import HeldOutText
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.study import Claim, Measured, Study, Trial
from tokenlab.study.trained import trained
from tokenlab.tokenizers import SentencePieceTrainer
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import Muon, WarmupStableDecay

CORPUS = TfdsCorpus(name="english_prose")
VOCABULARY = 1024


def config() -> Experiment:
    """The target: about one million parameters beside the embedding."""
    return Experiment(
        name="target",
        tokenizer=SentencePieceTrainer(vocab_size=VOCABULARY),
        data=PackedText(corpus=CORPUS, length=256),
        batch_size=16,
        model=llama(
            vocab_size=VOCABULARY, dim=128, num_layers=5, num_heads=4, num_kv_heads=2,
            hidden_dim=384,
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=Muon(learning_rate=WarmupStableDecay(peak=3e-3)),
        steps=400,
        checkpoint=Checkpointing(every=400),
        evals={"held_out": HeldOutText(corpus=CORPUS, length=256, max_documents=40)},
    )  # fmt: skip


def draft() -> Experiment:
    """A twentieth of its layers' parameters, on the same text."""
    model = llama(
        vocab_size=VOCABULARY, dim=64, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=128
    )
    return configs.replace(config(), {"name": "draft", "model": model})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing(Trial):
    """Continues held-out prose and counts passes of the target.

    Attributes:
        decoder: how.
        target: the experiment behind the target.
        draft: the experiment behind the draft.
        prompts: documents that are continued.
        length: tokens of a prompt.
    """

    decoder: Decoder
    target: Experiment
    draft: Experiment
    prompts: int = 32
    length: int = 32

    def measure(self, *, seed: int) -> Measured:
        """``tokens_per_pass``, and the mean surprise of what was written under the target, nats."""
        target, tokenizer = trained(self.target)
        small, _ = trained(self.draft)
        documents = CORPUS.documents("held_out")
        order = np.random.default_rng(seed).permutation(len(documents))
        ids = [
            [tokenizer.bos_id, *tokenizer.encode(documents[int(i)].text)][: self.length]
            for i in order[: self.prompts]
        ]
        key, drafter = stream(seed, "write"), None
        if isinstance(self.decoder, Speculative):
            drafter = self.decoder.drafter
            found = self.decoder(target, ids, key=key, others={"draft": small})
        else:
            found = self.decoder(target, ids, key=key)
        written = float(found.lengths.sum())
        passes = float(found.statistics.get("passes", found.lengths).sum())
        surprise = -float(found.logp_model.sum()) / written
        return Measured(
            figures={"decode/tokens_per_pass": written / passes, "decode/surprise": surprise},
            costs={
                "new_tokens": written,
                "nodes": float(drafter.nodes) if drafter else 0.0,
                "passes": float(found.ledger.passes),
            },
        )


def writing(decoder: Decoder) -> Writing:
    """A trial of ``decoder`` with the trained pair."""
    return Writing(decoder=decoder, target=config(), draft=draft())


def study() -> Study:
    """One, two, four and eight drafts of four tokens, and plain sampling."""
    common = {
        "max_new_tokens": 64, "end_ids": (),
        "sampler": Categorical(processors=(FirstTokens(count=VOCABULARY),)),
    }  # fmt: skip
    arms = {"one by one": writing(Autoregressive(**common))}
    for count in (1, 2, 4, 8):
        drafter = Chains(count=count, length=4)
        arms[f"{count} drafts"] = writing(
            Speculative(drafter=drafter, verifier=KSequential(chains=count), **common)
        )
    more = "decode/tokens_per_pass"
    return Study(
        name="spectr",
        question="Do more drafts of one length write more tokens per pass of the target?",
        arms=arms,
        matched="new_tokens",
        claims=(
            Claim(
                arm="4 drafts", than="1 drafts", metric=more, better="higher", margin=0.1,
                relative=True,
            ),
            Claim(arm="2 drafts", than="1 drafts", metric=more, better="higher"),
            Claim(arm="8 drafts", than="4 drafts", metric=more, better="higher"),
            Claim(arm="4 drafts", than="one by one", metric="decode/surprise", margin=-0.15),
        ),
        seeds=(0, 1, 2, 3, 4),
    )  # fmt: skip
