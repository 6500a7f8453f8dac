"""The tokenizer that comes with the package: 8192 ids, trained on the text that ``licensed_text`` finds.

Its manifest names the sources with versions, licences and hashes. ``cognexis tokenizer train installed`` makes such a
tokenizer from what a machine has.
"""

from pathlib import Path

from cognexis.tokenization_cognexis import CognexisTokenizer

DEFAULT_TOKENIZER = Path(__file__).parent / "default_tokenizer"


def load_default_tokenizer() -> CognexisTokenizer:
    """Load the shipped tokenizer.

    Raises:
        ArtifactMismatchError: its files were changed.
    """
    return CognexisTokenizer.from_pretrained(DEFAULT_TOKENIZER)
