# SPDX-License-Identifier: Apache-2.0
"""Flat remote code: the package's runtime modules as the few files that transformers can load.

A checkpoint folder has to load with ``trust_remote_code=True`` where this package is not installed, but the
loader of transformers follows only ``.name`` imports of files that lie side by side. So the modules that the
entry modules need are found by reading their imports and merged, one file per folder:

    cognexis/decoder/norm.py, cognexis/decoder/block.py  ->  decoder_cognexis.py
    in another folder: from cognexis.decoder.norm import RMSNorm  ->  from .decoder_cognexis import RMSNorm

Inside a file the modules stand in dependency order, their imports are hoisted, and imports of each other
vanish. What cannot be expressed that way is refused with file and line, never guessed:

- star, relative and module imports of our own code (``import cognexis.x``); only names can be imported;
- two things under one top-level name in one file, unless they are the same definition twice;
- folders that need each other, since each of the two files would have to be loaded first.

Three cases deserve a word. A module that is only reached by imports inside functions keeps a file of its own
(``..._on_demand_...``), so that what was loaded lazily, such as Triton kernels, still is. Sub-folders of one
folder that need each other share a file. A folder that a checkpoint does without is left out, and an import
of it inside a function becomes an ImportError that says so. Blocks under TYPE_CHECKING are dropped, because
the loader would take their imports as requirements.
"""

import ast
import builtins
import contextlib
import functools
import graphlib
import importlib.metadata
import importlib.resources
import itertools
import os
import re
import sys
import textwrap
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from cognexis.errors import BackendError

# The loader's own two expressions (transformers.dynamic_module_utils.get_relative_imports). They read text,
# not syntax: a docstring line can look like an import to them.
_LOADER_PATTERNS = (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import")
_LINE_WIDTH = 110
# Names whose value depends on where a module lies; in a merged file it would be another.
_PLACE_DEPENDENT = frozenset({"__file__", "__path__", "__package__", "__spec__", "__loader__", "globals"})
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_BINDING = (ast.Name, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
# What may stand on the right of two equal assignments that become one.
_HARMLESS_CALLS = ("getLogger", "get_logger", "TypeVar", "ParamSpec")
_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)

Dependencies = dict[str, set[str]]


class BundleError(BackendError):
    """The package's code cannot be written as flat remote code; the message names file and line."""

    code = "bundle"


@dataclass(frozen=True)
class BundleLayout:
    """Which package is flattened, and how its modules are spread over files.

    Attributes:
        root: name of the package; also the suffix of every generated file.
        entries: modules that get a file under their own name; those that do not exist are skipped unless
            they are in ``required``. Names here and below are relative to ``root``.
        required: entries without which there is no bundle.
        stays: folders and modules that must never travel.
        files: file stems by dotted prefix, the longest prefix wins. What is not listed goes into a file named
            after its folder, down to two levels: ``kernels.lstm.reference`` into ``kernels_lstm``.
    """

    root: str
    entries: tuple[str, ...]
    required: tuple[str, ...] = ()
    stays: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()

    def stem(self, module: str, is_package: bool) -> str:
        """Name the file of ``module``, without suffix."""
        table = dict(self.files)
        for prefix in _prefixes(module):
            if prefix in table:
                return table[prefix]
        parts = module.split(".")
        folder = parts if is_package else parts[:-1]
        return "_".join(folder[:2]) if folder else module

    def file_name(self, stem: str) -> str:
        """``decoder`` becomes ``decoder_cognexis.py``; ``modeling_cognexis`` keeps its name."""
        return f"{stem}.py" if stem.endswith(f"_{self.root}") else f"{stem}_{self.root}.py"


COGNEXIS = BundleLayout(
    root="cognexis",
    entries=("configuration_cognexis", "modeling_cognexis", "tokenization_cognexis"),
    required=("configuration_cognexis", "modeling_cognexis"),
    stays=("artifacts", "tasks", "safety", "training", "eval_harness", "serving", "hub", "cli", "__main__"),
)
_CORTEX_FOLDERS = ("cortex_layers",)


def bundle_files(needs_cortex: bool = False) -> dict[str, str]:
    """Generate the remote code of a checkpoint.

    Args:
        needs_cortex: whether the checkpoint has Cortex layers; without them neither ``cortex_layers`` nor
            the kernels that only they use are part of the result.

    Returns:
        Source text by file name, sorted by name. The work is done once per process.

    Raises:
        BundleError: if the package's code uses a form that cannot be flattened.
    """
    return dict(_cached_bundle(() if needs_cortex else _CORTEX_FOLDERS))


@functools.cache
def _cached_bundle(exclude: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(flatten(COGNEXIS, importlib.resources.files("cognexis"), exclude).items())


def write_bundle(folder: str | os.PathLike[str], config: Any = None) -> list[str]:
    """Write the remote code beside a checkpoint.

    Each file is written under a temporary name and then put in place, so that a reader never sees half of
    it. Files that are up to date are left alone, and generated files of an earlier save that are no longer
    needed are removed; nothing else in the folder is touched.

    Args:
        folder: checkpoint folder, created if it does not exist.
        config: the model's configuration, which tells whether Cortex layers are needed; None means no.

    Returns:
        The names of the files that make up the code, sorted.

    Raises:
        BundleError: if the package's code uses a form that cannot be flattened.
    """
    return write_files(folder, bundle_files(needs_cortex(config)), COGNEXIS.root)


def needs_cortex(config: Any) -> bool:
    """Say whether a model of this configuration has Cortex layers."""
    stages = ("prelude_layer_types", "core_layer_types", "coda_layer_types")
    return any("cortex" in (getattr(config, stage, None) or ()) for stage in stages)


def write_files(folder: str | os.PathLike[str], files: dict[str, str], root: str) -> list[str]:
    """Bring the generated files of package ``root`` in ``folder`` to the state of ``files``.

    Args:
        folder: target, created if it does not exist.
        files: source text by file name.
        root: name of the package; only files ``*_<root>.py`` that carry its header can be removed.

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
    mark = f"\n{_mark(root)}".encode()
    for path in target.glob(f"*_{root}.py"):
        if path.name not in files and path.is_file() and mark in path.read_bytes()[:200]:
            path.unlink(missing_ok=True)
    return sorted(files)


def flatten(layout: BundleLayout, package: Traversable, exclude: tuple[str, ...] = ()) -> dict[str, str]:
    """Flatten one package; the general form of `bundle_files`.

    Args:
        layout: what to flatten into which files.
        package: the package's folder.
        exclude: folders, relative to the package, that this checkpoint does without.

    Returns:
        Source text by file name, sorted by name.

    Raises:
        BundleError: for every form that the module docstring lists, with file and line.
    """
    graph = _Graph(layout, package, exclude)
    graph.collect()
    graph.check_folders()
    graph.assign_files()
    stems = sorted(set(graph.stems.values()))
    files = {layout.file_name(stem): _FlatFile(graph, stem).render() for stem in stems}
    _check_result(files)
    return dict(sorted(files.items()))


# ---- one module of the package ----


@dataclass(frozen=True)
class _OwnImport:
    """One ``from root.target import name as alias, ...`` statement."""

    target: str
    names: tuple[tuple[str, str], ...]
    node: ast.ImportFrom
    functions: tuple[ast.AST, ...]  # the functions around it, outermost first
    is_eager: bool  # stands at the top level, under no condition


@dataclass(eq=False)
class _Module:
    """A parsed module: its imports of our own code and what its top level binds."""

    name: str
    label: str  # path for messages, such as cognexis/decoder/norm.py
    is_package: bool
    text: str
    tree: ast.Module
    imports: list[_OwnImport] = field(default_factory=list)
    hidden: list[ast.stmt] = field(default_factory=list)  # blocks under TYPE_CHECKING

    def __post_init__(self) -> None:
        self.lines = self.text.split("\n")

    def error(self, node: ast.AST | int, message: str) -> BundleError:
        line = node if isinstance(node, int) else getattr(node, "lineno", 1)
        return BundleError(f"{self.label}:{line}: {message}")

    def own_import(self, node: ast.AST) -> _OwnImport | None:
        return next((own for own in self.imports if own.node is node), None)

    @functools.cached_property
    def bound(self) -> frozenset[str]:
        """Every name that the module's top level binds, imports included."""
        return frozenset(name for node in self.tree.body for name in _bound_names(node))

    @functools.cached_property
    def passed_on(self) -> dict[str, tuple[str, str]]:
        """Module and name behind each alias that the top level imports from our own code and keeps."""
        imports = [own for own in self.imports if own.is_eager]
        nodes = [own.node for own in imports]
        changed = {name for node in self.tree.body if node not in nodes for name in _bound_names(node)}
        found = {alias: (own.target, name) for own in imports for name, alias in own.names}
        return {alias: place for alias, place in found.items() if alias not in changed}

    def read(self, root: str) -> None:
        """Find the module's own imports; refuses the forms that flat files cannot express."""
        for pattern in _LOADER_PATTERNS:
            for match in re.finditer(pattern, self.text, flags=re.MULTILINE):
                raise self.error(
                    self.text.count("\n", 0, match.start(1)) + 1,
                    f"line looks like a relative import of {match.group(1)!r}, which the remote-code loader "
                    "would follow even inside a string; import by the absolute name, or reword the text",
                )
        for node in self.tree.body:
            self._visit(node, root, (), [])

    def _visit(self, node: ast.AST, root: str, functions: tuple[ast.AST, ...], around: list[ast.AST]) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            if around or node.orelse:
                raise self.error(node, "a TYPE_CHECKING block must be at the top level and have no else")
            self.hidden.append(node)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == root:
                    raise self.error(node, f"import {alias.name}: import names with from ... import instead")
        elif isinstance(node, ast.ImportFrom):
            self._read_from(node, root, functions, around)
        elif isinstance(node, ast.Name) and node.id in _PLACE_DEPENDENT:
            raise self.error(node, f"{node.id} means something else in a merged file; do without it")
        elif isinstance(node, ast.Call) and _imports_by_text(node, root):
            raise self.error(node, "our own modules cannot be imported by a name in a string")
        inner = (*functions, node) if isinstance(node, _FUNCTIONS) else functions
        for child in ast.iter_child_nodes(node):
            self._visit(child, root, inner, [*around, node])

    def _read_from(
        self, node: ast.ImportFrom, root: str, functions: tuple[ast.AST, ...], around: list[ast.AST]
    ) -> None:
        parts = (node.module or "").split(".")
        if node.level:
            raise self.error(node, "relative import; import by the absolute name")
        if any(alias.name == "*" for alias in node.names):
            raise self.error(node, "star import; name what is imported")
        if parts[0] != root:
            return
        if len(parts) == 1:
            raise self.error(node, f"from {root} import ...: import from the module that holds the name")
        if any(isinstance(outer, ast.ClassDef) for outer in around) and not functions:
            raise self.error(node, "import of our own code in a class body; move it to the top of the module")
        if not _stands_alone(self.lines, node):
            raise self.error(node, "an import of our own code must stand on lines of its own")
        names = tuple((alias.name, alias.asname or alias.name) for alias in node.names)
        self.imports.append(_OwnImport(".".join(parts[1:]), names, node, functions, is_eager=not around))


# ---- the modules together ----


class _Graph:
    """The modules that a bundle needs, what each name stands for, and the file of each module."""

    def __init__(self, layout: BundleLayout, package: Traversable, exclude: tuple[str, ...]) -> None:
        self.layout = layout
        self.package = package
        self.exclude = exclude
        self.parsed: dict[str, _Module | None] = {}
        self.entries: list[str] = []
        self.eager: Dependencies = {}  # by imports that run when the module is loaded
        self.lazy: Dependencies = {}  # by imports inside functions
        self.stems: dict[str, str] = {}
        self.version = _version(package, layout.root)

    def collect(self) -> None:
        """Follow the imports of the entry modules; fills ``eager`` and ``lazy``."""
        for name in self.layout.entries:
            if self.load(name):
                self.entries.append(name)
            elif name in self.layout.required or not self.entries:
                raise BundleError(f"{self.layout.root}/{name}.py: entry module not found")
        waiting = list(self.entries)
        while waiting:
            name = waiting.pop()
            if name in self.eager:
                continue
            self.eager[name], self.lazy[name] = set(), set()
            module = self.module(name)
            for statement in module.imports:
                if self.is_excluded(module, statement):
                    continue
                kind = self.eager if statement.is_eager else self.lazy
                kind[name].update(self._needed(module, statement))
            self.lazy[name] -= self.eager[name]
            waiting.extend(sorted(self.eager[name] | self.lazy[name]))

    def _needed(self, module: _Module, statement: _OwnImport) -> Iterator[str]:
        stays = next((p for p in _prefixes(statement.target) if p in self.layout.stays), None)
        if stays:
            raise module.error(statement.node, f"{self.layout.root}.{stays} never travels with a checkpoint")
        for name, _ in statement.names:
            yield self.origin(module, statement, name)[0]
        target = self.load(statement.target)
        if target and not target.is_package:  # a folder's __init__ that only passes a name on is skipped
            yield target.name

    def is_excluded(self, module: _Module, statement: _OwnImport) -> bool:
        """Say whether an import belongs to an excluded folder; at the top level that is an error."""
        prefix = next((p for p in _prefixes(statement.target) if p in self.exclude), None)
        if prefix and not statement.functions:
            raise module.error(
                statement.node,
                f"{self.layout.root}.{prefix} is left out of checkpoints that do not need it, so it can only "
                "be imported inside the function that uses it",
            )
        return prefix is not None

    def exclusion_message(self, statement: _OwnImport) -> str:
        """Text of the ImportError that stands where an excluded import was."""
        prefix = next(p for p in _prefixes(statement.target) if p in self.exclude)
        what = prefix.rpartition(".")[2].replace("_", " ").capitalize()
        return f"{self.layout.root}.{statement.target}: this checkpoint was saved without {what}"

    def origin(self, module: _Module, statement: _OwnImport, name: str) -> tuple[str, str]:
        """Module and name of the definition behind an imported name, through all re-exports."""
        target, seen = statement.target, set()
        while True:
            source = self.load(target)
            if source is None:
                raise module.error(statement.node, f"{self.layout.root}.{target} does not exist")
            if (target, name) in seen:
                raise module.error(statement.node, f"{name} is passed around in a circle and never defined")
            seen.add((target, name))
            if name in source.passed_on:
                target, name = source.passed_on[name]
                continue
            if name in source.bound:
                return target, name
            is_module = self.load(f"{target}.{name}") is not None
            reason = (
                "is a module; import the names in it" if is_module else f"is not defined in {source.label}"
            )
            raise module.error(statement.node, f"{name} {reason}")

    def module(self, name: str) -> _Module:
        """Give a module that is known to exist."""
        module = self.load(name)
        assert module is not None, name
        return module

    def load(self, name: str) -> _Module | None:
        """Parse a module, once; None if it does not exist."""
        if name not in self.parsed:
            self.parsed[name] = self._parse(name)
        return self.parsed[name]

    def _parse(self, name: str) -> _Module | None:
        *folders, last = name.split(".")
        place = self.package.joinpath(*folders) if folders else self.package
        path = "/".join((self.layout.root, *folders, last))
        for file, is_package in ((place / f"{last}.py", False), (place / last / "__init__.py", True)):
            if not file.is_file():
                continue
            label = f"{path}/__init__.py" if is_package else f"{path}.py"
            text = file.read_text(encoding="utf-8").replace("\r\n", "\n").rstrip("\n")
            try:
                tree = ast.parse(text)
            except SyntaxError as error:
                raise BundleError(f"{label}:{error.lineno}: {error.msg}") from error
            module = _Module(name, label, is_package, text, tree)
            module.read(self.layout.root)
            return module
        return None

    def check_folders(self) -> None:
        """Refuse top-level folders that need each other, by whatever import."""
        folders: Dependencies = {}
        for name in sorted(self.eager):
            top = name.split(".")[0]
            needed = {other.split(".")[0] for other in self.eager[name] | self.lazy[name]}
            folders.setdefault(top, set()).update(needed - {top})
        try:
            graphlib.TopologicalSorter({top: sorted(folders[top]) for top in sorted(folders)}).prepare()
        except graphlib.CycleError as error:
            circle = error.args[1][::-1]
            steps = [self._example(here, there) for here, there in itertools.pairwise(circle)]
            raise BundleError(
                f"{' -> '.join(circle)}: folders need each other, but their files must be loaded one after "
                f"the other ({'; '.join(steps)})"
            ) from error

    def _example(self, here: str, there: str) -> str:
        for name in sorted(self.eager):
            for statement in self.module(name).imports if name.split(".")[0] == here else ():
                if statement.target.split(".")[0] == there:
                    return f"{self.module(name).label}:{statement.node.lineno} imports {statement.target}"
        return f"{here} imports {there}"

    def assign_files(self) -> None:
        """Choose the file of each module; fills ``stems``."""
        stems = {name: self.layout.stem(name, self.module(name).is_package) for name in self.eager}
        stems |= {name: name for name in self.entries}
        at_load = self._loaded_at_once(stems)
        stems = {name: stem if name in at_load else f"{stem}_on_demand" for name, stem in stems.items()}
        files: Dependencies = {stem: set() for stem in stems.values()}
        for name, others in self.eager.items():
            files[stems[name]].update(stems[other] for other in others)
        joined = _join_cycles(files)
        self.stems = {name: joined[stem] for name, stem in stems.items()}

    def _loaded_at_once(self, stems: dict[str, str]) -> set[str]:
        """Modules that are loaded with their file; the others are only reached by imports in functions."""
        found: set[str] = set()
        waiting = list(self.entries)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                elsewhere = {other for other in self.lazy[name] if stems[other] != stems[name]}
                waiting.extend(self.eager[name] | elsewhere)
        return found


# ---- one generated file ----


@dataclass(frozen=True)
class _Owner:
    """Who bound a top-level name of a generated file, and to what."""

    module: _Module
    node: ast.stmt
    meaning: tuple[str, str]  # module and name of our definition, or "" and the path of another package's
    syntax: str  # the statement, where an equal one may stand in for it; empty elsewhere


class _FlatFile:
    """The modules of one file in dependency order, and the text that they become."""

    def __init__(self, graph: _Graph, stem: str) -> None:
        self.graph = graph
        self.stem = stem
        self.own_name = graph.layout.file_name(stem)
        self.modules = [graph.module(name) for name in self._order()]
        self.owners: dict[str, _Owner] = {}
        self.merged: dict[tuple[str, str], tuple[str, str]] = {}  # definitions dropped for an equal one
        self.plain_imports: set[str] = set()
        self.from_imports: dict[str, set[str]] = {}
        self.exported: set[str] = set()

    def _order(self) -> list[str]:
        members = sorted(name for name, stem in self.graph.stems.items() if stem == self.stem)
        inside = {name: sorted(self.graph.eager[name].intersection(members)) for name in members}
        try:
            return list(graphlib.TopologicalSorter(inside).static_order())
        except graphlib.CycleError as error:
            circle = " -> ".join(self.graph.module(name).label for name in error.args[1][::-1])
            raise BundleError(f"{circle}: modules import each other when they are loaded") from error

    def render(self) -> str:
        """Generate the text of the file."""
        future = {_has_future_annotations(module.tree): module.label for module in self.modules}
        if len(future) > 1:
            raise BundleError(
                f"{future[True]} has from __future__ import annotations and {future[False]} has not; both go "
                f"into {self.own_name}, where it would hold for both"
            )
        bodies = ["\n".join(self._module_lines(module)).strip("\n") for module in self.modules]
        self._check_builtins()
        parts = [self._header(), "from __future__ import annotations" if True in future else ""]
        parts += [self._imports(), *("\n" + body for body in bodies if body)]
        if self.exported:
            parts.append("\n" + _wrap("__all__ = [", [f'"{name}"' for name in sorted(self.exported)], "]"))
        return "\n\n".join(part for part in parts if part) + "\n"

    def _header(self) -> str:
        mark = f"{_mark(self.graph.layout.root)}{self.graph.version}; do not edit, every save writes it anew."
        lines = ["# SPDX-License-Identifier: Apache-2.0", mark]
        if len(self.modules) > 1:
            lines += ['"""Several modules in one file, in the order in which they need each other:', ""]
            lines += [*(f"    {module.label}" for module in self.modules), '"""']
        elif _docstring_node(self.modules[0].tree):
            node = self.modules[0].tree.body[0]
            lines.extend(self.modules[0].lines[node.lineno - 1 : node.end_lineno])
        return "\n".join(lines)

    def _imports(self) -> str:
        sections: list[list[str]] = [[], [], []]  # standard library, other packages, our own files
        for text in sorted(self.plain_imports):
            sections[text.split()[1].split(".")[0] not in sys.stdlib_module_names].append(text)
        for source, names in sorted(self.from_imports.items()):
            kind = 2 if source.startswith(".") else source.split(".")[0] not in sys.stdlib_module_names
            sections[kind].append(_wrap(f"from {source} import ", sorted(names), ""))
        return "\n\n".join("\n".join(section) for section in sections if section)

    def _module_lines(self, module: _Module) -> list[str]:
        out: list[str] = []
        if len(self.modules) > 1:
            docstring = (ast.get_docstring(module.tree, clean=False) or "").strip().splitlines()
            out += [f"# Module {module.label}", *(f"# {line}".rstrip() for line in docstring), ""]
        edits = self._edits(module)
        end = 0
        for node in module.tree.body:
            start = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))]) - 1
            if start < end:
                raise module.error(node, "two statements on one line")
            _append_gap(out, module.lines[end:start])
            end = node.end_lineno or node.lineno
            out += self._statement_lines(module, node, start, end, edits)
        _append_gap(out, module.lines[end:])
        return out

    def _statement_lines(
        self, module: _Module, node: ast.stmt, start: int, end: int, edits: dict[int, tuple[int, list[str]]]
    ) -> list[str]:
        if node is _docstring_node(module.tree) or node in module.hidden or _is_future(node):
            return []
        if isinstance(node, ast.Import | ast.ImportFrom):
            return self._hoist(module, node)
        if "__all__" in _bound_names(node):
            self.exported.update(_literal_names(module, node))
            return []
        if self._already_there(module, node):
            return []
        lines: list[str] = []
        while start < end:
            stop, replacement = edits.get(start, (start + 1, [module.lines[start]]))
            lines += replacement
            start = stop
        return lines

    def _hoist(self, module: _Module, node: ast.Import | ast.ImportFrom) -> list[str]:
        own = module.own_import(node)
        if own:
            assignments, siblings = self._resolve(module, own)
            for source, names in siblings.items():
                self.from_imports.setdefault(source, set()).update(names)
            return assignments
        for alias in node.names:
            text = alias.name + (f" as {alias.asname}" if alias.asname else "")
            if isinstance(node, ast.Import):
                self.plain_imports.add(f"import {text}")
                path = alias.name if alias.asname else alias.name.split(".")[0]
            else:
                self.from_imports.setdefault(str(node.module), set()).add(text)
                path = f"{node.module}.{alias.name}"
            self._claim(module, node, alias.asname or path.rpartition(".")[2], ("", path))
        return []

    def _resolve(self, module: _Module, own: _OwnImport) -> tuple[list[str], dict[str, set[str]]]:
        """Turn an import of our own code into assignments and imports from sibling files."""
        assignments: list[str] = []
        siblings: dict[str, set[str]] = {}
        for name, alias in own.names:
            source, original = self.graph.origin(module, own, name)
            stem = self.graph.stems[source]
            known = own.is_eager and self._claim(module, own.node, alias, (source, original))
            if stem != self.stem:
                sibling = "." + self.graph.layout.file_name(stem).removesuffix(".py")
                text = original if alias == original else f"{original} as {alias}"
                siblings.setdefault(sibling, set()).add(text)
                continue
            if any(_rebinds(function, original, own.node) for function in own.functions):
                raise module.error(own.node, f"{original} is also a local name here and would hide it")
            if alias != original and not known:
                assignments.append(f"{alias} = {original}")
        return assignments, siblings

    def _edits(self, module: _Module) -> dict[int, tuple[int, list[str]]]:
        """Replacements, by first line, for imports of our own code that stand inside other statements."""
        edits = {}
        texts: dict[ast.AST, list[str]] = {}
        for own in module.imports:
            if own.is_eager:
                continue
            if self.graph.is_excluded(module, own):
                texts[own.node] = [f'raise ImportError("{self.graph.exclusion_message(own)}")']
            else:
                texts[own.node], siblings = self._resolve(module, own)
                for source, names in sorted(siblings.items()):
                    texts[own.node].append(_wrap(f"from {source} import ", sorted(names), ""))
        for block in _blocks(module.tree):
            if block and all(texts.get(node) == [] for node in block):
                texts[block[-1]] = ["pass"]
        for node, text in texts.items():
            assert isinstance(node, ast.ImportFrom)
            lines = textwrap.indent("\n".join(text), " " * node.col_offset).splitlines()
            edits[node.lineno - 1] = (node.end_lineno or node.lineno, lines)
        return edits

    def _already_there(self, module: _Module, node: ast.stmt) -> bool:
        """Claim what a statement binds; True if an earlier module has the very same definition."""
        names = sorted(_bound_names(node) - {"_"})
        syntax = ast.dump(node) if _is_mergeable(node) else ""
        known = [self._claim(module, node, name, (module.name, name), syntax) for name in names]
        return bool(known) and all(known)

    def _claim(
        self, module: _Module, node: ast.stmt, name: str, meaning: tuple[str, str], syntax: str = ""
    ) -> bool:
        """Bind a name in the file; True if it already means the same, an error if it means something else."""
        meaning = self.merged.get(meaning, meaning)
        owner = self.owners.get(name)
        if owner is None or (owner.module is module and owner.meaning != meaning):
            self.owners[name] = _Owner(module, node, meaning, syntax)
            return False
        if owner.meaning == meaning:
            return owner.module is not module
        if syntax and owner.syntax == syntax:
            self.merged[meaning] = owner.meaning
            return True
        raise module.error(
            node,
            f"{name} means something else in {owner.module.label}:{owner.node.lineno}, and both modules go "
            f"into {self.own_name}; rename one of them",
        )

    def _check_builtins(self) -> None:
        for name in sorted(set(self.owners).intersection(dir(builtins))):
            for module in self.modules:
                uses = (n for n in ast.walk(module.tree) if isinstance(n, ast.Name) and n.id == name)
                use = next(uses, None)
                if use and name not in module.bound:
                    owner = self.owners[name].module.label
                    raise module.error(use, f"{name} would no longer be the built-in one, because of {owner}")


# ---- small questions about syntax ----


def _prefixes(module: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


def _mark(root: str) -> str:
    return f"# Generated from {root} "


def _version(package: Traversable, root: str) -> str:
    start = package / "__init__.py"
    for node in ast.parse(start.read_text(encoding="utf-8")).body if start.is_file() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            with contextlib.suppress(ValueError):
                return str(ast.literal_eval(node.value))
    try:
        return importlib.metadata.version(root)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _docstring_node(tree: ast.Module) -> ast.stmt | None:
    return tree.body[0] if ast.get_docstring(tree) is not None else None


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _has_future_annotations(tree: ast.Module) -> bool:
    return any(_is_future(node) and "annotations" in _bound_names(node) for node in tree.body)


def _imports_by_text(call: ast.Call, root: str) -> bool:
    name = ast.unparse(call.func).rpartition(".")[2]
    value = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
    return name in ("import_module", "__import__") and str(value).split(".")[0] in ("", root)


def _stands_alone(lines: list[str], node: ast.ImportFrom) -> bool:
    before = lines[node.lineno - 1].encode()[: node.col_offset].strip()
    after = lines[(node.end_lineno or node.lineno) - 1].encode()[node.end_col_offset :].strip()
    return not before and (not after or after.startswith(b"#"))


def _bound_names(node: ast.AST) -> set[str]:
    """Names that a statement binds in its own scope, or in the module by ``global`` inside a function."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        inner = (item for item in ast.walk(node) if isinstance(item, ast.Global))
        return {node.name, *(name for item in inner for name in item.names)}
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda):
        return set()
    return {name for child in ast.iter_child_nodes(node) for name in _bound_names(child)}


def _rebinds(function: ast.AST, name: str, own: ast.ImportFrom) -> bool:
    """Say whether a function binds ``name`` in another way than by imports like ``own``."""
    for node in ast.walk(function):
        if node is function or (isinstance(node, ast.ImportFrom) and node.module == own.module):
            continue
        if isinstance(node, ast.arg) and node.arg == name:
            return True
        if isinstance(node, _BINDING) and name in _bound_names(node):
            return True
    return False


def _blocks(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                yield block


def _literal_names(module: _Module, node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        with contextlib.suppress(ValueError):
            return [str(name) for name in ast.literal_eval(node.value)]
    raise module.error(node, "__all__ must be one assignment of a list of strings")


def _is_mergeable(node: ast.AST) -> bool:
    """Say whether one statement can stand for two equal ones: it makes nothing that the two would share."""
    if isinstance(node, ast.Try | ast.If | ast.ExceptHandler):
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        return all(_is_mergeable(child) for child in children)
    if isinstance(node, ast.Assign | ast.AnnAssign):
        if isinstance(node.value, ast.Call):
            return ast.unparse(node.value.func).rpartition(".")[2] in _HARMLESS_CALLS
        return not any(isinstance(part, (ast.Call, *_DISPLAYS)) for part in ast.walk(node.value or node))
    definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return isinstance(node, definition | ast.Import | ast.ImportFrom | ast.Pass)


def _append_gap(out: list[str], lines: Sequence[str]) -> None:
    """Copy the comments and blank lines between two statements, never more than two blank lines in a row."""
    for line in lines:
        if not line.startswith("# SPDX-License-Identifier") and (line.strip() or out[-2:] != ["", ""]):
            out.append(line.rstrip())


def _wrap(start: str, items: list[str], end: str) -> str:
    """Write ``start``, the items and ``end`` on one line, or one item per line in brackets."""
    line = f"{start}{', '.join(items)}{end}"
    if len(line) <= _LINE_WIDTH:
        return line
    opening, closing = ("", end) if end else ("(", ")")
    return "\n".join([f"{start}{opening}", *(f"    {item}," for item in items), closing])


def _join_cycles(files: Dependencies) -> dict[str, str]:
    """Give files that must be loaded one before the other, in a circle, a common name."""
    reach = {stem: set(others) for stem, others in files.items()}
    for middle in files:
        for stem in files:
            if middle in reach[stem]:
                reach[stem] |= reach[middle]
    joined = {}
    for stem in files:
        circle = {stem, *(other for other in reach[stem] if stem in reach[other])}
        joined[stem] = min(circle, key=lambda name: (len(name), name))
    return joined


def _check_result(files: dict[str, str]) -> None:
    """Make sure of what the loader will need: every import of a sibling finds its file and its names."""
    trees = {name: ast.parse(text, name) for name, text in files.items()}
    bound = {name: {n for node in tree.body for n in _bound_names(node)} for name, tree in trees.items()}
    for name, tree in trees.items():
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        seen = {hit for pattern in _LOADER_PATTERNS for hit in re.findall(pattern, files[name], re.MULTILINE)}
        if seen != {str(node.module) for node in imports}:
            raise BundleError(f"{name}: the loader would read the imports {sorted(seen)}")
        for node in imports:
            missing = {alias.name for alias in node.names} - bound.get(f"{node.module}.py", set())
            if missing:
                raise BundleError(f"{name}:{node.lineno}: {sorted(missing)} not found in {node.module}.py")
