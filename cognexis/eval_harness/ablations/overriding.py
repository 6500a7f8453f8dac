"""Overrides of a run configuration: documents merged over a base, later ones win.

    merged = base <- overrides of the command line <- changed factor <- seed and output folder

A mapping is merged key by key and every other value is replaced, a list and null included. Both documents are brought
to the canonical names of the settings first, so ``model: {recurrent: {gating: false}}`` changes what the base wrote as
``recurrent_gating: true``. Values that the base derived from a changed setting are derived anew.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cognexis.artifacts.run_config import RunConfig, apply_overrides
from cognexis.artifacts.run_config.documents import read_document
from cognexis.errors import InvalidConfigError

# What a trained model can be asked without training it again.
RUN_TIME_SECTIONS = ("inference", "evaluation")


def merged(base: RunConfig, *documents: Mapping[str, Any]) -> RunConfig:
    """The base with each document over it, in this order.

    Raises:
        InvalidConfigError: lists every unknown setting, or every fault of the result.
    """
    for document in documents:
        if texts := override_texts(document):
            base = apply_overrides(base, texts)
    return base


def override_texts(document: Mapping[str, Any]) -> list[str]:
    """The document as "section=value" texts; a section without settings changes nothing.

    Raises:
        InvalidConfigError: it is no mapping of sections.
    """
    if not isinstance(document, Mapping) or not all(isinstance(key, str) for key in document):
        raise InvalidConfigError(f"overrides={document!r}: must be a mapping of sections", path="overrides")
    return [f"{name}={json.dumps(value)}" for name, value in document.items() if value != {}]


def read_overrides(source: Mapping[str, Any] | str, folder: Path) -> dict[str, Any]:
    """A mapping as it is, or the file of that name in ``folder``.

    Raises:
        InvalidConfigError: the file is missing or no mapping.
    """
    return dict(source) if isinstance(source, Mapping) else read_document(folder / source)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    document: dict[str, Any] = {}
    for path, value in settings.items():
        *groups, name = path.split(".")
        place = document
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return document


def paths_of(document: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of the settings that a document of overrides changes."""
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from paths_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def needs_training(document: Mapping[str, Any]) -> bool:
    """Whether weights depend on what the document changes."""
    return any(path.split(".")[0] not in RUN_TIME_SECTIONS for path in paths_of(document))
