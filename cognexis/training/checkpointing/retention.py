"""Which checkpoints of a run stay, and which one a run goes on from.

The newest ``keep_last`` and the best ``keep_best`` verified checkpoints stay. Others are renamed to a name that no
reader looks at, then removed, and only after the newest one that stays has been verified. A damaged folder is never
removed and never counts: it is evidence, and perhaps all that is left.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cognexis.checkpoints.commit import finish_interrupted_save
from cognexis.checkpoints.json_file import sync
from cognexis.errors import CheckpointError, InvalidConfigError
from cognexis.training.checkpointing.training_state import read_training_state, resume_faults

logger = logging.getLogger("cognexis.training")

_NAME = re.compile(r"checkpoint-(\d{1,18})")
_TRASH = ".removed-"


@dataclass(frozen=True)
class Retention:
    """How many checkpoints stay.

    Attributes:
        keep_last: newest ones; 0 keeps all.
        keep_best: best ones by the validation metric, besides.
        greater_is_better: which direction of the metric is better.
    """

    keep_last: int = 0
    keep_best: int = 0
    greater_is_better: bool = False

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_best"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InvalidConfigError(f"{name}={value!r}: must be 0 or more", path=name, value=value)


def checkpoints_of(run_folder: Path) -> list[Path]:
    """Checkpoint folders, verified or not, newest first."""
    if not run_folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in run_folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def newest_verified(run_folder: Path) -> Path | None:
    """The newest checkpoint that training can go on from; damaged ones are reported and left as they are."""
    for path in checkpoints_of(run_folder):
        try:
            finish_interrupted_save(path)
        except CheckpointError as error:
            logger.warning("%s", error)
        if not (faults := resume_faults(path)):
            return path
        logger.warning("%s is damaged and passed over: %s", path, "; ".join(faults[:3]))
    return None


def prune(run_folder: Path, retention: Retention, protected: Iterable[Path] = ()) -> list[Path]:
    """Remove what need not stay; returns what was removed.

    Args:
        protected: folders that stay in any case.
    """
    _empty_trash(run_folder)
    if retention.keep_last == 0:
        return []
    stays = {path.resolve() for path in protected}
    intact = [path for path in checkpoints_of(run_folder) if not resume_faults(path)]
    if not intact:
        return []
    stays |= {path.resolve() for path in intact[: retention.keep_last]}
    metrics = {path: read_training_state(path).metric for path in intact}
    known = [(metric, path) for path, metric in metrics.items() if metric is not None]
    known.sort(key=lambda pair: pair[0], reverse=retention.greater_is_better)
    stays |= {path.resolve() for _, path in known[: retention.keep_best]}
    removed = [path for path in intact if path.resolve() not in stays]
    for path in removed:
        os.rename(path, run_folder / f"{_TRASH}{path.name}")
    if removed:
        sync(run_folder)
        _empty_trash(run_folder)
    return removed


def set_aside(path: Path) -> None:
    """Give a damaged checkpoint another name, so that a new one can take its place."""
    for number in range(1000):
        place = path.with_name(f"{path.name}.damaged-{number}")
        if not place.exists():
            logger.warning("%s is damaged; it is kept as %s", path, place.name)
            os.rename(path, place)
            return


def _empty_trash(run_folder: Path) -> None:
    for path in run_folder.glob(f"{_TRASH}*"):
        shutil.rmtree(path, ignore_errors=True)
