"""The configuration groups in ``conf/`` as plain data: what there is to choose from, without Hydra or torch."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from corematching.errors import UserError


def choices(group: str) -> list[str]:
    """Names of the files in ``conf/<group>``, sorted."""
    folder = files("conf") / group
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(group: str, name: str) -> dict[str, Any]:
    """Content of ``conf/<group>/<name>.yaml``.

    Raises
    ------
    UserError
        If there is no such file; names the ones there are.
    """
    from omegaconf import OmegaConf

    valid = choices(group)
    if name not in valid:
        raise unknown(group, name, valid)
    text = (files("conf") / group / f"{name}.yaml").read_text(encoding="utf-8")
    return dict(OmegaConf.to_container(OmegaConf.create(text) or OmegaConf.create({})))  # type: ignore[arg-type]


def unknown(what: str, value: object, valid: Iterable[str]) -> UserError:
    """The one-line error for a value that is not among the valid ones; points at a near miss."""
    valid = list(valid)
    near = get_close_matches(str(value), valid, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return UserError(f"unknown {what} '{value}'{hint}; valid: {', '.join(valid) or 'none'}")


def top_level() -> list[str]:
    """Everything that can be set with ``name=value``: the groups, then the root configuration's own settings."""
    from omegaconf import OmegaConf

    root = OmegaConf.create((files("conf") / "config.yaml").read_text(encoding="utf-8"))
    parts = [str(next(iter(entry))) for entry in root.defaults if not isinstance(entry, str)]
    settings = [str(key) for key in root if key not in ("defaults", "hydra")]
    return [part for part in parts if "/" not in part] + settings
