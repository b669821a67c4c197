"""The base of every pydantic model that is read from a file, and the declaration of a field with a drift class."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

DriftClass = Literal["A", "B", "C"]


class StrictModel(BaseModel):
    """Immutable; no unknown keys, no silent conversion of types, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def param(default: Any, drift: DriftClass, description: str, **constraints: Any) -> Any:
    """Declare a configuration field; the drift class is not optional, so no field can forget it."""
    return Field(default, description=description, json_schema_extra={"drift": drift}, **constraints)
