"""Names of array types, in one place.

Dimensions: ``B`` batch rows, ``T`` positions of a row, ``S`` key positions, ``D`` model width,
``H`` query heads, ``K`` key/value heads, ``V`` vocabulary, ``N`` tokens of any layout,
``L`` layers, ``C`` capacity (a static number of kept tokens).
"""

from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
Tokens = Int[Array, "B T"]
Positions = Int[Array, "B T"]
Segments = Int[Array, "B T"]  # 0 is padding; tokens attend within their own segment only
Prompt = Bool[Array, "B T"]  # tokens that are given, not generated
Weights = Float[Array, "B T"]
Values = Float[Array, "B T"]
RowKeys = Key[Array, " B"]  # one random key per row
Scalar = Float[Array, ""]

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Hidden",
    "Int",
    "Logits",
    "PRNGKeyArray",
    "Positions",
    "Prompt",
    "RowKeys",
    "Scalar",
    "Segments",
    "Tokens",
    "Values",
    "Weights",
]
