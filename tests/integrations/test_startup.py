"""What a wheel adds to every start of Python: primus.cli.convert, whatever else is named primus; and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
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


@pytest.fixture(scope="module")
def bare(installed, tmp_path_factory) -> Path:
    """The python of a new environment that has nothing but our wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    shutil.copytree(installed, next(folder.glob("lib/python*/site-packages")), dirs_exist_ok=True)
    return folder / "bin" / "python"


def started(python: Path, folder: Path, code: str, **variables: str) -> str:
    """What a start of Python in ``folder`` prints, on either stream."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    words = [str(python), "-c", code]
    done = subprocess.run(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


LOADED = "import sys; print(*sorted(name for name in sys.modules if 'primus' in name), sep=',')"


def test_a_start_of_python_loads_no_package(bare, tmp_path):
    assert started(bare, tmp_path, LOADED) == "_primus_bridge_startup\n"
    (tmp_path / "primus_bridge").mkdir()
    (tmp_path / "primus_bridge" / "__init__.py").write_text("checkout = True\n")
    assert started(bare, tmp_path, "import primus_bridge; print(primus_bridge.checkout)") == "True\n"


def test_a_start_of_python_says_nothing(bare, tmp_path):
    for name in ("primus_bridge", "primus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('broken')\n")
    assert started(bare, tmp_path, LOADED, PYTHONPATH=str(tmp_path)) == "_primus_bridge_startup\n"
    module = next(bare.parents[1].glob("lib/python*/site-packages/_primus_bridge_startup.py"))
    module.rename(module.with_suffix(".off"))
    try:
        assert started(bare, tmp_path, "print('quiet')") == "quiet\n"
    finally:
        module.with_suffix(".off").rename(module)
