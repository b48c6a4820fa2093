"""pyproject.toml says what the tree holds: every package, the YAML, and no __init__.py in the shared namespace."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from primus_bridge import __version__
from primus_bridge.config.presets import recipes_folder

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_every_package_is_listed():
    block = re.search(r"^packages = \[(.*?)^\]", PYPROJECT, re.M | re.S).group(1)
    listed = set(re.findall(r'"([\w.]+)"', block))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "primus_bridge").rglob("*.py")}
    assert listed == found | {"primus_bridge.examples", "primus_bridge.patches", "primus_bridge.recipes", "primus.cli"}


def test_primus_stays_a_namespace():
    assert [path.name for path in (ROOT / "primus").rglob("*.py")] == ["convert.py"]


def test_recipes_are_found_and_packaged():
    assert (recipes_folder() / "sft_trainer.yaml").is_file()
    assert {
        path.suffix for path in (ROOT / "recipes").iterdir() if path.name not in ("__init__.py", "__pycache__")
    } == {".yaml"}


def test_version_is_in_the_changelog():
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_has_a_reason():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pytest brings it there

    project = tomllib.loads(PYPROJECT)["project"]
    for dependency in project["dependencies"]:
        assert re.search(rf'"{re.escape(dependency)}",\s+# \w', PYPROJECT), dependency
    assert set(project["optional-dependencies"]) == {"launch", "gpu", "wandb", "bridge", "bench", "dev"}
    assert project["scripts"]["primus"] == project["scripts"]["primus-bridge"] == "primus_bridge.cli.main:main"
