"""Real text that is already on the machine: the source code of Python's standard library.

It needs no download, every Python installation that can run this package has it, and its licence
(PSF-2.0) permits the use. What is in a corpus follows from the installation alone:

* Files are taken in the order of a hash of their name, so a smaller corpus is a fair sample and not
  the first letters of the alphabet; a file that no longer fits ``max_characters`` is passed over.
* Left out are installed packages, tests, generated tables, and the parts that distributions package
  separately and may lack. Files that are not UTF-8, empty, or equal to an earlier one are left out too.
* Whether a file is held out follows from another hash of its name. So no file stands on both sides, and
  a file stays on its side when the size of the corpus changes.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognexis.errors import InvalidConfigError

LICENCE = "PSF-2.0"
PACKAGE = "Python standard library"

_EXCLUDED_FOLDERS = frozenset(
    (
        *("site-packages", "dist-packages", "__pycache__", "test", "tests"),
        *("encodings", "pydoc_data"),  # generated tables
        *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"),  # packaged separately
    )
)
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars")  # written when Python was built
_EXCLUDED_FILES = frozenset(("html/entities.py", "stringprep.py", "sitecustomize.py", "turtle.py"))


@dataclass(frozen=True)
class Corpus:
    """Documents with their names and their origin."""

    documents: tuple[str, ...]
    names: tuple[str, ...]
    """Path of each document inside the package, with forward slashes."""
    package: str
    version: str
    licence: str
    """SPDX identifier."""

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def num_characters(self) -> int:
        return sum(map(len, self.documents))

    @property
    def num_bytes(self) -> int:
        """Size in UTF-8, the denominator of bits per byte."""
        return sum(len(document.encode()) for document in self.documents)

    @property
    def sha256(self) -> str:
        """Hash of all names and documents in order."""
        digest = hashlib.sha256()
        for name, document in zip(self.names, self.documents, strict=True):
            for part in (name.encode(), document.encode()):
                digest.update(len(part).to_bytes(8, "big"))
                digest.update(part)
        return digest.hexdigest()

    def split(self, held_out_share: float = 0.05) -> tuple[Corpus, Corpus]:
        """Divide the documents into training and held-out documents.

        Args:
            held_out_share: expected share of held-out documents, in (0, 1).

        Raises:
            InvalidConfigError: the share is out of range, or one side would be empty.
        """
        if not 0 < held_out_share < 1:
            raise InvalidConfigError(f"held_out_share must be in (0, 1), got {held_out_share}")
        is_held_out = [_fraction("split", name) < held_out_share for name in self.names]
        training = self._select([not held_out for held_out in is_held_out])
        held_out = self._select(is_held_out)
        if not training.documents or not held_out.documents:
            raise InvalidConfigError(
                f"held_out_share={held_out_share} leaves {len(training)} training and {len(held_out)} "
                f"held-out documents of {len(self)}: use a larger corpus or another share"
            )
        return training, held_out

    def manifest(self) -> dict[str, Any]:
        """What the corpus is, for the ``data_manifest.json`` beside a model."""
        return {
            "package": self.package,
            "version": self.version,
            "licence": self.licence,
            "sha256": self.sha256,
            "num_files": len(self),
            "num_characters": self.num_characters,
            "num_bytes": self.num_bytes,
        }

    def _select(self, keep: list[bool]) -> Corpus:
        chosen = [index for index, kept in enumerate(keep) if kept]
        return Corpus(
            documents=tuple(self.documents[index] for index in chosen),
            names=tuple(self.names[index] for index in chosen),
            package=self.package,
            version=self.version,
            licence=self.licence,
        )


def standard_library_corpus(max_characters: int, root: Path | None = None) -> Corpus:
    """Read at most ``max_characters`` of the running interpreter's standard library.

    Args:
        max_characters: upper bound of the corpus size; only whole files are taken.
        root: the folder to read; None means where this interpreter keeps its library.

    Raises:
        InvalidConfigError: ``max_characters`` is not positive, or no source file fits, as in an installation
            that keeps its library compiled or zipped.
    """
    if max_characters < 1:
        raise InvalidConfigError(f"max_characters must be positive, got {max_characters}")
    root = root or Path(sysconfig.get_path("stdlib"))
    chosen: dict[str, str] = {}  # text -> name
    room = max_characters
    for name in sorted(_source_names(root), key=lambda name: (_fraction("order", name), name)):
        text = _read_text(root / name)
        if text and len(text) <= room and text not in chosen:
            chosen[text] = name
            room -= len(text)
    if not chosen:
        raise InvalidConfigError(
            f"no Python source file of at most {max_characters} characters in {root}: "
            f"raise max_characters, or use a Python installation that has its library as source files"
        )
    return Corpus(
        documents=tuple(chosen),
        names=tuple(chosen.values()),
        package=PACKAGE,
        version=f"{platform.python_implementation()} {platform.python_version()}",
        licence=LICENCE,
    )


def _source_names(root: Path) -> Iterator[str]:
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _EXCLUDED_FOLDERS.intersection(relative.parts) or relative.as_posix() in _EXCLUDED_FILES:
            continue
        if not relative.parts[0].startswith(_EXCLUDED_PREFIXES):
            yield relative.as_posix()


def _read_text(path: Path) -> str:
    """The text with its line ends as they are; empty if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _fraction(purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on nothing but the arguments."""
    digest = hashlib.sha256(f"{purpose}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
