"""``python -m primus.cli.convert`` with an installed wheel, whatever else is named primus on sys.path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import ROOT
from tests.integrations.test_primus import HOSTS, in_every_host

# a folder added by site.addsitedir is as good as site-packages: its .pth files are read; an editable install, in the
# Python that runs the tests, has a finder of its own, which would stand in for ours
IN_SITE = """
import runpy, site, sys
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
site.addsitedir(sys.argv.pop(1))
runpy.run_module("primus.cli.convert", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What a wheel puts into site-packages."""
    tree = tmp_path_factory.mktemp("source")
    for name in ("primus_bridge", "patches", "recipes", "examples", "primus"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "build_py", "--build-lib", "site"]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tree / "site"


def convert(installed: Path, *path: Path) -> subprocess.CompletedProcess:
    """The command, in an empty folder, with ``path`` before the site's folder."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    (installed.parent / "empty").mkdir(exist_ok=True)
    words = [sys.executable, "-c", IN_SITE, str(installed), "--list"]
    return subprocess.run(words, cwd=installed.parent / "empty", env=env, capture_output=True, text=True)


def test_alone(installed):
    done = convert(installed)
    assert done.returncode == 0, done.stderr
    assert "llama" in done.stdout


@in_every_host
def test_beside_a_primus_before_or_after(installed, host):
    for path in ((host,), (host, installed), (installed, host)):
        done = convert(installed, *path)
        assert done.returncode == 0, done.stderr
        assert "llama" in done.stdout


def test_the_finder_is_what_finds_it(installed):
    pth = installed / "primus_bridge.pth"
    pth.rename(installed / "primus_bridge.off")
    try:
        assert convert(installed).returncode == 0
        hidden = convert(installed, HOSTS[0])
        assert hidden.returncode == 1 and "No module named primus.cli.convert" in hidden.stderr
    finally:
        (installed / "primus_bridge.off").rename(pth)
