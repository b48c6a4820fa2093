"""Imported by every start of Python (primus_bridge.pth): ``primus.cli.convert`` is found beside a Primus, too.

In a wheel this is the module _primus_bridge_startup (wheel.py), which stands beside our packages and imports none of
them: which primus_bridge a program gets is not settled when Python starts. Without a Primus our module belongs to the
namespace package ``primus``. A Primus in another folder than ours, such as a checkout, is a regular package
``primus``, which hides that. So this finder is asked last.
"""

import sys

MODULE = "primus.cli.convert"


class ConvertFinder:
    """Finds our module where nothing else does."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname != MODULE:
            return None
        import importlib.util
        import os

        place = os.path.join(os.path.dirname(os.path.abspath(__file__)), *MODULE.split(".")) + ".py"
        return importlib.util.spec_from_file_location(fullname, place)


sys.meta_path.append(ConvertFinder)
