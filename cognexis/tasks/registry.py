"""The table of tasks."""

from cognexis.errors import InvalidConfigError
from cognexis.tasks.assoc_recall_fast import AssocRecall
from cognexis.tasks.delayed_recall import DelayedRecall
from cognexis.tasks.dyck import Dyck
from cognexis.tasks.majority import Majority
from cognexis.tasks.majority_headpad import MajorityHeadPad
from cognexis.tasks.sequence_task import SequenceTask
from cognexis.tasks.two_needle_xor_fast import TwoNeedleXor

TASKS: dict[str, type[SequenceTask]] = {
    task.name: task for task in (DelayedRecall, Majority, MajorityHeadPad, Dyck, TwoNeedleXor, AssocRecall)
}


def get_task(name: str) -> type[SequenceTask]:
    """The data set class of a task.

    Raises:
        InvalidConfigError: no task has the name; lists the known ones.
    """
    if name not in TASKS:
        raise InvalidConfigError(f"task={name!r}: must be one of {', '.join(TASKS)}", path="task", value=name)
    return TASKS[name]
