"""The page on run configurations has every setting, as the models define it."""

from pathlib import Path

import pytest

from cognexis.artifacts.run_config import NEEDED_SECTIONS
from cognexis.artifacts.run_config.field_table import field_rows, field_tables
from cognexis.artifacts.run_config.migrations import RENAMED
from cognexis.artifacts.run_config.model_section import NESTED
from cognexis.artifacts.run_config.resolving import DERIVED
from cognexis.artifacts.run_config.run_config import SECTIONS, default_run_config

PAGE = (Path(__file__).parents[3] / "docs" / "run_configs.md").read_text("utf-8")


@pytest.mark.parametrize("section", SECTIONS)
def test_page_holds_the_table_of_the_section(section: str) -> None:
    assert f"## Section `{section}`\n\n{field_tables()[section]}\n" in PAGE


def test_every_setting_has_a_row_with_a_meaning() -> None:
    document = default_run_config().document()
    for section in SECTIONS:
        rows = field_rows(section)
        assert all(name and default and allowed and meaning for name, default, allowed, meaning in rows), rows
        named = {name.split(".")[0] for name, *_ in rows}
        assert named == set(document[section]) if section != "model" else named == {"variant", "dtype"}


def test_page_names_commands_groups_and_renamed_settings() -> None:
    assert all(f"`{name}`" in PAGE for name in [*NEEDED_SECTIONS, *NESTED])
    assert all(f"| `{old}` | `{new}` |" in PAGE for old, new in RENAMED.items())


def test_derived_settings_are_null_by_default() -> None:
    for path in DERIVED:
        section, _, name = path.partition(".")
        assert {row[0]: row[1] for row in field_rows(section)}[name] == "null"
