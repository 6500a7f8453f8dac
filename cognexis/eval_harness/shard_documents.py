"""The documents behind a ``data_manifest.json``, checked against its checksums.

    {"schema_version": 1, "shards": [{"path", "format", "sha256", ...}], "tokenizer": {"checksum"}, "sha256"}

``token_ids_u32`` is a stream of unsigned 32-bit little-endian ids, its documents end to end, and is handed on as one
document; ``jsonl_text`` and ``jsonl_token_ids`` are read line by line. Other formats are refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cognexis.checkpoints.hashing import file_checksum
from cognexis.checkpoints.json_file import JSON_LIMIT, parse_strict_json, read_bytes
from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.tokens.match import tokenizer_checksum

DATA_MANIFEST = "data_manifest.json"
_TOKENS, _LINES = "token_ids_u32", ("jsonl_text", "jsonl_token_ids")


def shard_documents(
    manifest: Path, tokenizer: Any, read_lines: Callable[[Path], list[str | list[int]]]
) -> Iterator[str | list[int]]:
    """Every document of the shards, in their order.

    Args:
        manifest: the file.
        tokenizer: that of the model; token shards must be made with it.
        read_lines: reads a JSONL file.

    Raises:
        InvalidConfigError: the manifest is damaged, a shard is missing or of another format.
        ArtifactMismatchError: a checksum is not that of the content, or the tokens are another tokenizer's.
    """
    content = _verified(manifest)
    own, theirs = tokenizer_checksum(tokenizer), (content.get("tokenizer") or {}).get("checksum")
    for shard in content["shards"]:
        path, kind = manifest.parent / shard["path"], shard["format"]
        if not path.is_file() or not path.resolve().is_relative_to(manifest.parent.resolve()):
            raise InvalidConfigError(f"{manifest}: shard {shard['path']!r}: must be a file in the manifest's folder")
        if (actual := file_checksum(path)) != shard["sha256"]:
            raise ArtifactMismatchError(f"{path}: has checksum {actual}, its manifest says {shard['sha256']}")
        if kind == _TOKENS:
            if theirs is not None and theirs != own:
                raise ArtifactMismatchError(f"{manifest}: made with tokenizer {theirs}, the model has {own}")
            yield np.fromfile(path, dtype="<u4").tolist()
        elif kind in _LINES:
            yield from read_lines(path)
        else:
            allowed = ", ".join((_TOKENS, *_LINES))
            raise InvalidConfigError(f"{manifest}: shard {shard['path']!r}: format={kind!r}: must be one of {allowed}")


def _verified(manifest: Path) -> dict[str, Any]:
    def refuse(reason: str) -> NoReturn:
        raise InvalidConfigError(f"{manifest}: {reason}", path="path", value=str(manifest))

    content = parse_strict_json(read_bytes(manifest, JSON_LIMIT), refuse)
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list) or not shards:
        refuse("shards: must be a list with at least one entry; is this the manifest of `cognexis data build`?")
    if not all(isinstance(shard, dict) and {"path", "format", "sha256"} <= shard.keys() for shard in shards):
        refuse("shards: every entry needs path, format and sha256")
    recorded = content.pop("sha256", None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    actual = f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
    if recorded != actual:
        raise ArtifactMismatchError(f"{manifest}: the content has checksum {actual}, the file says {recorded}")
    return content
