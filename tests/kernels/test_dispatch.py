"""Which form of an operation runs, by environment, device and the operation's own objection."""

import pytest
import torch

from cognexis.errors import BackendError, InvalidConfigError
from cognexis.kernels import dispatch
from cognexis.kernels.discount import discounted_sum
from cognexis.kernels.dispatch import choose, requested_form

X = torch.zeros(2)


@pytest.fixture(autouse=True)
def _environment_is_read_again(monkeypatch):
    for name in ("COGNEXIS_KERNELS", "TRITON_INTERPRET", "CORTEX_DISABLE_TRITON", "CORTEX_FORCE_PYTORCH"):
        monkeypatch.delenv(name, raising=False)
    requested_form.cache_clear()
    yield
    requested_form.cache_clear()


@pytest.fixture
def triton(monkeypatch):
    """Triton as if it were installed and its interpreter on."""
    monkeypatch.setattr(dispatch, "triton_is_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("form", ["reference", "vectorised"])
def test_form_that_is_named_runs(form, monkeypatch):
    monkeypatch.setenv("COGNEXIS_KERNELS", form)
    assert choose("op", X, refusal=None).form == form
    assert choose("op", X, refusal=None, form="reference").form == "reference"


def test_auto_takes_triton_where_it_can_run_and_else_the_vectorised_form(triton, monkeypatch):
    assert choose("op", X, refusal=None).form == "triton"
    assert choose("op", X, refusal="head_dim 48 is no power of two") == dispatch.Choice(
        "vectorised", "head_dim 48 is no power of two"
    )
    monkeypatch.delenv("TRITON_INTERPRET")
    assert choose("op", X, refusal=None).form == "vectorised"


@pytest.mark.parametrize("switch", ["CORTEX_DISABLE_TRITON", "CORTEX_FORCE_PYTORCH"])
@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_both_switches_turn_auto_into_vectorised_and_leave_the_rest(switch, value, triton, monkeypatch):
    monkeypatch.setenv(switch, value)
    assert choose("op", X, refusal=None).form == "vectorised"
    for form in ("reference", "vectorised"):
        monkeypatch.setenv("COGNEXIS_KERNELS", form)
        requested_form.cache_clear()
        assert choose("op", X, refusal=None).form == form
    monkeypatch.setenv("COGNEXIS_KERNELS", "triton")
    requested_form.cache_clear()
    with pytest.raises(InvalidConfigError, match=f"COGNEXIS_KERNELS=triton contradicts {switch}={value}"):
        choose("op", X, refusal=None)


def test_switch_of_zero_is_no_switch(triton, monkeypatch):
    monkeypatch.setenv("CORTEX_DISABLE_TRITON", "0")
    assert choose("op", X, refusal=None).form == "triton"


def test_triton_by_name_is_an_error_where_it_cannot_run(triton, monkeypatch):
    monkeypatch.setenv("COGNEXIS_KERNELS", "triton")
    assert choose("op", X, refusal=None).form == "triton"
    with pytest.raises(BackendError, match="op: the Triton form was asked for, but has no Triton kernel"):
        choose("op", X)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match="the input lies on cpu"):
        choose("op", X, refusal=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="there is no CUDA device"):
        choose("op", X, refusal=None)
    monkeypatch.setattr(dispatch, "triton_is_installed", lambda: False)
    with pytest.raises(BackendError, match="Triton is not installed"):
        choose("op", X, refusal=None)


def test_unknown_forms_are_named_with_the_known_ones(monkeypatch):
    with pytest.raises(InvalidConfigError, match="form='fast': must be one of auto, reference, vectorised, triton"):
        choose("op", X, form="fast")
    monkeypatch.setenv("COGNEXIS_KERNELS", "fast")
    with pytest.raises(InvalidConfigError, match="COGNEXIS_KERNELS='fast': must be one of auto"):
        choose("op", X)


def test_operation_obeys_the_environment(monkeypatch):
    monkeypatch.setenv("COGNEXIS_KERNELS", "triton")
    with pytest.raises(BackendError, match="discounted_sum"):
        discounted_sum(torch.zeros(2), torch.zeros(3, 2), torch.zeros(3, 2))
