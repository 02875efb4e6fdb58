"""E2M1 codes: one bit of sign, two of exponent, one of mantissa, and two codes in a byte."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

# Codes that share a scale, along the contracted axis.
BLOCK = 16
# What the eight codes without a sign stand for; codes 8 to 15 are their negatives.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*E2M1, *(-value for value in E2M1)], np.float32)
# Half way from a value to the next; an even code gets what lies on its edge.
_EDGES = (np.array(E2M1[1:]) + np.array(E2M1[:-1])) / 2


def encoded(x: Float[Array, "*N"]) -> UInt8[Array, "*N"]:
    """The nearest code; ties go to the even one, and beyond 6 lies nothing."""
    size = jnp.abs(x.astype(jnp.float32))
    code = jnp.zeros(x.shape, jnp.uint8)
    for below, edge in enumerate(_EDGES.tolist()):
        over = size >= edge if below % 2 else size > edge
        code += over.astype(jnp.uint8)
    negative = (x < 0) & (code > 0)
    return code + 8 * negative.astype(jnp.uint8)


def decoded(codes: UInt8[Array, "*N"]) -> Float[Array, "*N"]:
    """What codes 0 to 15 stand for, float32."""
    return jnp.asarray(_VALUES)[codes.astype(jnp.int32)]


def packed(codes: UInt8[Array, "K ..."]) -> UInt8[Array, "P *N"]:
    """Two codes in a byte along the first axis, the earlier one in the low half."""
    return codes[0::2] | (codes[1::2] << 4)


def unpacked(codes: UInt8[Array, "P *N"]) -> UInt8[Array, "K ..."]:
    """Undoes :func:`packed`."""
    pairs = jnp.stack([codes & 15, codes >> 4], axis=1)
    return pairs.reshape(2 * codes.shape[0], *codes.shape[1:])
