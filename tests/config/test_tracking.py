"""What each dialect says of Weights & Biases: project, name, and the switches; and epochs in place of steps."""

from __future__ import annotations

import pytest

from primus_bridge.config import load_arguments, schema
from primus_bridge.errors import ConfigError

EXPERIMENT = """\
work_group: lab
user_name: me
exp_name: first
modules:
  trainer:
    framework: megatron_bridge
    overrides:
      stage: sft
      {line}
"""


def of_primus(tmp_path, line: str):
    file = tmp_path / "experiment.yaml"
    file.write_text(EXPERIMENT.format(line=line))
    return load_arguments(str(file), [])


@pytest.mark.parametrize(
    "line, used, project",
    [
        ("wandb_project: mine", True, "mine"),
        ("wandb_project: null", False, None),
        ("disable_wandb: false", True, "lab_me"),
        ("{disable_wandb: true, wandb_project: mine}", False, "mine"),
        ("use_wandb: true", True, "lab_me"),
    ],
)
def test_primus_names(tmp_path, line, used, project):
    line = line.strip("{}").replace(", ", "\n      ")
    logger = of_primus(tmp_path, line).logger
    assert (logger.uses_wandb, logger.wandb_project) == (used, project)


@pytest.mark.parametrize(
    "text, argument, expected",
    [
        ("logging: {wandb_project: p, wandb_entity: e, wandb_exp_name: n}", "logger.wandb_exp_name", "n"),
        ("wandb_run_name: n", "logger.wandb_exp_name", "n"),
        ("run_name: n", "logger.wandb_exp_name", "n"),
        ("logger: {wandb: true}", "logger.wandb", True),
        ("wandb_mode: offline", "logger.wandb_mode", "offline"),
        ("report_to: none", "logger.tensorboard", False),
        ("report_to: wandb", "logger.wandb", True),
        ("training: {epochs: 2}", "train.num_epochs", 2.0),
        ("num_train_epochs: 2", "train.num_epochs", 2.0),
    ],
)
def test_flat_names(tmp_path, text, argument, expected):
    file = tmp_path / "config.yaml"
    file.write_text(text + "\n")
    assert schema.get(load_arguments(str(file), []), argument) == expected


def test_no_other_mode(tmp_path):
    with pytest.raises(ConfigError, match="'wandb_mode' must be one of online, offline, disabled, or null; got 'of"):
        load_arguments(None, ["--wandb_mode", "ofline"])
