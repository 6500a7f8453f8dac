"""A small checkpoint with its tokenizer, as a user would have it on disk."""

from pathlib import Path
from typing import Any

from cognexis.artifacts.tokenizer_training import byte_reference_tokenizer
from tests.batteries.tiny import tiny_config, tiny_model


def save_checkpoint(folder: Path, seed: int = 0, **overrides: Any) -> Any:
    """Save a random model of byte tokens and its tokenizer into ``folder``; return the model."""
    tokenizer = byte_reference_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    settings = {"vocab_size": len(tokenizer), "tokenizer_checksum": tokenizer.checksum} | ids | overrides
    model = tiny_model(tiny_config(**settings), seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
