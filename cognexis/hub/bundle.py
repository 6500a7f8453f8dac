"""Flat remote code: the package's runtime modules as the few files that transformers can load.

A checkpoint folder has to load with ``trust_remote_code=True`` where this package is not installed, but the
loader of transformers follows only ``.name`` imports of files that lie side by side. So the modules that the
entry modules need are found by reading their imports and merged, one file per folder:

    cognexis/decoder/norm.py, cognexis/decoder/block.py  ->  decoder_cognexis.py
    in another folder: from cognexis.decoder.norm import RMSNorm  ->  from .decoder_cognexis import RMSNorm

Inside a file the modules stand in dependency order, their imports are hoisted, and imports of each other vanish.
What cannot be expressed that way is refused with file and line, never guessed: star, relative and module imports
of our own code; two meanings of one top-level name in one file; folders that need each other.

A module that is only reached by imports inside functions keeps a file of its own (``..._on_demand_...``), so that
what was loaded lazily, such as Triton kernels, still is. Sub-folders of one folder that need each other share a
file. Where a checkpoint does without a folder, an import of it inside a function becomes an ImportError that says
so. Blocks under TYPE_CHECKING are dropped, because the loader would take their imports as requirements.
"""

import functools
import importlib.resources
import os
import re
import uuid
from pathlib import Path
from typing import Any

from cognexis.hub.flat_file import flatten, header_mark
from cognexis.hub.module_graph import LOADER_PATTERNS, BundleLayout

COGNEXIS = BundleLayout(
    root="cognexis",
    entries=("configuration_cognexis", "modeling_cognexis", "tokenization_cognexis"),
    required=("configuration_cognexis", "modeling_cognexis", "tokenization_cognexis"),
    stays=("artifacts", "tasks", "safety", "training", "eval_harness", "serving", "hub", "cli", "__main__"),
    files=(("looping.schedulers", "looping"), ("configuration_sizes", "configuration_rules")),
)
# A model and a tokenizer each bring their own code into a folder. What both need is the same file, whoever writes it.
_MODEL_FILES = ("configuration_cognexis.py", "modeling_cognexis.py")
_TOKENIZER_FILES = ("tokenization_cognexis.py",)
_CORTEX_FOLDERS = ("cortex_layers",)


def bundle_files(needs_cortex: bool = False) -> dict[str, str]:
    """Generate the remote code of a model.

    Args:
        needs_cortex: whether the checkpoint has Cortex layers; without them neither ``cortex_layers`` nor
            the kernels that only they use are part of the result.

    Returns:
        Source text by file name, sorted by name. The work is done once per process.

    Raises:
        BundleError: if the package's code uses a form that cannot be flattened.
    """
    return _reachable(_cached_bundle(() if needs_cortex else _CORTEX_FOLDERS), _MODEL_FILES)


def tokenizer_files() -> dict[str, str]:
    """Generate the remote code of a tokenizer: source text by file name, as in :func:`bundle_files`."""
    return _reachable(_cached_bundle(_CORTEX_FOLDERS), _TOKENIZER_FILES)


def _reachable(bundle: tuple[tuple[str, str], ...], entries: tuple[str, ...]) -> dict[str, str]:
    """The files that ``entries`` import, directly or not, and themselves."""
    files, found, open_ends = dict(bundle), set(entries), list(entries)
    while open_ends:
        text = files[open_ends.pop()]
        needed = {f"{stem}.py" for pattern in LOADER_PATTERNS for stem in re.findall(pattern, text, re.MULTILINE)}
        open_ends += needed - found
        found |= needed
    return {name: files[name] for name in sorted(found)}


@functools.cache
def _cached_bundle(exclude: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(flatten(COGNEXIS, importlib.resources.files("cognexis"), exclude).items())


def write_bundle(folder: str | os.PathLike[str], config: Any = None) -> list[str]:
    """Write the remote code beside a checkpoint; that of a tokenizer in the folder is brought up to date.

    Args:
        folder: checkpoint folder, created if it does not exist.
        config: the model's configuration, which tells whether Cortex layers are needed; None means no.

    Returns:
        The names of the files that make up the code, sorted.

    Raises:
        BundleError: if the package's code uses a form that cannot be flattened.
    """
    files = bundle_files(needs_cortex(config))
    if Path(folder, "tokenization_cognexis.py").is_file():
        files |= tokenizer_files()
    return write_files(folder, files, COGNEXIS.root)


def write_tokenizer_code(folder: str | os.PathLike[str], tokenizer: Any = None) -> list[str]:
    """Write the code that loads a tokenizer; the code of a model in the same folder stays.

    Args:
        folder: tokenizer or checkpoint folder, created if it does not exist.
        tokenizer: unused; every tokenizer of the package needs the same files.

    Returns:
        The names of the files that make up the code, sorted.
    """
    return write_files(folder, tokenizer_files(), COGNEXIS.root, removes_others=False)


def needs_cortex(config: Any) -> bool:
    """Say whether a model of this configuration has Cortex layers."""
    stages = ("prelude_layer_types", "core_layer_types", "coda_layer_types")
    return any("cortex" in (getattr(config, stage, None) or ()) for stage in stages)


def write_files(
    folder: str | os.PathLike[str], files: dict[str, str], root: str, removes_others: bool = True
) -> list[str]:
    """Bring the generated files of package ``root`` in ``folder`` to the state of ``files``.

    Each file is written under a temporary name and then put in place, so that a reader never sees half of it.
    Files that are up to date are left alone. Generated files of an earlier save that are no longer part are
    removed, recognised by name and header; nothing else in the folder is touched.

    Args:
        folder: target, created if it does not exist.
        files: source text by file name.
        root: name of the package.
        removes_others: whether generated files that are not in ``files`` go.

    Returns:
        The names of ``files``, sorted.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in sorted(files.items()):
        content = text.encode("utf-8")
        path = target / name
        if path.is_file() and path.read_bytes() == content:
            continue
        temporary = target / f".{name}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    mark = f"\n{header_mark(root)}".encode()
    for path in target.glob(f"*_{root}.py") if removes_others else ():
        if path.name not in files and path.is_file() and mark in path.read_bytes()[:200]:
            path.unlink(missing_ok=True)
    return sorted(files)
