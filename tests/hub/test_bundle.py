"""The remote-code bundle: flattening of small made-up packages, and of the real one."""

import ast
import importlib
import inspect
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_imports

import cognexis
from cognexis.errors import BackendError
from cognexis.hub.bundle import _cached_bundle, bundle_files, needs_cortex, write_bundle, write_files
from cognexis.hub.flat_file import _check_result, flatten
from cognexis.hub.module_graph import LOADER_PATTERNS, BundleError, BundleLayout

TOY = BundleLayout("toy", entries=("configuration_toy", "modeling_toy"), stays=("training",))
NUMBERS = itertools.count()
ENTRY = {"toy/configuration_toy.py": "DEPTH = 2\n"}

# A folder's code needs torch and transformers; the others are requirements of these two.
COMES_WITH_TRANSFORMERS = {*("torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "yaml")}


def make_package(folder: Path, files: dict[str, str]) -> Path:
    """Write a package ``toy``; every folder gets an empty ``__init__`` unless one is given."""
    for name, text in {**ENTRY, "toy/__init__.py": '__version__ = "1.2.3"\n', **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    for path in (folder / "toy").rglob("*/"):
        (path / "__init__.py").touch()
    return folder / "toy"


@pytest.fixture
def flat(tmp_path):
    """Flatten a package given as a dictionary of files."""

    def run(files: dict[str, str], exclude: tuple[str, ...] = (), layout: BundleLayout = TOY) -> dict[str, str]:
        return flatten(layout, make_package(tmp_path / "source", files), exclude)

    return run


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Import one flat file as the loader does: as a member of a package that holds the files side by side."""

    def run(files: dict[str, str], module: str = "modeling_toy"):
        package = f"flat_{next(NUMBERS)}"  # a name that no earlier test has left in sys.modules
        write_files(tmp_path / package, files, "toy")
        (tmp_path / package / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return importlib.import_module(f"{package}.{module}")

    return run


def body(text: str) -> str:
    """A generated file without blank lines, comments and docstring."""
    tree = ast.parse(text)
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree)


def test_chain_of_imports_is_followed_merged_per_folder_and_rewritten(flat, load):
    files = flat(
        {
            "toy/modeling_toy.py": """
                from toy.configuration_toy import DEPTH
                from toy.decoder.block import Block

                def run(x):
                    return Block().go(x) + DEPTH
                """,
            "toy/decoder/block.py": """
                import math
                from toy.decoder.norm import norm
                from toy.errors import ToyError

                class Block:
                    def go(self, x):
                        if x < 0:
                            raise ToyError(x)
                        return norm(math.floor(x))
                """,
            "toy/decoder/norm.py": """
                import math

                def norm(x):
                    return math.sqrt(x)
                """,
            "toy/errors.py": "class ToyError(Exception):\n    pass\n",
            "toy/decoder/unused.py": "raise SystemExit\n",
        }
    )
    assert sorted(files) == ["configuration_toy.py", "decoder_toy.py", "errors_toy.py", "modeling_toy.py"]
    assert "from .decoder_toy import Block" in files["modeling_toy.py"]
    assert files["decoder_toy.py"].count("import math") == 1
    assert "from .errors_toy import ToyError" in files["decoder_toy.py"]
    assert load(files).run(9.5) == 5.0


def test_modules_of_a_file_stand_in_dependency_order(flat, load):
    parts = {
        "a": "from toy.decoder.c import C\n\nclass A(C):\n    pass\n",
        "b": "class B:\n    pass\n",
        "c": "from toy.decoder.b import B\n\nclass C(B):\n    pass\n",
    }
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.decoder.a import A\n",
            **{f"toy/decoder/{name}.py": text for name, text in parts.items()},
        }
    )
    assert re.findall(r"^class (\w)", files["decoder_toy.py"], re.MULTILINE) == ["B", "C", "A"]
    assert [kind.__name__ for kind in load(files).A.__mro__[:3]] == ["A", "C", "B"]


def test_text_of_the_modules_is_kept(flat):
    files = flat(
        {
            "toy/modeling_toy.py": '''
                # SPDX-License-Identifier: Apache-2.0
                """What this is."""

                from toy.decoder.a import a  # trailing remark

                LIMIT = 3  # why three
                # a remark of its own


                def f(x):
                    """Text with a blank


                    paragraph."""
                    return a(x)  # result
                ''',
            "toy/decoder/a.py": '"""Equations of a.\n\n    y = x\n"""\n\ndef a(x):\n    return x\n',
            "toy/decoder/b.py": "def b():\n    pass\n",
        }
    )
    text = files["modeling_toy.py"]
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n# Generated from toy 1.2.3; do not edit")
    assert text.count("SPDX") == 1
    assert ast.get_docstring(ast.parse(text)) == "What this is."
    for kept in ("LIMIT = 3  # why three", "# a remark of its own", "blank\n\n\n    paragraph", "  # result"):
        assert kept in text


def test_docstrings_of_merged_modules_stay_as_comments(flat):
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.decoder.a import a\n",
            "toy/decoder/a.py": '"""Equations of a.\n\n    y = x\n"""\nfrom toy.decoder.b import b\na = b\n',
            "toy/decoder/b.py": "b = 1\n",
        }
    )
    assert "# Module toy/decoder/a.py\n# Equations of a.\n#\n#     y = x\n" in files["decoder_toy.py"]


def test_renames_are_kept_between_files_and_assigned_within_one(flat, load):
    files = flat(
        {
            "toy/modeling_toy.py": """
                from toy.decoder.a import first as begin, twice
                from toy.decoder.b import second

                def run():
                    from toy.decoder.a import first as again
                    return begin(), second(), again(), twice()
                """,
            "toy/decoder/a.py": """
                def first():
                    return 1

                def twice():
                    from toy.decoder.a import first as one
                    return one() + one()
                """,
            "toy/decoder/b.py": """
                from toy.decoder.a import first as start

                def second():
                    if start() == 1:
                        from toy.decoder.a import first
                    return first() + 1
                """,
        }
    )
    assert "start = first" in files["decoder_toy.py"]
    assert "from .decoder_toy import first as begin" in files["modeling_toy.py"]
    assert load(files).run() == (1, 2, 1, 2)


def test_names_passed_on_by_a_package_come_from_where_they_are_defined(flat, load):
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.decoder import Norm as N\n",
            "toy/decoder/__init__.py": """
                from toy.decoder.parts.norm import RMSNorm as Norm
                from toy.decoder.heavy import heavy
                """,
            "toy/decoder/heavy.py": "heavy = 1\n",
            "toy/decoder/parts/norm.py": "class RMSNorm:\n    pass\n",
        }
    )
    assert sorted(files) == ["configuration_toy.py", "decoder_parts_toy.py", "modeling_toy.py"]
    assert load(files).N.__name__ == "RMSNorm"


def test_name_that_a_module_rebinds_is_that_modules_own(flat, load):
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.kernels.wrapped import f\n",
            "toy/kernels/wrapped.py": "from toy.decoder.plain import f\n\nf = (f, 'wrapped')\n",
            "toy/decoder/plain.py": "f = 1\n",
        }
    )
    assert load(files).f == (1, "wrapped")


def test_function_of_a_package_folder_is_merged_with_its_parts(flat, load):
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.kernels.scale import double\n",
            "toy/kernels/scale/__init__.py": """
                from toy.kernels.scale.reference import double_reference

                def double(x):
                    return double_reference(x)
                """,
            "toy/kernels/scale/reference.py": "def double_reference(x):\n    return 2 * x\n",
        }
    )
    assert sorted(files) == ["configuration_toy.py", "kernels_scale_toy.py", "modeling_toy.py"]
    assert load(files).double(4) == 8


def test_table_of_files_wins_over_folders(flat):
    layout = BundleLayout("toy", TOY.entries, files=(("kernels", "ops"), ("kernels.a.x", "special")))
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.kernels.a.x import x\nfrom toy.kernels.b.y import y\n",
            "toy/kernels/a/x.py": "x = 1\n",
            "toy/kernels/b/y.py": "y = 1\n",
        },
        layout=layout,
    )
    assert sorted(files) == ["configuration_toy.py", "modeling_toy.py", "ops_toy.py", "special_toy.py"]


def test_public_names_are_joined(flat):
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.decoder.a import a\n\n__all__ = ['Model']\n\nModel = a\n",
            "toy/decoder/a.py": "from toy.decoder.b import b\n__all__ = ['a']\na = b\n",
            "toy/decoder/b.py": "__all__ = ['b']\nb = 1\n",
        }
    )
    assert files["decoder_toy.py"].count("__all__") == 1
    assert '__all__ = ["a", "b"]' in files["decoder_toy.py"]
    assert '__all__ = ["Model"]' in files["modeling_toy.py"]


def test_entry_that_does_not_exist_is_skipped_unless_it_is_required(flat):
    files = {"toy/modeling_toy.py": "x = 1\n"}
    more = (*TOY.entries, "tokenization_toy")
    assert "tokenization_toy.py" not in flat(files, layout=BundleLayout("toy", more))
    with pytest.raises(BundleError, match=r"tokenization_toy\.py: entry module not found"):
        flat(files, layout=BundleLayout("toy", more, required=("tokenization_toy",)))


def test_guarded_imports_are_kept_as_they_are(flat, load):
    guard = "try:\n    import surely_not_installed as fast\nexcept ImportError:\n    fast = None\n"
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.kernels.dispatch import fast, use\n",
            "toy/kernels/dispatch.py": f"from toy.kernels.other import other\n{guard}use = other\n",
            "toy/kernels/other.py": f"{guard}other = fast\n",
        }
    )
    assert files["kernels_toy.py"].count(guard) == 1
    assert load(files).fast is None


def test_module_reached_only_inside_functions_stays_lazy(flat, load):
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.kernels.scale import double\n",
            "toy/kernels/dispatch.py": "fast = None\n",
            "toy/kernels/scale/__init__.py": """
                from toy.kernels.dispatch import fast
                from toy.kernels.scale.reference import reference

                def double(x, use_fast=False):
                    if use_fast:
                        from toy.kernels.scale.fast_kernel import kernel
                        return kernel(x)
                    return reference(x)
                """,
            "toy/kernels/scale/reference.py": "def reference(x):\n    return 2 * x\n",
            "toy/kernels/scale/fast_kernel.py": """
                from toy.kernels.dispatch import fast
                from toy.kernels.scale.launch import grid

                kernel = fast.jit(grid)
                """,
            "toy/kernels/scale/launch.py": "def grid():\n    return 1\n",
        }
    )
    assert "def grid" in files["kernels_scale_on_demand_toy.py"]
    double = load(files).double
    assert double(3) == 6
    with pytest.raises(AttributeError, match="jit"):
        double(3, use_fast=True)


def test_type_checking_blocks_are_dropped(flat, load):
    files = flat(
        {
            "toy/modeling_toy.py": """
                from typing import TYPE_CHECKING

                if TYPE_CHECKING:
                    import surely_not_installed
                    from toy.cortex.cell import Cell

                def run(cell: "Cell") -> "surely_not_installed.T":
                    return 1
                """,
            "toy/cortex/cell.py": "class Cell:\n    pass\n",
        },
        exclude=("cortex",),
    )
    assert sorted(files) == ["configuration_toy.py", "modeling_toy.py"]
    assert "import surely" not in files["modeling_toy.py"]
    assert load(files).run(None) == 1


CORTEX = {
    "toy/modeling_toy.py": """
        def build(kind):
            if kind == "cortex":
                from toy.cortex.cells.lstm import (
                    Cell,
                    State,
                )
                return Cell(State())
            return kind
        """,
    "toy/cortex/cells/lstm.py": """
        from toy.kernels.lstm import State

        class Cell(tuple):
            def __new__(cls, state):
                return super().__new__(cls, (state,))
        """,
    "toy/kernels/lstm.py": "class State:\n    pass\n",
}


def test_excluded_folder_is_left_out_and_says_so(flat, load):
    files = flat(CORTEX, exclude=("cortex",))
    assert sorted(files) == ["configuration_toy.py", "modeling_toy.py"]
    build = load(files).build
    assert build("attention") == "attention"
    with pytest.raises(ImportError, match=r"toy\.cortex\.cells\.lstm: this checkpoint was saved without Cortex"):
        build("cortex")


def test_folder_that_is_not_excluded_travels_with_its_kernels(flat, load):
    files = flat(CORTEX)
    assert sorted(files) == [
        *("configuration_toy.py", "cortex_cells_toy.py", "kernels_toy.py", "modeling_toy.py"),
    ]
    assert type(load(files).build("cortex")).__name__ == "Cell"


def test_excluded_folder_at_the_top_level_is_an_error(flat):
    files = {**CORTEX, "toy/modeling_toy.py": "from toy.cortex.cells.lstm import Cell\n"}
    with pytest.raises(BundleError, match=r"^toy/modeling_toy.py:1: toy.cortex is left out"):
        flat(files, exclude=("cortex",))


def test_excluded_prefix_is_a_whole_name(flat):
    files = {"toy/modeling_toy.py": "from toy.cortex_free.a import a\n", "toy/cortex_free/a.py": "a = 1\n"}
    assert "cortex_free_toy.py" in flat(files, exclude=("cortex",))


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("from toy.decoder.a import *", "star import"),
        ("from math import *", "star import"),
        ("import toy.decoder.a", "import names with from"),
        ("import toy.decoder.a as a", "import names with from"),
        ("import toy", "import names with from"),
        ("from .decoder.a import f", "relative import"),
        ("from . import decoder", "relative import"),
        ("from toy import decoder", "from the module that holds the name"),
        ("from toy.decoder import a", "a is a module"),
        ("from toy.decoder.a import missing", "missing is not defined in toy/decoder/a.py"),
        ("from toy.decoder.nowhere import f", "toy.decoder.nowhere does not exist"),
        ("from toy.training.loop import f", "toy.training.loop never travels"),
        ("class K:\n    from toy.decoder.a import f", "class body"),
        ("x = 1; from toy.decoder.a import f", "lines of its own"),
        ("from toy.decoder.a import f; x = 1", "lines of its own"),
        ("import importlib\nimportlib.import_module('toy.decoder.a')", "a name in a string"),
        ("print(__file__)", "__file__ means something else"),
        ("x = 1; y = 2", "two statements on one line"),
        ("def f():\n    if TYPE_CHECKING:\n        import fast", "TYPE_CHECKING block must be at the top"),
        ("if TYPE_CHECKING:\n    import fast\nelse:\n    fast = None", "TYPE_CHECKING block .* have no else"),
        ("__all__ = ['x'] + []", "__all__ must be"),
        ("def f(:", "invalid syntax|expected"),
    ],
)
def test_form_that_flat_files_cannot_express_is_refused(flat, statement, reason):
    files = {
        "toy/modeling_toy.py": f"VALUE = 1\n{statement}\n",
        "toy/decoder/a.py": "def f():\n    return 1\n",
        "toy/training/loop.py": "f = 1\n",
    }
    with pytest.raises(BundleError, match=rf"^toy/modeling_toy.py:[23]: .*({reason})"):
        flat(files)


@pytest.mark.parametrize(
    "text",
    [
        '"""Use\n\nfrom .norm import x to import.\n"""\n',
        'def f():\n    """Text\n      from .norm import x\n    """\n',
        'TEXT = """\nimport .norm\n"""\n',
        '"""Words on two lines:\nfrom\n.norm import and so on.\n"""\n',
    ],
)
def test_text_that_looks_like_a_relative_import_is_refused(flat, text):
    with pytest.raises(BundleError, match=r"^toy/modeling_toy.py:\d: line looks like a relative import of 'norm'"):
        flat({"toy/modeling_toy.py": text})


COLLISIONS = {
    "two functions": ("def helper():\n    return 1\n", "def helper():\n    return 2\n"),
    "two constants": ("helper = 1\n", "helper = 2\n"),
    "function and import": ("def helper():\n    return 1\n", "from math import pi as helper\n"),
    "two imports": ("from math import pi as helper\n", "from math import e as helper\n"),
    "two tables, though equal": ("helper = {}\n", "helper = {}\n"),
    "two caches, though equal": ("helper = dict()\n", "helper = dict()\n"),
    "two classes, though equal": ("class helper:\n    seen = []\n", "class helper:\n    seen = []\n"),
    "two memories, though equal": ("def helper(seen=[]):\n    pass\n", "def helper(seen=[]):\n    pass\n"),
    "function and import of ours": ("helper = 1\n", "from toy.errors import helper\n"),
    "two guarded imports": (
        "try:\n    import fast as helper\nexcept ImportError:\n    helper = None\n",
        "try:\n    import slow as helper\nexcept ImportError:\n    helper = None\n",
    ),
    "a global statement": ("def _set():\n    global helper\n    helper = 1\n", "helper = 0\n"),
}


@pytest.mark.parametrize("first, second", COLLISIONS.values(), ids=COLLISIONS)
def test_different_things_under_one_name_in_one_file_are_an_error(flat, first, second):
    files = {
        "toy/modeling_toy.py": "from toy.decoder.b import b\n",
        "toy/decoder/a.py": f"{first}\na = 1\n",
        "toy/decoder/b.py": f"from toy.decoder.a import a\n{second}\nb = a\n",
        "toy/errors.py": "helper = 1\n",
    }
    with pytest.raises(BundleError) as caught:
        flat(files)
    for part in ("helper", "toy/decoder/a.py", "toy/decoder/b.py", "decoder_toy.py"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "twice",
    [
        "import logging\n\nlogger = logging.getLogger(__name__)\n",
        "def helper(x):\n    return x\n",
        "LIMIT = (1, -2.5, 'x')\n",
        "from typing import TypeVar\n\nT = TypeVar('T')\n",
        "import torch.nn as nn\n",
    ],
)
def test_equal_definitions_are_merged_once(flat, load, twice):
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.decoder.b import b\n",
            "toy/decoder/a.py": f"{twice}\na = 1\n",
            "toy/decoder/b.py": f"from toy.decoder.a import a\n{twice}\nb = a\n",
        }
    )
    assert body(files["decoder_toy.py"]).count(body(twice).splitlines()[-1]) == 1
    assert load(files).b == 1


@pytest.mark.parametrize("inside", ["if DEBUG:\n    ", "try:\n    import fast\nexcept ImportError:\n    "])
def test_conditional_import_is_kept_between_files_and_refused_within_one(flat, load, inside):
    files = {
        "toy/modeling_toy.py": f"DEBUG = True\n{inside}from toy.decoder.a import a\n",
        "toy/decoder/a.py": "a = 1\n",
    }
    assert load(flat(files)).a == 1
    files["toy/decoder/b.py"] = files["toy/modeling_toy.py"]
    files["toy/modeling_toy.py"] = "from toy.decoder.b import a\n"
    with pytest.raises(BundleError, match=r"^toy/decoder/b.py:\d: decoder.a shares a file with this module"):
        flat(files)


def test_folder_that_does_something_when_imported_is_refused(flat):
    files = {
        "toy/modeling_toy.py": "from toy.decoder.parts.a import a\n",
        "toy/decoder/parts/a.py": "a = 1\n",
        "toy/decoder/__init__.py": '"""Text."""\nfrom toy.decoder.parts.a import a\n\nregistry = {}\n',
    }
    flat(files)
    files["toy/decoder/__init__.py"] += "registry.update(a=a)\n"
    with pytest.raises(BundleError, match=r"^toy/decoder/__init__.py:5: a folder's __init__ is left out"):
        flat(files)


def test_merged_definition_can_be_imported_from_either_module(flat, load):
    twice = "def helper(x):\n    return x\n"
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.decoder.c import c\n",
            "toy/decoder/a.py": f"{twice}\na = 1\n",
            "toy/decoder/b.py": f"from toy.decoder.a import a\n{twice}\nb = a\n",
            "toy/decoder/c.py": "from toy.decoder.b import b, helper\n\nc = helper(b)\n",
        }
    )
    assert load(files).c == 1


def test_built_in_name_redefined_by_a_neighbour_is_an_error(flat):
    files = {
        "toy/modeling_toy.py": "from toy.decoder.b import b\n",
        "toy/decoder/a.py": "def sum(x):\n    return 0\n\na = 1\n",
        "toy/decoder/b.py": "from toy.decoder.a import a\n\nb = sum([a])\n",
    }
    with pytest.raises(BundleError, match=r"^toy/decoder/b.py:3: sum would no longer be the built-in one"):
        flat(files)


def test_local_name_that_would_hide_a_vanished_import_is_an_error(flat):
    files = {
        "toy/modeling_toy.py": "from toy.decoder.b import b\n",
        "toy/decoder/a.py": "def f():\n    return 1\n",
        "toy/decoder/b.py": """
            from toy.decoder.a import f as g

            def b():
                from toy.decoder.a import f
                f = f() + g()
                return f
            """,
    }
    with pytest.raises(BundleError, match=r"^toy/decoder/b.py:5: f is also a local name"):
        flat(files)


def test_name_that_is_passed_around_in_a_circle_is_an_error(flat):
    files = {
        "toy/modeling_toy.py": "from toy.decoder.a import x\n",
        "toy/decoder/a.py": "from toy.decoder.b import x\n",
        "toy/decoder/b.py": "from toy.decoder.a import x\n",
    }
    with pytest.raises(BundleError, match=r"^toy/modeling_toy.py:1: x is passed around in a circle"):
        flat(files)


def test_future_annotations_in_some_modules_of_a_file_are_an_error(flat, load):
    files = {
        "toy/modeling_toy.py": "from toy.decoder.b import b\n",
        "toy/decoder/a.py": "from __future__ import annotations\n\na = 1\n",
        "toy/decoder/b.py": "from toy.decoder.a import a\n\nb = a\n",
    }
    with pytest.raises(
        BundleError, match=r"toy/decoder/a.py has from __future__ import annotations and toy/decoder/b.py"
    ):
        flat(files)
    files["toy/decoder/b.py"] = f'"""Text."""\nfrom __future__ import annotations\n{files["toy/decoder/b.py"]}'
    result = flat(files)
    assert result["decoder_toy.py"].count("from __future__ import annotations") == 1
    assert load(result).b == 1


@pytest.mark.parametrize("inside", ["", "def late():\n    "])
def test_folders_that_need_each_other_are_an_error(flat, inside):
    files = {
        "toy/modeling_toy.py": "from toy.decoder.a import a\n",
        "toy/decoder/a.py": "from toy.looping.x import x\n\na = x\n",
        "toy/looping/x.py": "x = 1\n",
        "toy/looping/y.py": "y = 1\n",
        "toy/decoder/b.py": "b = 1\n",
    }
    flat(files)
    files["toy/looping/x.py"] += f"{inside}from toy.decoder.b import b\n"
    with pytest.raises(BundleError, match="folders need each other") as caught:
        flat(files)
    assert "toy/decoder/a.py needs toy/looping/x.py" in str(caught.value)
    assert "toy/looping/x.py needs toy/decoder/b.py" in str(caught.value)


def test_modules_of_a_file_that_import_each_other_at_load_are_an_error(flat):
    files = {
        "toy/modeling_toy.py": "from toy.decoder.a import a\n",
        "toy/decoder/a.py": "from toy.decoder.b import b\n\na = 1\n",
        "toy/decoder/b.py": "from toy.decoder.a import a\n\nb = 1\n",
    }
    with pytest.raises(BundleError, match="modules import each other") as caught:
        flat(files)
    assert "toy/decoder/a.py" in str(caught.value) and "toy/decoder/b.py" in str(caught.value)


def test_sub_folders_that_need_each_other_share_a_file(flat, load):
    files = flat(
        {
            "toy/modeling_toy.py": "from toy.looping.driver import drive\n",
            "toy/looping/driver.py": "from toy.looping.schedulers.fixed import fixed\n\ndrive = fixed\n",
            "toy/looping/options.py": "options = 7\n",
            "toy/looping/schedulers/fixed.py": "from toy.looping.options import options\n\nfixed = options\n",
        }
    )
    assert sorted(files) == ["configuration_toy.py", "looping_toy.py", "modeling_toy.py"]
    assert load(files).drive == 7


def test_error_is_one_of_the_packages_own():
    assert issubclass(BundleError, BackendError) and BundleError.code == "bundle"


def random_package(seed: int) -> dict[str, str]:
    """A package of modules that import each other at random, at the top or inside a function."""
    rng = random.Random(seed)
    names = [f"{folder}.m{i}" for i, folder in enumerate(sorted(rng.choices(["a", "b", "c.d", "c.e", "f"], k=12)))]
    files = {}
    for i, name in enumerate([*names, "modeling_toy"]):
        used = rng.sample(range(i), k=min(i, rng.randint(0, 3))) if i < len(names) else range(len(names))
        lines, calls = [], []
        late = []
        for j in used:
            alias = f"f{j}" if rng.random() < 0.7 else f"alias{i}_{j}"
            rename = "" if alias == f"f{j}" else f" as {alias}"
            (late if rng.random() < 0.3 else lines).append(f"from toy.{names[j]} import f{j}{rename}")
            calls.append(f"{alias}()")
        own = "run" if i == len(names) else f"f{i}"
        lines += [
            f"def {own}():",
            *(f"    {line}" for line in late),
            f"    return ({own!r}, {', '.join(calls)})",
        ]
        files[f"toy/{name.replace('.', '/')}.py"] = "\n".join(lines) + "\n"
    return files


@pytest.mark.parametrize("seed", range(25))
def test_flat_form_computes_the_same_as_the_package(flat, load, tmp_path, monkeypatch, seed):
    source = random_package(seed)
    result = load(flat(source)).run()
    monkeypatch.syspath_prepend(tmp_path / "source")
    importlib.invalidate_caches()
    try:
        assert result == importlib.import_module("toy.modeling_toy").run()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
            del sys.modules[name]


def test_result_is_the_same_byte_for_byte(tmp_path):
    source = random_package(3)
    first = make_package(tmp_path / "one", source)
    second = make_package(tmp_path / "two", dict(reversed(source.items())))
    assert list(flatten(TOY, first).items()) == list(flatten(TOY, second).items())


def test_line_ends_of_the_source_do_not_matter(tmp_path):
    folder = make_package(tmp_path, random_package(4))
    unix = flatten(TOY, folder)
    for path in folder.rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert flatten(TOY, folder) == unix


def test_result_that_the_loader_could_not_follow_is_an_error():
    neighbour = {"b_toy.py": "y = 1\n"}
    _check_result({"a_toy.py": "from .b_toy import y\n", **neighbour})
    for text in ("from .b_toy import x\n", "from .c_toy import y\n", '"""\nfrom .b_toy import y\n"""\n'):
        with pytest.raises(BundleError, match=r"^a_toy\.py"):
            _check_result({"a_toy.py": text, **neighbour})


def test_generated_files_name_no_module_of_the_package(flat):
    for text in flat(random_package(5)).values():
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        assert all(node.level == 1 and "." not in str(node.module) for node in imports)


def test_writing_again_touches_nothing(tmp_path):
    files = {"a_toy.py": "a = 1\n", "b_toy.py": "b = 1\n"}
    assert write_files(tmp_path / "new" / "folder", files, "toy") == ["a_toy.py", "b_toy.py"]
    folder = tmp_path / "new" / "folder"
    for name in files:
        os.utime(folder / name, (1, 1))
    write_files(folder, {**files, "b_toy.py": "b = 2\n"}, "toy")
    assert (folder / "a_toy.py").stat().st_mtime == 1
    assert (folder / "b_toy.py").stat().st_mtime != 1
    assert (folder / "b_toy.py").read_text() == "b = 2\n"
    assert sorted(path.name for path in folder.iterdir()) == ["a_toy.py", "b_toy.py"]


def test_only_stale_generated_files_are_removed(flat, tmp_path):
    generated = flat({"toy/modeling_toy.py": "from toy.errors import e\n", "toy/errors.py": "e = 1\n"})
    folder = tmp_path / "checkpoint"
    write_files(folder, generated, "toy")
    others = {
        "mine_toy.py": "# written by hand\n",
        "quoting_toy.py": "x = 1\n" * 100 + "\n# Generated from toy 1\n",
        "config.json": "{}",
        "readme.md": generated["errors_toy.py"],
    }
    for name, text in others.items():
        (folder / name).write_text(text)
    del generated["errors_toy.py"]
    write_files(folder, generated, "toy")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*generated, *others])


def test_failed_write_leaves_the_old_file_and_no_leftovers(tmp_path, monkeypatch):
    write_files(tmp_path, {"a_toy.py": "old\n"}, "toy")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_files(tmp_path, {"a_toy.py": "new\n"}, "toy")
    assert [path.name for path in tmp_path.iterdir()] == ["a_toy.py"]
    assert (tmp_path / "a_toy.py").read_text() == "old\n"


def test_file_that_is_a_link_into_a_cache_is_replaced_and_the_cache_kept(tmp_path):
    (tmp_path / "blob").write_text("old\n")
    (tmp_path / "a_toy.py").symlink_to("blob")
    write_files(tmp_path, {"a_toy.py": "new\n"}, "toy")
    assert (tmp_path / "blob").read_text() == "old\n"
    assert (tmp_path / "a_toy.py").read_text() == "new\n"


def test_loader_still_finds_imports_by_the_expressions_that_are_guarded_against():
    source = inspect.getsource(get_relative_imports)
    assert [pattern for pattern in LOADER_PATTERNS if pattern not in source] == []
    assert source.count("re.findall") == len(LOADER_PATTERNS)


LOADABLE = {
    "toy/configuration_toy.py": """
        from transformers import PreTrainedConfig

        from toy.errors import ToyError

        class ToyConfig(PreTrainedConfig):
            model_type = "toy"

            def __init__(self, width=4, **kwargs):
                if width < 1:
                    raise ToyError(width)
                self.width = width
                super().__init__(**kwargs)
        """,
    "toy/modeling_toy.py": '''
        """The model."""
        from typing import TYPE_CHECKING

        import torch
        from transformers import PreTrainedModel

        from toy.configuration_toy import ToyConfig
        from toy.decoder.block import Block

        if TYPE_CHECKING:
            import surely_not_installed

        class ToyModel(PreTrainedModel):
            config_class = ToyConfig

            def __init__(self, config):
                super().__init__(config)
                self.block = Block(config.width)
                self.post_init()

            def forward(self, x):
                return self.block(x)
        ''',
    "toy/decoder/block.py": """
        import torch

        from toy.errors import ToyError
        from toy.kernels.scale import double

        class Block(torch.nn.Linear):
            def __init__(self, width, kind="linear"):
                if kind == "cortex":
                    from toy.cortex.cell import Cell
                    self.cell = Cell()
                super().__init__(width, width)

            def forward(self, x):
                if x.shape[-1] != self.in_features:
                    raise ToyError(x.shape)
                return double(super().forward(x))
        """,
    "toy/cortex/cell.py": "import surely_not_installed\n\nclass Cell:\n    pass\n",
    "toy/errors.py": "class ToyError(ValueError):\n    pass\n",
    "toy/kernels/dispatch.py": """
        try:
            import surely_not_installed
        except ImportError:
            surely_not_installed = None
        """,
    "toy/kernels/scale/__init__.py": """
        from toy.kernels.dispatch import surely_not_installed
        from toy.kernels.scale.reference import double_reference

        def double(x):
            if surely_not_installed is not None:
                from toy.kernels.scale.fast_kernel import double_fast
                return double_fast(x)
            return double_reference(x)
        """,
    "toy/kernels/scale/reference.py": "def double_reference(x):\n    return 2 * x\n",
    "toy/kernels/scale/fast_kernel.py": """
        from toy.kernels.dispatch import surely_not_installed

        double_fast = surely_not_installed.jit(2)
        """,
}

# Loads each checkpoint described in argv from a folder and from a Hub cache; prints what it saw as one line of JSON.
LOADER = """
import json, shutil, sys
checkpoints = json.loads(sys.argv[1])
for name in checkpoints:
    sys.modules[name] = None  # from here on `import name` fails, installed or not
import torch, transformers
from pathlib import Path
from transformers.dynamic_module_utils import check_imports, get_class_from_dynamic_module, get_imports

report = {}
for name, (auto_class, folder) in checkpoints.items():
    files = sorted(Path(folder).glob("*.py"))
    seen = {
        "imports": sorted({package for path in files for package in get_imports(path)}),
        "siblings": sorted({sibling for path in files for sibling in check_imports(path)}),
        "places": [],
    }
    references = json.loads(Path(folder, "config.json").read_text())["auto_map"].values()
    for place in (folder, f"me/{name}"):
        classes = [get_class_from_dynamic_module(reference, place) for reference in references]
        model = getattr(transformers, auto_class).from_pretrained(place, trust_remote_code=True).eval()
        with torch.no_grad():
            output = model(torch.load(f"{folder}.inputs"))
        output = output if isinstance(output, torch.Tensor) else output.logits
        model.save_pretrained("saved")
        seen["places"].append({
            "classes": sorted(kind.__name__ for kind in classes),
            "module": type(model).__module__,
            "difference": (output - torch.load(f"{folder}.outputs")).abs().max().item(),
            "saved": sorted(path.name for path in Path("saved").glob("*.py")),
        })
        shutil.rmtree("saved")
    report[name] = seen
unwanted = (*checkpoints, "tensordict", "pydantic")
report["unwanted"] = sorted(name for name, module in sys.modules.items() if module and name.split(".")[0] in unwanted)
print(json.dumps(report))
"""


def toy_checkpoint(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a toy checkpoint; returns inputs and what the model makes of them."""
    source = make_package(folder.parent / "source", LOADABLE)
    write_files(folder, flatten(TOY, source, exclude=("cortex",)), "toy")
    weight, inputs = torch.randn(4, 4), torch.randn(3, 4)
    tensors = {"block.weight": weight, "block.bias": torch.zeros(4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    auto_map = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "width": 4, "auto_map": auto_map}))
    return inputs, 2 * inputs @ weight.T


def package_checkpoint(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a small Cognexis checkpoint; returns inputs and what the model makes of them."""
    config = cognexis.CognexisConfig(
        vocab_size=32,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        num_prelude_blocks=1,
        num_coda_blocks=1,
        trained_max_loops=2,
        max_loops=2,
        default_loops=2,
    )
    model = cognexis.CognexisForCausalLM(config).eval()
    model.save_pretrained(folder)
    assert write_bundle(folder, config) == sorted(bundle_files())
    inputs = torch.arange(12).view(2, 6)
    with torch.no_grad():
        return inputs, model(inputs).logits


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What the loader sees of both checkpoints in one process that can import neither package."""
    tmp_path = tmp_path_factory.mktemp("loaded")
    checkpoints = {"toy": ("AutoModel", toy_checkpoint), "cognexis": ("AutoModelForCausalLM", package_checkpoint)}
    arguments = {}
    for name, (auto_class, write) in checkpoints.items():
        folder = tmp_path / name / "checkpoint"
        inputs, outputs = write(folder)
        torch.save(inputs, f"{folder}.inputs")
        torch.save(outputs, f"{folder}.outputs")
        snapshot = tmp_path / "home" / "hub" / f"models--me--{name}" / "snapshots" / ("0123456789" * 4)
        shutil.copytree(folder, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
        arguments[name] = (auto_class, str(folder))
    (tmp_path / "empty").mkdir()
    elsewhere = ("PYTHONPATH", "HF_HUB_CACHE", "HF_MODULES_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in elsewhere}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", LOADER, json.dumps(arguments)]
    result = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1], ids=["folder", "hub cache"])
def test_toy_checkpoint_loads_where_the_package_cannot_be_imported(loaded, place):
    seen = loaded["toy"]["places"][place]
    assert seen["classes"] == ["ToyConfig", "ToyModel"]
    assert seen["module"].startswith("transformers_modules.")
    assert seen["difference"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1], ids=["folder", "hub cache"])
def test_checkpoint_loads_where_the_package_cannot_be_imported(loaded, place):
    seen = loaded["cognexis"]["places"][place]
    assert {"CognexisConfig", "CognexisModel", "CognexisForCausalLM"} <= set(seen["classes"])
    assert seen["module"].startswith("transformers_modules.")
    assert seen["difference"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1], ids=["folder", "hub cache"])
def test_model_of_remote_code_saves_all_of_its_code_again(loaded, place):
    assert loaded["cognexis"]["places"][place]["saved"] == sorted(bundle_files())
    assert loaded["toy"]["places"][place]["saved"] == [
        *("configuration_toy.py", "decoder_toy.py", "errors_toy.py", "kernels_scale_on_demand_toy.py"),
        *("kernels_scale_toy.py", "kernels_toy.py", "modeling_toy.py"),
    ]


@pytest.mark.slow
def test_loader_asks_only_for_what_is_needed(loaded):
    assert set(loaded["toy"]["imports"]) == {"torch", "transformers", "typing"}
    asked = set(loaded["cognexis"]["imports"]) - sys.stdlib_module_names
    assert asked <= COMES_WITH_TRANSFORMERS
    assert set(loaded["cognexis"]["siblings"]) <= {name.removesuffix(".py") for name in bundle_files()}
    assert loaded["unwanted"] == []


def test_package_is_flattened_into_a_few_files():
    files = bundle_files()
    required = {
        "configuration_cognexis.py",
        "modeling_cognexis.py",
        "decoder_cognexis.py",
        "errors_cognexis.py",
    }
    assert required <= set(files)
    assert len(files) <= 15
    for name, text in files.items():
        assert name.endswith("_cognexis.py")
        assert text.startswith(
            f"# SPDX-License-Identifier: Apache-2.0\n# Generated from cognexis {cognexis.__version__};"
        )


def test_package_without_cortex_layers_needs_only_torch_and_transformers():
    for name, text in bundle_files().items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            unexpected = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
            assert unexpected <= COMES_WITH_TRANSFORMERS | {"triton"}, name


def test_package_is_flattened_once_per_process():
    first = bundle_files()
    hits = _cached_bundle.cache_info().hits
    first.clear()  # the caller's own copy
    assert bundle_files()
    assert _cached_bundle.cache_info().hits == hits + 1


def test_cortex_layers_are_needed_where_a_stage_lists_them():
    config = SimpleNamespace(prelude_layer_types=["full_attention"], core_layer_types=None)
    assert not needs_cortex(config) and not needs_cortex(None)
    config.coda_layer_types = ["full_attention", "cortex"]
    assert needs_cortex(config)


def test_files_of_cortex_models_can_be_merged():
    files, plain = bundle_files(True), bundle_files()
    assert plain.keys() <= files.keys() and any("cortex" in name for name in files.keys() - plain.keys())
    for name, text in files.items():
        compile(text, name, "exec")
