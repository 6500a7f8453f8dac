"""Small tokenizers for tests, trained once per process."""

import functools
import hashlib
import inspect
import json

from cognexis.artifacts.tokenizer_training import byte_reference_tokenizer, train_tokenizer
from cognexis.tokenization_cognexis import CognexisTokenizer

TYPES = ("sentencepiece", "bpe", "byte_reference")


@functools.cache
def small_tokenizer(tokenizer_type: str = "sentencepiece") -> CognexisTokenizer:
    """A tokenizer of 700 ids (266 for ``byte_reference``); do not add tokens to it, make a deep copy."""
    if tokenizer_type == "byte_reference":
        return byte_reference_tokenizer()
    texts = [inspect.getsource(module) for module in (hashlib, inspect, json)]
    return train_tokenizer(texts, 700, tokenizer_type=tokenizer_type)
