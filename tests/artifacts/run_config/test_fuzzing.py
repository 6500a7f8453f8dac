"""Thousands of broken configurations: each is accepted and works, or is refused with the name of a field.

COGNEXIS_CONFIG_FUZZ_CASES sets the number of the slow test (5,000 without it).
"""

import collections
import os
from pathlib import Path
from typing import Any

import pytest

from cognexis.artifacts.run_config import RunConfig, config_from_document, run_config
from cognexis.errors import InvalidConfigError
from tests.artifacts.run_config.fuzzing import run_case

CASES = int(os.environ.get("COGNEXIS_CONFIG_FUZZ_CASES", "5000"))


def outcomes(numbers: range, folder: Path) -> collections.Counter[tuple[str, str]]:
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for number in numbers:
        try:
            counts["run config" if number % 2 else "architecture", run_case(number, folder)] += 1
        except BaseException as error:
            error.add_note(f"case {number}: run_case({number}, folder) repeats it")
            raise
    return counts


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_broken_configurations_are_refused_by_name_or_work(tmp_path: Path) -> None:
    counts = outcomes(range(500), tmp_path)
    assert len(counts) == 4 and min(counts.values()) > 5, "both kinds are accepted and refused"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_many_broken_configurations_are_refused_by_name_or_work(tmp_path: Path) -> None:
    assert sum(outcomes(range(CASES), tmp_path).values()) == CASES


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_fuzzing_notices_when_validation_is_bypassed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the errors of pydantic, and with them untranslated, some of the cases above must fail."""

    def unchecked(self: Any, **settings: Any) -> None:
        made = RunConfig.model_construct(**settings)
        for name in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__", "__pydantic_private__"):
            object.__setattr__(self, name, getattr(made, name))

    with monkeypatch.context() as patched:
        patched.setattr(run_config.RunConfig, "__init__", unchecked)
        with pytest.raises((AssertionError, AttributeError, TypeError, ValueError)):
            outcomes(range(1, 101, 2), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(run_config, "faults_of", lambda error, root: [error])
        with pytest.raises((AssertionError, AttributeError, TypeError, ValueError)):
            outcomes(range(1, 101, 2), tmp_path)


@pytest.mark.parametrize(
    "document",
    [
        {"run": {"": 1}},
        {"": 1},
        {"model": {"": 1}},
        {"model": 1},
        {"inference": {"sampling": {"temperature": 10**400}}},
        {"run": {"seed": 10**5000}},
        {"training": {"precision": {"loss_scale": 10**5000}}},
        {"model": {"variant": "tiny", "rope_parameters": {"dtype": 1}}},
        {"training": {"loop_curriculum": {"milestones": {"1" * 5000: 1}}}},
    ],
)
def test_document_that_once_ended_in_another_error_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        config_from_document(document)
    assert caught.value.path
