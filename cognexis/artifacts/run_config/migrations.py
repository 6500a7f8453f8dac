"""Older forms of a run configuration: schema versions and renamed settings.

A document without ``schema_version`` has the current one. Each migration turns a document of its version into one of
the next; renamed settings are accepted in every version. Both warn, once per document, with what to write instead.
"""

import warnings
from collections.abc import Callable
from typing import Any

from cognexis.errors import InvalidConfigError

SCHEMA_VERSION = 1

# Deprecated path -> the path that replaced it.
RENAMED = {
    "inference.total_loop_budget": "inference.compute_budget.max_total_loops",
    "inference.max_generated_tokens": "inference.max_new_tokens",
    "inference.scheduler.gain_threshold": "inference.scheduler.predicted_gain_threshold",
    "inference.cache.kind": "inference.cache.type",
    "training.curriculum": "training.loop_curriculum",
    "safety.max_loops": "safety.max_user_loops",
}


def _from_version_0(document: dict[str, Any]) -> dict[str, Any]:
    """Version 0 had the groups ``generation`` for inference, and ``seed`` and ``name`` outside of sections."""
    document = dict(document)
    run = document.get("run", {})
    for key in ("name", "seed"):
        if key in document and isinstance(run, dict) and key not in run:
            run = {**run, key: document.pop(key)}
            document["run"] = run
    if "generation" in document and "inference" not in document:
        document["inference"] = document.pop("generation")
    return document


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_version_0}


def migrate(document: dict[str, Any]) -> dict[str, Any]:
    """The document in the current version.

    Raises:
        InvalidConfigError: the version is newer than this package, or none at all.
    """
    document = dict(document)
    version = document.get("schema_version", SCHEMA_VERSION)
    known = isinstance(version, int) and not isinstance(version, bool) and 0 <= version <= SCHEMA_VERSION
    if not known:
        reason = f"must be {SCHEMA_VERSION}, or an older version that can be migrated"
        if isinstance(version, int) and version > SCHEMA_VERSION:
            reason += "; a newer version of cognexis wrote this file"
        raise InvalidConfigError(
            f"schema_version={version!r:.100}: {reason}", path="schema_version", value=version, reason=reason
        )
    for old in range(version, SCHEMA_VERSION):
        document = MIGRATIONS[old](document)
        _warn(f"schema_version {old} is deprecated; `cognexis config migrate` writes version {old + 1}")
    document["schema_version"] = SCHEMA_VERSION
    for old_path, new_path in RENAMED.items():
        document = _renamed(document, old_path, new_path)
    return document


def _renamed(document: dict[str, Any], old_path: str, new_path: str) -> dict[str, Any]:
    *folders, old = old_path.split(".")
    group: Any = document
    for name in folders:
        group = group.get(name) if isinstance(group, dict) else None
    if not isinstance(group, dict) or old not in group:
        return document
    document = _copied(document)
    group = document
    for name in folders:
        group = group[name]
    value = group.pop(old)
    _warn(f"{old_path} is deprecated; write {new_path}")
    target: Any = document
    *folders, new = new_path.split(".")
    for name in folders:
        target = target.setdefault(name, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict) or new in target:
        reason = f"given twice, also as {new_path!r}"
        raise InvalidConfigError(f"{old_path}={value!r:.100}: {reason}", path=old_path, value=value, reason=reason)
    target[new] = value
    return document


def _copied(value: Any) -> Any:
    return {key: _copied(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _warn(message: str) -> None:
    warnings.warn(message, FutureWarning, stacklevel=2)
