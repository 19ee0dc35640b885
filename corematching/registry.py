"""Building methods by name: ``conf/method/<name>.yaml`` holds the defaults, the dataclass checks the values."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from corematching.errors import UserError

if TYPE_CHECKING:
    from corematching.methods.base import Method

CONF = Path(str(files("conf")))
PER_IMAGE = "per_image"
"""A parameter that every method has that chooses visual tokens inside the LLM; off unless it is named."""

FILE_PARAMETERS = ("predictor", "router")
"""Parameters whose value may be the path of a file with trained weights."""
PACKAGED = "packaged:"
"""Begins the path of a file inside the installed package's ``models``."""


def file_of(path: str) -> Path:
    """Where a file lies that a method's parameter names."""
    inside = path.removeprefix(PACKAGED)
    return Path(path).expanduser() if inside == path else Path(__file__).parent / "models" / inside


def group_names(group: str) -> list[str]:
    """Names of the YAML files in a ``conf/`` group, sorted."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def _defaults(name: str) -> dict[str, Any]:
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / "method" / f"{name}.yaml"))
    return config


def method_defaults(name: str) -> dict[str, Any]:
    """A method's parameters as its YAML gives them.

    Raises
    ------
    UserError
        For an unknown name; lists the valid ones.
    """
    if name not in group_names("method"):
        raise UserError(f"unknown method {name!r}: choose from {', '.join(group_names('method'))}")
    return {key: value for key, value in _defaults(name).items() if not key.startswith("_") and key != "name"}


def build_method(name: str, /, **parameters: Any) -> Method:
    """Build a method from its YAML defaults and overrides.

    Parameters
    ----------
    name
        A name in ``conf/method``.
    **parameters
        Overrides of its parameters, e.g. ``keep=192``. ``per_image=True`` gives every image of a prompt its share of
        the budget, for methods that choose inside the LLM (:class:`corematching.methods.per_image.PerImage`).

    Raises
    ------
    UserError
        For an unknown method or parameter (names the valid ones) or a value out of range.
    """
    values = method_defaults(name)
    cls = get_class(_defaults(name)["_target_"])
    known = [field.name for field in fields(cls)]
    per_image = parameters.pop(PER_IMAGE, False)
    if not isinstance(per_image, bool):
        raise UserError(f"{PER_IMAGE}={per_image!r} is not valid: give true or false")
    for parameter in parameters:
        if parameter not in known:
            raise UserError(
                f"unknown parameter {parameter!r} of method {name!r}: choose from {', '.join(known) or '(it has none)'}"
            )
    values.update(parameters)
    method = cls(**values)
    if per_image:
        from corematching.methods.per_image import PerImage

        object.__setattr__(method, "name", name)
        method = PerImage(method)
    object.__setattr__(method, "name", name)
    return method


def compose(first: Method, second: Method) -> Method:
    """Join a token method with a neuron or KV method.

    Raises
    ------
    UserError
        If both reduce the same thing.
    """
    from corematching.methods.composed import Composed

    return Composed(first, second)
