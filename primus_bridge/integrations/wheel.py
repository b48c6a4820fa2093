"""The build command of pyproject.toml: a wheel also has primus_bridge.pth, which imports startup.py from beside it.

An editable install needs none: setuptools makes a finder of its own for it.
"""

import shutil
from pathlib import Path

from setuptools.command.build_py import build_py

# Python prints what a .pth file raises, at every start: a module that is gone is nothing to tell every program of
PTH = r'import sys; exec("try:\n import _primus_bridge_startup\nexcept ImportError:\n pass")' + "\n"


class BuildPy(build_py):
    """Copies the packages, and writes the two files beside them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            startup = Path(__file__).with_name("startup.py")
            shutil.copyfile(startup, Path(self.build_lib, "_primus_bridge_startup.py"))
            Path(self.build_lib, "primus_bridge.pth").write_text(PTH, encoding="utf-8")
