"""Callbacks named in a configuration: built-in names, dotted paths, keywords; what is wrong is said before anything."""

from __future__ import annotations

import sys

import pytest
import yaml

from primus_bridge.callbacks.build import build_callbacks, check_callbacks
from primus_bridge.callbacks.checkpointing import CheckpointCallback
from primus_bridge.callbacks.validation import ValidationCallback
from primus_bridge.callbacks.wandb import WandBCallback
from primus_bridge.cli.main import main
from primus_bridge.config import load_arguments
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.errors import ConfigError
from tests.cli.example import train_words, tree

MINE = """
from primus_bridge import Callback

class Sampler(Callback):
    def __init__(self, every, words=("a",), *, upper=False):
        self.every, self.words, self.upper = every, words, upper

class Open(Callback):
    def __init__(self, **kinds):
        self.kinds = kinds

class Plain(Callback):
    pass

class Broken(Callback):
    def __init__(self):
        raise KeyError("no such thing")

class Misspelt(Callback):
    def on_step_ended(self, state, metrics): ...

class NoCallback:
    pass

def function():
    return Plain()
"""


def arguments(*callbacks, save="out", **dataset) -> BridgeArguments:
    made = BridgeArguments()
    made.logger.callbacks = [{"path": item} if isinstance(item, str) else item for item in callbacks]
    made.checkpoint.save = save
    for name, value in dataset.items():
        setattr(made.dataset, name, value)
    return made


def kinds(made) -> list[str]:
    return [type(callback).__name__ for callback in made.callbacks]


def test_named_ones_come_after_ours(module):
    module("mine", MINE)
    given = {"path": "ValidationCallback", "eval_steps": 5, "patience": 2}
    made = build_callbacks(
        arguments("mine.Plain", {"path": "mine.Sampler", "every": 10, "upper": True}, given, validation_split=0.5),
        [CheckpointCallback(save_steps=3)],
    )
    assert kinds(made)[:2] == ["MetricsCallback", "ProgressCallback"]
    plain, sampler, validation, checkpoint = made.callbacks[-4:]
    assert kinds(made)[-4:] == ["Plain", "Sampler", "ValidationCallback", "CheckpointCallback"]
    assert (sampler.every, sampler.words, sampler.upper) == (10, ("a",), True)
    assert (validation.eval_steps, validation.patience) == (5, 2)


def test_in_yaml_under_logger_or_at_the_top(module, root):
    module("mine", MINE)
    given = ["mine.Plain", {"path": "mine.Open", "colour": "red"}]
    for text in ({"callbacks": given}, {"logger": {"callbacks": given}}, {"logging": {"callbacks": given}}):
        (root / "config.yaml").write_text(yaml.safe_dump(text))
        read = load_arguments("config.yaml", ["--save", "out"])
        assert kinds(build_callbacks(read))[-2:] == ["Plain", "Open"]
    assert load_arguments(None, ["--callbacks", "[mine.Plain]"]).logger.callbacks == [{"path": "mine.Plain"}]


@pytest.mark.parametrize(
    "given, message",
    [
        ("mine.Samplr", "'Samplr' does not exist - did you mean 'Sampler'? in "),
        ("nowhere.Sampler", "cannot import 'nowhere' (from "),
        ("ValidationCallbak", "unknown callback 'ValidationCallbak' - did you mean 'ValidationCallback'?"),
        ({"path": "mine.Sampler", "evry": 3}, "unknown key 'evry' of mine.Sampler - did you mean 'every'?"),
        ({"path": "mine.Plain", "every": 3}, "unknown key 'every' of mine.Plain; it takes none"),
        ("mine.Sampler", "mine.Sampler needs every: write {path: mine.Sampler, every: ...}"),
        ("mine.NoCallback", "NoCallback is no Callback: derive it from primus_bridge.Callback"),
        ("mine.function", "'mine.function' is no class"),
        ("mine.Misspelt", "Misspelt.on_step_ended would never be called - did you mean 'on_step_end'?"),
        ({"every": 3}, "a callback is a dotted path such as"),
    ],
)
def test_what_is_wrong_is_said_before_it_is_made(module, given, message):
    module("mine", MINE)
    with pytest.raises(ConfigError) as refused:
        check_callbacks(arguments(given))
    assert str(refused.value).startswith("logger.callbacks: ") and message in str(refused.value)


@pytest.mark.parametrize(
    "given, message",
    [
        ("mine.Broken", "callback Broken raised KeyError: 'no such thing' (when it was made)"),
        ({"path": "ValidationCallback", "eval_steps": 0}, "eval_steps 0 must be above 0"),
        ("ValidationCallback", "ValidationCallback: there is nothing to evaluate on: give validation_split"),
        ({"path": "CheckpointCallback", "save_best": True}, "there is nothing to evaluate on"),
        ("CheckpointCallback", "give it save_steps, or save_best=True"),
        (
            {"path": "CheckpointCallback", "save_steps": 2, "output_dir": "elsewhere"},
            "its output_dir elsewhere is not the run's save folder out (default)",
        ),
    ],
)
def test_what_cannot_be_made_is_said(module, given, message):
    path = module("mine", MINE)
    with pytest.raises(ConfigError) as refused:
        build_callbacks(arguments(given))
    assert message in str(refused.value)
    if given == "mine.Broken":  # the line that raised
        line = MINE.splitlines().index('        raise KeyError("no such thing")') + 1
        assert str(refused.value).startswith(f"{path}:{line}: ")


def test_validation_needs_a_rhythm():
    with pytest.raises(ConfigError, match="give it eval_steps, or the run eval_interval"):
        build_callbacks(arguments("ValidationCallback", validation_split=0.5))
    given = arguments("ValidationCallback", validation_split=0.5)
    given.train.eval_interval = 5
    assert isinstance(build_callbacks(given).callbacks[-1], ValidationCallback)


def test_only_callbacks_are_taken():
    with pytest.raises(ConfigError, match="the callbacks: function is no Callback"):
        build_callbacks(arguments(), [lambda: None])


def test_a_typo_ends_the_command_with_nothing_written(root, module, capfd):
    module("mine", MINE)
    (root / "callbacks.yaml").write_text("callbacks:\n  - mine.Plain\n  - {path: mine.Sampler, evry: 2}\n")
    before = tree(root)
    assert main([*train_words("model", "rows.json", "typo"), "--config", "callbacks.yaml"]) == 2
    told = capfd.readouterr()
    assert told.err == (
        "primus: callbacks.yaml:1: unknown key 'evry' of mine.Sampler - did you mean 'every'?; "
        "it takes every, words, upper\n"
    )
    assert {name for name in tree(root) if "__pycache__" not in name} == set(before)


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], False),
        (["--wandb_project", "p"], True),
        (["--wandb_project", "p", "--no-wandb"], False),
        (["--wandb"], True),
        (["--use_wandb", "true"], True),
        (["--wandb_project", "p", "--disable_wandb", "true"], False),
        (["--wandb_project", "p", "--report_to", "none"], False),
        (["--report_to", "all"], True),
        (["--wandb_project", "p", "--report_to", "tensorboard"], False),
    ],
)
def test_when_wandb_is_used(words, expected):
    read = load_arguments(None, [*words, "--save", "out"])
    made = build_callbacks(read).callbacks
    assert [callback for callback in made if isinstance(callback, WandBCallback)] == made[-1:] * expected
    assert read.logger.tensorboard is not (words[-2:] == ["--report_to", "none"])


def test_without_the_package_nothing_is_started(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    asked = arguments()
    asked.logger.wandb_project = "mine"
    with pytest.raises(ConfigError, match=r"pip install 'primus-bridge\[wandb\]', or leave it out with --no-wandb"):
        check_callbacks(asked)
    with pytest.raises(ConfigError, match="pip install"):
        build_callbacks(arguments(), [WandBCallback(project="mine")])
    asked.logger.wandb = False
    check_callbacks(asked)
    build_callbacks(asked, [WandBCallback(project="mine")])
