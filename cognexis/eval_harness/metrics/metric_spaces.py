"""The depth metrics as modules of the library ``evaluate``: self-contained folders that are Spaces of the Hub.

A folder holds ``<name>.py`` (the functions of this package that the metric needs, copied by name, and a thin shell),
the card ``README.md``, ``app.py`` and ``requirements.txt``. It needs no cognexis:

    evaluate.load(str(metric_path("depth_gain_ratio")))

``hub_assets/metrics`` holds the same folders; ``write_metric_space`` makes them.
"""

import ast
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub.constants import HF_HOME

from cognexis.eval_harness.metrics.bootstrap import bootstrap_depths
from cognexis.eval_harness.metrics.depth import depth_efficiency_index, one_of
from cognexis.eval_harness.metrics.depth_results import DEPTH_METRICS, WITHOUT_COMPUTE, DepthOptions
from cognexis.eval_harness.metrics.space_texts import APP, CARD, CARDS, REQUIREMENTS, SHELL

_SOURCES: tuple[Callable[..., Any], ...] = (depth_efficiency_index, bootstrap_depths, DepthOptions)


def write_metric_space(name: str, folder: Path) -> Path:
    """Write the files of one metric into ``folder / name`` and return that folder.

    Raises:
        InvalidConfigError: an unknown name.
    """
    one_of("name", name, tuple(DEPTH_METRICS))
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for file, text in space_files(name).items():
        with tempfile.NamedTemporaryFile("w", dir=place, delete=False, encoding="utf-8") as temporary:
            temporary.write(text)
        os.chmod(temporary.name, 0o644)
        os.replace(temporary.name, place / file)
    return place


def metric_path(name: str) -> Path:
    """The folder of a metric for ``evaluate.load``, from any working directory; written when it is not there.

    It lies under ``HF_HOME/cognexis/metrics``, in a folder named after the content.

    Raises:
        InvalidConfigError: an unknown name.
    """
    one_of("name", name, tuple(DEPTH_METRICS))
    files = space_files(name)
    digest = hashlib.sha256("\0".join(files.values()).encode()).hexdigest()[:16]
    folder = Path(HF_HOME) / "cognexis" / "metrics" / digest
    complete = all((folder / name / file).is_file() for file in files)
    return folder / name if complete else write_metric_space(name, folder)


def space_files(name: str) -> dict[str, str]:
    """Text of every file of a Space, by file name."""
    summary, formula, example = CARDS[name]
    words = {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "class_name": "".join(word.capitalize() for word in name.split("_")),
        "summary": summary,
        "formula": formula,
        "example": example,
        "function": DEPTH_METRICS[name].__name__,
        "needs_compute": str(name not in WITHOUT_COMPUTE),
    }
    functions = copied_functions(words["function"])
    words["pairwise"] = "from itertools import pairwise\n" if "pairwise(" in functions else ""
    module = Template(SHELL).substitute(words, functions=functions)
    return {
        f"{name}.py": module,
        "README.md": Template(CARD).substitute(words),
        "app.py": Template(APP).substitute(words),
        "requirements.txt": REQUIREMENTS,
    }


def copied_functions(name: str) -> str:
    """The source of a function and of everything of ours that it uses, in the order of definition."""
    definitions: dict[str, str] = {}
    uses: dict[str, set[str]] = {}
    for anchor in _SOURCES:
        source = inspect.getsource(inspect.getmodule(anchor) or anchor)
        for node in ast.parse(source).body:
            target = getattr(node, "name", None)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                target = node.targets[0].id
            if target is not None:
                first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
                definitions[target] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
                uses[target] = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    needed, waiting = {"DepthOptions"}, {name}
    while waiting:
        found = waiting.pop()
        needed.add(found)
        waiting |= (uses[found] & set(definitions)) - needed
    pieces, was_constant = [], False
    for key, text in definitions.items():
        if key in needed:
            is_constant = not text.startswith(("def", "class", "@"))
            pieces.append(("\n" if is_constant and was_constant else "\n\n\n") + text)
            was_constant = is_constant
    return "".join(pieces).strip("\n")
