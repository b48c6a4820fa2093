"""Imported by every start of Python (primus_bridge.pth): ``primus.cli.convert`` is found beside a Primus, too.

Without a Primus it is a part of the namespace package ``primus``. A Primus in another folder than ours, such as a
checkout, is a regular package ``primus``, which hides that part. So this has to be small, and is asked last.
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

        top = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        return importlib.util.spec_from_file_location(fullname, os.path.join(top, *MODULE.split(".")) + ".py")


if ConvertFinder not in sys.meta_path:
    sys.meta_path.append(ConvertFinder)
