"""From a manifest to rows and their order: what a training run opens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.training.data.blocks import JoinedRows, TokenRows
from cognexis.training.data.collating import RowCollator
from cognexis.training.data.loader import TrainingLoader
from cognexis.training.data.manifest import TOKEN_FORMAT, DataManifest, read_data_manifest
from cognexis.training.data.order import RowOrder
from cognexis.training.data.packing import Packing
from cognexis.training.data.partition import rank_indices
from cognexis.training.data.verify import open_shard, require_sound


@dataclass(frozen=True)
class TokenData:
    """Rows of token shards, ready for training.

    Attributes:
        manifest: where they come from.
        rows: map-style dataset; see ``packing.py`` for a row.
        packing: how rows are made.
    """

    manifest: DataManifest
    rows: JoinedRows
    packing: Packing

    @property
    def checksum(self) -> str:
        """``sha256:...`` of the manifest."""
        return self.manifest.checksum

    def order(self, seed: int, *, shuffle: bool = True, window: int | None = None) -> RowOrder:
        """The endless stream of rows, with the weights of the manifest."""
        weights = [shard.weight for shard in self.manifest.shards]
        return RowOrder(self.rows.counts, weights, seed=seed, shuffle=shuffle, window=window)

    def collator(self) -> RowCollator:
        """Makes batches of these rows."""
        return RowCollator(self.packing.pad_token_id)

    def training_loader(
        self,
        *,
        seed: int,
        batch_size: int,
        shuffle: bool = True,
        window: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        **settings: Any,
    ) -> TrainingLoader:
        """Resumable batches of one rank; ``settings`` are those of :class:`TrainingLoader`."""
        return TrainingLoader(
            self.rows,
            self.order(seed, shuffle=shuffle, window=window),
            collate or self.collator(),
            batch_size=batch_size,
            data_checksum=self.checksum,
            **settings,
        )

    def evaluation_loader(
        self, *, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> DataLoader[Any]:
        """Each row once, in order, rank r reading the rows r, r + W, ...; the last batch may be short."""
        share = rank_indices(len(self.rows), rank, world_size)
        return DataLoader(self.rows, batch_size, sampler=share, collate_fn=self.collator(), num_workers=num_workers)


def open_data(
    path: str | Path,
    *,
    sequence_length: int,
    pad_token_id: int | None = None,
    packed: bool = True,
    position_reset: str = "reset",
    mask_boundary_targets: bool = True,
    verify: bool = True,
    vocab_size: int | None = None,
    tokenizer_checksum: str | None = None,
    with_domain: bool = False,
) -> TokenData:
    """Open the token shards of a manifest.

    Args:
        path: ``data_manifest.json`` or its folder.
        sequence_length: predicted tokens of a row; a packed row holds one token more.
        pad_token_id: fills rows; None takes the one that the manifest records.
        packed: False gives each document rows of its own, of different lengths.
        position_reset: ``reset`` or ``continue`` at document starts.
        mask_boundary_targets: do not learn the first token of a document from another document.
        verify: hash all files; False compares sizes and counts only. One rank that hashes is enough.
        vocab_size: size of the model's vocabulary; the shards must fit.
        tokenizer_checksum: of the model's tokenizer; the shards must have been made with it.
        with_domain: rows carry the ``domain`` of their shard, batches ``domains``.

    Raises:
        InvalidConfigError: the manifest or a setting breaks a rule, or a shard still has to be made into tokens.
        ArtifactMismatchError: the shards are not what the manifest says, or were made with another tokenizer.
    """
    manifest = read_data_manifest(path)
    recorded = manifest.tokenizer or {}
    if pad_token_id is None and (pad_token_id := recorded.get("pad_token_id")) is None:
        raise InvalidConfigError(f"{path}: records no pad_token_id; pass pad_token_id", path="pad_token_id")
    packing = Packing(sequence_length, pad_token_id, position_reset, mask_boundary_targets)
    for index, shard in enumerate(manifest.shards):
        if shard.format != TOKEN_FORMAT:
            raise InvalidConfigError(
                f"{path}: shards[{index}].format={shard.format!r}: training reads {TOKEN_FORMAT}; make token shards "
                f"of it with: cognexis data build {path} --out FOLDER --tokenizer TOKENIZER",
                path=f"shards[{index}].format",
                value=shard.format,
            )
    if tokenizer_checksum and recorded.get("checksum") and recorded["checksum"] != tokenizer_checksum:
        raise ArtifactMismatchError(
            f"{path}: made with the tokenizer {recorded['checksum']}, the model's is {tokenizer_checksum}; build the "
            "data again with this tokenizer",
            path="tokenizer.checksum",
            value=recorded["checksum"],
        )
    made_for = recorded.get("vocab_size")
    if vocab_size is not None and made_for is not None and made_for > vocab_size:
        raise ArtifactMismatchError(
            f"{path}: made with a vocabulary of {made_for}, the model has {vocab_size}", path="vocab_size"
        )
    require_sound(manifest, contents=verify)
    parts = [
        TokenRows(open_shard(manifest, shard), packing, packed=packed, vocab_size=vocab_size)
        for shard in manifest.shards
    ]
    domains = [shard.domain for shard in manifest.shards]
    return TokenData(manifest, JoinedRows(parts, domains, with_domain=with_domain), packing)
