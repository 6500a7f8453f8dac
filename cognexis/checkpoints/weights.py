"""Check weight files against the model that shall hold them, before memory is allocated for it.

Only safetensors files are read, and of those the headers: names, shapes and dtypes. A name counts with or without the
prefix of the body, since the body is saved without it. What is refused:

* a parameter of the body or a tied-weight head that is missing, of another shape, or not floating point
* a tensor that would belong to the body but has no place in it: another number of blocks, copies of the shared block
* an index that points outside the folder, to a link that leaves it, or to something that is no regular file

New heads are left to transformers, which initialises them and says so.
"""

import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cognexis.checkpoints.json_file import read_json
from cognexis.checkpoints.manifest import is_plain_name
from cognexis.errors import CheckpointError

_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_INDEX_DTYPES = frozenset({"I64"})
_BODY = "model."
_BODY_PARTS = frozenset({"embed_tokens", "prelude", "recurrent", "coda", "final_norm", "lm_head"})
_CORE_COPY = re.compile(r"recurrent\.(?:blocks|loops|layers)\.(\d+)\.")
_MOST_NAMES = 8  # in one message


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor lies and what its file says about it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint: one file, or the shards that the index names; empty if there is none.

    Raises:
        CheckpointError: the index is damaged, or one of the files is missing, outside the folder or no regular file.
    """
    middle = f".{variant}" if variant else ""
    single, index = folder / f"model{middle}.safetensors", folder / f"model.safetensors.index{middle}.json"
    if single.exists() or single.is_symlink():
        names = [single.name]
    elif index.exists() or index.is_symlink():
        content = read_json(_inside(folder, index.name))
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must name a file for each tensor")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        return []
    return [_inside(folder, name) for name in names]


def _inside(folder: Path, name: str) -> Path:
    """The path of a regular file that lies in ``folder`` itself, or among the blobs of the Hub cache."""
    path = folder / name
    if not is_plain_name(name):
        raise CheckpointError(f"{folder}: the weight index names {name!r}; only files in the folder itself are read")
    try:
        real, home = path.resolve(strict=True), folder.resolve()
        status = real.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: is a link to {real}, outside the checkpoint; copy the file into the folder")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return path


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes of all tensors.

    Raises:
        CheckpointError: a file is damaged, or two files hold the same name.
    """
    headers: dict[str, TensorHeader] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118  (safe_open is no mapping)
                    part = content.get_slice(name)
                    if name in headers:
                        raise CheckpointError(f"{file}: {name} lies in {headers[name].file.name} too")
                    headers[name] = TensorHeader(file, tuple(part.get_shape()), str(part.get_dtype()))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: damaged weights: {error}") from error
    return headers


def check_weights(
    model: Any, headers: dict[str, TensorHeader], *, allow_other_shapes: bool = False, allow_unknown: bool = True
) -> None:
    """Compare the tensors of a checkpoint with the parameters of ``model`` (which may lie on the meta device).

    Args:
        allow_other_shapes: leave shapes to transformers (``ignore_mismatched_sizes``).
        allow_unknown: accept tensors that belong neither to the body nor to a head of ours.

    Raises:
        CheckpointError: lists every fault.
    """
    given = {_in_body(name): header for name, header in headers.items()}
    wanted = {_in_body(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    tied = {_in_body(name) for name in getattr(model, "all_tied_weights_keys", None) or {}}
    faults = [f"{name}: missing" for name in wanted if name not in given and name not in tied and _is_ours(name)]
    copies = sorted({int(match[1]) for name in given if (match := _CORE_COPY.search(name))})
    if copies and len(copies) > model.config.num_recurrent_blocks:
        expected = model.config.num_recurrent_blocks
        raise CheckpointError(
            f"the file holds {len(copies)} copies of the recurrent block, expected {expected}: "
            "one shared block runs at every loop"
        )
    for name, header in given.items():
        if name not in wanted:
            if (_is_ours(name) and name not in tied and not name.startswith("lm_head.")) or not allow_unknown:
                faults.append(f"{name}: the model of this configuration has no such tensor")
        elif header.dtype not in (allowed := _FLOAT_DTYPES if wanted[name].is_floating_point() else _INDEX_DTYPES):
            faults.append(f"{name}: dtype {header.dtype}, must be one of {sorted(allowed)}")
        elif not allow_other_shapes and header.shape != tuple(wanted[name].shape):
            faults.append(f"{name}: shape {list(header.shape)}, the configuration asks for {list(wanted[name].shape)}")
    if faults:
        raise CheckpointError(_listed("the weights do not belong to this configuration", faults))
    _check_tied(model, headers)


def _in_body(name: str) -> str:
    return name.removeprefix(_BODY)


def _is_ours(name: str) -> bool:
    """Whether a tensor belongs to the body or the language-model head, which every checkpoint brings along."""
    return name.split(".")[0] in _BODY_PARTS


def _check_tied(model: Any, headers: dict[str, TensorHeader]) -> None:
    """A tied weight that is stored under both names must be the same tensor twice."""
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in headers and source in headers:
            pair = [read_tensor(headers[name].file, name) for name in (target, source)]
            if not torch.equal(*pair):
                raise CheckpointError(
                    f"{target} and {source} are tied in the configuration but differ in the file; "
                    "set tie_word_embeddings=false or remove one"
                )


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(file, framework="pt") as content:
        return content.get_tensor(name)


def refuse_nonfinite(model: Any, headers: dict[str, TensorHeader]) -> None:
    """Look for NaN and infinity in the loaded weights; weights left on disk are read from their files.

    Raises:
        CheckpointError: names the tensors and how many of their values are not finite.
    """
    faults = []
    for name, tensor in _loaded_tensors(model, headers):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            faults.append(f"{name}: {count} of {tensor.numel()} values are NaN or infinite")
    if faults:
        raise CheckpointError(_listed("non-finite weights (allow_nonfinite=True loads them)", faults))


def _loaded_tensors(model: Any, headers: dict[str, TensorHeader]) -> Iterator[tuple[str, Tensor]]:
    by_name = {_in_body(name): (name, header) for name, header in headers.items()}
    for name, parameter in model.named_parameters():
        stored_name, header = by_name.get(_in_body(name), (name, None))
        if parameter.device.type != "meta":
            yield name, getattr(parameter.data, "_local_tensor", parameter.data)
        elif header is not None:
            yield name, read_tensor(header.file, stored_name)


def _listed(what: str, faults: list[str]) -> str:
    more = f"\n  and {len(faults) - _MOST_NAMES} more" if len(faults) > _MOST_NAMES else ""
    return f"{what}:\n  " + "\n  ".join(faults[:_MOST_NAMES]) + more
