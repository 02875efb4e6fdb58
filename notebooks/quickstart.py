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
# # Quickstart
# Load an experiment, change it, train it for a minute, look at its curves, let it write, and see
# which tokens it finds hard. The objects are those of the command line; nothing is special here.

# %%
# %matplotlib inline
import pathlib
import sysconfig
import tempfile

import jax.numpy as jnp
from IPython.display import display
from rich.console import Console

from tokenlab import config
from tokenlab.core.context import Context, View
from tokenlab.data import TextFiles
from tokenlab.decode import Autoregressive, Categorical, Temperature, complete
from tokenlab.evals import HeldOutText, windows
from tokenlab.files import experiment_of
from tokenlab.models import llama
from tokenlab.plots import plot_curves, plot_token_values
from tokenlab.tokenizers import ByteTokenizer
from tokenlab.train.loop import train

# %% [markdown]
# ## An experiment is an object
# `replace` is the only way to change one. Here, of the plain Transformer beside the quickstart:
# other text (Python's own `email` package, which lies on every disk), bytes instead of pieces, a
# smaller model, fewer steps.

# %%
experiment = experiment_of(pathlib.Path("../experiments/quickstart.py:plain"))
corpus = TextFiles(pattern=sysconfig.get_paths()["stdlib"] + "/email/*.py", held_out=0.15)
small = config.replace(
    experiment,
    {
        "name": "notebook",
        "tokenizer": ByteTokenizer(),
        "data.corpus": corpus,
        "data.length": 128,
        "batch_size": 8,
        "model": llama(
            vocab_size=264, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=192
        ),
        "optimizer.learning_rate.peak": 1e-2,
        "steps": 150,
        "evals": {"held_out": HeldOutText(corpus=corpus, length=128, stride=64, max_documents=2)},
        "samples": None,
    },
)
for line in list(config.describe(small.model))[:8]:
    display(f"model.{line.path}: {line.type} = {line.value}   {line.doc}")

# %% [markdown]
# A mistake is answered with the nearest name.

# %%
try:
    config.replace(small, {"model.num_layer": 3})
except config.UserError as error:
    display(str(error))

# %% [markdown]
# ## Train
# The same call as `python -m tokenlab train`. The folder has everything the run leaves behind.

# %%
folder = pathlib.Path(tempfile.mkdtemp()) / "run"
outcome = train(small, folder, console=Console())
display(outcome.evals)
plot_curves(folder)

# %% [markdown]
# ## Write

# %%
view = View(model=small.model, params=outcome.state.params)
tokenizer = outcome.run.tokenizer
decoder = Autoregressive(
    max_new_tokens=120, sampler=Categorical(processors=(Temperature(value=0.5),))
)
completions, generation = complete(view, tokenizer, ["def ", "import "], decoder=decoder)
for prompt, text in completions:
    display(prompt + text)
display({name: float(value) for name, value in vars(generation.ledger).items()})

# %% [markdown]
# ## Which tokens are hard?
# The context gives the log-probability of every target of a batch; one held-out window is enough
# for a picture.

# %%
document = corpus.documents("held_out")[0]
ids = [tokenizer.bos_id, *tokenizer.encode(document.text[:2000]), tokenizer.eos_id]
row = next(windows(jnp.asarray(ids), length=600, stride=600))
batch = {name: jnp.asarray(values)[None] for name, values in row.items()}
nats = -Context(batch=batch, views={"policy": view}).token_logp()[0]
pieces = [tokenizer.decode([int(i)]).decode("utf-8", "replace") for i in row["targets"]]
plot_token_values(pieces, nats.tolist(), label="nats per byte")
