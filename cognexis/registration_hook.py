"""Registration waits until transformers is used: whoever needs memory cells only should wait for neither.

``cognexis.registration`` is imported as soon as an import of one of ``_TRIGGERS`` is finished: the Auto classes, which
have to know the model, or our own classes, whose saving it completes. Some modules of transformers load the Auto
classes while they are not complete themselves, and the model needs them complete. So an import counts as finished
when this thread is executing no module of transformers and none of this package.
"""

import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WATCHED = ("cognexis", "transformers")
_TRIGGERS = (
    "transformers.models.auto.configuration_auto",
    "cognexis.configuration_cognexis",
    "cognexis.tokenization_cognexis",
)


def register_when_needed() -> None:
    """Register now if a trigger is loaded already, and otherwise once one is."""
    if _is_triggered():
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds modules as the finders behind it do, and learns when they have been executed."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in _WATCHED:
            return None
        found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path) if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _WatchedLoader(spec.loader, self)
        return spec

    def execute(self, loader: Loader, module: ModuleType) -> None:
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            loader.exec_module(module)
        finally:
            self._thread.depth = depth
        if not depth and self in sys.meta_path and _is_triggered():
            sys.meta_path.remove(self)
            _register()


class _WatchedLoader(Loader):
    """Stands before a module's own loader until the module is executed."""

    def __init__(self, loader: Loader, watch: _Watch) -> None:
        self._loader = loader
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._watch.execute(self._loader, module)


def _is_triggered() -> bool:
    return any(name in sys.modules for name in _TRIGGERS)


def _register() -> None:
    from cognexis.registration import __name__ as _  # noqa: F401
