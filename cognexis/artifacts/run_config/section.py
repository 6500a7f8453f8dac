"""What all sections of a run configuration have in common: strict types, no unknown keys, no change after creation."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A group of settings. Equal settings make equal sections; what was given and what is a default is remembered."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


def spelled(aliases: dict[Any, str]) -> BeforeValidator:
    """Accept other spellings of a value; the canonical one is stored and written."""

    def canonical(value: Any) -> Any:
        return aliases.get(value, value) if isinstance(value, (str, bool)) else value

    return BeforeValidator(canonical)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# A list in a file, stored as a tuple: Listed[tuple[int, ...]].
as_listed = BeforeValidator(_as_tuple)

Count = Annotated[int, Field(ge=1, le=2**63 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**63 - 1)]
Loops = Annotated[int, Field(ge=1, le=65_536)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]

LOOP_MODES = ("fixed", "adaptive_sequence", "adaptive_token")
LOOP_MODE_ALIASES: dict[Any, str] = {
    "adaptive": "adaptive_sequence",
    **dict.fromkeys(("token_adaptive", "tokenwise", "token_wise"), "adaptive_token"),
}
DTYPE_ALIASES: dict[Any, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
