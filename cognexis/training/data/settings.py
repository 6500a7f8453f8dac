"""From the ``training.data`` section of a run configuration to data and loader.

position_reset: auto          restarts positions where documents do not see each other
document_boundary_attention   null takes the model's setting; false leaves ``document_ids`` out of the rows
shuffle_buffer                the window of the order; null shuffles the whole index, 0 not at all
"""

from typing import Any

from cognexis.artifacts.run_config.training_section import DataSettings
from cognexis.errors import InvalidConfigError
from cognexis.training.data.loader import TrainingLoader
from cognexis.training.data.opening import TokenData, open_data

SPLITS = ("train", "validation")


def open_run_data(
    settings: DataSettings, config: Any, *, split: str = "train", tokenizer: Any = None, verify: bool = True
) -> TokenData | None:
    """Open the data that a run configuration names.

    Args:
        settings: the section.
        config: the model's configuration.
        split: ``train`` or ``validation``.
        tokenizer: the model's; the shards must have been made with it.
        verify: hash all files; leave that to one rank.

    Returns:
        None for a validation manifest that is not given.

    Raises:
        InvalidConfigError: no training manifest, rows longer than the model takes, documents that are to see each
            other against the model's setting, or what ``open_data`` refuses.
        ArtifactMismatchError: see ``open_data``.
    """
    if split not in SPLITS:
        raise InvalidConfigError(f"split={split!r}: must be one of {', '.join(SPLITS)}", path="split", value=split)
    name = f"{split}_manifest"
    manifest = getattr(settings, name)
    if manifest is None:
        if split == "train":
            raise InvalidConfigError(
                f"training.data.{name}=None: name the manifest that cognexis data build wrote",
                path=f"training.data.{name}",
            )
        return None
    longest = config.max_position_embeddings
    if settings.sequence_length + 1 > longest:
        raise InvalidConfigError(
            f"training.data.sequence_length={settings.sequence_length}: a row holds one token more, and "
            f"max_position_embeddings is {longest}; at most {longest - 1}",
            path="training.data.sequence_length",
            value=settings.sequence_length,
        )
    of_model = config.document_boundary_attention
    is_closed = of_model if settings.document_boundary_attention is None else settings.document_boundary_attention
    reset = settings.position_reset
    if is_closed != of_model and (is_closed or reset == "reset"):
        raise InvalidConfigError(
            f"training.data.document_boundary_attention={is_closed}: model.document_boundary_attention is {of_model}"
            f"{', and restarting positions separate documents' if of_model else ''}",
            path="training.data.document_boundary_attention",
            value=is_closed,
        )
    return open_data(
        manifest,
        sequence_length=settings.sequence_length,
        pad_token_id=config.pad_token_id,
        packed=settings.packing,
        position_reset=("reset" if is_closed else "continue") if reset == "auto" else reset,
        with_document_ids=is_closed or not of_model,
        verify=verify,
        vocab_size=config.vocab_size,
        tokenizer_checksum=tokenizer.checksum if tokenizer is not None else config.tokenizer_checksum,
    )


def run_loader(
    data: TokenData,
    settings: DataSettings,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    **further: Any,
) -> TrainingLoader:
    """The training loader of a run: workers, prefetching and shuffle window as the section says."""
    return data.training_loader(
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        num_workers=settings.num_workers,
        prefetch_batches=settings.prefetch_batches,
        window=settings.shuffle_buffer or None,
        shuffle=settings.shuffle_buffer != 0,
        **further,
    )
