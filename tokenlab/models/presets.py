"""Transformers by their shapes."""

from __future__ import annotations

from tokenlab.depth import Sequential
from tokenlab.models.attention import Attention
from tokenlab.models.layers import SwiGLU
from tokenlab.models.transformer import Block, Transformer


def llama(
    *,
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    hidden_dim: int,
    **rest,
) -> Transformer:
    """A Transformer of Llama's shape: grouped-query attention, SwiGLU, tied embeddings."""
    block = Block(
        mixer=Attention(num_heads=num_heads, num_kv_heads=num_kv_heads),
        feedforward=SwiGLU(hidden_dim=hidden_dim),
    )
    return Transformer(vocab_size=vocab_size, dim=dim, num_layers=num_layers, block=block, **rest)


def transformer_1m(vocab_size: int = 4096, **rest) -> Transformer:
    """About one million parameters beside the embedding."""
    return llama(
        vocab_size=vocab_size, dim=128, num_layers=5, num_heads=4, num_kv_heads=2,
        hidden_dim=384, **rest,
    )  # fmt: skip


def transformer_15m(vocab_size: int = 8192, **rest) -> Transformer:
    """About fifteen million parameters; the shape of ``benchmarks/train_step``."""
    return llama(
        vocab_size=vocab_size, dim=384, num_layers=6, num_heads=6, num_kv_heads=6,
        hidden_dim=1024, **rest,
    )  # fmt: skip


def transformer_135m(vocab_size: int = 49_152, **rest) -> Transformer:
    """SmolLM2-135M's geometry: 30 layers of width 576, 9 query and 3 key/value heads."""
    return llama(
        vocab_size=vocab_size, dim=576, num_layers=30, num_heads=9, num_kv_heads=3,
        hidden_dim=1536, depth=Sequential(scan=True), max_length=8192, **rest,
    )  # fmt: skip
