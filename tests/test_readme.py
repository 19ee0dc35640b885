"""What README and docs promise: commands compose, links lead somewhere, lists are complete, the example runs."""

import re
import shlex
from pathlib import Path

import pytest
from test_configs import composed

from corematching import groups

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")  # continued lines
        for line in re.findall(r"^(?:\$ )?(python run\.py[^\n`]*)", text, re.MULTILINE):
            words = shlex.split(line, comments=True)[2:]
            if not any(word.startswith("--") for word in words) and "longest" not in line:  # add_a_method.md's own
                yield pytest.param(words, id=f"{page.name}: {' '.join(words) or 'python run.py'}")


@pytest.mark.parametrize("words", commands())
def test_every_command_composes(words):
    given = {word.split("=")[0] for word in words}
    config = composed(*words, *(word for word in ("model=tiny", "data=mini") if word.split("=")[0] not in given))
    assert config.methods


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    text = page.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    named = re.findall(r"`((?:scripts|conf|corematching|results|docs|notebooks)/[\w./]+\.\w+)`", text)
    named = [name for name in named if "longest" not in name]  # what add_a_method.md makes
    missing = [target for target in targets if not (page.parent / target).exists()]
    missing += [name for name in named if not ((ROOT / name).exists() or (ROOT / "corematching" / name).exists())]
    assert not missing


def test_the_methods_are_all_listed_and_all_exist():
    table = README.partition("## Methods")[2].partition("\n\nEach is one file")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(groups.choices("method"))


def test_every_experiment_that_is_named_exists():
    named = {name for page in PAGES for name in re.findall(r"\+experiment=(\w+)", page.read_text(encoding="utf-8"))}
    assert named <= set(groups.choices("experiment"))


def test_the_python_example_runs_as_printed():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    made = {}
    exec(compile(example, "README.md", "exec"), made)  # our own page
    assert len(made["trace"].samples[0].visual_tokens[5]) == 64
    assert made["both"].acts_on == {"tokens", "neurons"}
