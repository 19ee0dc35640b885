"""The configuration groups in ``conf/`` as plain data: what there is to choose from, without composing or torch."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from omegaconf import OmegaConf

from corematching import registry
from corematching.errors import UserError
from corematching.registry import group_names


def choices(group: str) -> list[str]:
    """Names of the files in ``conf/<group>``, sorted."""
    return group_names(group)


def known(group: str, name: str) -> str:
    """`name`, if there is such a file in ``conf/<group>``.

    Raises
    ------
    UserError
        If there is none; names the ones there are.
    """
    valid = choices(group)
    if name not in valid:
        raise unknown(group, name, valid)
    return name


def load(group: str, name: str) -> dict[str, Any]:
    """Content of ``conf/<group>/<name>.yaml``.

    Raises
    ------
    UserError
        If there is no such file; names the ones there are.
    """
    file = registry.CONF / group / f"{known(group, name)}.yaml"
    return dict(OmegaConf.to_container(OmegaConf.load(file)))  # type: ignore[arg-type]


def unknown(what: str, value: object, valid: Iterable[str]) -> UserError:
    """The one-line error for a value that is not among the valid ones; points at a near miss."""
    valid = list(valid)
    near = get_close_matches(str(value), valid, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return UserError(f"unknown {what} '{value}'{hint}; valid: {', '.join(valid) or 'none'}")


def parts() -> list[str]:
    """The groups that a command line chooses from."""
    defaults = OmegaConf.load(registry.CONF / "config.yaml").defaults
    names = [str(next(iter(entry))) for entry in defaults if not isinstance(entry, str)]
    return [name for name in names if "/" not in name]


def top_level() -> list[str]:
    """Everything that can be set with ``name=value``: the groups, then the root configuration's own settings."""
    root = OmegaConf.load(registry.CONF / "config.yaml")
    return parts() + [str(key) for key in root if key not in ("defaults", "hydra")]
