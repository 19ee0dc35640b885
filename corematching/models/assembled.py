"""Models put together at load time: a language model that another package ships, in a stock LLaVA around it.

The folder of such a model holds the LLaVA's ``config.json`` and ``assembly.json``: the package, its file and
the file's digest; nothing of the language model is copied. The projector is **not trained**: the whole is for text.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from corematching.errors import UserError

ASSEMBLY = "assembly.json"


@dataclass(frozen=True)
class Assembly:
    """What an assembled model is made of.

    Attributes
    ----------
    package, file, sha256
        The GGUF file of the language model: the installed package that holds it, its name there, its digest.
    tower
        Folder beside the model's own that the vision tower is taken from.
    make
        The command that installs what is missing.
    """

    package: str
    file: str
    sha256: str
    tower: str
    make: str

    @classmethod
    def of(cls, folder: str | Path) -> Assembly | None:
        """The assembly of a model folder, None for a folder with weights of its own."""
        path = Path(folder) / ASSEMBLY
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def weights(self) -> Path:
        """The GGUF file.

        Raises
        ------
        UserError
            If the package, or the reader of its file, is not installed, or holds another file; says what to run.
        """
        path = package_file(self.package, self.file, self.make)
        if find_spec("gguf") is None:
            raise UserError(f"the package gguf, which reads {self.file}, is not installed: run {self.make}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise UserError(f"{self.package} holds another {self.file} than this model is made of: run {self.make}")
        return path


def package_file(package: str, file: str, make: str) -> Path:
    """Path of a file in an installed package, which is not imported (its own dependencies may be missing).

    Raises
    ------
    UserError
        If it is not there; names the command that installs it.
    """
    spec = find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / file).is_file():
            return Path(place) / file
    raise UserError(f"the package {package} with {Path(file).name} is not installed: run {make}")


def assemble(folder: str | Path, assembly: Assembly, config: Any, dtype: Any) -> Any:
    """The model of a folder with an assembly.

    Parameters
    ----------
    config
        Its transformers config; layers that the language model has beyond it are left out.
    """
    source = assembly.weights()
    language: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    wanted = model.model.language_model.state_dict()
    held = language.model.state_dict()
    model.model.language_model.load_state_dict({name: held[name] for name in wanted})
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    tower: Any = AutoModelForImageTextToText.from_pretrained(Path(folder).parent / assembly.tower, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(tower.model.vision_tower.state_dict())
    model.generation_config = language.generation_config
    model.config._name_or_path = str(folder)
    return model.to(dtype)


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer of a model folder, assembled or not."""
    assembly = Assembly.of(folder)
    if assembly is None:
        return AutoTokenizer.from_pretrained(folder)
    source = assembly.weights()
    return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
