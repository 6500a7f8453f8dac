"""A real corpus made of text that is installed on this machine, with its licences.

    code, prose, translations   the standard library and well-known packages (``cognexis.artifacts.licensed_text``)
    dialogue                    the package chatterbot-corpus, where it is installed
    documentation               documentation packages of Debian, where they are installed

Nothing is downloaded. Every source is recorded with package, version, licence, size and checksum. Documentation under
the GNU licences is read only if that is asked for. A text that several packages have counts once.
"""

import gzip
import hashlib
import importlib.metadata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cognexis.artifacts.licensed_text import corpora_manifest, installed_corpora
from cognexis.artifacts.text_corpus import Corpus
from cognexis.errors import InvalidConfigError
from cognexis.training.data.inputs import DataInput
from cognexis.training.data.sources import DocumentSource

INSTALLED = "installed"
"""The input that stands for the licensed text of this machine."""

_DOMAINS = {"Python help topics": "prose", "Django": "translations", "chatterbot-corpus": "dialogue"}
_DIALOGUE_SHARE = 0.05
_LARGEST_FILE = 4 * 2**20


@dataclass(frozen=True)
class DebianSource:
    """A package of Debian whose documentation is text.

    Attributes:
        package: its name.
        licence: SPDX expression of the documentation.
        suffixes: which of its files are read, compressed or not.
        share: part of the whole text that it may make up.
        is_copyleft: whether the licence is one of the GNU family.
    """

    package: str
    licence: str
    suffixes: tuple[str, ...]
    share: float
    is_copyleft: bool = True


DEBIAN_SOURCES = (
    DebianSource("python3.11-doc", "PSF-2.0", (".rst", ".rst.txt"), 0.20, is_copyleft=False),
    DebianSource("linux-doc-6.1", "GPL-2.0-only", (".rst",), 0.25),
    DebianSource("git-doc", "GPL-2.0-only", (".txt",), 0.10),
    DebianSource("perl-doc", "GPL-1.0-or-later OR Artistic-1.0-Perl", (".pod",), 0.10),
    DebianSource("anarchism", "GPL-2.0-or-later", (".md", ".markdown"), 0.10),
    DebianSource("debian-policy", "GPL-2.0-or-later", (".txt", ".rst"), 0.05),
    DebianSource("developers-reference", "GPL-2.0-or-later", (".txt", ".rst"), 0.05),
)


def installed_inputs(
    max_characters: int, *, copyleft: bool = False, root: Path = Path("/")
) -> tuple[list[DataInput], list[dict[str, Any]]]:
    """The licensed text of this machine as inputs of a build, and the record of where it comes from.

    Args:
        max_characters: upper bound of all texts together.
        copyleft: read documentation under the GNU licences, too.
        root: where Debian's files lie.

    Raises:
        InvalidConfigError: ``max_characters`` is not positive, or nothing was found.
    """
    if max_characters < 1:
        raise InvalidConfigError(f"max_characters={max_characters}: must be positive", path="max_characters")
    found = [*installed_corpora(max_characters), dialogue_corpus(int(max_characters * _DIALOGUE_SHARE))]
    for source in DEBIAN_SOURCES:
        if copyleft or not source.is_copyleft:
            found.append(debian_corpus(source, int(max_characters * source.share), root))
    corpora = [corpus for corpus in _within(max_characters, _without_repeats(found)) if corpus.documents]
    if not corpora:
        raise InvalidConfigError(f"max_characters={max_characters}: no text fits; raise it", path="max_characters")
    inputs = []
    for corpus in sorted(corpora, key=_domain_of):
        texts = list(zip(corpus.names, corpus.documents, strict=True))
        documents = DocumentSource(corpus.package, texts, [corpus.sha256])
        inputs.append(DataInput(documents, domain=_domain_of(corpus), on_control="text"))
    return inputs, corpora_manifest(corpora)


def dialogue_corpus(max_characters: int) -> Corpus:
    """The English dialogues of chatterbot-corpus, a turn a line; empty where it is not installed."""
    try:
        distribution = importlib.metadata.distribution("chatterbot-corpus")
    except importlib.metadata.PackageNotFoundError:
        return Corpus((), (), "chatterbot-corpus", "", "BSD-3-Clause")
    files = sorted(
        str(file) for file in distribution.files or () if "/english/" in f"/{file}" and file.suffix == ".yml"
    )
    pairs = ((name, text) for name in files for text in _dialogues(Path(str(distribution.locate_file(name)))))
    return _corpus("chatterbot-corpus", distribution.version, "BSD-3-Clause", pairs, max_characters)


def debian_corpus(source: DebianSource, max_characters: int, root: Path = Path("/")) -> Corpus:
    """The text of an installed package of Debian; empty where it is not installed."""
    listing = root / "var/lib/dpkg/info" / f"{source.package}.list"
    version = _debian_version(source.package, root)
    names: list[str] = []
    if version and listing.is_file():
        lines = listing.read_text("utf-8", "replace").splitlines()
        names = [name for name in lines if name.removesuffix(".gz").endswith(source.suffixes)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    pairs = ((name.lstrip("/"), _read(root / name.lstrip("/"))) for name in names)
    return _corpus(source.package, version, source.licence, pairs, max_characters)


def _corpus(package: str, version: str, licence: str, pairs: Iterable[tuple[str, str]], max_characters: int) -> Corpus:
    """Whole texts until ``max_characters`` are reached; one that does not fit is passed over."""
    chosen: dict[str, str] = {}
    for name, text in pairs:
        if text.strip() and len(text) <= max_characters and text not in chosen:
            chosen[text] = name
            max_characters -= len(text)
    return Corpus(tuple(chosen), tuple(chosen.values()), package, version, licence)


def _without_repeats(corpora: Iterable[Corpus]) -> Iterator[Corpus]:
    seen: set[str] = set()
    for corpus in corpora:
        new = [index for index, text in enumerate(corpus.documents) if text not in seen]
        seen.update(corpus.documents)
        yield _select(corpus, new)


def _within(max_characters: int, corpora: Iterable[Corpus]) -> Iterator[Corpus]:
    for corpus in corpora:
        kept = []
        for index, text in enumerate(corpus.documents):
            if len(text) <= max_characters:
                kept.append(index)
                max_characters -= len(text)
        yield _select(corpus, kept)


def _select(corpus: Corpus, indices: list[int]) -> Corpus:
    documents = tuple(corpus.documents[index] for index in indices)
    return replace(corpus, documents=documents, names=tuple(corpus.names[index] for index in indices))


def _domain_of(corpus: Corpus) -> str:
    if any(source.package == corpus.package for source in DEBIAN_SOURCES):
        return "documentation"
    return _DOMAINS.get(corpus.package, "code")


def _dialogues(path: Path) -> Iterator[str]:
    content = yaml.safe_load(_read(path)) or {}
    for turns in content.get("conversations", ()):
        yield "\n".join(str(turn).strip() for turn in turns) + "\n"


def _debian_version(package: str, root: Path) -> str:
    status = root / "var/lib/dpkg/status"
    if not status.is_file():
        return ""
    for entry in status.read_text("utf-8", "replace").split("\n\n"):
        if entry.startswith(f"Package: {package}\n") and "\nStatus: install ok installed" in entry:
            return next((line[9:] for line in entry.splitlines() if line.startswith("Version: ")), "")
    return ""


def _read(path: Path) -> str:
    """The text; empty if it is missing, large, damaged or not UTF-8."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return ""
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""
