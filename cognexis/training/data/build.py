"""Makes token shards and their manifest; an interrupted build goes on where it was.

Everything is written into ``.NAME.building`` beside the output folder NAME. Whenever the open shards have reached
their size, they are closed and hashed, and ``progress.json`` is replaced: from then on these shards count. A build
that dies leaves its folder; the next one with the same settings removes what does not count yet and reads on from the
recorded place. At the end the manifests are written and the folder gets its name, in one step. Where shards are cut
depends on the records alone, so an interrupted build gives the same bytes as one that ran through.

With a validation share, documents go to ``train`` or ``validation`` by a hash of their tokens, so equal documents are
on the same side.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cognexis.checkpoints.hashing import file_checksums
from cognexis.checkpoints.json_file import read_json, sync, write_json
from cognexis.errors import ArtifactMismatchError, CheckpointError, InvalidConfigError
from cognexis.training.data.corruption import FaultHandler, RecordCounts, check_policy
from cognexis.training.data.inputs import DataInput, WeightedSource, open_inputs
from cognexis.training.data.manifest import (
    DATA_MANIFEST,
    TOKEN_FORMAT,
    DataManifest,
    ShardEntry,
    canonical_checksum,
)
from cognexis.training.data.pipeline import Document, DocumentPipeline, Filter, LengthFilter
from cognexis.training.data.shard_writer import TokenShardWriter
from cognexis.training.data.sources import LONGEST_RECORD
from cognexis.training.data.token_shard import SUFFIXES

PROGRESS_FILE, LOCK_FILE, QUARANTINE_FILE = "progress.json", ".lock", "quarantine.jsonl"
TRAIN, VALIDATION = "train", "validation"
_SETTINGS = (
    *("policy", "shard_tokens", "validation_share", "add_bos", "learned", "learn_end"),
    *("min_characters", "max_characters", "longest_record"),
)


@dataclass(frozen=True)
class BuildOrder:
    """What ``build_data`` shall make.

    Attributes:
        inputs: what is read, in this order.
        output_dir: the new folder.
        tokenizer: a ``CognexisTokenizer``.
        policy: ``fail``, ``skip`` or ``quarantine``.
        shard_tokens: a shard is closed when it has reached so many tokens.
        validation_share: expected share of documents that are held out, 0 or in (0, 1).
        add_bos: begin raw text with ``<s>``.
        learned: what is learned of chats, ``assistant`` or ``all``.
        learn_end: learn the ``<|end|>`` of the assistant.
        min_characters: shorter texts are left out.
        max_characters: longer texts are left out; None takes any.
        longest_record: bytes of the longest line that is read.
        filters: further quality filters; a build with these is not resumed.
        sources: packages, versions, licences and checksums, for the manifest.
    """

    inputs: Sequence[DataInput]
    output_dir: str | Path
    tokenizer: Any
    policy: str = "fail"
    shard_tokens: int = 2**27
    validation_share: float = 0.0
    add_bos: bool = True
    learned: str = "assistant"
    learn_end: bool = True
    min_characters: int = 0
    max_characters: int | None = None
    longest_record: int = LONGEST_RECORD
    filters: Sequence[Filter] = ()
    sources: Sequence[dict[str, Any]] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """What the manifest says about how the shards were made."""
        return {name: getattr(self, name) for name in _SETTINGS}


def build_data(
    order: BuildOrder, report: Callable[[str], None] = lambda line: None, *, restart: bool = False
) -> dict[str, DataManifest]:
    """Make the shards; see the module docstring.

    Args:
        order: what to make.
        report: receives a line now and then.
        restart: discard what an interrupted build of this folder left.

    Returns:
        The manifests by folder: ``train`` and ``validation``, or one under an empty name.

    Raises:
        InvalidConfigError: a setting, an input or, under ``fail``, a record breaks a rule. Settings and inputs are
            checked before anything is written.
        ArtifactMismatchError: an unfinished build of the same name was made with other settings or inputs.
        CheckpointError: the folder cannot be written, or another process builds it.
    """
    target = _check(order)
    pipeline = DocumentPipeline(
        order.tokenizer,
        filters=(LengthFilter(order.min_characters, order.max_characters), *order.filters),
        add_bos=order.add_bos,
        learned=order.learned,
        learn_end=order.learn_end,
    )
    sources = open_inputs(order.inputs, order.longest_record)
    staging = target.with_name(f".{target.name}.building")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with _locked(staging):
            if restart:
                (staging / PROGRESS_FILE).unlink(missing_ok=True)
            try:
                build = _Build(order, sources, staging, report)
                build.run(pipeline)
                return build.finish(target)
            finally:
                if staging.is_dir() and not (staging / PROGRESS_FILE).exists():
                    shutil.rmtree(staging)  # nothing in it counts
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written: {error.strerror or error}; the same build goes on from what is in {staging}"
        ) from error


def _check(order: BuildOrder) -> Path:
    """Refuse bad settings and an output folder that is in use; the resolved folder."""

    def require(name: str, is_valid: bool, rule: str) -> None:
        if not is_valid:
            value = getattr(order, name)
            raise InvalidConfigError(f"{name}={value!r}: {rule}", path=name, value=value)

    check_policy(order.policy)
    for name in ("shard_tokens", "longest_record"):
        value = getattr(order, name)
        require(name, type(value) is int and 1 <= value < 2**40, "must be a whole number of 1 or more")
    for name in ("min_characters", "max_characters"):
        value = getattr(order, name)
        none_allowed = name == "max_characters" and value is None
        require(name, none_allowed or (type(value) is int and value >= 0), "must be a whole number of 0 or more")
    share = order.validation_share
    require("validation_share", isinstance(share, int | float) and 0 <= share < 1, "must be 0 or in (0, 1)")
    target = Path(order.output_dir).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InvalidConfigError(
            f"output_dir={str(order.output_dir)!r}: exists already; remove it or choose another folder",
            path="output_dir",
            value=str(order.output_dir),
        )
    return target


class _Build:
    """One build: the open shards, and what counts already."""

    def __init__(
        self, order: BuildOrder, sources: Sequence[WeightedSource], staging: Path, report: Callable[[str], None]
    ) -> None:
        self.order, self.sources, self.staging, self.report = order, sources, staging, report
        self.splits = (TRAIN, VALIDATION) if order.validation_share else ("",)
        self.tokenizer = tokenizer_facts(order.tokenizer)
        self.identity = self._identity()
        self.shards: dict[str, list[ShardEntry]] = {split: [] for split in self.splits}
        self.counts = RecordCounts()
        self.source, self.position, self.quarantine_bytes = 0, 0, 0
        self.writers: dict[str, TokenShardWriter] = {}
        self.quarantined: list[dict[str, Any]] = []
        self._recover()

    def run(self, pipeline: DocumentPipeline) -> None:
        """Read every source to its end."""
        handler = FaultHandler(self.order.policy, self.counts, self.quarantined.append)
        try:
            while self.source < len(self.sources):
                weighted = self.sources[self.source]
                for record, document in pipeline.documents(
                    weighted.source.read(self.position), handler, weighted.on_control
                ):
                    self.position = record.next_position
                    if document is not None:
                        self._add(document, weighted)
                following = self.sources[self.source + 1 : self.source + 2]
                self.source, self.position = self.source + 1, 0
                if not following or (following[0].domain, following[0].weight) != (weighted.domain, weighted.weight):
                    self._commit(weighted)
        finally:
            for writer in self.writers.values():
                writer.discard()

    def finish(self, target: Path) -> dict[str, DataManifest]:
        """Write the manifests and give the folder its name."""
        manifests = {}
        for split, shards in self.shards.items():
            if not shards:
                raise InvalidConfigError(
                    f"inputs: no document for {split or 'the shards'} in {self.counts.read} records "
                    f"({_summary(self.counts)})",
                    path="inputs",
                )
            manifests[split] = DataManifest(
                tuple(shards),
                target / split,
                tokenizer=self.tokenizer,
                settings=self.order.settings(),
                counts=self.counts.as_dict(),
                sources=list(self.order.sources) or None,
            )
        for split, manifest in manifests.items():
            manifest.write(self.staging / split / DATA_MANIFEST)
        sync(self.staging)
        os.rename(self.staging, target)
        sync(target.parent)
        for name in (PROGRESS_FILE, LOCK_FILE):
            (target / name).unlink(missing_ok=True)
        self.report(f"{sum(manifest.num_tokens for manifest in manifests.values()):,} tokens in {target}")
        return manifests

    def _add(self, document: Document, weighted: WeightedSource) -> None:
        tokens = np.asarray(document.tokens, "<u4")
        split = self._split_of(tokens)
        if split not in self.writers:
            self.writers[split] = self._open_writer(split, weighted.domain)
        self.writers[split].add(tokens, document.is_target)
        if sum(writer.num_tokens for writer in self.writers.values()) >= self.order.shard_tokens:
            self._commit(weighted)

    def _split_of(self, tokens: np.ndarray[Any, Any]) -> str:
        if len(self.splits) == 1:
            return self.splits[0]
        share = int.from_bytes(hashlib.sha256(tokens.tobytes()).digest()[:8], "big") / 2**64
        return VALIDATION if share < self.order.validation_share else TRAIN

    def _open_writer(self, split: str, domain: str) -> TokenShardWriter:
        folder = self.staging / split
        folder.mkdir(exist_ok=True)
        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in domain) or "shard"
        return TokenShardWriter(folder / f"{name}-{len(self.shards[split]):05d}.bin")

    def _commit(self, weighted: WeightedSource) -> None:
        """Close the open shards; from here on they count."""
        for split, writer in self.writers.items():
            files = writer.close()
            checksums = dict(zip((path.suffix for path in files), file_checksums(files), strict=True))
            self.shards[split].append(
                ShardEntry(
                    path=writer.path.name,
                    format=TOKEN_FORMAT,
                    num_documents=writer.num_documents,
                    num_tokens=writer.num_tokens,
                    sha256=checksums.pop(".bin"),
                    weight=weighted.weight,
                    domain=weighted.domain,
                    companions=checksums,
                )
            )
            sync(self.staging / split)
        self.writers.clear()
        self._write_quarantine()
        write_json(
            self.staging / PROGRESS_FILE,
            {
                "identity": self.identity,
                "source": self.source,
                "position": self.position,
                "quarantine_bytes": self.quarantine_bytes,
                "counts": self.counts.as_dict(),
                "shards": {split: [asdict(shard) for shard in shards] for split, shards in self.shards.items()},
            },
        )
        self.report(f"{sum(s.num_tokens or 0 for part in self.shards.values() for s in part):,} tokens")

    def _write_quarantine(self) -> None:
        if not self.quarantined:
            return
        with open(self.staging / QUARANTINE_FILE, "ab") as file:
            for row in self.quarantined:
                self.quarantine_bytes += file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.quarantined.clear()

    def _identity(self) -> str:
        """What an unfinished build must have in common with this one."""
        inputs = [
            [item.source.identity(), item.source.format, item.domain, item.weight, item.on_control]
            for item in self.sources
        ]
        filters = [repr(check) for check in self.order.filters]
        return canonical_checksum(
            {"inputs": inputs, "settings": self.order.settings(), "tokenizer": self.tokenizer, "filters": filters}
        )

    def _recover(self) -> None:
        """Take over what an earlier run finished, and remove what it did not."""
        path = self.staging / PROGRESS_FILE
        progress = read_json(path) if path.is_file() else None
        if progress is not None:
            if progress["identity"] != self.identity:
                raise ArtifactMismatchError(
                    f"{self.staging}: holds an unfinished build with other settings, inputs or tokenizer; repeat that "
                    "one, or remove the folder",
                    path="output_dir",
                )
            self.source, self.position = progress["source"], progress["position"]
            self.quarantine_bytes = progress["quarantine_bytes"]
            self.counts = RecordCounts.from_dict(progress["counts"])
            self.shards = {
                split: [ShardEntry(**shard) for shard in shards] for split, shards in progress["shards"].items()
            }
            self.report(f"going on after {self.counts.read:,} records")
        counted = {
            (self.staging / split / shard.path).with_suffix(suffix)
            for split, shards in self.shards.items()
            for shard in shards
            for suffix in (".bin", *shard.companions)
        }
        for split, suffix in itertools.product(self.splits, SUFFIXES):
            for found in (self.staging / split).glob(f"*{suffix}"):
                if found not in counted:
                    found.unlink()
        if (quarantine := self.staging / QUARANTINE_FILE).is_file():
            os.truncate(quarantine, self.quarantine_bytes)


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What a data manifest records of the tokenizer."""
    return {
        "checksum": tokenizer.checksum,
        "vocab_size": len(tokenizer),
        "eod_token_id": tokenizer.convert_tokens_to_ids("<eod>"),
        "pad_token_id": tokenizer.pad_token_id,
        "chat_template": tokenizer.manifest["chat_template"],
    }


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out; the lock ends with the process."""
    with open(folder / LOCK_FILE, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder}: another process is building this data") from error
        yield


def _summary(counts: RecordCounts) -> str:
    parts = {"empty": counts.empty, **counts.filtered, **counts.skipped}
    return ", ".join(f"{count} {name}" for name, count in parts.items() if count) or "nothing was read"
