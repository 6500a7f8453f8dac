"""The fixed ids of every Cognexis tokenizer: control tokens first, then the 256 bytes, then the pieces."""

CONTROL_TOKENS: tuple[str, ...] = (
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<eod>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
)
"""The control tokens; the position is the id."""

BYTE_TOKENS: tuple[str, ...] = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""The pieces that stand for one byte each; their ids follow those of the control tokens."""

BYTE_VALUES: dict[str, int] = {token: byte for byte, token in enumerate(BYTE_TOKENS)}

TOKENIZER_TYPES: tuple[str, ...] = ("sentencepiece", "bpe", "byte_reference")
"""Unigram pieces, byte-pair pieces, or no pieces at all; the three share ids, words and byte fallback."""


def control_name(token: str) -> str:
    """The name of a control token in manifests: ``<|user|>`` is ``user``, ``<eod>`` is ``eod``."""
    return token.strip("<|>") or token
