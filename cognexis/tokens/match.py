"""Whether a tokenizer and a model belong together.

A model's loader sees no tokenizer, so whoever has both asks here: generation helpers, pipelines, the command line.
"""

from typing import Any

from transformers.utils import logging

from cognexis.errors import ArtifactMismatchError
from cognexis.tokens.manifest import backend_checksum

logger = logging.get_logger(__name__)


def tokenizer_checksum(tokenizer: Any) -> str | None:
    """The checksum of any fast tokenizer; None for one without a backend of ``tokenizers``."""
    own = getattr(tokenizer, "checksum", None)
    if isinstance(own, str):
        return own
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    return backend_checksum(backend.to_str()) if hasattr(backend, "to_str") else None


def check_tokenizer_match(
    config: Any, tokenizer: Any, *, generation_config: Any = None, allow_tokenizer_mismatch: bool = False
) -> None:
    """Check that ids of ``tokenizer`` mean to the model what they meant in training.

    Args:
        config: the model's configuration. Its ``tokenizer_checksum``, if any, must be the tokenizer's; its vocabulary
            must hold every id (it may be larger); its special ids must be the tokenizer's, where both name one.
        tokenizer: a fast tokenizer.
        generation_config: its special ids are checked too.
        allow_tokenizer_mismatch: log a warning instead.

    Raises:
        ArtifactMismatchError: lists every difference with both values.
    """
    differences = []
    expected = getattr(config, "tokenizer_checksum", None)
    actual = tokenizer_checksum(tokenizer) if expected is not None else None
    if expected is not None and actual != expected:
        differences.append(
            f"the model was trained with tokenizer {expected}, this one is {actual or 'not comparable'}"
        )
    size = getattr(config, "vocab_size", None)
    if size is not None and len(tokenizer) > size:
        differences.append(
            f"the tokenizer has {len(tokenizer)} ids and the model {size} (resize_token_embeddings adds rows)"
        )
    for owner, settings in (("the configuration", config), ("the generation configuration", generation_config)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            wanted, own = getattr(settings, name, None), getattr(tokenizer, name, None)
            if wanted is None or own is None:
                continue
            wanted = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
            if own not in wanted:
                differences.append(
                    f"{name} is {wanted[0] if len(wanted) == 1 else wanted} in {owner}, {own} in the tokenizer"
                )
    if not differences:
        return
    message = f"tokenizer and model do not match: {'; '.join(dict.fromkeys(differences))}"
    if not allow_tokenizer_mismatch:
        raise ArtifactMismatchError(message, path="tokenizer_checksum", value=actual)
    logger.warning(message)
