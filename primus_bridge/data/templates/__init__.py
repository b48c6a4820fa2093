"""Prompt templates: one file a kind; ``choose_template`` picks one by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from primus_bridge.data.templates.base import Piece, Rendered, Template
from primus_bridge.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from primus_bridge.config.arguments import DatasetArguments

__all__ = ["TEMPLATES", "Piece", "Rendered", "Template", "choose_template"]

ALIASES = {"mistral": "mistral_v3", "qwen2": "qwen2.5"}
TEMPLATES = (
    *("auto", "chat_template", "custom", "alpaca", "dolly", "chatml", "llama2", "llama3"),
    *("mistral", "mistral_v1", "mistral_v3", "mistral_tekken", "gemma", "qwen2", "qwen2.5", "qwen3"),
    *("vicuna", "zephyr", "phi3", "deepseek", "squad"),
)
JINJA, YAML = (".jinja", ".jinja2", ".j2"), (".yaml", ".yml")


def choose_template(dataset: DatasetArguments, data_format: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template of ``dataset.prompt_template``.

    'auto': alpaca and dolly rows take their own; others the tokenizer's chat template, or chatml when it has none.
    Raises ConfigError for an unknown name, a file that cannot be read or is no template, and when 'chat_template' is
    asked for and the tokenizer has none.
    """
    name, custom = dataset.prompt_template, dataset.custom_template
    if custom and name not in ("auto", "custom"):
        raise ConfigError(
            f"custom_template is given, and prompt_template is '{name}'; remove one of them",
            where="dataset.custom_template",
        )
    if name == "custom" and not custom:
        raise ConfigError(
            "prompt_template 'custom' needs Jinja text, or the path of a .jinja or .yaml file",
            where="dataset.custom_template",
        )
    if custom or name.endswith(JINJA + YAML):
        return _custom(custom or name, tokenizer, dataset.enable_thinking)
    if name == "auto":
        own = data_format if data_format in ("alpaca", "dolly") else "chatml"
        name = "chat_template" if own == "chatml" and tokenizer.chat_template else own
    return _named(ALIASES.get(name, name), dataset, tokenizer)


def _named(name: str, dataset: DatasetArguments, tokenizer: PreTrainedTokenizerFast) -> Template:
    from primus_bridge.data.templates import chat_template, deepseek, instructions, mistral, qwen, roles

    kinds: dict[str, Callable[[], Template]] = {
        "alpaca": lambda: instructions.Alpaca(tokenizer, response_newline=dataset.alpaca_response_newline),
        "dolly": lambda: instructions.Dolly(tokenizer),
        "squad": lambda: instructions.Squad(tokenizer),
        "llama2": lambda: instructions.Llama2(tokenizer),
        "llama3": lambda: roles.llama3(tokenizer),
        "mistral_v1": lambda: mistral.MistralV1(tokenizer),
        "mistral_v3": lambda: mistral.MistralV3(tokenizer),
        "mistral_tekken": lambda: mistral.MistralTekken(tokenizer),
        "qwen2.5": lambda: qwen.Qwen25(tokenizer),
        "qwen3": lambda: qwen.Qwen3(tokenizer, dataset.enable_thinking),
        "deepseek": lambda: deepseek.DeepSeek(tokenizer),
        "chat_template": lambda: chat_template.ChatTemplate(tokenizer, enable_thinking=dataset.enable_thinking),
    }
    if name in kinds:
        return kinds[name]()
    if name in roles.TABLES:
        return roles.RoleTemplate(tokenizer, name, roles.TABLES[name])
    raise ConfigError(
        f"unknown template '{name}'{did_you_mean(name, TEMPLATES)}; known are {', '.join(TEMPLATES)}, "
        "and the path of a .jinja or .yaml file",
        where="dataset.prompt_template",
    )


def _custom(text: str, tokenizer: PreTrainedTokenizerFast, enable_thinking: bool | None) -> Template:
    from primus_bridge.data.templates import chat_template, roles, roles_file

    path = Path(text).expanduser() if "\n" not in text and text.endswith(JINJA + YAML) else None
    if path and path.suffix in YAML:
        return roles.RoleTemplate(tokenizer, path.name, roles_file.load_table(str(path)))
    where = str(path) if path else "dataset.custom_template"
    if path:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read this template: {error}", where=where) from None
    elif "{" not in text:
        raise ConfigError(
            f"neither Jinja text nor the path of a .jinja or .yaml file: {text[:60]!r}", where="dataset.custom_template"
        )
    return chat_template.ChatTemplate(
        tokenizer, text, name=path.name if path else "custom", where=where, enable_thinking=enable_thinking
    )
