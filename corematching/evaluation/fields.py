"""What the schema of a configuration is built from: closed parts, worded types, and refusals in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

from corematching import groups
from corematching.errors import UserError

_LONGEST = 80  # signs of a bad value that a message repeats


@dataclass(frozen=True)
class Worded:
    """Metadata of a type: whatever is wrong with a value, the refusal says what would be right."""

    wording: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> Any:
        return core_schema.no_info_wrap_validator_function(self._check, handler(source))

    def _check(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise refusal(self.wording) from None


@dataclass(frozen=True)
class OneOf:
    """Metadata of a type: a name among those that ``valid`` lists; a near miss is pointed out."""

    what: str
    valid: Callable[[], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable) -> Any:
        return core_schema.no_info_plain_validator_function(
            self._check, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    def _check(self, value: Any) -> Any:
        names = tuple(self.valid())
        if not isinstance(value, str) or value not in names:
            raise groups.unknown(self.what, shown(value), names)
        return value


class Part(BaseModel):
    """A closed set of settings: none unknown, none missing, none of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _closed(cls, values: Any) -> Any:
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        if not isinstance(values, Mapping):
            raise refusal(f"its settings ({', '.join(fields)})")
        unknown = [key for key in values if key not in fields]
        if unknown and cls.model_config.get("extra") == "forbid":
            valid = [name for name, field in fields.items() if field.repr]
            raise PydanticCustomError("unknown_setting", "{key}", {"key": shown(unknown[0]), "valid": valid})
        absent = [key for key, field in fields.items() if field.is_required() and key not in values]
        if absent:
            raise PydanticCustomError("absent_setting", "{key}", {"key": absent[0]})
        return values


def refusal(wording: str) -> PydanticCustomError:
    """What a validator raises: the message will name setting and value, and then say ``wording``."""
    return PydanticCustomError("not_valid", "{wording}", {"wording": wording})


def explain(error: ValidationError) -> UserError:
    """The first refusal in one line."""
    first = error.errors(include_url=False)[0]
    kind, context, value = first["type"], first.get("ctx", {}), first["input"]
    path = _path(first["loc"])
    if isinstance(context.get("error"), UserError):
        return context["error"]
    if kind == "unknown_setting":
        return groups.unknown(f"setting of {path}" if path else "setting", context["key"], context["valid"])
    if kind == "absent_setting":
        name = f"{path}.{context['key']}" if path else context["key"]
        return UserError(f"{name} is missing: it is part of the configuration, see --cfg job")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name") if isinstance(value, Mapping) else value
        return groups.unknown(path, shown(name), groups.choices(path))
    return UserError(f"{path}={shown(value)} is not valid: give {context.get('wording') or first['msg']}")


def _path(location: tuple[int | str, ...]) -> str:
    """``("methods", 0, "keep")`` as ``methods[0].keep``, without what pydantic adds for the choice of a part."""
    text = ""
    for place, step in enumerate(location):
        if isinstance(step, int):
            text += f"[{step}]"
        elif not (place == 1 and step in groups.choices(str(location[0]))):
            text += f".{step}" if text else step
    return text


def shown(value: Any) -> str:
    """A value as one would type it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _many(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else [value]


def _plain(value: Any) -> Any:
    """Refuse what no method's parameter can be."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, list):
            _plain(item)
        elif not isinstance(item, str | int | float | None) or (isinstance(item, float) and not math.isfinite(item)):
            raise refusal("a finite number, a word, true, false, null, or a list of those")
    return value


OneOrMany = BeforeValidator(_many)
"""Metadata of a list: a single value stands for a list of one."""
SeveralOrNone = BeforeValidator(lambda value: None if value is None else _many(value))
"""The same of a list that may be absent."""
Text = Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^\x00]*[^\x00\s][^\x00]*$"), Worded("a text")]
Label = Annotated[str, StringConstraints(max_length=100, pattern=r"\S"), Worded("a text of 1 to 100 signs")]
FolderName = Annotated[
    str,
    StringConstraints(max_length=120, pattern=r"^[^./\\\s\x00-\x1f\x7f]([^/\\\x00-\x1f\x7f]*[^/\\\s\x00-\x1f\x7f])?$"),
    Worded("a folder's name: 1 to 120 signs, without a slash, and without a dot in front"),
]
Count = Annotated[int, Field(ge=1, lt=2**63), Worded("a whole number of at least 1")]
Seed = Annotated[int, Field(ge=0, lt=2**32), Worded("a whole number of at least 0 and below 2**32")]
Switch = Annotated[bool, Worded("true or false")]
Positive = Annotated[float, Field(gt=0), Worded("a number above 0")]
Parameter = Annotated[Any, BeforeValidator(_plain)]
"""What a method's parameter may be as far as the configuration knows; the method itself knows more."""
