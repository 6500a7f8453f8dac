"""The table of tasks: which class stands behind the ``type`` of a data set, and how it gets what it needs.

A class is called with those of the following that its constructor names: ``path``, ``split``, ``tokenizer``,
``vocab_size``, ``max_length`` (tokens of a request), ``seed``, ``sandbox`` (of generated programs), and ``task``. Its
keyword-only arguments are the ``options`` of the data set; their defaults fix their types.

    class Rhymes(Task):
        name = "rhymes"
        metrics = {"rhymes": "higher_is_better"}

        def __init__(self, path: Path, *, num_lines: int = 2) -> None: ...

    register_task(Rhymes)         # evaluation.datasets: [{name: r, type: custom, task: rhymes, path: r.jsonl}]
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognexis.configuration_rules import nearest_name
from cognexis.errors import ConfigFault, InvalidConfigError
from cognexis.eval_harness.tasks.code import CodeGeneration
from cognexis.eval_harness.tasks.exact_match import ExactMatch
from cognexis.eval_harness.tasks.language_modeling import LanguageModeling
from cognexis.eval_harness.tasks.multiple_choice import MultipleChoice
from cognexis.eval_harness.tasks.overlap import TextOverlap
from cognexis.eval_harness.tasks.protocol import HIGHER, LOWER, Task
from cognexis.eval_harness.tasks.recall import Recall
from cognexis.eval_harness.tasks.safety import Refusal
from cognexis.eval_harness.tasks.synthetic import Synthetic, family_of

TASK_TYPES: dict[str, type[Task]] = {
    "language_modeling": LanguageModeling,
    "multiple_choice": MultipleChoice,
    "exact_match": ExactMatch,
    "generation": TextOverlap,
    "code": CodeGeneration,
    "safety": Refusal,
    "recall": Recall,
    "synthetic": Synthetic,
}
CUSTOM_TASKS: dict[str, type[Task]] = {}


def register_task(task: type[Task]) -> None:
    """Add a task of one's own under its ``name``, for data sets of ``type: custom``.

    Raises:
        InvalidConfigError: the name is taken, or the class names no metrics.
    """
    name = getattr(task, "name", "")
    if not name or name in CUSTOM_TASKS:
        raise InvalidConfigError(f"name={name!r}: must be text that no other registered task has", path="name")
    if not task.metrics or not set(task.metrics.values()) <= {HIGHER, LOWER}:
        raise InvalidConfigError(
            f"{name}: metrics={dict(task.metrics)!r}: must map one or more names to {HIGHER} or {LOWER}",
            path="metrics",
        )
    CUSTOM_TASKS[name] = task


@dataclass(frozen=True)
class TaskContext:
    """What a run offers to its tasks.

    Attributes:
        tokenizer: the model's.
        vocab_size: ids of the model.
        max_length: longest request in tokens, answer included.
        seed: of what is generated.
        sandbox: name of the sandbox for generated programs.
    """

    tokenizer: Any
    vocab_size: int
    max_length: int
    seed: int
    sandbox: str = "auto"


def build_task(dataset: Any, context: TaskContext) -> Task:
    """The task of one ``DatasetSettings``.

    Raises:
        InvalidConfigError: an unknown task or option, an option of another type, or data that are damaged.
    """
    cls = _class_of(dataset)
    offered = {**vars(context), "path": None if dataset.path is None else Path(dataset.path)}
    offered |= {"split": dataset.split, "task": dataset.task}
    taken: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[name] = parameter.default
        elif name in offered:
            taken[name] = offered[name]
    if "tokenizer" in taken and context.tokenizer is None:
        raise InvalidConfigError(f"type {dataset.type}: needs a tokenizer, and the checkpoint has none", path="type")
    if dataset.type == "synthetic":
        options |= family_of(dataset.task).task.difficulty()
    return cls(**taken, **_checked(dataset.options, options, cls.name))


def _class_of(dataset: Any) -> type[Task]:
    if dataset.type != "custom":
        return TASK_TYPES[dataset.type]
    if dataset.task not in CUSTOM_TASKS:
        known = ", ".join(CUSTOM_TASKS) or "none"
        reason = f"is not registered{nearest_name(dataset.task, CUSTOM_TASKS)}; registered: {known}"
        raise InvalidConfigError(f"task={dataset.task!r}: {reason}", path="task", value=dataset.task, reason=reason)
    return CUSTOM_TASKS[dataset.task]


def _checked(given: Mapping[str, Any], options: Mapping[str, Any], kind: str) -> dict[str, Any]:
    faults = []
    for name, value in given.items():
        if name not in options:
            known = ", ".join(options) or "none"
            reason = f"unknown option{nearest_name(name, options)}; {kind} knows {known}"
            faults.append(ConfigFault(f"options.{name}", value, reason))
        elif (default := options[name]) is not inspect.Parameter.empty and not _fits(value, default):
            faults.append(ConfigFault(f"options.{name}", value, f"must be {_type_name(default)}"))
    if faults:
        raise InvalidConfigError("; ".join(faults), faults=faults)
    return dict(given)


def _type_name(default: Any) -> str:
    if default is None:
        return "a whole number"
    word = "a list" if isinstance(default, tuple) else f"of type {type(default).__name__}"
    return f"{word}, such as {default!r}"


def _fits(value: Any, default: Any) -> bool:
    """Whether an option has the type of its default; None stands for a number that follows from other settings."""
    if default is None:
        return type(value) is int
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)
