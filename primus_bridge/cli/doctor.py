"""``primus doctor``: versions, devices, optional parts found or missing, active patches and why."""

from __future__ import annotations

import json
import sys
from typing import Any

HELP = """\
primus doctor: what this machine has, and what the package makes of it

usage: primus doctor [--json]

  --json   the same as one JSON object

examples:
  primus doctor
  primus doctor --json | python -m json.tool
"""


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    from primus_bridge.bridge.engine import usable
    from primus_bridge.errors import ConfigError, did_you_mean
    from primus_bridge.machine import examine

    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    for word in argv:
        if word != "--json":
            raise ConfigError(f"unknown option '{word}'{did_you_mean(word, ['--json'])}; see primus doctor --help")
    facts = examine() | {"engine_bridge": usable()}
    print(json.dumps(facts, indent=2)) if "--json" in argv else _print(facts)
    return 0


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=160)

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column in columns:
            made.add_column(column, overflow="fold")
        return made

    console.print(f"primus-bridge {facts['primus_bridge']}, Python {facts['python']}", highlight=False)
    console.print(facts["system"], highlight=False)
    packages = table("\nPackages", "package", "version")
    for name, version in facts["packages"].items():
        packages.add_row(name, version or "[red]missing[/red]")
    console.print(packages)
    devices = facts["devices"]
    console.print(
        f"\nDevices\n{devices['cpu_cores']} CPU cores; GPU runtime of torch: {devices['runtime']}", highlight=False
    )
    for index, gpu in enumerate(devices["gpus"]):
        console.print(f"GPU {index}: {gpu}", highlight=False)
    if not devices["gpus"]:
        console.print("no GPU: runs use gloo on the CPU", highlight=False)
    optional = table("\nOptional parts", "part", "state", "for")
    for part in facts["optional"]:
        optional.add_row(part["name"], part["version"] or ("found" if part["found"] else "missing"), part["use"])
    console.print(optional)
    console.print(f"\nEngine bridge\n{facts['engine_bridge']}", highlight=False, markup=False)
    patches = table("\nPatches of upstream packages", "patch", "state", "package", "because")
    for patch in facts["patches"]:
        state = "active" if patch["active"] else "off"
        if patch["active"] and not patch["in_range"]:
            state = f"[red]needs {patch['versions']}[/red]"
        package = f"{patch['package']} {patch['installed'] or 'missing'} ({patch['versions']})"
        patches.add_row(patch["id"], state, package, f"{patch['why']}: {patch['reason']}")
    console.print(patches)


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
