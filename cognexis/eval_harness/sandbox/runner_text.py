"""The text that runs inside a sandbox, made of modules of this package."""

import functools
import re
from pathlib import Path

_HERE = Path(__file__).parent


@functools.cache
def joined_source(entry: str) -> str:
    """The channel, both sides and the module ``entry`` as one text, without their imports of each other."""
    texts = [(_HERE / f"{name}.py").read_text("utf-8") for name in ("wire", "program_side", "tests_side", entry)]
    return re.sub(r"^from cognexis\.[^\n(]*(\([^)]*\))?\n", "", "\n".join(texts), flags=re.MULTILINE)
