"""The command line from outside: help, versions, imports, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

import primus_bridge
from primus_bridge.cli.main import COMMANDS, guarded
from primus_bridge.errors import ConfigError
from tests.cli.command import ROOT, run

HEAVY = ("torch", "megatron", "transformers", "datasets", "numpy")


def test_help_lists_every_command_and_is_quick():
    started = time.perf_counter()
    result = run("--help")
    seconds = time.perf_counter() - started
    assert (result.code, result.err) == (0, "")
    for command in COMMANDS:
        assert f"\n  {command} " in result.out
    # under half a second on an idle machine; the bound leaves room for a busy one, and importing torch takes longer
    assert seconds < 1.5, seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"primus {command}" in result.out
    assert "example" in result.out.lower()


@pytest.mark.parametrize(
    "code",
    [
        "import primus_bridge",
        "import primus_bridge.cli.main; primus_bridge.cli.main.main(['--help'])",
        "import primus_bridge.cli.main; primus_bridge.cli.main.main(['train', '--help'])",
        "import primus_bridge.cli.main; primus_bridge.cli.main.main(['convert', '--help'])",
        "import primus_bridge.cli.main; primus_bridge.cli.main.main(['preview', '--help'])",
        "import primus_bridge.registry, primus_bridge.adapter",
        "import primus_bridge.config; primus_bridge.config.load_arguments(None, ['--lr', '1'])",
    ],
)
def test_nothing_heavy_is_imported(code):
    script = f"import sys\n{code}\nprint('LOADED', [m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_version():
    assert run("--version").out == f"primus-bridge {primus_bridge.__version__}\n"


def test_no_command_prints_help():
    assert run().out == run("--help").out


def test_unknown_command():
    result = run("trian")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("primus: unknown command 'trian' - did you mean 'train'?")


def test_errors_become_one_message_and_an_exit_code(capsys):
    def fail():
        raise ConfigError("unknown key", where="a.yaml:3")

    assert guarded(fail) == 2
    assert capsys.readouterr().err == "primus: a.yaml:3: unknown key\n"

    def interrupt():
        raise KeyboardInterrupt

    assert guarded(interrupt) == 130
    assert guarded(lambda: None) == 0
    with pytest.raises(RuntimeError):  # a bug keeps its traceback
        guarded(lambda: (_ for _ in ()).throw(RuntimeError("bug")))


def test_doctor():
    result = run("doctor", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts["primus_bridge"] == primus_bridge.__version__
    assert facts["packages"]["torch"] and facts["packages"]["megatron-core"]
    assert facts["devices"]["cpu_cores"] >= 1
    assert "transformer-engine" in [part["name"] for part in facts["optional"]]
    assert facts["patches"] and all(patch["id"] and patch["why"] for patch in facts["patches"])
    table = run("doctor")
    assert table.code == 0
    for patch in facts["patches"]:
        assert patch["id"] in table.out
    assert run("doctor", "--jsn").err == (
        "primus: unknown option '--jsn' - did you mean '--json'?; see primus doctor --help\n"
    )
