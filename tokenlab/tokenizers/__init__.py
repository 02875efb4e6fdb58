"""Tokenizers and their trainers: bytes to ids and back, without losing a byte."""

from tokenlab.tokenizers.base import Tokenizer, TokenizerTrainer
from tokenlab.tokenizers.byte import ByteTokenizer
from tokenlab.tokenizers.files import cached_fit, load_tokenizer, save_tokenizer
from tokenlab.tokenizers.pretrained import PretrainedTokenizer
from tokenlab.tokenizers.sentence_piece import SentencePieceTokenizer, SentencePieceTrainer

__all__ = [
    "ByteTokenizer",
    "PretrainedTokenizer",
    "SentencePieceTokenizer",
    "SentencePieceTrainer",
    "Tokenizer",
    "TokenizerTrainer",
    "cached_fit",
    "load_tokenizer",
    "save_tokenizer",
]
