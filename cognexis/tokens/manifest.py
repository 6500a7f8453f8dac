"""The record beside a tokenizer: what it is, what it does to text, and a checksum that tells it from every other.

    checksum = sha256 of tokenizer.json as JSON with sorted keys and no blanks, without ``padding`` and ``truncation``

Those two are settings of a call that the file format happens to store. Everything else counts: pieces, scores, merges,
control tokens, words, decoder and the tokens put around a text. The sum is therefore the same after saving and loading
again, and on every version of transformers; adding a token changes it, because then ids mean something else.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cognexis.errors import TokenizerError
from cognexis.tokens.layout import TOKENIZER_TYPES

MANIFEST_FILE = "tokenizer_manifest.json"
MANIFEST_VERSION = 1
REQUIRED_CONTROL = ("bos", "eos", "pad", "unk", "eod")

NORMALIZATION: dict[str, Any] = {
    "unicode_form": "none",
    "lowercase": False,
    "whitespace": "kept",
    "digits": "one token each",
    "byte_fallback": True,
    "invalid_utf8": "refused on encoding; replaced by U+FFFD on decoding",
    "special_tokens_in_text": "recognised by the stock call; text for encode_untrusted and chat content",
}
"""What happens to a text before it is cut into pieces: nothing."""

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "type": str,
    "tokenizer_version": str,
    "vocab_size": int,
    "allow_byte_fallback": bool,
    "add_bos_default": bool,
    "add_eos_default": bool,
    "normalization": dict,
    "special_tokens": list,
    "chat_template": (str, type(None)),
    "checksum": str,
}


def backend_checksum(content: str | bytes) -> str:
    """The checksum of a ``tokenizer.json``.

    Raises:
        TokenizerError: the content is no JSON object.
    """
    try:
        model = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
    if not isinstance(model, dict):
        raise TokenizerError("tokenizer.json must hold a JSON object")
    kept = {key: value for key, value in model.items() if key not in ("padding", "truncation")}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def check_special_tokens(tokens: Iterable[Mapping[str, Any]], vocab_size: int) -> None:
    """Check the control tokens of a manifest: names, strings and ids are unique, none is missing or out of range.

    Raises:
        TokenizerError: lists every fault.
    """
    faults, seen = [], {"name": set(), "token": set(), "id": set()}  # type: ignore[var-annotated]
    for entry in tokens:
        if not isinstance(entry, Mapping) or set(entry) != {"name", "token", "id"}:
            faults.append(f"{entry!r} must have the fields name, token and id")
            continue
        index = entry["id"]
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < vocab_size:
            faults.append(f"id {index!r} of {entry['name']} must lie in [0, {vocab_size})")
        for key, values in seen.items():
            value = entry[key]
            if key != "id" and not (isinstance(value, str) and value):
                faults.append(f"{key} must be a string that is not empty, got {value!r}")
            if repr(value) in values:
                faults.append(f"{key} {value!r} occurs twice")
            values.add(repr(value))
    missing = [name for name in REQUIRED_CONTROL if repr(name) not in seen["name"]]
    faults += [f"{name} is missing" for name in missing]
    if faults:
        raise TokenizerError(f"special tokens of the tokenizer: {'; '.join(faults)}")


def check_manifest(manifest: Any) -> dict[str, Any]:
    """Return ``manifest`` if it is well formed.

    Raises:
        TokenizerError: names the first field that is missing, of another type or out of range.
    """
    if not isinstance(manifest, dict):
        raise TokenizerError(f"{MANIFEST_FILE} must hold a JSON object")
    for name, kind in _FIELDS.items():
        if name not in manifest:
            raise TokenizerError(f"{MANIFEST_FILE}: {name} is missing")
        value = manifest[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TokenizerError(f"{MANIFEST_FILE}: {name}={value!r} has the wrong type")
    rules = {
        "schema_version": (manifest["schema_version"] == MANIFEST_VERSION, f"must be {MANIFEST_VERSION}"),
        "type": (manifest["type"] in TOKENIZER_TYPES, f"must be one of {', '.join(TOKENIZER_TYPES)}"),
        "tokenizer_version": (manifest["tokenizer_version"].strip() != "", "must not be empty"),
        "vocab_size": (manifest["vocab_size"] > 0, "must be positive"),
        "checksum": (re.fullmatch(r"sha256:[0-9a-f]{64}", manifest["checksum"]), "must be sha256: and 64 hex digits"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise TokenizerError(f"{MANIFEST_FILE}: {name}={manifest[name]!r} {rule}")
    check_special_tokens(manifest["special_tokens"], manifest["vocab_size"])
    return manifest


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        TokenizerError: the file is no JSON, or the manifest is malformed.
    """
    try:
        manifest = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{MANIFEST_FILE} cannot be read: {error}") from error
    return check_manifest(manifest)


def manifest_differences(written: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """What a manifest says that the tokenizer beside it does not confirm, one sentence each."""
    different = []
    for name in ("checksum", "vocab_size", "add_bos_default", "add_eos_default", "chat_template", "special_tokens"):
        if written[name] != actual[name]:
            detail = "" if name == "special_tokens" else f" {written[name]!r}, the tokenizer has {actual[name]!r}"
            different.append(f"{MANIFEST_FILE} says {name}{detail or ' other than those of the tokenizer'}")
    return different
