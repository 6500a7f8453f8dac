"""How a model is saved and loaded: one step for the whole folder, nothing believed that was not checked.

Saving goes through ``staged_folder``: interrupted at any point it leaves the previous or the new checkpoint. The
folder gets ``metadata.json``, ``scheduler.json`` and, last, ``manifest.json``. Loading checks, in this order: an
interrupted save is completed, the folder matches its manifest, the tensors fit the configuration, no weight is NaN or
infinite. Weights are read from safetensors only; nothing is ever unpickled.
"""

import copy
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from cognexis.checkpoints.adapters import check_adapter
from cognexis.checkpoints.card_facts import CardFacts
from cognexis.checkpoints.commit import finish_interrupted_save, staged_folder
from cognexis.checkpoints.json_file import read_json, write_json
from cognexis.checkpoints.manifest import (
    MANIFEST_FILE,
    is_plain_name,
    kind_of,
    read_manifest,
    verify_folder,
    write_manifest,
)
from cognexis.checkpoints.metadata import (
    METADATA_FILE,
    RESOLVED_FILE,
    SCHEDULER_FILE,
    TrainingRecord,
    metadata_of,
    read_metadata,
    read_scheduler,
    scheduler_state,
    tokenizer_facts,
    training_record,
)
from cognexis.checkpoints.weights import check_weights, read_headers, refuse_nonfinite, weight_files
from cognexis.errors import CheckpointError, InvalidConfigError

logger = logging.getLogger(__name__)

VERIFY_MODES = ("strict", "warn", "off")
_FETCH_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class CheckpointFiles:
    """``save_pretrained`` and ``from_pretrained`` of every Cognexis model, above those of transformers."""

    _folder_writers: ClassVar[list[Any]] = []  # the package adds its own files: called with (folder, model)
    _build_id: ClassVar[Any] = None  # says which package saves; a model loaded without one keeps the answer it had
    config: Any
    card_facts: CardFacts | None = None
    """What the model card shall say beyond what the model knows; the package writes the card at every save."""

    @property
    def training_record(self) -> TrainingRecord:
        """What training knows about this model; stored in ``metadata.json`` and carried from load to save."""
        if "_training_record" not in self.__dict__:
            self.__dict__["_training_record"] = TrainingRecord()
        return self.__dict__["_training_record"]

    @training_record.setter
    def training_record(self, record: TrainingRecord) -> None:
        self.__dict__["_training_record"] = record

    @property
    def scheduler_record(self) -> dict[str, Any]:
        """The content of ``scheduler.json``: how loops are chosen; the body's, which a language model shares."""
        body: Any = getattr(self, "base_model", self)
        if "_scheduler_record" not in body.__dict__:
            body.__dict__["_scheduler_record"] = scheduler_state()
        return body.__dict__["_scheduler_record"]

    @scheduler_record.setter
    def scheduler_record(self, record: dict[str, Any]) -> None:
        body: Any = getattr(self, "base_model", self)
        body.__dict__["_scheduler_record"] = record
        if (head := getattr(body, "value_head", None)) is not None:
            head.set_calibration(record.get("calibration"))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; see the module docstring for what is different.

        Raises:
            CheckpointError: the place cannot be written or another process is saving there; nothing is changed then.
        """
        push_to_hub = kwargs.pop("push_to_hub", False)
        save: Any = super().save_pretrained  # type: ignore[misc]
        if not self.should_save_on_this_rank(is_main_process) or kwargs.get("distributed_checkpoint"):  # type: ignore[attr-defined]
            if is_main_process:
                Path(save_directory, MANIFEST_FILE).unlink(missing_ok=True)  # it would not match what follows
            save(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
            return
        saved_keywords = ("max_shard_size", "variant", "save_peft_format", "save_original_format")
        hub_keywords = {key: kwargs.pop(key) for key in list(kwargs) if key not in (*saved_keywords, "token")}
        if hub_keywords and not push_to_hub:
            raise TypeError(f"save_pretrained() got unexpected keywords {sorted(hub_keywords)}")
        with staged_folder(save_directory) as folder:
            save(folder, state_dict=state_dict, **kwargs)
            if not getattr(self, "_hf_peft_config_loaded", False):  # adapters are no checkpoint of their own
                self._write_records(folder, Path(save_directory), kwargs.get("variant"))
        if push_to_hub:
            repository = hub_keywords.pop("repo_id", Path(save_directory).name)
            token = {"token": kwargs["token"]} if kwargs.get("token") is not None else {}
            self.push_to_hub(repository, **hub_keywords, **token)  # type: ignore[attr-defined]

    def _write_records(self, folder: Path, target: Path, variant: str | None) -> None:
        record = self.training_record
        if record.build_id is None and self._build_id is not None:
            record.build_id = self._build_id()
        write_json(folder / METADATA_FILE, metadata_of(self, record, tokenizer_facts(target)))
        write_json(folder / SCHEDULER_FILE, self.scheduler_record)
        for writer in self._folder_writers:
            writer(folder, self, target)
        kept = {path.name: path for path in _files(target) if not _is_replaced(path.name, variant)}
        write_manifest(folder, kept | {path.name: path for path in _files(folder)})

    def load_adapter(self, peft_model_id: Any = None, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """As in transformers; an adapter that does not fit the model is refused before anything is changed.

        Raises:
            CheckpointError: see ``check_adapter``.
        """
        if peft_model_id is not None and kwargs.get("hotswap", "auto") in (False, "auto"):
            check_adapter(self, Path(peft_model_id), adapter_name or "default")
        load: Any = super().load_adapter  # type: ignore[misc]
        return load(peft_model_id, adapter_name, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        verify: str | None = None,
        allow_nonfinite: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, with checks.

        Args:
            verify: "strict" demands a manifest that matches and no tensor without a place; "warn" reports what does
                not match; "off" compares nothing and leaves missing tensors to transformers, which initialises them.
                None: a folder without a manifest is reported, one that does not match its manifest is refused.
            allow_nonfinite: load weights that are NaN or infinite.

        Raises:
            CheckpointError: the folder does not match its manifest, the weights do not fit the configuration, are
                damaged, not finite, or stored in another format than safetensors.
            InvalidConfigError: an unknown ``verify``, or ``use_safetensors=False``.
        """
        if verify is not None and verify not in VERIFY_MODES:
            raise InvalidConfigError(
                f"verify={verify!r}: must be one of {', '.join(VERIFY_MODES)}", path="verify", value=verify
            )
        if kwargs.get("use_safetensors") is False:
            raise InvalidConfigError(
                "use_safetensors=False: weights are read from safetensors only", path="use_safetensors", value=False
            )
        load: Any = super().from_pretrained  # type: ignore[misc]
        name = pretrained_model_name_or_path
        if name is None or kwargs.get("gguf_file") is not None:
            return load(name, *model_args, **kwargs)
        folder = _local_folder(name, kwargs)
        if folder is None or _is_adapter(folder):
            return load(name, *model_args, **kwargs | {"use_safetensors": True})
        _require_verified(folder, verify)
        scheduler = read_scheduler(folder)
        metadata = read_metadata(folder)
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):  # not of our class: each loaded file has a copy of its own
            if config is None and not (folder / "config.json").is_file():
                raise CheckpointError(f"{folder}: has no config.json")
            fields = (*_FETCH_KEYWORDS, *cls.config_class.__dataclass_fields__)  # type: ignore[attr-defined]
            known = {key: kwargs[key] for key in fields if key in kwargs and key != "dtype"}
            config = cls.config_class.from_pretrained(config or name, **known)  # type: ignore[attr-defined]
        headers = {}
        is_quantized = getattr(config, "quantization_config", None) is not None
        is_sharded_by_rank = any(folder.glob("shard-*-model-*.safetensors"))
        if not is_quantized and not is_sharded_by_rank and not kwargs.get("key_mapping"):
            headers = read_headers(_require_weights(folder, kwargs.get("variant")))
            with torch.device("meta"):
                skeleton: Any = cast(Any, cls)(copy.deepcopy(config), *model_args)
            if verify != "off":
                check_weights(
                    skeleton,
                    headers,
                    allow_other_shapes=bool(kwargs.get("ignore_mismatched_sizes")),
                    allow_unknown=verify != "strict",
                )
        loaded = load(name, *model_args, **kwargs | {"use_safetensors": True})
        model = loaded[0] if kwargs.get("output_loading_info") else loaded
        if not allow_nonfinite and headers:
            refuse_nonfinite(model, headers)
        model.training_record = training_record(metadata)
        if scheduler is not None:
            model.scheduler_record = scheduler
        return loaded


def _is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter; transformers loads the base model that it names, through this method."""
    return (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else iter(())


def _is_replaced(name: str, variant: str | None) -> bool:
    """Whether a file of an older save gives way to a new one that has other files of its kind."""
    kind, _ = kind_of(name) or ("", False)
    if kind != "model_weights":
        return False
    stem = name.removesuffix(".json").replace(".safetensors.index", "").removesuffix(".safetensors")
    parts = stem.split("-")[0].split(".")
    return (parts[1] if len(parts) > 1 else None) == variant


def _local_folder(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> Path | None:
    """Where the files of a checkpoint lie on this machine; those of a Hub repository are fetched first."""
    place = Path(name)
    if place.is_symlink() and not place.exists():
        raise CheckpointError(f"{place}: a link that points nowhere")
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place}: is a file; from_pretrained needs the checkpoint's folder")
    if place.is_dir():
        folder = place / kwargs.get("subfolder", "")
        if not folder.resolve().is_relative_to(place.resolve()):
            raise InvalidConfigError(
                f"subfolder={kwargs['subfolder']!r}: lies outside {place}", path="subfolder", value=kwargs["subfolder"]
            )
        if os.access(folder, os.R_OK | os.X_OK):
            finish_interrupted_save(folder)
            return folder
        raise CheckpointError(f"{folder}: cannot be read; check its permissions")
    known = {key: kwargs[key] for key in _FETCH_KEYWORDS if key in kwargs}

    def fetch(file: str) -> Path | None:
        found = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False, **known)
        return None if found is None else Path(found)

    if (config := fetch("config.json")) is None:
        return None
    folder = config.parent
    for file in (MANIFEST_FILE, METADATA_FILE, SCHEDULER_FILE, RESOLVED_FILE):
        fetch(file)
    _fetch_weights(folder, kwargs.get("variant"), fetch)
    return folder


def _fetch_weights(folder: Path, variant: str | None, fetch: Any) -> None:
    middle = f".{variant}" if variant else ""
    if fetch(f"model{middle}.safetensors") is None and fetch(f"model.safetensors.index{middle}.json") is not None:
        index = read_json(folder / f"model.safetensors.index{middle}.json")
        for file in sorted({str(file) for file in index.get("weight_map", {}).values()}):
            if is_plain_name(file):  # others are refused when the files are read
                fetch(file)
    if (folder / MANIFEST_FILE).exists():
        for artifact in read_manifest(folder):
            if artifact.kind != "model_weights":
                fetch(artifact.path)


def _require_verified(folder: Path, verify: str | None) -> None:
    if verify == "off":
        return
    result = verify_folder(folder)
    if not result.is_present:
        if verify == "strict":
            raise CheckpointError(f"{folder}: has no {MANIFEST_FILE}, and verify='strict' needs one")
        logger.warning(f"{folder}: has no {MANIFEST_FILE}; its files are unverified")
        return
    for note in result.notes:
        logger.warning(f"{folder}: {note}")
    if result.faults and verify == "warn":
        logger.warning(f"{folder}: does not match its manifest: {'; '.join(result.faults)}")
    elif result.faults:
        faults = "\n  ".join(result.faults)
        raise CheckpointError(f"{folder}: does not match its {MANIFEST_FILE}:\n  {faults}")


def _require_weights(folder: Path, variant: str | None) -> list[Path]:
    if files := weight_files(folder, variant):
        return files
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    beside = f"; {', '.join(pickled)} could run code when read and never is" if pickled else ""
    raise CheckpointError(f"{folder}: no weights in safetensors format{beside}")
