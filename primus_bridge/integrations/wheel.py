"""The build command of pyproject.toml: a wheel also has primus_bridge.pth, which imports startup.py.

An editable install needs none: setuptools makes a finder of its own for it.
"""

from pathlib import Path

from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copies the packages, and writes the file beside them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            line = "import primus_bridge.integrations.startup\n"
            Path(self.build_lib, "primus_bridge.pth").write_text(line, encoding="utf-8")
