"""Compare the shards of a manifest with what it says about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cognexis.checkpoints.hashing import file_checksums
from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.training.data.manifest import TOKEN_FORMAT, DataManifest, ShardEntry
from cognexis.training.data.token_shard import TOKEN_TYPE, TokenShard


@dataclass(frozen=True)
class DataVerification:
    """What a check found.

    Attributes:
        num_files: files whose content was hashed.
        num_documents: documents that the manifest promises.
        num_tokens: tokens that it promises.
        faults: what does not match, a sentence each.
    """

    num_files: int
    num_documents: int
    num_tokens: int
    faults: tuple[str, ...]


def verify_data(manifest: DataManifest, *, contents: bool = True, vocab_size: int | None = None) -> DataVerification:
    """Check every shard.

    Args:
        contents: hash the files and read the shards through; False compares sizes and counts only.
        vocab_size: token ids lie below it; None takes what the manifest says of the tokenizer.
    """
    faults: list[str] = []
    files: list[tuple[Path, str]] = []
    sound: list[ShardEntry] = []
    for shard in manifest.shards:
        found = _file_faults(manifest, shard)
        faults += found
        if not found:
            sound.append(shard)
            files += _files_of(manifest, shard)
    if contents:
        for (path, expected), actual in zip(files, file_checksums(path for path, _ in files), strict=True):
            if actual != expected:
                faults.append(f"{path}: content {actual} is not the {expected} of the manifest")
        if vocab_size is None and manifest.tokenizer is not None:
            vocab_size = manifest.tokenizer.get("vocab_size")
        faults += _content_faults(manifest, sound, vocab_size)
    return DataVerification(
        len(files) if contents else 0, manifest.num_documents, manifest.num_tokens, tuple(dict.fromkeys(faults))
    )


def require_sound(manifest: DataManifest, *, contents: bool = True) -> None:
    """Raise where a shard is not what the manifest says.

    Raises:
        ArtifactMismatchError: lists every fault.
    """
    result = verify_data(manifest, contents=contents)
    if result.faults:
        raise ArtifactMismatchError(
            f"{manifest.folder}: {len(result.faults)} faults in the data: " + "; ".join(result.faults), path="shards"
        )


def _files_of(manifest: DataManifest, shard: ShardEntry) -> list[tuple[Path, str]]:
    path = manifest.folder / shard.path
    return [(path, shard.sha256), *((path.with_suffix(suffix), value) for suffix, value in shard.companions.items())]


def _file_faults(manifest: DataManifest, shard: ShardEntry) -> list[str]:
    """Missing files, links that lead out of the folder, and counts that cannot be."""
    root = manifest.folder.resolve()
    for path, _ in _files_of(manifest, shard):
        if not path.is_file():
            return [f"{path}: missing"]
        if not path.resolve().is_relative_to(root):
            return [f"{path}: leads out of the folder of the manifest"]
    path = manifest.folder / shard.path
    if shard.format != TOKEN_FORMAT:
        return []
    if (size := path.stat().st_size) != (shard.num_tokens or 0) * TOKEN_TYPE.itemsize:
        return [f"{path}: {size} bytes, but num_tokens={shard.num_tokens} takes {(shard.num_tokens or 0) * 4}"]
    try:
        opened = open_shard(manifest, shard)
    except InvalidConfigError as error:
        return [str(error)]
    if opened.has_mask != (".mask" in shard.companions):
        return [f"{path.with_suffix('.mask')}: {'is not in the manifest' if opened.has_mask else 'missing'}"]
    if opened.num_documents != shard.num_documents:
        return [f"{path}: holds {opened.num_documents} documents, num_documents={shard.num_documents}"]
    return []


def _content_faults(manifest: DataManifest, shards: Sequence[ShardEntry], vocab_size: int | None) -> list[str]:
    faults = []
    for shard in shards:
        if shard.format == TOKEN_FORMAT:
            try:
                open_shard(manifest, shard).check_contents(vocab_size)
            except InvalidConfigError as error:
                faults.append(str(error))
    return faults


def open_shard(manifest: DataManifest, shard: ShardEntry) -> TokenShard:
    """The token shard of an entry."""
    eod = (manifest.tokenizer or {}).get("eod_token_id")
    return TokenShard(manifest.folder / shard.path, eod)
