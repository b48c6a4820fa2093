"""``python -m primus.cli.convert``, the documented name of ``primus convert``.

No __init__.py stands here nor above: the folder joins an installed Primus instead of hiding it.
"""

import sys

from primus_bridge.cli import convert
from primus_bridge.cli.main import guarded


def main(argv: list[str] | None = None) -> int:
    """The exit code of the conversion that the words ask for."""
    return guarded(lambda: convert.main(sys.argv[1:] if argv is None else list(argv)))


if __name__ == "__main__":
    sys.exit(main())
