"""In an environment with Megatron-Bridge: the container of each case, validated by itself, as JSON.

    python -m tests.bridge.containers CASES.json OUT.json DEFAULTS.json

CASES.json: name -> words of ``primus train``. OUT.json: name -> the container's fields, or the error.
DEFAULTS.json: see container_keys.py.
"""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import yaml


def container_of(words: list[str]) -> dict:
    """What ``--dry_run`` prints, read as YAML; then the container must pass its own validation."""
    from primus_bridge.bridge.container import build_container
    from primus_bridge.bridge.engine import imported
    from primus_bridge.cli.train import print_container
    from primus_bridge.config import load_arguments
    from primus_bridge.config.validate import check_world, layout_size, validate
    from primus_bridge.errors import ConfigError
    from primus_bridge.preflight import check_bridge

    try:
        arguments = load_arguments(None, words)
        validate(arguments)
        check_world(arguments, layout_size(arguments))
        with redirect_stdout(io.StringIO()) as printed:
            print_container(arguments)
        container = build_container(arguments, check_bridge(arguments, weights=False))
    except ConfigError as error:
        return {"error": str(error)}
    os.environ["WORLD_SIZE"] = str(layout_size(arguments))
    # what a run does before: it makes the weights, and counts the sequences
    container.checkpoint.pretrained_checkpoint = os.getcwd()
    container.train.train_iters = container.train.train_iters or 10
    try:
        imported("megatron.bridge.training.config").runtime_config_update(container)
    except Exception:
        return {"invalid": traceback.format_exc()}
    return {
        "yaml": yaml.safe_load(printed.getvalue()),
        "notes": arguments.notes,
        "lr_decay_steps": container.scheduler.lr_decay_steps,
    }


def main(cases: str, out: str, defaults_file: str) -> None:
    from tests.bridge.container_keys import defaults

    results = {name: container_of(words) for name, words in json.loads(Path(cases).read_text()).items()}
    Path(out).write_text(json.dumps(results, default=list))
    Path(defaults_file).write_text(json.dumps(defaults(), default=sorted))


if __name__ == "__main__":
    main(*sys.argv[1:])
