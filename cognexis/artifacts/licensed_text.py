"""Permissively licensed text that is already installed: code, documentation and translations for a tokenizer.

    source code       the standard library and well-known packages, docstrings included
    prose             the topics of Python's help, and the packages' descriptions, which are Markdown
    other languages   the translations that come with Django, when it is installed

Every source has a budget, so that the mixture depends little on what else a machine has. Within a package the files
are taken in the order of a hash of their name. Tests and generated files are left out.
"""

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognexis.artifacts.text_corpus import LICENCE, Corpus, standard_library_corpus
from cognexis.errors import InvalidConfigError

_LEFT_OUT = re.compile(r"(^|/)(tests?|testing|_vendor|__pycache__|locale_data)/|(^|/)test_|_generated|\.dist-info/")
_TRANSLATION = re.compile(r'^msgstr(?:\[\d\])? ((?:"(?:[^"\\]|\\.)*"\s*)+)', re.MULTILINE)
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class TextSource:
    """An installed distribution whose licence permits training on its text.

    Attributes:
        distribution: name as pip knows it.
        licence: SPDX identifier.
        share: part of the whole text that it may make up.
        suffix: which of its files are read.
    """

    distribution: str
    licence: str
    share: float
    suffix: str = ".py"


SOURCES = (
    TextSource("numpy", "BSD-3-Clause", 0.07),
    TextSource("pandas", "BSD-3-Clause", 0.10),
    TextSource("networkx", "BSD-3-Clause", 0.07),
    TextSource("sympy", "BSD-3-Clause", 0.06),
    TextSource("torch", "BSD-3-Clause", 0.10),
    TextSource("transformers", "Apache-2.0", 0.10),
    TextSource("huggingface_hub", "Apache-2.0", 0.04),
    TextSource("Django", "BSD-3-Clause", 0.12, ".po"),
)
_STANDARD_LIBRARY_SHARE = 0.30


def installed_corpora(max_characters: int) -> list[Corpus]:
    """Read the sources of this machine.

    Args:
        max_characters: upper bound of all corpora together; a source that is missing leaves its share unused.

    Returns:
        One corpus for each source that was found; the standard library comes first.

    Raises:
        InvalidConfigError: ``max_characters`` is not positive.
    """
    if max_characters < 1:
        raise InvalidConfigError(f"max_characters must be positive, got {max_characters}")
    found = [standard_library_corpus(max(1, int(max_characters * _STANDARD_LIBRARY_SHARE))), _help_topics()]
    found += [_package_corpus(source, int(max_characters * source.share)) for source in SOURCES]
    return [corpus for corpus in found if corpus.documents]


def corpora_manifest(corpora: Iterable[Corpus]) -> list[dict[str, Any]]:
    """What the corpora are, for the manifest of what was made of them."""
    return [corpus.manifest() for corpus in corpora]


def _help_topics() -> Corpus:
    """Python's help on its syntax; empty where an installation lacks it."""
    try:
        from pydoc_data import topics as module
    except ImportError:
        return Corpus((), (), "Python help topics", "", LICENCE)
    topics: dict[str, str] = module.topics
    names = sorted(topics)
    return Corpus(
        documents=tuple(topics[name] for name in names),
        names=tuple(names),
        package="Python help topics",
        version=platform.python_version(),
        licence=LICENCE,
    )


def _package_corpus(source: TextSource, max_characters: int) -> Corpus:
    try:
        distribution = importlib.metadata.distribution(source.distribution)
    except importlib.metadata.PackageNotFoundError:
        return Corpus((), (), source.distribution, "", source.licence)
    chosen: dict[str, str] = {}
    for name, text in _texts_of(distribution, source):
        if text and len(text) <= max_characters and text not in chosen:
            chosen[text] = name
            max_characters -= len(text)
    return Corpus(
        documents=tuple(chosen),
        names=tuple(chosen.values()),
        package=source.distribution,
        version=distribution.version,
        licence=source.licence,
    )


def _texts_of(distribution: importlib.metadata.Distribution, source: TextSource) -> Iterator[tuple[str, str]]:
    yield "description", str(distribution.metadata.json.get("description", ""))
    files = [file for file in distribution.files or () if str(file).endswith(source.suffix)]
    names = {Path(str(file)).as_posix(): file for file in files}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if not _LEFT_OUT.search(name):
            text = _read(Path(str(distribution.locate_file(names[name]))))
            yield name, _translations(text) if source.suffix == ".po" else text


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _translations(catalogue: str) -> str:
    """The translated sentences of a gettext catalogue, one a line."""
    sentences = ("".join(_QUOTED.findall(found)) for found in _TRANSLATION.findall(catalogue))
    unescaped = (re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), text) for text in sentences)
    return "\n".join(text for text in unescaped if text)
