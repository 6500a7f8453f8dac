"""The pages tell the truth: their code runs, their tables and lists are the package's, their links lead somewhere.

Each check is a function from a page's text to its faults. It runs over the real pages, and over small texts that
break it, so that a check which cannot fail does not stay unnoticed. A page's code blocks marked ``python`` run in
order with one namespace; a block marked ``text`` right after one is what that block prints.
"""

import ast
import contextlib
import functools
import io
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.errors import InvalidConfigError

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
ALL_TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

INHERITED = {field.name for field in fields(PreTrainedConfig)}
OWN_FIELDS = {field.name: field for field in fields(CognexisConfig) if field.name not in INHERITED}


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


# ---- reading Markdown ----


@dataclass(frozen=True)
class Block:
    """One fenced code block; ``line`` is the number of its first line of code."""

    language: str
    code: str
    line: int
    end: int


def blocks(text: str) -> list[Block]:
    found, start, language = [], None, ""
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if start is None:
            start, language = number, line[3:].strip()
        else:
            found.append(Block(language, "\n".join(lines[start : number - 1]), start + 1, number))
            start = None
    assert start is None, f"line {start}: the code block is not closed"
    return found


def prose(text: str) -> str:
    """The text without its code blocks, with the same line numbers."""
    lines = text.split("\n")
    for block in blocks(text):
        lines[block.line - 2 : block.end] = [""] * (block.end - block.line + 2)
    return "\n".join(lines)


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """The rows of each table, by column heading; the cells without surrounding blanks."""
    rows: list[list[str]] = []
    for line in [*prose(text).split("\n"), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            heading, _, *body = rows
            yield [dict(zip(heading, row, strict=True)) for row in body]
            rows = []


def rows_with(text: str, *columns: str) -> list[dict[str, str]]:
    return [row for table in tables(text) for row in table if set(columns) <= set(row)]


def code_words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# ---- code blocks ----


def run_blocks(name: str, text: str) -> None:
    """Run the page's Python blocks in order; what they print must be the text block that follows."""
    namespace: dict[str, Any] = {"__name__": "page"}
    all_blocks = blocks(text)
    lines = text.split("\n")
    for index, block in enumerate(all_blocks):
        if block.language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
        following = all_blocks[index + 1] if index + 1 < len(all_blocks) else None
        if following and following.language == "text" and not "".join(lines[block.end : following.line - 2]).strip():
            place = f"{name}:{following.line}"
            assert printed.getvalue().rstrip("\n") == following.code, f"{place}: the block above prints something else"


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/quickstart: an untrained cognexis-tiny, with a tokenizer trained on the pages."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = train_tokenizer([page.read_text("utf-8") for page in ALL_TEXTS], vocab_size=512)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CognexisForCausalLM(CognexisConfig.from_variant("tiny", vocab_size=len(tokenizer), **ids))
    model.save_pretrained(folder / "runs" / "quickstart")
    tokenizer.save_pretrained(folder / "runs" / "quickstart")
    return folder


@every_page
def test_code_blocks_run_and_print_what_the_page_says(page, working_folder, monkeypatch):
    monkeypatch.chdir(working_folder)
    run_blocks(page_name(page), page.read_text("utf-8"))


def test_pages_with_code_are_found():
    counts = {page.name: sum(b.language == "python" for b in blocks(page.read_text("utf-8"))) for page in PAGES}
    assert all(counts[name] >= 2 for name in ("README.md", "configuration.md", "generation.md", "recurrence.md"))


def test_blocks_of_a_page_share_a_namespace_and_are_compared_with_the_text_after_them():
    shared = "```python\na = 1\n```\n\n```\nraise SystemExit\n```\n\n```python\nprint(a)\n```\n\n```text\n1\n```"
    run_blocks("x.md", shared)
    with pytest.raises(AssertionError, match=r"x\.md:6: the block above prints something else"):
        run_blocks("x.md", "```python\nprint(2)\n```\n\n```text\n1\n```")
    with pytest.raises(AssertionError, match="prints something else"):
        run_blocks("x.md", "```python\n```\n\n```text\n1\n```")
    run_blocks("x.md", "```python\nprint(2)\n```\n\nElsewhere:\n\n```text\n1\n```")


def test_failing_block_is_reported_with_page_and_line():
    with pytest.raises(NameError) as caught:
        run_blocks("x.md", "# Page\n\n```python\n\nmissing\n```")
    place = caught.traceback[-1]
    assert (str(place.path), place.lineno + 1) == ("x.md", 5)


def test_block_that_is_not_closed_is_reported():
    with pytest.raises(AssertionError, match="line 2: the code block is not closed"):
        blocks("text\n```python\nx = 1\n")


# ---- the tables of the configuration ----


def default_of(field: Any) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


def type_text(field: Any) -> str:
    return (field.type.__name__ if isinstance(field.type, type) else str(field.type)).replace(" | ", " or ")


def first_fault(name: str, value: Any) -> str:
    """What the configuration says about one value; empty if it has nothing against this field."""
    try:
        CognexisConfig(**{name: value})
    except InvalidConfigError as error:
        return next((fault for fault in error.faults if fault.startswith(f"{name}=")), "")
    return ""


def range_faults(name: str, cell: str) -> Iterator[str]:
    """Where the configuration disagrees with a range in words, as far as single values tell."""
    choices, words = code_words(cell), ""
    if match := re.fullmatch(r"(\d+) to (\d+)(?:\^(\d+))?( - 1)?", cell):
        low, high = int(match[1]), int(match[2]) ** int(match[3] or 1) - bool(match[4])
        if any("must be between" in first_fault(name, value) for value in (low, high)):
            yield f"{name}: the ends of {cell} are refused"
        refused, words = [low - 1, high + 1], "must be between"
    elif choices and choices != ["None"]:
        if f"must be one of {', '.join(choices)}" not in first_fault(name, "?"):
            yield f"{name}: the allowed values are not {choices}"
        return
    else:
        refused = {"[0, 1)": [-0.1, 1.0], "above 0": [0, float("nan")], "0 or more": [-1]}.get(cell, [])
    for value in refused:
        if not (fault := first_fault(name, value)) or words not in fault:
            yield f"{name}: {value} is accepted, the page says {cell}"


def field_faults(text: str) -> list[str]:
    rows = rows_with(text, "field", "type", "default", "range")
    named = [code_words(row["field"])[0] for row in rows]
    faults = [f"{name}: no row" for name in OWN_FIELDS if name not in named]
    faults += [f"{name}: two rows" for name in sorted(set(named)) if named.count(name) > 1]
    for name, row in zip(named, rows, strict=True):
        if name not in OWN_FIELDS:
            faults.append(f"{name}: not a field")
            continue
        default, expected = ast.literal_eval(code_words(row["default"])[0]), default_of(OWN_FIELDS[name])
        if default != expected or type(default) is not type(expected):
            faults.append(f"{name}: the default is {expected!r}, the page says {default!r}")
        if row["type"] != type_text(OWN_FIELDS[name]):
            faults.append(f"{name}: the type is {type_text(OWN_FIELDS[name])}, the page says {row['type']}")
        faults += range_faults(name, row["range"])
        if not row["meaning"]:
            faults.append(f"{name}: no meaning")
    return faults


def alias_faults(text: str) -> list[str]:
    named = {code_words(row["alias"])[0]: code_words(row["field"])[0] for row in rows_with(text, "alias", "field")}
    wrong = sorted(named.items() ^ CognexisConfig.attribute_map.items())
    return [f"{alias} -> {field}: on one side only" for alias, field in wrong]


def own_properties() -> set[str]:
    return {name for name, value in vars(CognexisConfig).items() if isinstance(value, property)}


def property_faults(text: str) -> list[str]:
    named = [code_words(row["property"])[0].partition("(")[0] for row in rows_with(text, "property", "value")]
    faults = [f"{name}: no such property" for name in named if not hasattr(CognexisConfig, name)]
    return faults + [f"{name}: no row" for name in sorted(own_properties() - {"auto_map"} - set(named))]


CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text("utf-8")


@pytest.mark.parametrize("check", [field_faults, alias_faults, property_faults], ids=lambda check: check.__name__)
def test_configuration_page_agrees_with_the_class(check):
    assert check(CONFIGURATION) == []


HEAD = "| field | type | default | range | meaning |\n|---|---|---|---|---|\n"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("| `hidden_size` | int | `4095` | 1 to 2^20 | H |", "hidden_size: the default is 4096"),
        ("| `attention_dropout` | float or int | `0` | [0, 1) | x |", "attention_dropout: the default is 0.0"),
        ("| `hidden_size` | float | `4096` | 1 to 2^20 | H |", "hidden_size: the type is int"),
        ("| `hidden_sizes` | int | `4096` | 1 to 2^20 | H |", "hidden_sizes: not a field"),
        ("| `hidden_size` | int | `4096` | 1 to 2^20 | |", "hidden_size: no meaning"),
        ("| `hidden_size` | int | `4096` | 1 to 2^19 | H |", "hidden_size: 524289 is accepted"),
        ("| `hidden_size` | int | `4096` | 1 to 2^21 | H |", "hidden_size: the ends of 1 to 2^21 are refused"),
        ("| `max_loops` | int or None | `None` | 2 to 65536 | x |", "max_loops: 1 is accepted"),
        ("| `norm_type` | str | `'rmsnorm'` | `rmsnorm`, `none` | x |", "norm_type: the allowed values are not"),
        ("| `gate_init_bias` | float or int | `0.0` | 0 or more | x |", "gate_init_bias: -1 is accepted"),
        ("| `hidden_size` | int | `4096` | any | H |\n" * 2, "hidden_size: two rows"),
        ("| `head_dim` | int or None | `None` | any | D |", "vocab_size: no row"),
    ],
)
def test_wrong_row_of_a_field_table_is_reported(row, fault):
    assert any(found.startswith(fault) for found in field_faults(HEAD + row))


def test_wrong_alias_and_property_are_reported():
    assert "num_loops -> max_loops: on one side only" in alias_faults(
        "| alias | field |\n|---|---|\n| `num_loops` | `max_loops` |"
    )
    found = property_faults("| property | value |\n|---|---|\n| `depth(x)` | y |\n| `loop_cap` | y |")
    assert {"depth: no such property", "loop_slots: no row"} <= set(found) and "loop_cap: no row" not in found


# ---- the tables of the presets ----


@functools.cache
def parameter_count(name: str) -> int:
    with torch.device("meta"):
        model = CognexisForCausalLM(CognexisConfig.from_variant(name))
    return sum(parameter.numel() for parameter in model.parameters())


def printed_like(count: int, text: str) -> str:
    """``count`` with the unit and the digits of ``text``: 8010551296 like "8.01 B" is "8.01 B"."""
    match = re.match(r"[\d.,]+(?: ([MBT]))?", text)
    assert match is not None, text
    if not match[1]:
        return f"{count:,}"
    decimals = len(match[0].split()[0].partition(".")[2])
    return f"{count / {'M': 1e6, 'B': 1e9, 'T': 1e12}[match[1]]:.{decimals}f} {match[1]}"


def preset_faults(text: str) -> list[str]:
    rows = rows_with(text, "preset", "hidden", "heads / kv", "prelude + core + coda", "loops", "parameters")
    faults = [] if rows else ["no table of presets"]
    for row in rows:
        name = code_words(row["preset"])[0]
        config = CognexisConfig.from_variant(name)
        stages = (config.num_prelude_blocks, config.num_recurrent_blocks, config.num_coda_blocks)
        expected = {
            "hidden": str(config.hidden_size),
            "heads / kv": f"{config.num_attention_heads} / {config.num_key_value_heads}",
            "prelude + core + coda": " + ".join(map(str, stages)),
            "loops": str(config.trained_max_loops),
            "feed-forward": str(config.intermediate_size),
            "parameters": printed_like(parameter_count(name), row["parameters"]),
        }
        if match := re.search(r" \(vocabulary (\d+)\)$", row["parameters"]):
            expected["parameters"] += match[0]
            if int(match[1]) != config.vocab_size:
                faults.append(f"{name}: vocabulary is {config.vocab_size}")
        faults += [
            f"{name}: {column} is {expected[column]}, the page says {cell}"
            for column, cell in row.items()
            if column in expected and cell != expected[column]
        ]
    return faults


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md"])
def test_preset_tables_are_what_is_measured(page):
    assert preset_faults((ROOT / page).read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("| `cognexis-tiny` | 128 | 4 / 2 | 1 + 1 + 1 | 8 | 1.7 M |", "parameters is 1.6 M"),
        ("| `cognexis-tiny` | 128 | 4 / 2 | 1 + 1 + 1 | 8 | 1.60 M |", "parameters is 1.64 M"),
        ("| `cognexis-tiny` | 128 | 4 / 2 | 1 + 1 + 1 | 8 | 1,639,681 |", "parameters is 1,639,680"),
        ("| `cognexis-tiny` | 128 | 4 / 2 | 1 + 1 + 1 | 8 | 1.6 M (vocabulary 9000) |", "vocabulary is 8192"),
        ("| `cognexis-tiny` | 128 | 4 / 4 | 1 + 1 + 1 | 8 | 1.6 M |", "heads / kv is 4 / 2"),
        ("| `cognexis-tiny` | 128 | 4 / 2 | 1 + 1 + 2 | 8 | 1.6 M |", "prelude + core + coda is 1 + 1 + 1"),
        ("| `cognexis-tiny` | 128 | 4 / 2 | 1 + 1 + 1 | 9 | 1.6 M |", "loops is 8"),
    ],
)
def test_wrong_preset_row_is_reported(row, fault):
    head = "| preset | hidden | heads / kv | prelude + core + coda | loops | parameters |\n|---|---|---|---|---|---|\n"
    assert [f"cognexis-tiny: {fault}"] == [found.partition(", the page")[0] for found in preset_faults(head + row)]
    assert preset_faults("no table here") == ["no table of presets"]


# ---- the tree and other paths ----


def tree_entries(text: str) -> list[str]:
    """Paths that the drawn tree names: it starts with ``cognexis/``; indented lines lie inside the folder above."""
    tree = next((block.code for block in blocks(text) if block.code.startswith("cognexis/")), "")
    entries, folder = [], ""
    for line in tree.split("\n"):
        names = re.match(r"\s*((?:[\w.]+(?:/|\.\w+)(?:\s+|$))*)", line)
        inside = folder if line.startswith(" ") else ""
        found = names[1].split() if names else []
        entries += [inside + name for name in found]
        if found and not inside:
            folder = found[0]
    return entries


def tree_faults(text: str, root: Path) -> list[str]:
    entries = tree_entries(text)
    if not entries:
        return ["no tree"]
    faults = [f"{entry}: does not exist" for entry in entries if not is_there(root, entry)]
    folders = [path.name for path in sorted((root / "cognexis").iterdir()) if any(path.glob("**/*.py"))]
    faults += [f"cognexis/{name}/: not in the tree" for name in folders if f"cognexis/{name}/" not in entries]
    if match := re.search(r"^docs/ +(.+)$", text, re.MULTILINE):
        pages = re.split(r", | and ", match[1])
        faults += [f"docs/{name}.md: does not exist" for name in pages if not (root / f"docs/{name}.md").is_file()]
    return faults


def is_there(root: Path, path: str) -> bool:
    return (root / path).is_dir() if path.endswith("/") else (root / path).is_file()


def path_faults(text: str, root: Path) -> list[str]:
    """Paths in running text and tables that begin with a folder of the repository."""
    named = [word for word in code_words(prose(text)) if re.match(r"(cognexis|tests|docs|scripts)/\S+$", word)]
    return [f"{path}: does not exist" for path in named if not is_there(root, path)]


def test_readme_tree_is_the_repository():
    assert tree_faults((ROOT / "README.md").read_text("utf-8"), ROOT) == []


@every_page
def test_named_paths_exist(page):
    assert path_faults(page.read_text("utf-8"), ROOT) == []


def test_wrong_tree_is_reported(tmp_path):
    for path in ("cognexis/a.py", "cognexis/decoder/x.py", "cognexis/hub/deep/y.py", "tests/t.py", "docs/letters.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "cognexis/__pycache__").mkdir()
    inside = "  a.py  b.py\n  decoder/   norms, a.b/ cache\n"
    tree = f"```\ncognexis/\n{inside}tests/    mirrors c.py\ndocs/   letters, words\n```"
    files = ["cognexis/a.py", "cognexis/b.py", "cognexis/decoder/"]
    assert tree_entries(tree) == ["cognexis/", *files, "tests/", "docs/"]
    assert tree_faults(tree, tmp_path) == [
        "cognexis/b.py: does not exist",
        "cognexis/hub/: not in the tree",
        "docs/words.md: does not exist",
    ]
    assert tree_faults("no tree", tmp_path) == ["no tree"]
    named = "`cognexis/a.py`, `cognexis/hub/`, `tests/`, `cognexis/c.py` and `cognexis.c`\n\n```\n`docs/x.md`\n```"
    assert path_faults(named, tmp_path) == ["cognexis/c.py: does not exist"]


# ---- links ----


def anchors(text: str) -> set[str]:
    """The fragments under which a page's headings can be reached."""
    headings = re.findall(r"^#+ +(.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_faults(page: Path) -> list[str]:
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if re.match(r"\w+:", target):
            continue
        file, _, fragment = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists():
            faults.append(f"{target}: no such file")
        elif fragment and fragment not in anchors(path.read_text("utf-8")):
            faults.append(f"{target}: no such heading")
    return faults


@pytest.mark.parametrize("page", ALL_TEXTS, ids=page_name)
def test_links_lead_somewhere(page):
    assert link_faults(page) == []


def test_broken_link_is_reported(tmp_path):
    (tmp_path / "b.md").write_text("# Loops, and `num_loops`\n\n```\n# no heading\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Top\n[1](b.md) [2](b.md#loops-and-num_loops) [3](#top) [4](https://example.org)\n"
        "[5](c.md) [6](b.md#no-heading) [7](#bottom)\n```\n[8](d.md)\n```\n"
    )
    assert link_faults(page) == [
        "c.md: no such file",
        "b.md#no-heading: no such heading",
        "#bottom: no such heading",
    ]


# ---- words ----

_OUT_OF_PLACE = {
    "a path of somebody's machine": r"(?<![\w.~/])/(?:home|root|tmp|work|mnt|Users|opt|data)/",
    "a number that is explained nowhere here": r"\b[A-Z]{1,5}-\d{2}\b",
    "a note of open work": r"\b(?:TODO|FIXME|TBD|XXX)\b",
    "praise": r"(?i)\b(?:state[- ]of[- ]the[- ]art|blazing|seamless(?:ly)?|revolutionary|cutting[- ]edge)\b",
    "a picture sign": r"[\u2600-\u27bf\U0001f300-\U0001faff]",
}


def word_faults(text: str) -> list[str]:
    return [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r} is {reason}"
        for reason, pattern in _OUT_OF_PLACE.items()
        for match in re.finditer(pattern, text)
    ]


@pytest.mark.parametrize("page", ALL_TEXTS, ids=page_name)
def test_pages_hold_no_words_that_do_not_belong_there(page):
    assert word_faults(page.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see\n/tmp/x.py", "line 2: '/tmp/' is a path"),
        ("in `/home/me/run`", "line 1: '/home/' is a path"),
        ("as ABC-07 says", "line 1: 'ABC-07' is a number"),
        ("TODO: more", "line 1: 'TODO' is a note"),
        ("a seamless tool", "line 1: 'seamless' is praise"),
        ("done \u2705", "is a picture sign"),
    ],
)
def test_word_out_of_place_is_reported(text, fault):
    assert len(word_faults(text)) == 1 and fault in word_faults(text)[0]


def test_ordinary_words_pass():
    assert word_faults("UTF-8, PSF-2.0, SHA-256, 1 / 2, docs/data/x, https://example.org/data/x, float32/work") == []
