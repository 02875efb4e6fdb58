"""Published models: import from safetensors and GGUF, export to safetensors."""

from tokenlab.interop.families import FAMILIES, Family
from tokenlab.interop.pretrained import Pretrained, load_pretrained, save_pretrained

__all__ = ["FAMILIES", "Family", "Pretrained", "load_pretrained", "save_pretrained"]
