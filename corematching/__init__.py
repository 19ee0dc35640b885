"""CoreMatching-Bench: sparse inference for vision-language models, measured honestly.

The names below are the public API. They are imported on first use, so that ``import corematching`` (and with it
``--help`` and every error message of the command line) does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corematching.cost.flops import flops
    from corematching.engine.trace import SampleTrace, Trace
    from corematching.errors import UserError
    from corematching.models.loading import load_model
    from corematching.registry import build_method, compose

_HOME = {
    "build_method": "corematching.registry",
    "compose": "corematching.registry",
    "flops": "corematching.cost.flops",
    "load_model": "corematching.models.loading",
    "SampleTrace": "corematching.engine.trace",
    "Trace": "corematching.engine.trace",
    "UserError": "corematching.errors",
}

__version__ = "0.1.0"
__all__ = ["SampleTrace", "Trace", "UserError", "build_method", "compose", "flops", "load_model"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'corematching' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
