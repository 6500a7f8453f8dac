"""The one place that chooses between the forms of an operation.

Triton itself is imported with the first kernel that runs, since that takes half a second.

Each operation has a ``reference`` (a loop over time, the truth), a ``vectorised`` form (plain torch, the CPU and
fallback path) and perhaps a ``triton`` kernel. ``COGNEXIS_KERNELS`` names one of them, or ``auto`` (the default):
Triton where it can run, else vectorised. ``CORTEX_DISABLE_TRITON`` and ``CORTEX_FORCE_PYTORCH`` turn ``auto`` into
``vectorised``. What is asked for by name and cannot run is an error, never a silent replacement.
"""

import functools
import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from cognexis.errors import BackendError, InvalidConfigError

FORMS = ("auto", "reference", "vectorised", "triton")
_TRUE = frozenset({"1", "true", "yes"})
_SWITCHES = ("CORTEX_DISABLE_TRITON", "CORTEX_FORCE_PYTORCH")


@dataclass(frozen=True)
class Choice:
    """The form that runs, and why it is not another."""

    form: str
    reason: str


@functools.cache
def requested_form() -> str:
    """The form that the environment asks for; read once, ``requested_form.cache_clear()`` reads it again.

    Raises:
        InvalidConfigError: COGNEXIS_KERNELS names no form, or asks for Triton that another variable forbids.
    """
    form = os.environ.get("COGNEXIS_KERNELS", "auto") or "auto"
    if form not in FORMS:
        raise InvalidConfigError(
            f"COGNEXIS_KERNELS={form!r}: must be one of {', '.join(FORMS)}", path="COGNEXIS_KERNELS", value=form
        )
    forbidden = [name for name in _SWITCHES if os.environ.get(name, "").lower() in _TRUE]
    if forbidden and form == "triton":
        raise InvalidConfigError(
            f"COGNEXIS_KERNELS=triton contradicts {forbidden[0]}={os.environ[forbidden[0]]}", path="COGNEXIS_KERNELS"
        )
    return "vectorised" if forbidden and form == "auto" else form


@functools.cache
def triton_is_installed() -> bool:
    """Whether there is a Triton to import."""
    return find_spec("triton") is not None


def triton_is_usable() -> bool:
    """Whether Triton can run at all: installed, and a CUDA device or the interpreter."""
    return triton_is_installed() and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")


def choose(op: str, x: torch.Tensor, refusal: str | None = "has no Triton kernel", form: str | None = None) -> Choice:
    """Choose the form of ``op`` for a tensor.

    Args:
        op: name for messages.
        x: the input, whose device counts.
        refusal: the operation's own objection to Triton in words; None if it has none.
        form: what the caller asks for; None takes the environment's.

    Raises:
        BackendError: Triton was asked for by name and cannot run.
    """
    wanted = requested_form() if form is None else form
    if wanted not in FORMS:
        raise InvalidConfigError(f"form={wanted!r}: must be one of {', '.join(FORMS)}", path="form", value=wanted)
    if wanted in ("reference", "vectorised"):
        return Choice(wanted, "asked for")
    objection = refusal
    if objection is None and not triton_is_usable():
        objection = "there is no CUDA device" if triton_is_installed() else "Triton is not installed"
    if objection is None and x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        objection = f"the input lies on {x.device}"
    if objection is None:
        return Choice("triton", "it can run")
    if wanted == "triton":
        raise BackendError(f"{op}: the Triton form was asked for, but {objection}")
    return Choice("vectorised", objection)
