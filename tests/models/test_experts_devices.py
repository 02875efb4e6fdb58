"""Experts give on four devices what they give on one, in both forms, gradients included."""

import json

import numpy as np
from devices import run_on_devices

SCRIPT = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from tokenlab.models import MixtureOfExperts
from tokenlab.routing import PooledThresholdGate
from tokenlab.train.mesh import MeshShape, batch_sharding, placed_on, shardings

x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 8)), jnp.float32)
valid = jnp.asarray(np.arange(6) < np.asarray([[6], [4], [1], [0]]))
for form in ("dense", "sorted"):
    layer = MixtureOfExperts(num_experts=4, hidden_dim=8, gate=PooledThresholdGate(), form=form)
    boxed = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))["params"]
    plain = nn.meta.unbox(boxed)
    for shape, devices in ((MeshShape(), 1), (MeshShape(data=1, fsdp=2, expert=2), 4)):
        mesh = shape.build(jax.devices()[:devices])
        with placed_on(mesh):
            rng = np.random.default_rng(1)
            params = jax.tree.map(
                lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), jnp.float32),
                plain,
            )
            params = jax.device_put(params, shardings(boxed, mesh))
            rows = jax.device_put(x, jax.NamedSharding(mesh, batch_sharding(mesh).spec))

            @jax.jit
            def run(params, x):
                def total(params):
                    out = layer.apply({"params": params}, x, valid=valid, train=True)
                    return jnp.sum(jnp.sin(out)), out

                gradient, out = jax.grad(total, has_aux=True)(params)
                return out, gradient

            found = jax.tree.leaves(run(params, rows))
        print(json.dumps([np.asarray(leaf).tolist() for leaf in found]))
"""


def test_one_device_and_four_agree():
    found = [json.loads(line) for line in run_on_devices(4, SCRIPT).splitlines()]
    assert len(found) == 4
    for leaves in found[1:]:
        for ours, expected in zip(leaves, found[0], strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)
