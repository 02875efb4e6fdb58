"""Few bits: quantisers of one matrix, and of a decoder layer by layer."""

from tokenlab.quantize.base import ActivationQuantizer, Quantized, Quantizer
from tokenlab.quantize.grid import SymmetricGrid
from tokenlab.quantize.importance import (
    ActivationNorm,
    AttentionConcentration,
    FirstAndLastPositions,
    FirstPositions,
    LayerView,
    ScoredImportance,
    TokenImportance,
    TokenRarity,
    Uniform,
    attention_received,
)
from tokenlab.quantize.layerwise import RSQ, Layerwise, QuantizedModel, QuaRot, expand
from tokenlab.quantize.nvfp4 import (
    NVFP4,
    NVFP4Activations,
    NVFP4Tensor,
    fake_nvfp4,
    nvfp4,
    tensor_scale,
)
from tokenlab.quantize.rotation import Rotation, hadamard_matrix, random_orthogonal
from tokenlab.quantize.rounding import GPTQ, RoundToNearest, upper_factor

__all__ = [
    "GPTQ",
    "NVFP4",
    "RSQ",
    "ActivationNorm",
    "ActivationQuantizer",
    "AttentionConcentration",
    "FirstAndLastPositions",
    "FirstPositions",
    "LayerView",
    "Layerwise",
    "NVFP4Activations",
    "NVFP4Tensor",
    "QuaRot",
    "Quantized",
    "QuantizedModel",
    "Quantizer",
    "Rotation",
    "RoundToNearest",
    "ScoredImportance",
    "SymmetricGrid",
    "TokenImportance",
    "TokenRarity",
    "Uniform",
    "attention_received",
    "expand",
    "fake_nvfp4",
    "hadamard_matrix",
    "nvfp4",
    "random_orthogonal",
    "tensor_scale",
    "upper_factor",
]
