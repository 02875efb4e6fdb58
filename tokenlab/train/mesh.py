"""The device mesh, and the one table that maps logical axes onto it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from tokenlab.core.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

# Logical axis -> mesh axes. Parts name logical axes only; this table is the whole strategy.
RULES = (
    ("batch", ("data", "fsdp")),
    ("length", "sequence"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("experts", "expert"),
    ("embed", "fsdp"),
    ("embed_act", None),
    ("norm", None),
    ("positions", None),
    ("codes", None),
    ("layers", None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices lie along each axis; one of them may be -1, all that remain.

    Attributes:
        data: batch, parameters copied.
        fsdp: batch, parameters split.
        tensor: heads, feed-forward width and vocabulary.
        sequence: positions.
        expert: experts.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1

    def build(self, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over all devices.

        Raises:
            UserError: the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = [getattr(self, axis) for axis in AXES]
        fixed = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and fixed > 0 and len(devices) % fixed == 0:
            sizes[sizes.index(-1)] = len(devices) // fixed
        if min(sizes) < 1 or math.prod(sizes) != len(devices):
            shown = ", ".join(f"{a}={getattr(self, a)}" for a in AXES)
            raise UserError(
                f"mesh ({shown}) does not fit {len(devices)} devices; change the mesh.* fields"
            )
        grid = np.asarray(devices).reshape(sizes)
        return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def placed_on(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Computes on ``mesh`` in here, with logical axes mapped by :data:`RULES`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes, positions over the sequence axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def shardings(boxed: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Sharding of every leaf, from the logical names its box carries."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
