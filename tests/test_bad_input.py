"""Bad input of every kind, for every method and setting: one line, exit status 2, nothing written.

Composing a configuration takes Hydra a fifth of a second, so it is done once; bad values are then put in its place, and
the program goes on from there. A few words go through all of it.
"""

import math

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from corematching import cli, groups
from corematching.benchmarks.data import DataSource
from corematching.efficiency import bench
from corematching.evaluation import provenance, runner
from corematching.registry import method_defaults

NAN = math.nan
SWITCHES = ("tokens", "neurons", "deduplicate", "proportional_attention")
PARAMETERS = [(name, parameter) for name in groups.choices("method") for parameter in method_defaults(name)]
WRONG_TYPES = ([[1]], 10**40, True)
"""Of which no parameter takes any, except that switches take the last; taken in turns."""
OF_METHODS = [
    [{"name": name, parameter: value}]
    for place, (name, parameter) in enumerate(PARAMETERS)
    for value in (NAN, WRONG_TYPES[place % (2 if parameter in SWITCHES else 3)])
]
METHODS = [
    *(5, None, True, "", [], {}, [["fastv"]], [{}], [None], [{"name": 5}], [{"name": "fastvv"}], [{"label": "x"}]),
    *([{"name": "fastv", "label": label}] for label in (5, "", " ", "x" * 101, ["x"], True, "half \ud83d")),
    *([{"name": "fastv", "with": second}] for second in (5, {}, ["core_neurons"], "fastv", {"name": "h2o", "kep": 1})),
    *([{"name": "fastv", "budgets": budgets}] for budgets in (5, {64: 5}, {64: {"kep": 1}}, {64: {"keep": NAN}})),
    [{"name": "fastv", "layr": 3}],
    [{"name": "fastv", "layer": 12}],
    [{"name": "fastv", "keep": 577}],
    [{"name": "fastv", "depth_fraction": 1.5}],
    [{"name": "core_tokens", "reference": 0}],
    [{"name": "pyramiddrop", "keeps": [0.1, 0.5, 0.9]}],
    [{"name": "pyramiddrop", "layers": [], "keeps": []}],
    [{"name": "sparsevlm", "layers": [1, 2, 3], "schedule": [10, 20, 30]}],
    [{"name": "dejavu", "predictor": "/no/such/file", "keep": 0.4}],
    [{"name": "sgl", "guide": "/no/such/model"}],
    [{"name": "cdpruner", "text_model": "/no/such/model"}],
    ["fastv", {"name": "fastv", "layer": 3}],
    [{"name": "fastv", "label": "a"}, {"name": "random", "label": "a"}],
    [{"name": "fastv", "label": "a\tb"}, {"name": "random", "label": "a b"}],
]
NO_COUNTS = (0, 1.5, NAN, True, "many", [[1]], 10**30)
COUNTS = ("batch_size", "together", "limit", "generation.max_new_tokens", "model.batch_size", "model.layers")
NO_TEXTS = (5, NAN, True, "", [], {"a": 1})
NO_CHOICES = (5, None, True, "nothing", "", [], {"a": 1})
SETTINGS = {
    "methods": METHODS,
    "keep": (None, 0, -1, 577, 1.5, NAN, math.inf, True, "many", [[1]], {"a": 1}, [64, "x"], [1, 1.0]),
    **dict.fromkeys(
        ("batch_size", "together", "limit", "generation.max_new_tokens", "model.num_layers", "model.batch_size"),
        NO_COUNTS,
    ),
    **dict.fromkeys(("model.visual_tokens", "model.vision_layers"), NO_COUNTS[:3]),
    **dict.fromkeys(("seed", "data.seed"), (None, -1, 2**32, 1.5, NAN, True, "x", [])),
    "data.n": (None, 1, 10**9, 2.5, NAN, True, "x", []),
    "data.per_image": (0, -1, 10**9, 2.5, NAN, True, "x", []),
    **dict.fromkeys(("report", "debug", "model.comparable"), (None, 1, 0, "yes", [], {"a": 1})),
    **dict.fromkeys(("results_dir", "experiment", "model.name"), (None, *NO_TEXTS)),
    "model.revision": NO_TEXTS,
    **dict.fromkeys(("prompt", "image", "match", "runner", "model.prompt", "model.weights", "model.dtype"), NO_CHOICES),
    **dict.fromkeys(("executor.name", "tracking.name", "tracking.mode", "data.name", "judge.name"), NO_CHOICES),
    "model.device": ("tpu", "cuda:", "cuda:99", "cuda:x", *NO_TEXTS),
    "benchmarks": (5, None, True, [], "gqa2", [["gqa"]], {"a": 1}),
    **dict.fromkeys(
        ("generation", "features", "model", "data", "judge", "executor", "tracking"), (None, 5, True, "x", [])
    ),
    "model.method_overrides": (5, {"fastvv": {}}, {"fastv": {"layr": 1}}, {"fastv": 5}, {"fastv": {"layer": NAN}}),
    "model.path": (*NO_TEXTS, "/no/such/model", "no/such/model/at/all", "packaged:nothing", "nul\0byte"),
    "model.num_layers": (*NO_COUNTS, 13),
    "features.cache": (None, 5, "x", "on", []),
    "features.most_gb": (None, 0, -1, NAN, "x", True),
    "judge.timeout": (None, 0, -1, NAN, 1e9, "x", True),
    "judge.attempts": (None, 0, 1.5, 1000, "x", True),
    "judge.url": (5, "", "ftp://x", "x", []),
    "judge.note": (None, 5, "", "{x}", "{", []),
    "executor.workers": (0,),
    "controls": (None, 5, "x"),
    "force": (None, -1, NAN, "x"),
    "name": (5, "", "a/b", "..", "\x1b"),
    **dict.fromkeys(("hardware", "efficiency"), (5, "titan_xp", {"name": "titan_xp"})),
    **dict.fromkeys(("limt", "foo", "model.foo", "data.foo", "judge.foo", "generation.foo", "method.layer"), (1,)),
    "runner": ("os.getcwd", "corematching.evaluation.runner.run_experiment"),
}
TIMING = {
    **dict.fromkeys(("efficiency.repeats", "efficiency.before", "efficiency.after"), NO_COUNTS),
    **dict.fromkeys(("efficiency.output_tokens", "efficiency.batch"), (None, 0, [], [0], [1.5], "x", True)),
    **dict.fromkeys(("efficiency.engine", "efficiency.ffn"), NO_CHOICES),
    "efficiency.foo": (1,),
    **dict.fromkeys(("hardware.flops", "hardware.memory", "hardware.link"), (1, 0, NAN, "x", True)),
    "methods": ([], ["nothing"], [{"name": "fastv", "layer": 12}]),
    **dict.fromkeys(("hardware", "efficiency"), (None, 5, {})),
}
DELETED = ("methods", "keep", "benchmarks", "generation", "model.path", "model", "data", "judge", "seed", "runner")


def cases():
    """(experiment, setting, value); DELETED settings have the value `cases` itself."""
    for value in OF_METHODS:
        yield "quickstart", "methods", value
    for experiment, settings in (("quickstart", SETTINGS), ("efficiency", TIMING)):
        for setting, values in settings.items():
            for value in values:
                yield experiment, setting, value
    for setting in DELETED:
        yield "quickstart", setting, cases


CASES = list(cases())


@pytest.fixture(scope="module")
def composed():
    """Both kinds of experiments, composed once."""
    found = {}
    for experiment in ("quickstart", "efficiency"):
        words = [f"experiment={experiment}", "model=tiny", "data=mini", "judge=local", "tracking=wandb_offline"]
        with initialize_config_module("conf", version_base="1.3"):
            config = compose("config", words, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        choices = config.hydra.runtime.choices
        del config.hydra
        OmegaConf.set_struct(config, False)
        found[experiment] = config, choices, words
    return found


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty folder, and a program that stops where it would start to write results."""

    def started(*_):
        raise AssertionError("this input was accepted")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(DataSource, "version", lambda self, benchmark: "version")
    monkeypatch.setattr(runner, "Store", started)
    monkeypatch.setattr(bench, "Store", started)
    return tmp_path


def check_refusal(status, capsys, folder):
    """One line on the error stream, nothing else anywhere."""
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert err[:-1].isprintable()
    assert list(folder.iterdir()) == []


def test_there_are_enough_cases():
    assert len(CASES) >= 300
    assert {value[0]["name"] for _, setting, value in CASES[: len(OF_METHODS)]} == {name for name, _ in PARAMETERS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{ascii(case[2])[:60]}")
def test_bad_values_are_refused_in_one_line(case, composed, nowhere, capsys, monkeypatch):
    experiment, setting, value = case
    base, choices, words = composed[experiment]
    if not setting.startswith("model."):
        monkeypatch.setattr(provenance, "folder_digest", lambda folder: "digest")
    config = base.copy()
    parent, _, key = setting.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if value is cases:
        del node[key]
    elif node is None:
        config[parent] = {key: value}
    else:
        node[key] = value
    check_refusal(cli.run(config, choices, words), capsys, nowhere)


PLAIN_WORDS = (
    *("limit", "", "=5", "~foo", "limit=1,2", "keep=[1", "limit=${foo}", "+foo=1", "limits=5", "a/b=c", "command=x"),
    *("--multirun", "-m", "--cfg", "--package", "--nothing", "hydra.run.dir=x", "model=[tiny]", "method=fastv,random"),
    *("experiment=null", "methods={a:1}", "~model", "method.layer=3", "++method.layer=3", "experiment=../x"),
)
WORDS = {
    **{word: [word] for word in PLAIN_WORDS},
    "completion": ["-sc", "install=bash"],
    "what": ["--cfg", "nothing"],
    "of a method": ["method=topv", "method.layer=x"],
    "of a part of it": ["method=pyramiddrop", "method.layers=5"],
    "escape": ["prompt=\x1b[31m"],
    "surrogate": ["methods=[{name:fastv,label:'\udcff'}]"],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=[ascii(name) for name in WORDS])
def test_bad_words_are_refused_in_one_line(words, nowhere, capsys):
    check_refusal(cli.main(words), capsys, nowhere)


def test_the_version_is_this_projects(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("corematching-bench ")
