"""One generated file: several modules in dependency order, merged into a text that the remote-code loader accepts."""

import ast
import builtins
import graphlib
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable

from cognexis.hub.module_graph import (
    DEFINITIONS,
    LOADER_PATTERNS,
    BundleError,
    BundleLayout,
    Dependencies,
    Module,
    ModuleGraph,
    OwnImport,
    bound_names,
    is_future,
)

_LINE_WIDTH = 110
_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
# Calls that may stand on the right of two equal assignments that become one.
_HARMLESS_CALLS = ("getLogger", "get_logger", "TypeVar", "ParamSpec")


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
    graph = ModuleGraph(layout, package, exclude)
    graph.collect()
    graph.check_folders()
    graph.assign_files()
    stems = set(graph.stems.values())
    files = {layout.file_name(stem): FlatFile(graph, stem).render() for stem in sorted(stems)}
    _check_result(files)
    return dict(sorted(files.items()))


@dataclass(frozen=True)
class _Owner:
    """Who bound a top-level name of a generated file, and to what."""

    module: Module
    node: ast.stmt
    meaning: tuple[str, str]  # module and name of our definition, or "" and the path of another package's


class FlatFile:
    """The modules of one file in dependency order, and the text that they become."""

    def __init__(self, graph: ModuleGraph, stem: str) -> None:
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
        future = {any(map(is_future, module.body)): module.label for module in self.modules}
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
        mark = f"{header_mark(self.graph.layout.root)}{version_of(self.graph.package)}"
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

    def _module_lines(self, module: Module) -> list[str]:
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
            elif "__all__" in bound_names(node):
                self.exported.update(_literal_names(module, node))
            elif node is not module.docstring and not self._already_there(module, node):
                while start < end:
                    stop, replacement = edits.get(start, (start + 1, [module.lines[start]]))
                    out += replacement
                    start = stop
        _append_gap(out, module.lines[end:])
        return out

    def _hoist(self, module: Module, node: ast.Import | ast.ImportFrom) -> list[str]:
        """Put an import at the top of the file; returns the assignments that take its place."""
        own = next((own for own in module.imports if own.node is node), None)
        if own:
            assignments, siblings = self._resolve(module, own)
            for source, names in siblings.items():
                self.from_imports.setdefault(source, set()).update(names)
            return assignments
        for alias in () if is_future(node) else node.names:
            text = alias.name + (f" as {alias.asname}" if alias.asname else "")
            if isinstance(node, ast.Import):
                self.plain_imports.add(f"import {text}")
                path = alias.name if alias.asname else alias.name.split(".")[0]
            else:
                self.from_imports.setdefault(str(node.module), set()).add(text)
                path = f"{node.module}.{alias.name}"
            self._claim(module, node, alias.asname or path.rpartition(".")[2], ("", path))
        return []

    def _resolve(self, module: Module, own: OwnImport) -> tuple[list[str], Dependencies]:
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

    def _edits(self, module: Module) -> dict[int, tuple[int, list[str]]]:
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

    def _already_there(self, module: Module, node: ast.stmt) -> bool:
        """Claim what a statement binds; True if an earlier module has the very same definition."""
        names = sorted(bound_names(node) - {"_"})
        known = [self._claim(module, node, name, (module.name, name)) for name in names]
        return bool(known) and all(known)

    def _claim(self, module: Module, node: ast.stmt, name: str, meaning: tuple[str, str]) -> bool:
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


def version_of(package: Traversable) -> str:
    """The version that the package's ``__init__.py`` states."""
    start = (package / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"', start, re.MULTILINE)
    return version[1] if version else "(no version)"


def header_mark(root: str) -> str:
    return f"# Generated from {root} "


def _rebinds(function: ast.AST, name: str, own: ast.ImportFrom) -> bool:
    """Say whether a function binds ``name`` in another way than by imports like ``own``."""
    binding = (ast.Name, ast.Import, ast.ImportFrom, *DEFINITIONS)
    for node in ast.walk(function):
        if node is function or (isinstance(node, ast.ImportFrom) and node.module == own.module):
            continue
        if name in (bound_names(node) if isinstance(node, binding) else (getattr(node, "arg", None),)):
            return True
    return False


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """Every indented block of a statement."""
    for node in ast.walk(statement):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if block and isinstance(block, list):
                yield block


def _literal_names(module: Module, node: ast.stmt) -> list[str]:
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


def _check_result(files: dict[str, str]) -> None:
    """Make sure of what the loader will need: every import of a sibling finds its file and its names."""
    trees = {name: ast.parse(text, name) for name, text in files.items()}
    bound = {name: {n for node in tree.body for n in bound_names(node)} for name, tree in trees.items()}
    for name, tree in trees.items():
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        seen = {hit for pattern in LOADER_PATTERNS for hit in re.findall(pattern, files[name], re.MULTILINE)}
        if seen != {str(node.module) for node in imports}:
            raise BundleError(f"{name}: the loader would read the imports {sorted(seen)}")
        for node in imports:
            missing = {alias.name for alias in node.names} - bound.get(f"{node.module}.py", set())
            if missing:
                raise BundleError(f"{name}:{node.lineno}: {sorted(missing)} not found in {node.module}.py")
