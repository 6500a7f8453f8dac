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

import ast
import builtins
import functools
import graphlib
import importlib.resources
import itertools
import os
import re
import sys
import textwrap
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeGuard

from cognexis.errors import BackendError

# The loader's own two expressions (transformers.dynamic_module_utils.get_relative_imports). They read text,
# not syntax: a docstring line can look like an import to them.
_LOADER_PATTERNS = (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import")
_LINE_WIDTH = 119
# Names whose value depends on where a module lies; in a merged file it would be another.
_PLACE_DEPENDENT = frozenset({"__file__", "__path__", "__package__", "__spec__", "__loader__", "globals"})
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
# Calls that may stand on the right of two equal assignments that become one.
_HARMLESS_CALLS = ("getLogger", "get_logger", "TypeVar", "ParamSpec")

Dependencies = dict[str, set[str]]


class BundleError(BackendError):
    """The package's code cannot be written as flat remote code; the message names file and line."""

    code = "bundle"


@dataclass(frozen=True)
class BundleLayout:
    """Which package is flattened; all names but the first are relative to it.

    Attributes:
        root: name of the package; also the suffix of every generated file.
        entries: modules that keep a file of their own; those that do not exist are skipped.
        required: entries without which there is no bundle.
        stays: folders and modules that must never travel.
        files: file stems by dotted prefix of the modules that they hold; the longest prefix wins. The file of what
            is not listed has the name of its folder, two levels deep: ``kernels_lstm`` for kernels/lstm/reference.py.
    """

    root: str
    entries: tuple[str, ...]
    required: tuple[str, ...] = ()
    stays: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()

    def stem(self, module: str, is_package: bool) -> str:
        """Name the file of a module, without suffix."""
        parts = module.split(".")
        listed = [stem for prefix, stem in sorted(self.files) if prefix in _prefixes(module)]
        return listed[-1] if listed else "_".join((parts if is_package else parts[:-1])[:2]) or module

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

    Each file is written under a temporary name and then put in place, so that a reader never sees half of it.
    Files that are up to date are left alone. Generated files of an earlier save that are no longer part are
    removed, recognised by name and header; nothing else in the folder is touched.

    Args:
        folder: target, created if it does not exist.
        files: source text by file name.
        root: name of the package.

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
        layout: what to flatten.
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
    stems = set(graph.stems.values())
    files = {layout.file_name(stem): _FlatFile(graph, stem).render() for stem in sorted(stems)}
    _check_result(files)
    return dict(sorted(files.items()))


@dataclass(frozen=True)
class _OwnImport:
    """One ``from root.target import name as alias, ...`` statement."""

    target: str
    names: tuple[tuple[str, str], ...]
    node: ast.ImportFrom
    functions: tuple[ast.AST, ...]  # the functions around it
    is_plain: bool  # stands at the top level, under no condition


@dataclass(eq=False)
class _Module:
    """A parsed module: its imports of our own code and what its top level binds."""

    name: str
    label: str  # path for messages, such as cognexis/decoder/norm.py
    lines: list[str]
    body: list[ast.stmt]
    docstring: ast.stmt | None
    imports: list[_OwnImport] = field(default_factory=list)
    globals: list[ast.Global] = field(default_factory=list)

    @property
    def is_package(self) -> bool:
        return self.label.endswith("/__init__.py")

    def error(self, node: ast.AST | int, message: str) -> BundleError:
        line = node if isinstance(node, int) else getattr(node, "lineno", 1)
        return BundleError(f"{self.label}:{line}: {message}")

    @functools.cached_property
    def bound(self) -> frozenset[str]:
        """Every name that the module's top level binds, imports included."""
        return frozenset(name for node in self.body for name in _bound_names(node))

    @functools.cached_property
    def passed_on(self) -> dict[str, tuple[str, str]]:
        """Module and name behind each alias that the top level imports from our own code and keeps."""
        imports = [own for own in self.imports if own.is_plain]
        nodes = [own.node for own in imports]
        changed = {name for node in self.body if node not in nodes for name in _bound_names(node)}
        found = {alias: (own.target, name) for own in imports for name, alias in own.names}
        return {alias: place for alias, place in found.items() if alias not in changed}

    def read(self, root: str) -> None:
        """Find the module's own imports; refuses the forms that flat files cannot express."""
        text = "\n".join(self.lines)
        for match in itertools.chain(*(re.finditer(pattern, text, re.MULTILINE) for pattern in _LOADER_PATTERNS)):
            raise self.error(
                text.count("\n", 0, match.start(1)) + 1,
                f"line looks like a relative import of {match.group(1)!r}, which the remote-code loader "
                "would follow even inside a string; import by the absolute name, or reword the text",
            )
        for node in self.body:
            self._visit(node, root, ())

    def _visit(self, node: ast.AST, root: str, around: tuple[ast.AST, ...]) -> None:
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == root for alias in node.names):
            raise self.error(node, f"import of {root}: import names with from ... import instead")
        if isinstance(node, ast.ImportFrom):
            self._read_from(node, root, around)
        elif isinstance(node, ast.Global):
            self.globals.append(node)
        elif isinstance(node, ast.Name) and node.id in _PLACE_DEPENDENT:
            raise self.error(node, f"{node.id} means something else in a merged file; do without it")
        elif isinstance(node, ast.Call) and _imports_by_text(node, root):
            raise self.error(node, "our own modules cannot be imported by a name in a string")
        elif _is_type_checking(node):
            raise self.error(node, "a TYPE_CHECKING block must be at the top level and have no else")
        for child in ast.iter_child_nodes(node):
            self._visit(child, root, (*around, node))

    def _read_from(self, node: ast.ImportFrom, root: str, around: tuple[ast.AST, ...]) -> None:
        package, _, target = (node.module or "").partition(".")
        is_own = package == root
        functions = tuple(outer for outer in around if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef))
        before = self.lines[node.lineno - 1].encode()[: node.col_offset].strip()
        after = self.lines[(node.end_lineno or 0) - 1].encode()[node.end_col_offset :].strip()
        faults = {
            "relative import; import by the absolute name": node.level > 0,
            "star import; name what is imported": node.names[0].name == "*",
            f"from {root} import ...: import from the module that holds the name": is_own and not target,
            "import of our own code in a class body; move it to the top of the module": is_own
            and any(isinstance(outer, ast.ClassDef) for outer in around)
            and not functions,
            "an import of our own code must stand on lines of its own": is_own
            and bool(before or (after and not after.startswith(b"#"))),
        }
        for fault, found in faults.items():
            if found:
                raise self.error(node, fault)
        if is_own:
            names = tuple((alias.name, alias.asname or alias.name) for alias in node.names)
            self.imports.append(_OwnImport(target, names, node, functions, is_plain=not around))


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

    def collect(self) -> None:
        """Follow the imports of the entry modules; fills ``eager`` and ``lazy``."""
        missing = [name for name in self.layout.required if not self.load(name)]
        if missing:
            raise BundleError(f"{self.layout.root}/{missing[0]}.py: entry module not found")
        self.entries = [name for name in self.layout.entries if self.load(name)]
        waiting = list(self.entries)
        while waiting:
            name = waiting.pop()
            if name in self.eager:
                continue
            self.eager[name], self.lazy[name] = set(), set()
            for own in self.module(name).imports:
                if not self.why_excluded(self.module(name), own):
                    (self.lazy if own.functions else self.eager)[name].update(self._needed(self.module(name), own))
            self.lazy[name] -= self.eager[name]
            waiting.extend(sorted(self.eager[name] | self.lazy[name]))
        self._check_packages()

    def _needed(self, module: _Module, own: _OwnImport) -> Iterator[str]:
        if own.target.split(".")[0] in self.layout.stays:
            raise module.error(own.node, f"{self.layout.root}.{own.target} never travels with a checkpoint")
        for name, _ in own.names:
            yield self.origin(module, own, name)[0]
        if not self.module(own.target).is_package:  # a folder's __init__ that only passes a name on is skipped
            yield own.target

    def _check_packages(self) -> None:
        """Refuse a folder whose ``__init__`` does something on import, but only passes names on in the result."""
        harmless = (ast.Import, ast.ImportFrom, ast.Assign, *_DEFINITIONS)
        around = {folder for name in self.eager for folder in _prefixes(name)} - self.eager.keys()
        for module in filter(None, map(self.load, sorted(around))):
            for node in module.body:
                if not isinstance(node, harmless) and node is not module.docstring:
                    raise module.error(node, "a folder's __init__ is left out here, so this would not run")

    def why_excluded(self, module: _Module, own: _OwnImport) -> str:
        """Say why what an import names is left out; empty where it is not."""
        prefix = next((prefix for prefix in _prefixes(own.target) if prefix in self.exclude), "")
        if prefix and not own.functions:
            reason = "is left out of some checkpoints; import it inside the function that uses it"
            raise module.error(own.node, f"{self.layout.root}.{prefix} {reason}")
        what = prefix.rpartition(".")[2].replace("_", " ").capitalize()
        return f"{self.layout.root}.{own.target}: this checkpoint was saved without {what}" if prefix else ""

    def origin(self, module: _Module, own: _OwnImport, name: str) -> tuple[str, str]:
        """Module and name of the definition behind an imported name, through all re-exports."""
        target, seen = own.target, set()
        while True:
            source = self.load(target)
            if source is None:
                raise module.error(own.node, f"{self.layout.root}.{target} does not exist")
            if (target, name) in seen:
                raise module.error(own.node, f"{name} is passed around in a circle and never defined")
            seen.add((target, name))
            if name in source.passed_on:
                target, name = source.passed_on[name]
            elif name in source.bound:
                return target, name
            elif self.load(f"{target}.{name}"):
                raise module.error(own.node, f"{name} is a module; import the names in it")
            else:
                raise module.error(own.node, f"{name} is not defined in {source.label}")

    def module(self, name: str) -> _Module:
        """Give a module that is known to exist."""
        module = self.load(name)
        assert module is not None, name
        return module

    def load(self, name: str) -> _Module | None:
        """Parse a module, once; None if it does not exist."""
        if name not in self.parsed:
            paths = (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py")
            self.parsed[name] = next(
                (self._parse(name, path) for path in paths if (self.package / path).is_file()), None
            )
        return self.parsed[name]

    def _parse(self, name: str, path: str) -> _Module:
        label = f"{self.layout.root}/{path}"
        text = (self.package / path).read_text(encoding="utf-8").rstrip("\n")
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise BundleError(f"{label}:{error.lineno}: {error.msg}") from error
        docstring = tree.body[0] if ast.get_docstring(tree) is not None else None
        lines = text.split("\n")
        for node in [node for node in tree.body if _is_type_checking(node) and not node.orelse]:
            tree.body.remove(node)
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or 0) - node.lineno + 1)
        module = _Module(name, label, lines, tree.body, docstring)
        module.read(self.layout.root)
        return module

    def check_folders(self) -> None:
        """Refuse top-level folders that need each other, by whatever import."""
        folders: dict[str, dict[str, str]] = {}  # by importing and imported folder, one place where it happens
        for name in sorted(self.eager):
            needed = folders.setdefault(name.split(".")[0], {})
            for other in sorted(self.eager[name] | self.lazy[name]):
                needed[other.split(".")[0]] = f"{self.module(name).label} needs {self.module(other).label}"
        try:
            graphlib.TopologicalSorter(
                {top: sorted(needed.keys() - {top}) for top, needed in folders.items()}
            ).prepare()
        except graphlib.CycleError as error:
            steps = itertools.pairwise(error.args[1][::-1])
            places = "; ".join(folders[here][there] for here, there in steps)
            raise BundleError(f"folders need each other, but one file must be loaded first: {places}") from error

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


@dataclass(frozen=True)
class _Owner:
    """Who bound a top-level name of a generated file, and to what."""

    module: _Module
    node: ast.stmt
    meaning: tuple[str, str]  # module and name of our definition, or "" and the path of another package's


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
        self.from_imports: Dependencies = {}
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
        future = {any(map(_is_future, module.body)): module.label for module in self.modules}
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
        start = (self.graph.package / "__init__.py").read_text(encoding="utf-8")
        version = re.search(r'^__version__ = "(.+)"', start, re.MULTILINE)
        mark = f"{_mark(self.graph.layout.root)}{version[1] if version else '(no version)'}"
        lines = ["# SPDX-License-Identifier: Apache-2.0", f"{mark}; do not edit, every save writes it anew."]
        first = self.modules[0]
        if len(self.modules) > 1:
            lines += ['"""Several modules in one file, in the order in which they need each other:', ""]
            lines += [*(f"    {module.label}" for module in self.modules), '"""']
        elif first.docstring:
            lines += first.lines[first.docstring.lineno - 1 : first.docstring.end_lineno]
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
            docstring = ast.literal_eval(module.docstring.value) if isinstance(module.docstring, ast.Expr) else ""
            out = [f"# Module {module.label}", *(f"# {line}".rstrip() for line in docstring.strip().splitlines()), ""]
        edits = self._edits(module)
        for statement, name in ((node, name) for node in module.globals for name in node.names):
            self._claim(module, statement, name, (module.name, name))
        end = 0
        for node in module.body:
            start = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))]) - 1
            if start < end:
                raise module.error(node, "two statements on one line")
            _append_gap(out, module.lines[end:start])
            end = node.end_lineno or node.lineno
            if isinstance(node, ast.Import | ast.ImportFrom):
                out += self._hoist(module, node)
            elif "__all__" in _bound_names(node):
                self.exported.update(_literal_names(module, node))
            elif node is not module.docstring and not self._already_there(module, node):
                while start < end:
                    stop, replacement = edits.get(start, (start + 1, [module.lines[start]]))
                    out += replacement
                    start = stop
        _append_gap(out, module.lines[end:])
        return out

    def _hoist(self, module: _Module, node: ast.Import | ast.ImportFrom) -> list[str]:
        """Put an import at the top of the file; returns the assignments that take its place."""
        own = next((own for own in module.imports if own.node is node), None)
        if own:
            assignments, siblings = self._resolve(module, own)
            for source, names in siblings.items():
                self.from_imports.setdefault(source, set()).update(names)
            return assignments
        for alias in () if _is_future(node) else node.names:
            text = alias.name + (f" as {alias.asname}" if alias.asname else "")
            if isinstance(node, ast.Import):
                self.plain_imports.add(f"import {text}")
                path = alias.name if alias.asname else alias.name.split(".")[0]
            else:
                self.from_imports.setdefault(str(node.module), set()).add(text)
                path = f"{node.module}.{alias.name}"
            self._claim(module, node, alias.asname or path.rpartition(".")[2], ("", path))
        return []

    def _resolve(self, module: _Module, own: _OwnImport) -> tuple[list[str], Dependencies]:
        """Turn an import of our own code into assignments and imports from sibling files."""
        assignments: list[str] = []
        siblings: Dependencies = {}
        for name, alias in own.names:
            source, original = self.graph.origin(module, own, name)
            stem = self.graph.stems[source]
            known = own.is_plain and self._claim(module, own.node, alias, (source, original))
            if stem != self.stem:
                sibling = "." + self.graph.layout.file_name(stem).removesuffix(".py")
                text = original if alias == original else f"{original} as {alias}"
                siblings.setdefault(sibling, set()).add(text)
                continue
            if not (own.is_plain or own.functions):
                raise module.error(own.node, f"{source} shares a file with this module and cannot be conditional")
            if any(_rebinds(function, original, own.node) for function in own.functions):
                raise module.error(own.node, f"{original} is also a local name here and would hide it")
            if alias != original and not known:
                assignments.append(f"{alias} = {original}")
        return assignments, siblings

    def _edits(self, module: _Module) -> dict[int, tuple[int, list[str]]]:
        """Replacements, by first line, for imports of our own code that stand inside other statements."""
        texts: dict[ast.stmt, list[str]] = {}
        for own in module.imports:
            if own.is_plain:
                continue
            if why := self.graph.why_excluded(module, own):
                texts[own.node] = [f'raise ImportError("{why}")']
                continue
            texts[own.node], siblings = self._resolve(module, own)
            for source, names in sorted(siblings.items()):
                texts[own.node].append(_wrap(f"from {source} import ", sorted(names), ""))
        for block in (block for node in module.body for block in _blocks(node)) if texts else ():
            if all(texts.get(node) == [] for node in block):
                texts[block[-1]] = ["pass"]
        return {
            node.lineno - 1: (
                node.end_lineno or node.lineno,
                textwrap.indent("\n".join(text), " " * node.col_offset).splitlines(),
            )
            for node, text in texts.items()
        }

    def _already_there(self, module: _Module, node: ast.stmt) -> bool:
        """Claim what a statement binds; True if an earlier module has the very same definition."""
        names = sorted(_bound_names(node) - {"_"})
        known = [self._claim(module, node, name, (module.name, name)) for name in names]
        return bool(known) and all(known)

    def _claim(self, module: _Module, node: ast.stmt, name: str, meaning: tuple[str, str]) -> bool:
        """Bind a name in the file; True if it already means the same, an error if it means something else."""
        meaning = self.merged.get(meaning, meaning)
        owner = self.owners.get(name)
        if owner is None or (owner.module is module and owner.meaning != meaning):
            self.owners[name] = _Owner(module, node, meaning)
            return False
        if owner.meaning == meaning:
            return owner.module is not module
        if _is_mergeable(node) and ast.dump(node) == ast.dump(owner.node):
            self.merged[meaning] = owner.meaning
            return True
        place = f"{owner.module.label}:{owner.node.lineno}"
        reason = f"means something else in {place}, and both modules go into {self.own_name}; rename one of them"
        raise module.error(node, f"{name} {reason}")

    def _check_builtins(self) -> None:
        for name in sorted(set(self.owners).intersection(dir(builtins))):
            for module in (module for module in self.modules if name not in module.bound):
                for use in (node for statement in module.body for node in ast.walk(statement)):
                    if isinstance(use, ast.Name) and use.id == name:
                        owner = self.owners[name].module.label
                        raise module.error(use, f"{name} would no longer be the built-in one, because of {owner}")


def _prefixes(module: str) -> list[str]:
    """``a.b.c`` gives ``a``, ``a.b``, ``a.b.c``."""
    return list(itertools.accumulate(module.split("."), "{}.{}".format))


def _mark(root: str) -> str:
    return f"# Generated from {root} "


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_type_checking(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports_by_text(call: ast.Call, root: str) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    value = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
    return name in ("import_module", "__import__") and str(value).split(".")[0] in ("", root)


def _bound_names(node: ast.AST) -> set[str]:
    """Names that a statement binds in its own scope."""
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda):
        return set()
    return {name for child in ast.iter_child_nodes(node) for name in _bound_names(child)}


def _rebinds(function: ast.AST, name: str, own: ast.ImportFrom) -> bool:
    """Say whether a function binds ``name`` in another way than by imports like ``own``."""
    binding = (ast.Name, ast.Import, ast.ImportFrom, *_DEFINITIONS)
    for node in ast.walk(function):
        if node is function or (isinstance(node, ast.ImportFrom) and node.module == own.module):
            continue
        if name in (_bound_names(node) if isinstance(node, binding) else (getattr(node, "arg", None),)):
            return True
    return False


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """Every indented block of a statement."""
    for node in ast.walk(statement):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if block and isinstance(block, list):
                yield block


def _literal_names(module: _Module, node: ast.stmt) -> list[str]:
    try:
        return [str(name) for name in ast.literal_eval(getattr(node, "value", None) or "")]
    except ValueError as error:
        raise module.error(node, "__all__ must be one assignment of a list of strings") from error


def _is_mergeable(node: ast.AST) -> bool:
    """Say whether one statement can stand for two equal ones: it makes nothing that the two would share."""
    if isinstance(node, ast.Try | ast.If | ast.ExceptHandler):
        return all(_is_mergeable(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
    if isinstance(node, ast.Assign | ast.AnnAssign):
        if isinstance(node.value, ast.Call):
            return ast.unparse(node.value.func).rpartition(".")[2] in _HARMLESS_CALLS
        return not any(isinstance(part, (ast.Call, *_DISPLAYS)) for part in ast.walk(node.value or node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return not any(isinstance(part, _DISPLAYS) for part in ast.walk(node.args))  # mutable defaults
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Pass)


def _append_gap(out: list[str], lines: list[str]) -> None:
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
