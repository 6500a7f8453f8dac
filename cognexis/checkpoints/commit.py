"""Save a folder so that at every moment the previous or the new checkpoint is there, whole.

A folder that does not exist is written beside its place and renamed into it. An existing one keeps files that are
nobody's business, so it is updated file by file:

    1. write everything into FOLDER/.saving and force it to disk
    2. rename FOLDER/.saving to FOLDER/.saved           the save counts from here on
    3. move each file of FOLDER/.saved into FOLDER, the manifest last; remove weights that are no longer part
    4. remove FOLDER/.saved

A save that dies before step 2 has changed nothing; what it left is cleared by the next one. After step 2 the next
reader or writer goes on with step 3 (``finish_interrupted_save``). One process saves at a time: the second gets an
error, and the lock of a process that died is taken over.
"""

import contextlib
import fnmatch
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cognexis.checkpoints.json_file import sync
from cognexis.checkpoints.manifest import MANIFEST_FILE
from cognexis.errors import CheckpointError

_STAGING, _COMMITTED, _LOCK = ".saving", ".saved", ".saving.lock"
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index*.json")
_READER_PATIENCE = 10.0  # seconds that a reader waits for another process to move a few files


@contextlib.contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a folder to write into; when the block ends well, its files become those of ``target``.

    A manifest among the new files means a whole checkpoint: weights in ``target`` that it does not name are removed.

    Raises:
        CheckpointError: ``target`` is a file or a dangling link, cannot be written, or another process is saving
            into it. Nothing is changed then.
    """
    folder = Path(target)
    try:
        folder = _resolve(folder)
        existed = folder.is_dir()
        place = folder if existed else folder.parent
        prefix = "" if existed else f".{folder.name}"
        place.mkdir(parents=True, exist_ok=True)
        with _lock(place / f"{prefix}{_LOCK}", folder):
            finish_interrupted_save(folder, holds_lock=True)
            if existed:
                _clear_first_save(folder)
            staging = place / f"{prefix}{_STAGING}"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                yield staging
                _sync_tree(staging)
                _commit(staging, folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be saved: {error.strerror or error}") from error


def finish_interrupted_save(folder: Path, holds_lock: bool = False) -> None:
    """Complete a save that was committed and then interrupted; without one nothing happens.

    Raises:
        CheckpointError: the folder cannot be written, or another process does not finish its save.
    """
    deadline = time.monotonic() + _READER_PATIENCE
    while (folder / _COMMITTED).is_dir():
        try:
            with contextlib.nullcontext() if holds_lock else _lock(folder / _LOCK, folder):
                _roll_forward(folder)
        except _LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        except OSError as error:
            if (folder / _COMMITTED).is_dir():
                raise CheckpointError(
                    f"{folder}: an interrupted save must be completed first, and that failed: {error.strerror}"
                ) from error


def _clear_first_save(folder: Path) -> None:
    """Remove what a first save left beside ``folder`` when it died right after its last step."""
    lock = folder.parent / f".{folder.name}{_LOCK}"
    with contextlib.suppress(OSError):
        if lock.exists() and _is_abandoned(_holder(lock)):
            shutil.rmtree(folder.parent / f".{folder.name}{_STAGING}", ignore_errors=True)
            lock.unlink()


class _LockedError(CheckpointError):
    """Another process holds the lock."""


def _resolve(given: Path) -> Path:
    if given.is_symlink() and not given.exists():
        raise CheckpointError(f"{given}: a link that points nowhere; cannot save there")
    if given.exists() and not given.is_dir():
        raise CheckpointError(f"{given}: is a file; a checkpoint needs a folder")
    return given.resolve()


def _commit(staging: Path, folder: Path) -> None:
    if not folder.exists():
        with contextlib.suppress(FileExistsError):
            os.rename(staging, folder)
            sync(folder.parent)
            return
    os.rename(staging, folder / _COMMITTED)
    sync(folder)
    _roll_forward(folder)


def _roll_forward(folder: Path) -> None:
    """Steps 3 and 4; may be repeated from any point at which it stopped."""
    committed = folder / _COMMITTED
    if not committed.is_dir():
        return
    names = sorted(path.relative_to(committed) for path in committed.rglob("*") if not path.is_dir())
    manifest = Path(MANIFEST_FILE)
    if manifest in names:
        new = {artifact["path"] for artifact in json.loads((committed / manifest).read_bytes())["artifacts"]}
        for path in folder.iterdir():
            if path.name not in new and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _WEIGHTS):
                path.unlink()
    for name in sorted(names, key=lambda name: (name == manifest, name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(committed / name, folder / name)
    sync(folder)
    shutil.rmtree(committed)
    sync(folder)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


@contextlib.contextmanager
def _lock(path: Path, folder: Path) -> Iterator[None]:
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            holder = _holder(path)
            if not _is_abandoned(holder):
                who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
                raise _LockedError(f"{folder}: {who} is saving there; if that is not so, remove {path}") from None
            stale = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, stale)
                stale.unlink()
    else:
        raise _LockedError(f"{folder}: another process is saving there")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(owner, file)
        yield
    finally:
        path.unlink(missing_ok=True)


def _holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; a lock that was created a moment ago may still be empty."""
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text())
            return found if isinstance(found, dict) else None
        time.sleep(0.05)
    return {"pid": None, "host": socket.gethostname()}  # nobody wrote a name: its process died at once


def _is_abandoned(holder: dict[str, Any] | None) -> bool:
    """Whether the process that made the lock ran on this machine and is gone."""
    if holder is None or holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, TypeError):
        return True
    except PermissionError:
        return False  # it lives, as another user
    return False
