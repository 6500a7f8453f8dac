"""What a bundle needs: the modules behind the entry modules, what each name stands for, and the file of each module.

Modules are parsed, never imported. A form that flat files cannot express is refused here, with file and line.
"""

import ast
import functools
import graphlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from typing import TypeGuard

from cognexis.errors import BackendError

# The loader's own two expressions (transformers.dynamic_module_utils.get_relative_imports). They read text,
# not syntax: a docstring line can look like an import to them.
LOADER_PATTERNS = (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import")
# Names whose value depends on where a module lies; in a merged file it would be another.
_PLACE_DEPENDENT = frozenset({"__file__", "__path__", "__package__", "__spec__", "__loader__", "globals"})
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
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


@dataclass(frozen=True)
class OwnImport:
    """One ``from root.target import name as alias, ...`` statement."""

    target: str
    names: tuple[tuple[str, str], ...]
    node: ast.ImportFrom
    functions: tuple[ast.AST, ...]  # the functions around it
    is_plain: bool  # stands at the top level, under no condition


@dataclass(eq=False)
class Module:
    """A parsed module: its imports of our own code and what its top level binds."""

    name: str
    label: str  # path for messages, such as cognexis/decoder/norm.py
    lines: list[str]
    body: list[ast.stmt]
    docstring: ast.stmt | None
    imports: list[OwnImport] = field(default_factory=list)
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
        return frozenset(name for node in self.body for name in bound_names(node))

    @functools.cached_property
    def passed_on(self) -> dict[str, tuple[str, str]]:
        """Module and name behind each alias that the top level imports from our own code and keeps."""
        imports = [own for own in self.imports if own.is_plain]
        nodes = [own.node for own in imports]
        changed = {name for node in self.body if node not in nodes for name in bound_names(node)}
        found = {alias: (own.target, name) for own in imports for name, alias in own.names}
        return {alias: place for alias, place in found.items() if alias not in changed}

    def read(self, root: str) -> None:
        """Find the module's own imports; refuses the forms that flat files cannot express."""
        text = "\n".join(self.lines)
        for match in itertools.chain(*(re.finditer(pattern, text, re.MULTILINE) for pattern in LOADER_PATTERNS)):
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
            self.imports.append(OwnImport(target, names, node, functions, is_plain=not around))


class ModuleGraph:
    """The modules that a bundle needs, what each name stands for, and the file of each module."""

    def __init__(self, layout: BundleLayout, package: Traversable, exclude: tuple[str, ...]) -> None:
        self.layout = layout
        self.package = package
        self.exclude = exclude
        self.parsed: dict[str, Module | None] = {}
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

    def _needed(self, module: Module, own: OwnImport) -> Iterator[str]:
        if own.target.split(".")[0] in self.layout.stays:
            raise module.error(own.node, f"{self.layout.root}.{own.target} never travels with a checkpoint")
        for name, _ in own.names:
            yield self.origin(module, own, name)[0]
        if not self.module(own.target).is_package:  # a folder's __init__ that only passes a name on is skipped
            yield own.target

    def _check_packages(self) -> None:
        """Refuse a folder whose ``__init__`` does something on import, but only passes names on in the result."""
        harmless = (ast.Import, ast.ImportFrom, ast.Assign, *DEFINITIONS)
        around = {folder for name in self.eager for folder in _prefixes(name)} - self.eager.keys()
        for module in filter(None, map(self.load, sorted(around))):
            for node in module.body:
                if not isinstance(node, harmless) and node is not module.docstring:
                    raise module.error(node, "a folder's __init__ is left out here, so this would not run")

    def why_excluded(self, module: Module, own: OwnImport) -> str:
        """Say why what an import names is left out; empty where it is not."""
        prefix = next((prefix for prefix in _prefixes(own.target) if prefix in self.exclude), "")
        if prefix and not own.functions:
            reason = "is left out of some checkpoints; import it inside the function that uses it"
            raise module.error(own.node, f"{self.layout.root}.{prefix} {reason}")
        what = prefix.rpartition(".")[2].replace("_", " ").capitalize()
        return f"{self.layout.root}.{own.target}: this checkpoint was saved without {what}" if prefix else ""

    def origin(self, module: Module, own: OwnImport, name: str) -> tuple[str, str]:
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

    def module(self, name: str) -> Module:
        """Give a module that is known to exist."""
        module = self.load(name)
        assert module is not None, name
        return module

    def load(self, name: str) -> Module | None:
        """Parse a module, once; None if it does not exist."""
        if name not in self.parsed:
            paths = (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py")
            self.parsed[name] = next(
                (self._parse(name, path) for path in paths if (self.package / path).is_file()), None
            )
        return self.parsed[name]

    def _parse(self, name: str, path: str) -> Module:
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
        module = Module(name, label, lines, tree.body, docstring)
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


def _prefixes(module: str) -> list[str]:
    """``a.b.c`` gives ``a``, ``a.b``, ``a.b.c``."""
    return list(itertools.accumulate(module.split("."), "{}.{}".format))


def is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_type_checking(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports_by_text(call: ast.Call, root: str) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    value = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
    return name in ("import_module", "__import__") and str(value).split(".")[0] in ("", root)


def bound_names(node: ast.AST) -> set[str]:
    """Names that a statement binds in its own scope."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda):
        return set()
    return {name for child in ast.iter_child_nodes(node) for name in bound_names(child)}


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
