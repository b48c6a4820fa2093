"""Callbacks named in a configuration: built-in names, dotted paths, keywords; what is wrong is said before anything."""

from __future__ import annotations

import sys

import numpy
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
    for one in ("[mine.Plain]", "mine.Plain", "{path: mine.Plain}"):  # one alone needs no list
        assert load_arguments(None, ["--callbacks", one]).logger.callbacks == [{"path": "mine.Plain"}]
    (root / "config.yaml").write_text("callbacks: mine.Plain\n")
    assert load_arguments("config.yaml", []).logger.callbacks == [{"path": "mine.Plain"}]
    (root / "config.yaml").write_text("callbacks: 3\n")
    with pytest.raises(ConfigError, match="config.yaml:1: 'callbacks' must be a list of paths or mappings, got 3"):
        load_arguments("config.yaml", [])


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
    with pytest.raises(
        ConfigError, match=r"the callbacks: ValidationCallback is a class: .*, ValidationCallback\(\.\.\.\)"
    ):
        build_callbacks(arguments(), [ValidationCallback])


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
def test_when_wandb_is_used(words, expected, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
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
    build_callbacks(arguments(), [WandBCallback(project="mine", mode="disabled")])
    asked.logger.wandb = False
    check_callbacks(asked)
    build_callbacks(asked, [WandBCallback(project="mine")])


@pytest.fixture
def logged_out(tmp_path, monkeypatch):
    """A home folder in which wandb finds neither a key nor a mode."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_key_nothing_is_started(logged_out, monkeypatch):
    online = WandBCallback(project="mine")
    with pytest.raises(
        ConfigError, match="WandBCallback: .* has no key for https://api.wandb.ai: log in with `wandb l"
    ):
        build_callbacks(arguments(), [online])
    (logged_out / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    build_callbacks(arguments(), [online])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    with pytest.raises(ConfigError, match="has no key for https://wandb.example.com"):
        build_callbacks(arguments(), [online])
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "secret")
            build_callbacks(arguments(), [online])
    (logged_out / "wandb").mkdir()
    settings = logged_out / "wandb" / "settings"
    settings.write_text("[default]\napi_key = secret\n")
    build_callbacks(arguments(), [online])
    settings.write_text("[default]\nmode = offline\n")  # wandb offline
    build_callbacks(arguments(), [online])
    with pytest.raises(ConfigError, match="has no key"):
        build_callbacks(arguments(), [WandBCallback(project="mine", mode="online")])


def test_the_mode_of_wandb(logged_out, monkeypatch):
    with pytest.raises(
        ConfigError, match="must be one of online, offline, disabled, or null; got 'offlin' - did you m"
    ):
        WandBCallback(mode="offlin")
    for mode in ("offline", "dryrun", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        build_callbacks(arguments(), [WandBCallback(project="mine")])
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(ConfigError, match="WANDB_MODE: unknown mode 'offlin' - did you mean 'offline'"):
        build_callbacks(arguments(), [WandBCallback(project="mine")])


@pytest.mark.parametrize(
    "kind, keywords, message",
    [
        (ValidationCallback, dict(eval_steps=2.5), "'eval_steps' must be a whole number, or null, got 2.5"),
        (ValidationCallback, dict(eval_steps=True), "'eval_steps' must be a whole number, or null, got true"),
        (
            ValidationCallback,
            dict(patience="3"),
            "'patience' must be a whole number, or null, got '3': remove the quotes",
        ),
        (ValidationCallback, dict(min_delta=None), "'min_delta' must be a number, got null"),
        (CheckpointCallback, dict(save_steps="ten"), "'save_steps' must be a whole number, or null, got 'ten'"),
        (CheckpointCallback, dict(save_best="yes"), "'save_best' must be true or false, got 'yes'"),
        (CheckpointCallback, dict(output_dir=3, save_steps=1), "'output_dir' must be text, or null, got 3"),
        (WandBCallback, dict(project=3), "'project' must be text, or null, got 3"),
        (WandBCallback, dict(config=[1]), "'config' must be a mapping of names, or null, got [1]"),
    ],
)
def test_ours_check_what_they_are_given(kind, keywords, message):
    with pytest.raises(ConfigError) as refused:
        kind(**keywords)
    assert str(refused.value).startswith(f"{kind.__name__}: {message}")


def test_numbers_of_another_library_are_numbers():
    made = ValidationCallback(eval_steps=numpy.int64(3), min_delta=numpy.float32(0.5))
    assert (made.eval_steps, made.best.min_delta) == (3, 0.5) and type(made.eval_steps) is int


def test_a_wrong_value_is_said_at_its_line_with_nothing_written(root, capfd):
    (root / "wrong.yaml").write_text("callbacks: [{path: CheckpointCallback, save_steps: ten}]\n")
    words = train_words("model", "rows.json", "wrong")
    before = tree(root)
    assert main([*words, "--config", "wrong.yaml"]) == 2
    assert capfd.readouterr().err == (
        "primus: wrong.yaml:1: CheckpointCallback: 'save_steps' must be a whole number, or null, got 'ten'\n"
    )
    assert tree(root) == before
