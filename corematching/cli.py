"""The command line: Hydra composes the configuration, the experiment's runner does the work, mistakes get one line.

Exit status: 0 done, 1 some cells failed, 2 wrong input, 130 interrupted. Nothing here imports torch, so that help,
``--cfg job`` and complaints answer at once.
"""

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from corematching import __version__, groups
from corematching.errors import UserError
from corematching.evaluation import asks, machine
from corematching.evaluation.controls import with_controls
from corematching.evaluation.settings import read_settings
from corematching.texts import neutral

RUNNERS = {
    "accuracy": "corematching.evaluation.runner.run_experiment",
    "efficiency": "corematching.efficiency.bench.run",
    "prediction": "corematching.efficiency.prediction.run",
    "text": "corematching.perplexity.run",
    "decode": "corematching.longdecode.run",
}
"""What runs an experiment, by the setting ``runner``; imported when it is needed."""
DRY_RUN = "corematching.evaluation.dry_run.dry_run"
_FLAGS = {"--help", "-h", "--resolve", "-r", "--info", "-i", "--hydra-help", "--multirun", "-m"}
_WITH_VALUE = {"--cfg": ("job", "hydra", "all"), "-c": ("job", "hydra", "all"), "--package": (), "-p": ()}
_COMPLETION = "there is no tab completion; --help lists every part and setting"
_NOT_OFFERED = {"--shell-completion": _COMPLETION, "-sc": _COMPLETION}
_MULTIRUN = {"--multirun", "-m"}
_OF_MULTIRUN = r"hydra/launcher=|hydra\.(launcher|sweep)\."
"""Hydra's own settings that can be chosen where a command stands for several runs."""

OmegaConf.register_new_resolver("machine", machine.default, replace=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    Parameters
    ----------
    arguments
        Command-line words; those of the process by default.
    """
    words = _options_last([_normalise(word) for word in (sys.argv[1:] if arguments is None else arguments)])
    words = _with_shards(words)
    if "--version" in words:
        print(f"corematching-bench {__version__}")
        return 0
    debug = "debug=true" in (word.lower() for word in words)
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [sys.argv[0], *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print at length, and we say it in one line
    try:
        _check_words(words)
        _hydra_main()
        return 0
    except Unfinished as jobs:
        return jobs.status
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return _complain(error, words, debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        sys.argv = before[0]
        os.environ.pop("HYDRA_FULL_ERROR")
        if before[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = before[1]


class Unfinished(Exception):
    """What a run of several (``--multirun``) raises that has an exit status other than 0."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def job(config: DictConfig) -> None:
    """One run, as Hydra calls it: here, or where a launcher has submitted it."""
    chosen = HydraConfig.get()
    given: Any = OmegaConf.to_container(chosen.overrides.task, resolve=False)  # a word may hold a ${...} of its own
    words = [word for word in given if not word.startswith("hydra")]
    status = run(config, chosen.runtime.choices, words)
    if chosen.mode != RunMode.MULTIRUN:
        raise SystemExit(status)
    if status:
        raise Unfinished(status)


_hydra_main = hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")(job)


def run(config: DictConfig, choices: Any, words: Sequence[str]) -> int:
    """Run a composed configuration and return the exit status; what is wrong with it is told here, in one line.

    Hydra would add lines of its own.
    """
    debug = OmegaConf.select(config, "debug") is True
    try:
        config = settle(config, choices, words)
        settings = read_settings(config)
        runner = get_method(DRY_RUN if settings["dry_run"] else RUNNERS[settings["runner"]])
        return runner(config)
    except (UserError, OmegaConfBaseException) as error:
        return _complain(error, words, debug)


def _complain(error: Exception, words: Sequence[str], debug: bool) -> int:
    """Print what is wrong in one line; returns the exit status for wrong input."""
    if debug:
        traceback.print_exception(error)
    print(f"error: {error if isinstance(error, UserError) else neutral(explain(error, words))}", file=sys.stderr)
    return 2


def settle(config: DictConfig, choices: Any, overrides: Sequence[str]) -> DictConfig:
    """Turn ``method=...`` on the command line into a ``methods`` list with its controls, and note the command line.

    A keep given as ``method.keep=...`` is that entry's own; otherwise the method takes part in the experiment's sweep.
    What is no experiment gets a name of its own (see `corematching.evaluation.asks`).
    Unless a judge is given, the mini suite's open questions get the bundled one, which knows their answers.
    """
    given = {word.split("=", 1)[0].lstrip("+~") for word in overrides}
    with open_dict(config):
        name = choices.get("method")
        if name:
            parameters = {key: value for key, value in (config.method or {}).items() if not key.startswith("_")}
            defaults = groups.load("method", name)
            own = {
                key: value
                for key, value in parameters.items()
                if f"method.{key}" in given or value != defaults.get(key)
            }
            model: Any = OmegaConf.to_container(config.model, resolve=True)
            config.methods = with_controls({"name": name, **own}, model, config.controls)
        elif config.get("method"):
            raise UserError(_needs_a_method(f"method.{next(iter(config.method))}"))
        config.pop("method", None)
        if config.name or asks.ad_hoc(overrides):
            config.experiment = config.name or asks.named_from(overrides)
        if len(cards := _cards(overrides, choices.get("experiment"))) > 1:
            if setting := next((name for name in given if name.startswith("hardware.")), None):
                raise UserError(f"'{setting}' needs one card: choose it with hardware=NAME")
            config.hardware = [groups.load("hardware", card) for card in cards]
        if not any(re.match(r"judge\b", name) for name in given) and OmegaConf.select(config, "data.name") == "mini":
            config.judge = groups.load("judge", "local")
        config.command = list(overrides)
    return config


def _cards(overrides: Sequence[str], experiment: str | None) -> list[str]:
    """The profiles in ``conf/hardware`` that are chosen: by the command line, else by the experiment's file.

    Hydra composes a list of them into one, of which the last wins.
    """
    words = [word.split("=", 1)[1] for word in overrides if word.lstrip("+").startswith("hardware=")]
    if words:
        return _listed(words[-1])
    entries = groups.load("experiment", experiment).get("defaults", []) if experiment else []
    named = [entry["/hardware"] for entry in entries if isinstance(entry, dict) and "/hardware" in entry]
    return named[-1] if named and isinstance(named[-1], list) else []


def _listed(value: str) -> list[str]:
    """``[a, b]`` or ``a`` as names."""
    return [name.strip(" '\"") for name in value.strip("[] ").split(",")]


def _normalise(word: str) -> str:
    """Accept ``+experiment=x`` beside ``experiment=x`` and ``benchmark=a,b`` beside ``benchmarks=[a,b]``."""
    if word.startswith("+experiment="):
        return word[1:]
    if match := re.fullmatch(r"benchmark=\[?([^\[\]]*)\]?", word):
        return f"benchmarks=[{match[1]}]"
    return word


def _options_last(words: list[str]) -> list[str]:
    """Settings first: Hydra takes none after an option."""
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    return settings + [word for word in words if word not in settings]


def _with_shards(words: list[str]) -> list[str]:
    """Where several runs each compute a shard (``shard=0,1,2,3``), they are told how many there are."""
    given = [word.partition("=")[2] for word in words if word.startswith("shard=")]
    known = any(word.startswith("shards=") for word in words)
    if not _MULTIRUN & set(words) or known or not given or not re.fullmatch(r"\d+(,\d+)*", given[-1]):
        return words
    return [f"shards={max(map(int, given[-1].split(','))) + 1}", *words]


def _check_words(words: Sequence[str]) -> None:
    """Refuse what Hydra would answer at length, or would take for something else than an experiment."""
    rest, several = list(words), bool(_MULTIRUN & set(words))
    if several and not any("," in re.sub(r"\[[^][]*\]|\{[^{}]*\}", "", word) for word in words):
        raise UserError(
            "--multirun has nothing to vary: give a setting several values, as in shard=0,1,2,3 or model=tiny,smol; "
            "lists such as methods=[fastv,random] compare within one run"
        )
    while rest:
        word = rest.pop(0)
        if word.startswith("-"):
            _check_flag(word, rest)
        elif "=" in word:
            _check_setting(word, several)
        elif not word.startswith("~"):
            raise UserError(f"cannot read '{word}': settings are written name=value, lists as [a,b]")


def _check_flag(word: str, rest: list[str]) -> None:
    """Refuse an option that does not exist or lacks its value, which is taken from the words that follow."""
    flag, has_value, value = word.partition("=")
    if flag in _NOT_OFFERED:
        raise UserError(f"'{flag}' is not offered: {_NOT_OFFERED[flag]}")
    if flag in _WITH_VALUE:
        value, valid = value if has_value else (rest.pop(0) if rest else ""), _WITH_VALUE[flag]
        if not value or (valid and value not in valid):
            raise groups.unknown(f"value of {flag}", value, valid or ["the name of a part"])
    elif flag not in _FLAGS:
        raise UserError(f"unknown option '{flag}'; options: --help, --version, --cfg job; settings are name=value")


def _check_setting(word: str, several: bool) -> None:
    """Refuse a part that is not chosen by one name, and Hydra's own settings."""
    name, _, value = word.lstrip("+").partition("=")
    if not name or name == "command":
        raise groups.unknown("setting", name, groups.top_level())
    if re.match(r"hydra\b", name):
        _check_launcher(word.lstrip("+"), several)
    elif name == "hardware" and value.startswith("["):
        _check_choices(name, _listed(value))
    elif name in groups.parts():
        _check_choices(name, value.split(",") if several else [value])


def _check_choices(part: str, values: Iterable[str]) -> None:
    for value in values:
        groups.known(part, value.strip("'\""))


def _check_launcher(word: str, several: bool) -> None:
    """Refuse Hydra's own settings, but for those that say where several runs go."""
    if not several or not re.match(_OF_MULTIRUN, word):
        raise UserError(
            f"'{word}' is not offered: Hydra's own settings are fixed, but for hydra/launcher=submitit_slurm and its "
            "hydra.launcher.* with --multirun; see --help for what can be set"
        )
    name, _, value = word.partition("=")
    known = ("basic", "submitit_local", "submitit_slurm")
    if name == "hydra/launcher" and value not in known:
        raise groups.unknown(name, value, known)
    if name == "hydra/launcher" and value != "basic" and not _installed("hydra_plugins.hydra_submitit_launcher"):
        raise UserError(
            f"{word} needs packages that are not installed: pip install 'corematching-bench[slurm]'; or write a job "
            "script (scripts/slurm.sbatch)"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def explain(error: Exception, words: Sequence[str]) -> str:
    """Say in one line what is wrong with the command line or a configuration file, and what would be right."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
        return str(groups.unknown(group, name, groups.choices(group)))
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}': settings are written name=value, lists as [a,b]"
    text = str(error)
    if isinstance(error, ConfigCompositionException) and (match := re.search(r"Could not override '([^']+)'", text)):
        return _explain_setting(match[1].split("@")[0], words)
    if match := re.search(r"Error merging override (.*)", text):
        return f"{match[1]} is not valid: a list, a mapping or a single value stands there, see --cfg job"
    if match := re.search(r"Ambiguous value for argument '([^']*)'", text):
        name, _, values = match[1].partition("=")
        return f"{match[1]} is not valid: give one value, or {name}=[{values}] where a list is asked for"
    if match := re.search(r"Could not delete.*'([^']*)'", text):
        return str(groups.unknown("setting", match[1], groups.top_level()))
    if match := re.search(r"[Cc]ould not find '([^']+)'|No match in the defaults list.*'([^']+)'", text):
        return f"unknown part '{match[1] or match[2]}'; see --help"
    return " ".join(text.split())


def _explain_setting(path: str, words: Sequence[str]) -> str:
    """The error line for a dotted setting that the composed configuration does not have."""
    parent, _, key = path.rpartition(".")
    if not parent:
        top = groups.top_level()
        return str(groups.unknown("setting", key, top))
    chosen = next((word.split("=", 1)[1] for word in words if word.startswith(f"{parent}=")), None)
    if parent == "method" and chosen is None:
        return _needs_a_method(path)
    if chosen in groups.choices(parent):
        names = [name for name in groups.load(parent, chosen) if not name.startswith("_")]
        return str(groups.unknown(f"parameter of {parent} {chosen}", key, names))
    names = sorted({name for choice in groups.choices(parent) for name in groups.load(parent, choice)})
    return str(groups.unknown(f"setting of {parent}", key, names))


def _needs_a_method(path: str) -> str:
    return f"'{path}' needs a method: add method=NAME with one of {', '.join(groups.choices('method'))}"
