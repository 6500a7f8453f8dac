"""The rules that keep the package readable and its model files loadable from the Hub.

A rule is a function from one module to its faults. Every rule runs over the package, and over small modules
that break it, so that a rule which cannot fail does not stay unnoticed. CONTRIBUTING.md gives the reasons.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from transformers.utils import import_utils

PACKAGE = Path(__file__).parents[1] / "cognexis"
MAX_LINES = 600

# Part of the package (a folder or a file right below it) -> the parts that it may import besides itself.
_CONFIGURATION = {"configuration_cognexis", "configuration_rules", "configuration_sizes"}
_TO_CONFIGURATION = {"errors", "kernels", "cortex_layers", "checkpoints", *_CONFIGURATION}
_TO_MODEL = {*_TO_CONFIGURATION, "looping", "tokens", "decoder", "modeling_cognexis"}
_BESIDE_MODEL = {"tokens", "tokenization_cognexis", "artifacts", "tasks", "safety"}
_RING = {"training", "eval_harness", "serving", "hub"}
MAY_IMPORT = {
    "errors": set(),
    "kernels": {"errors"},
    "cortex_layers": {"errors", "kernels"},
    "checkpoints": {"errors"},
    "configuration_cognexis": {"errors", "cortex_layers", "checkpoints", "configuration_rules", "configuration_sizes"},
    "configuration_sizes": set(),
    "configuration_rules": {"errors", "cortex_layers", "checkpoints"},
    "looping": _TO_CONFIGURATION,
    "decoder": {*_TO_CONFIGURATION, "looping", "tokens"},
    "modeling_cognexis": {*_TO_CONFIGURATION, "looping", "decoder"},
    "tokens": {"errors"},
    "tokenization_cognexis": {"errors", "checkpoints", "tokens"},
    "artifacts": {"errors", "checkpoints", "tokens", "tokenization_cognexis", *_CONFIGURATION},
    "tasks": {"errors", *_CONFIGURATION},
    "safety": {"errors", *_CONFIGURATION},
    **{part: {*_TO_MODEL, *_BESIDE_MODEL} for part in _RING},
    "cli": {*_TO_MODEL, *_BESIDE_MODEL, *_RING, "registration"},
    "__main__": {"cli"},
    "registration": {"errors", "configuration_cognexis", "looping", "decoder", "modeling_cognexis", "hub"}
    | {"tokenization_cognexis", "checkpoints"},
    "registration_hook": {"registration"},
    "__init__": {"registration", "registration_hook"},
}
# Where a part may import one module of another part only.
ONLY_MODULE = {(part, "cortex_layers"): "cortex_layers.layer_settings" for part in _CONFIGURATION}
RUNNABLE = {"cli", "__main__"}

# The parts whose files travel with a checkpoint, and the packages that these may import.
HUB_PARTS = {*_TO_MODEL, "tokens", "tokenization_cognexis"}
HUB_PACKAGES = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "yaml"}
FURTHER_PACKAGES = {
    "kernels": {"triton"},
    "cortex_layers": {"pydantic", "tensordict", "triton"},
    "tokens": {"tokenizers"},
    "tokenization_cognexis": {"tokenizers"},
}
# The files work without these, so the loader must not take them for requirements.
GUARDED_PACKAGES = {"triton"}


@dataclass(frozen=True)
class Module:
    """One file of the package: its dotted name, its text, and the names of all modules.

    The name is relative to the package; a folder's __init__ has the name of its folder.
    """

    name: str
    source: str
    all_names: frozenset[str]
    is_folder: bool = False

    @property
    def part(self) -> str:
        return self.name.split(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)


@dataclass(frozen=True)
class Import:
    """One imported name; ``name`` is None in ``import module``."""

    line: int
    module: str
    name: str | None = None
    level: int = 0
    is_guarded: bool = False

    @property
    def package(self) -> str:
        return self.module.split(".")[0]

    @property
    def target(self) -> str:
        """The module in the form of ``Module.name``; the package itself is ``__init__``."""
        return self.module.partition(".")[2] or "__init__"


def read_package(folder: Path) -> list[Module]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        *folders, stem = path.relative_to(folder).with_suffix("").parts
        is_folder = bool(folders) and stem == "__init__"
        found.append((".".join(folders if is_folder else [*folders, stem]), path, is_folder))
    names = frozenset(name for name, _, _ in found)
    return [Module(name, path.read_text("utf-8"), names, is_folder) for name, path, is_folder in found]


def imports_of(tree: ast.AST, is_guarded: bool = False) -> Iterator[Import]:
    """Every import in the tree, those in functions and under TYPE_CHECKING included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, is_guarded=is_guarded)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(node.lineno, node.module or "", alias.name, node.level, is_guarded)
        else:
            yield from imports_of(node, is_guarded or is_guard(node))


def is_guard(node: ast.AST) -> bool:
    """Say whether the code below may miss a package, in a form that the Hub loader understands."""
    if isinstance(node, ast.Try):
        caught = [name for handler in node.handlers if handler.type for name in ast.walk(handler.type)]
        return any(getattr(name, "id", None) in ("ImportError", "ModuleNotFoundError") for name in caught)
    if isinstance(node, ast.If):
        calls = [call.func for call in ast.walk(node.test) if isinstance(call, ast.Call)]
        names = [function.id for function in calls if isinstance(function, ast.Name)]
        return any(name.endswith("_available") and hasattr(import_utils, name) for name in names)
    return False


def wrong_direction(module: Module) -> Iterator[str]:
    """The package is layered: a part imports only what its row of MAY_IMPORT names."""
    if module.part not in MAY_IMPORT:
        yield f"{module.part} has no row in MAY_IMPORT; decide what it may import"
        return
    for found in imports_of(module.tree):
        if found.package != "cognexis" or found.target == "__init__":
            continue
        part = found.target.split(".")[0]
        only = ONLY_MODULE.get((module.part, part), found.target)
        if part != module.part and part not in MAY_IMPORT[module.part]:
            yield f"line {found.line}: {module.part} may not import {part}"
        elif found.target != only:
            yield f"line {found.line}: {module.part} may import only {only} of {part}"


def wrong_form(module: Module) -> Iterator[str]:
    """Our own code is imported by absolute names: this is the form that the bundle writer can rewrite."""
    for found in imports_of(module.tree):
        if found.level:
            yield f"line {found.line}: relative import"
        elif found.package != "cognexis":
            continue
        elif found.name is None:
            yield f"line {found.line}: import {found.module}, where a name should be imported from it"
        elif found.name == "*":
            yield f"line {found.line}: star import"
        elif f"{found.module}.{found.name}".partition(".")[2] in module.all_names:
            yield f"line {found.line}: {found.name} is a module; import a name from it"
        elif found.target == "__init__" and module.part not in RUNNABLE:
            yield f"line {found.line}: import {found.name} from the module that defines it"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            texts = [str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if any(re.match(r"\.|cognexis(\.|$)", text) for text in texts):
                yield f"line {node.lineno}: our own module imported by a name in a string"


def foreign_package(module: Module) -> Iterator[str]:
    """Each import in a Hub file, also inside a function, is a requirement for all who load it."""
    if module.part not in HUB_PARTS:
        return
    allowed = HUB_PACKAGES | FURTHER_PACKAGES.get(module.part, set())
    for found in imports_of(module.tree):
        if found.level or found.package == "cognexis" or found.package in sys.stdlib_module_names:
            continue
        if found.package not in allowed:
            yield f"line {found.line}: a Hub file may not import {found.package}"
        elif found.package in GUARDED_PACKAGES and not found.is_guarded:
            yield f"line {found.line}: {found.package} must be imported under try/except ImportError"


def text_like_relative_import(module: Module) -> Iterator[str]:
    """The Hub loader searches text, not syntax: a docstring line can look like an import to it."""
    if module.part not in HUB_PARTS:
        return
    for number, line in enumerate(module.source.splitlines(), start=1):
        if re.match(r"\s*(from|import)\s+\.", line):
            yield f"line {number}: begins like a relative import"


def runnable(module: Module) -> Iterator[str]:
    """Files directly in the package are for importing; what runs is the command line."""
    if "." in module.name or module.is_folder or module.name in RUNNABLE:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            yield f"line {node.lineno}: runs as a script; the command line lives in cli.py"


def too_long(module: Module) -> Iterator[str]:
    """A file that nobody can read in one sitting should be two."""
    lines = len(module.source.splitlines())
    if lines > MAX_LINES:
        yield f"{lines} lines, at most {MAX_LINES}"


def left_over_note(module: Module) -> Iterator[str]:
    """Open work belongs into an issue, where it is seen."""
    for number, line in enumerate(module.source.splitlines(), start=1):
        if found := re.search(r"\b(TODO|FIXME)\b", line):
            yield f"line {number}: {found.group()}"


Rule = Callable[[Module], Iterator[str]]
# Each rule with modules that break it: name, source, and words that the fault must contain.
VIOLATIONS: dict[Rule, list[tuple[str, str, str]]] = {
    wrong_direction: [
        ("errors", "from cognexis.kernels.dispatch import use_triton", "errors may not import kernels"),
        ("kernels.conv", "from cognexis.cortex_layers.types import State", "may not import cortex_layers"),
        ("kernels.conv", "from cognexis.configuration_cognexis import C", "may not import configuration"),
        ("cortex_layers.cells", "from cognexis.looping.trace import T", "may not import looping"),
        ("configuration_cognexis", "from cognexis.cortex_layers.state import S", "only cortex_layers.layer_settings"),
        ("configuration_rules", "from cognexis.cortex_layers import S", "only cortex_layers.layer_settings"),
        ("looping.driver", "from cognexis.decoder.cache import C", "looping may not import decoder"),
        ("decoder.cache", "from cognexis.modeling_cognexis import M", "may not import modeling_cognexis"),
        ("modeling_cognexis", "from cognexis.training.losses import L", "may not import training"),
        ("tokens.guard", "from cognexis.tokenization_cognexis import T", "tokens may not import tokenization"),
        ("tokenization_cognexis", "from cognexis.configuration_cognexis import C", "may not import"),
        ("artifacts.hashes", "from cognexis.modeling_cognexis import M", "may not import modeling_cognexis"),
        ("tasks.copy", "from cognexis.safety.rules import R", "tasks may not import safety"),
        ("safety.rules", "from cognexis.decoder.norm import N", "safety may not import decoder"),
        ("training.losses", "from cognexis.eval_harness.metrics import m", "may not import eval_harness"),
        ("serving.server", "from cognexis.hub.bundle import b", "serving may not import hub"),
        ("hub.export", "from cognexis.cli import main", "hub may not import cli"),
        ("__init__", "from cognexis.training.trainer import T", "__init__ may not import training"),
        ("looping.trace", "if TYPE_CHECKING:\n    from cognexis.decoder.block import B", "line 2: looping"),
        ("looping.trace", "class A:\n  def f(self):\n    from cognexis.decoder import B", "line 3: looping"),
        ("misc", "", "misc has no row"),
        ("decoders.norm", "", "decoders has no row"),
    ],
    wrong_form: [
        ("decoder.block", "from .norm import RMSNorm", "relative import"),
        ("decoder.block", "from . import norm", "relative import"),
        ("decoder.block", "import cognexis.decoder.norm", "a name should be imported"),
        ("decoder.block", "import cognexis", "a name should be imported"),
        ("decoder.block", "from cognexis.decoder.norm import *", "star import"),
        ("decoder.block", "from cognexis.decoder import norm", "norm is a module"),
        ("cli", "from cognexis import decoder", "decoder is a module"),
        ("decoder.block", "from cognexis import CognexisConfig", "from the module that defines it"),
        ("hub.card", "import importlib\nimportlib.import_module('cognexis.decoder')", "in a string"),
        ("hub.card", "import_module('.decoder', package='here')", "in a string"),
        ("hub.card", "__import__('cognexis')", "in a string"),
    ],
    foreign_package: [
        ("decoder.block", "import einops", "may not import einops"),
        ("decoder.block", "def f():\n    import pydantic", "line 2: a Hub file may not import pydantic"),
        ("kernels.conv", "from tensordict import TensorDict", "may not import tensordict"),
        ("modeling_cognexis", "try:\n    import peft\nexcept ImportError:\n    pass", "may not import peft"),
        ("kernels.dispatch", "import triton.language as tl", "triton must be imported under try"),
        ("kernels.dispatch", "def f():\n    import triton", "triton must be imported under try"),
        ("kernels.dispatch", "if my_triton_available():\n    import triton", "triton must be imported"),
        ("kernels.dispatch", "try:\n    import triton\nexcept OSError:\n    pass", "triton must be imported"),
    ],
    text_like_relative_import: [
        ("decoder.norm", '"""Norms.\n\n    from .block come\n"""', "line 3"),
        ("modeling_cognexis", "TEXT = '''\nimport .x\n'''", "line 2"),
    ],
    runnable: [
        ("modeling_cognexis", 'if __name__ == "__main__":\n    print(1)', "runs as a script"),
        ("train", 'if "__main__" == __name__:\n    print(1)', "runs as a script"),
    ],
    too_long: [("decoder.norm", "x = 1\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines")],
    left_over_note: [
        ("decoder.norm", "x = 1  # TODO: more", "line 1: TODO"),
        ("hub.card", '"""Cards.\n\nFIXME\n"""', "line 3: FIXME"),
    ],
}
ALLOWED: dict[Rule, list[tuple[str, str]]] = {
    wrong_direction: [
        ("decoder.block", "from cognexis.decoder.norm import N\nfrom cognexis.looping.trace import T"),
        ("configuration_cognexis", "from cognexis.cortex_layers.layer_settings import layer_faults"),
        ("training.trainer", "from cognexis.modeling_cognexis import M\nimport torch, datasets"),
        ("__main__", "from cognexis.cli import main"),
    ],
    wrong_form: [
        ("decoder.block", "from cognexis.decoder.norm import RMSNorm\nfrom torch import nn\nimport math"),
        ("cli", "from cognexis import __version__"),
        ("hub.bundle", "import importlib\nimportlib.import_module('triton')"),
    ],
    foreign_package: [
        ("decoder.block", "import torch.nn.functional as F\nfrom transformers import Cache\nimport math"),
        ("kernels.dispatch", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
        ("kernels.dispatch", "if is_triton_available():\n    import triton"),
        ("cortex_layers.state", "from tensordict import TensorDict\nimport pydantic"),
        ("training.trainer", "import datasets"),
    ],
    text_like_relative_import: [
        ("decoder.norm", '"""Norms taken from .block and elsewhere."""'),
        ("training.trainer", '"""\nfrom .here\n"""'),
    ],
    runnable: [("cli", 'if __name__ == "__main__":\n    print(1)')],
    too_long: [("decoder.norm", "x = 1\n" * MAX_LINES)],
    left_over_note: [("tasks.plan", "NAMES = ['todo', 'TODOS']")],
}
TOY_NAMES = frozenset({"decoder", "decoder.norm", "decoder.block", "modeling_cognexis"})


def faults_of(folder: Path, rule: Rule) -> list[str]:
    return [f"{module.name}: {fault}" for module in read_package(folder) for fault in rule(module)]


@pytest.mark.parametrize("rule", VIOLATIONS, ids=lambda rule: rule.__name__)
def test_package_obeys_the_rule(rule):
    faults = faults_of(PACKAGE, rule)
    assert not faults, "\n".join([str(rule.__doc__), *faults])


@pytest.mark.parametrize(
    ("rule", "name", "source", "words"),
    [(rule, *case) for rule, cases in VIOLATIONS.items() for case in cases],
)
def test_rule_reports_a_violation(rule, name, source, words):
    faults = list(rule(Module(name, source, TOY_NAMES)))
    assert any(words in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("rule", "name", "source"), [(rule, *case) for rule, cases in ALLOWED.items() for case in cases]
)
def test_rule_lets_right_code_pass(rule, name, source):
    assert list(rule(Module(name, source, TOY_NAMES))) == []


def test_rules_read_a_folder_of_files(tmp_path):
    for path, source in {
        "__init__.py": "from cognexis.registration import E\n",
        "errors.py": "class E(Exception): ...\n",
        "decoder/__init__.py": "from cognexis.training.trainer import T\n",
        "decoder/parts/__init__.py": "",
        "decoder/parts/norm.py": "from cognexis.decoder import parts\nfrom .x import y\n",
    }.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    names = ["__init__", "decoder", "decoder.parts", "decoder.parts.norm", "errors"]
    assert [module.name for module in read_package(tmp_path)] == names
    assert faults_of(tmp_path, wrong_direction) == ["decoder: line 1: decoder may not import training"]
    assert faults_of(tmp_path, wrong_form) == [
        "decoder.parts.norm: line 1: parts is a module; import a name from it",
        "decoder.parts.norm: line 2: relative import",
    ]


def test_package_is_found():
    names = {module.name for module in read_package(PACKAGE)}
    assert names >= {"__init__", "errors", "configuration_cognexis"}


def test_layers_have_no_cycle():
    def everything_below(part: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        for below in MAY_IMPORT[part] - seen:
            seen |= everything_below(below, seen | {below})
        return seen

    assert [part for part in MAY_IMPORT if part in everything_below(part)] == []
