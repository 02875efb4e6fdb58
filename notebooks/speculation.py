# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Speculation: how many tokens a pass writes
# A drafter proposes a tree of continuations, the target reads all of it in one pass and keeps a
# path that it could have written itself. What is written stays as it was; what changes is the
# number of passes. Here: the tokens of each pass, by drafter. About four minutes on one core, most
# of it compilation, and six more to train a small pair if no study has done so yet. What it reads
# comes with `python -m tokenlab models fetch smollm2_135m` and `python -m tokenlab data fetch NAME`
# for `english_prose` and `python_stdlib`.

# %%
# %matplotlib inline
import pathlib

import jax
import numpy as np
from IPython.display import display

from tokenlab.core.context import View
from tokenlab.data import TfdsCorpus
from tokenlab.decode import Categorical, FirstTokens, Greedy
from tokenlab.decode.speculative import Chains, KSequential, RecursiveRejection, Speculative
from tokenlab.files import load_module
from tokenlab.interop import load_pretrained
from tokenlab.interop.assets import fetch_model
from tokenlab.plots import plot_pass_lengths, plot_token_values
from tokenlab.study.trained import trained

goose, dyspec = (
    load_module(pathlib.Path(f"../experiments/decode/{name}.py")) for name in ("goose", "dyspec")
)
spectr = dyspec.spectr


def written_by_pass(decoder, view, ids, **others):
    """Tokens that each pass of the target wrote, by row, and the generation."""
    lengths = [np.ones(len(ids), int)]  # the first token comes with the prompt

    def seen(tokens, now):
        lengths.append(np.array(now))

    found = decoder(view, ids, key=jax.random.key(0), on_tokens=seen, others=others)
    steps = np.diff(np.stack(lengths), axis=0).T
    return [row[row > 0] for row in steps], found


# %% [markdown]
# ## Without a second model
# SmolLM2-135M goes on, greedily, with code that stands in its prompt already and with prose that
# does not. Drafts come from the context (copied from where the last tokens stood before, which is
# prompt lookup; followers that the model lately found likely; both, as Goose weighs them), all in
# trees of 32 nodes; or from the first 20 of the model's own 30 layers, two tokens at a time.

# %%
model, params, tokenizer = load_pretrained(fetch_model("smollm2_135m"))
target = View(model=model, params=params)
prompts = {"code": [], "prose": []}
for kind, name in (("code", "python_stdlib"), ("prose", "english_prose")):
    for document in TfdsCorpus(name=name).documents("held_out"):
        tokens = tokenizer.encode(document.text[:2000])
        if len(tokens) >= 180 and len(prompts[kind]) < 2:
            shown = tokens[20:180]
            prompts[kind].append([*shown, *shown[:40]] if kind == "code" else shown)
drafters = {
    "copied": goose.TREES["spine"],
    "followers": goose.TREES["branches"],
    "Goose": goose.TREES["goose"],
    "first layers": Chains(view=None, early_exit=20, length=2),
}
rows, found = {}, {}
for name, drafter in drafters.items():
    decoder = Speculative(
        drafter=drafter, sampler=Greedy(), max_new_tokens=40, end_ids=(), stream_every=1
    )
    rows[name], found[name] = written_by_pass(decoder, target, prompts["code"] + prompts["prose"])
count = len(prompts["code"])
lengths = {f"{name}, code": np.concatenate(each[:count]) for name, each in rows.items()}
lengths |= {f"{name}, prose": np.concatenate(each[count:]) for name, each in rows.items()}

# %% [markdown]
# The target decides, so all of them wrote the same tokens:

# %%
display(all((one.tokens == found["Goose"].tokens).all() for one in found.values()))

# %% [markdown]
# Tokens of each pass; the title ends with the mean, code above and prose below.

# %%
plot_pass_lengths(lengths)

# %% [markdown]
# Copying is all or nothing: most passes write the one token that any pass writes, and a few write a
# whole passage. Followers give two or three. Goose has both in one tree, and on these prompts the
# longest passes on average. The first layers are hardly ever right: nothing in training asked them
# to be read, so they cost twenty layers a token for almost nothing. Two prompts of a kind are an
# illustration; `docs/studies/goose.json` has three draws of four, in which Goose beats each of its
# two sources on code. That it beats a balanced tree of both by a tenth is not certain there.

# %% [markdown]
# Where the long passes are: the first piece of code as Goose wrote it, each token shaded by how
# many came in its pass.

# %%
each = np.concatenate([[1], rows["Goose"][0]])
shades = np.repeat(each, each).tolist()
pieces = [tokenizer.decode([int(i)]).decode("utf-8", "replace") for i in found["Goose"].tokens[0]]
plot_token_values(pieces, shades, label="tokens of the pass", colours="Blues")

# %% [markdown]
# ## With a second model
# The pair that the studies of speculation train: a target of five layers, a draft of one, both on
# English prose. Tokens are drawn at temperature 1. All drafters but the first propose 16 tokens.

# %%
target, tokenizer = trained(spectr.config())
small, _ = trained(spectr.draft())
documents = spectr.CORPUS.documents("held_out")
ids = [[tokenizer.bos_id, *tokenizer.encode(document.text)][:32] for document in documents[:8]]
drafters = {
    "a chain of 4": Chains(length=4),
    "4 chains of 4": Chains(count=4, length=4),
    "tree 4, 3": dyspec.DRAFTERS["bushy"],
    "tree 4, 1, 1, 1": dyspec.DRAFTERS["deep"],
    "dynamic tree": dyspec.DRAFTERS["dynamic"],
}
sampler = Categorical(processors=(FirstTokens(count=spectr.VOCABULARY),))
lengths = {}
for name, drafter in drafters.items():
    verifier = KSequential(chains=4) if drafter.chains == 4 else RecursiveRejection()
    decoder = Speculative(
        drafter=drafter, verifier=verifier, sampler=sampler, max_new_tokens=64, end_ids=(),
        stream_every=1,
    )  # fmt: skip
    rows, _ = written_by_pass(decoder, target, ids, draft=small)
    lengths[name] = np.concatenate(rows)
plot_pass_lengths(lengths)

# %% [markdown]
# The shape of a tree is the shape of its histogram. A chain ends at its first mistake; four of them
# give the first token four chances, and so does a tree, which then goes on along each branch. The
# tree `4, 3` is too shallow: half of its passes are all that it can hold. The dynamic tree puts its
# nodes where the draft is sure of them, but this draft is hardly ever sure, so almost all of them
# go side by side on the first level: nearly every pass writes two tokens, and very few write more.
# That is DySpec's study in one picture: with this pair it does not beat a fixed tree of as many
# nodes.
