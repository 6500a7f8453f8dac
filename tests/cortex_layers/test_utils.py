"""The choice between a caller's own functions."""

import warnings

import pytest
import torch

from cognexis.cortex_layers import utils
from cognexis.cortex_layers.utils import select_backend, triton_available
from cognexis.kernels.dispatch import requested_form

X = torch.zeros(2)


def one():
    return 1


def test_on_cpu_the_pytorch_function_is_chosen():
    assert select_backend("nowhere:nothing", one, X) is one
    assert select_backend(None, "math:sqrt", X)(4) == 2


def test_triton_needs_its_device_its_function_and_permission(monkeypatch):
    class OnDevice:
        is_cuda = True

    def other():
        return 2

    monkeypatch.setattr(utils, "TRITON_AVAILABLE", True)
    assert select_backend(other, one, OnDevice()) is other
    assert select_backend(other, one, OnDevice(), allow_triton=False) is one
    assert select_backend("cognexis.nowhere:nothing", one, OnDevice()) is one
    assert select_backend(other, one, X) is one


def test_missing_pytorch_function_is_an_error():
    with pytest.raises(ImportError, match="math:nothing"):
        select_backend(None, "math:nothing", X)


def test_cuda_extension_is_ignored_with_one_warning():
    utils._warn_about_cuda.cache_clear()
    with pytest.warns(DeprecationWarning, match="allow_cuda is ignored"):
        assert select_backend(None, one, X, cuda_fn="x:y", allow_cuda=True) is one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_backend(None, one, X, cuda_fn="x:y", allow_cuda=True)


@pytest.mark.parametrize("variable", ["CORTEX_DISABLE_TRITON", "CORTEX_FORCE_PYTORCH"])
def test_triton_is_off_where_the_environment_says_so(variable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(utils, "triton_is_installed", lambda: True)
    monkeypatch.setenv(variable, "1")
    requested_form.cache_clear()
    try:
        assert not triton_available()
        monkeypatch.delenv(variable)
        requested_form.cache_clear()
        assert triton_available()
    finally:
        requested_form.cache_clear()
