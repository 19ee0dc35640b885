"""lmms-eval's door to this package (entry point ``lmms_eval.models``).

lmms-eval imports this file on every start and drops all later plug-ins when it raises, so it imports nothing heavy.
"""

from typing import Any


def manifests() -> list[Any]:
    """The models this package offers to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("corematching", simple_class_path="corematching.evaluation.lmms_model.CoreMatchingLMM")]
