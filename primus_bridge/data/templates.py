"""Prompt templates: messages become pieces of text, each supervised or not, the template's own or the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from primus_bridge.data.formats import Message, RowError
from primus_bridge.data.tokenizer import adds_bos
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Piece(NamedTuple):
    text: str
    supervised: bool
    """Whether its tokens are targets: assistant content and its end of turn."""
    literal: bool
    """True: the template's own text, in which special tokens are special. False: user text, where they are text."""


class Rendered(NamedTuple):
    pieces: list[Piece]
    head: int
    """Leading pieces (BOS, system message) that cutting from the left keeps when they fit."""
    bos: bool = False
    """BOS comes before the pieces as the tokenizer itself adds it, not as text of the template."""


class Template(Protocol):
    name: str

    def control_tokens(self) -> Sequence[str]:
        """Markers that are control tokens even when the tokenizer does not call them special."""

    def warnings(self) -> list[str]:
        """What a user should know about this template with this tokenizer."""

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Raises RowError when the family's template cannot express these messages."""


def _prompt(text: str) -> Piece:
    return Piece(text, supervised=False, literal=True)


def _said(text: str) -> Piece:
    return Piece(text, supervised=False, literal=False)


def _answer(text: str) -> Piece:
    return Piece(text, supervised=True, literal=False)


def _end(text: str) -> Piece:
    return Piece(text, supervised=True, literal=True)


class _OwnTemplate:
    """What the families written here share: the tokenizer's BOS and EOS, and markers that should be single tokens."""

    name = ""
    markers: tuple[str, ...] = ()

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.adds_bos = adds_bos(tokenizer)

    def control_tokens(self) -> Sequence[str]:
        return self.markers

    def warnings(self) -> list[str]:
        known = self.tokenizer.get_added_vocab()
        missing = [marker for marker in self.markers if marker not in known]
        if not missing:
            return []
        return [
            f"template '{self.name}': the tokenizer has no token {', '.join(missing)}; "
            "the model learns the marker as ordinary text, and generation must stop on that text"
        ]

    def _eos(self) -> str:
        if self.tokenizer.eos_token is None:
            raise ConfigError(
                f"template '{self.name}' ends answers with EOS, and the tokenizer has no eos_token; "
                "set one in its tokenizer_config.json, or use prompt_template: chatml"
            )
        return self.tokenizer.eos_token


def _pairs(messages: Sequence[Message], name: str) -> tuple[str, list[tuple[Message, Message]]]:
    """(system text or '', user and assistant pairs). Raises RowError unless the turns alternate."""
    system, turns = "", list(messages)
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    if len(turns) % 2 or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        roles = ", ".join(turn.role for turn in turns)
        raise RowError("role", f"template '{name}' needs user and assistant turns that alternate, found {roles}")
    return system, list(zip(turns[::2], turns[1::2], strict=True))


class Alpaca(_OwnTemplate):
    """stanford_alpaca's prompt; target = output + EOS. Source: github.com/tatsu-lab/stanford_alpaca, PROMPT_DICT.

    A system message stands in place of the preamble. Several turns (alpaca's history): the preamble once, then an
    Instruction/Input/Response block a turn, each answer ended by EOS and separated by a blank line.
    """

    name = "alpaca"
    plain = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, response_newline: bool = True):
        super().__init__(tokenizer)
        self.response = "\n\n### Response:" + ("\n" if response_newline else "")

    def render(self, messages: Sequence[Message]) -> Rendered:
        system, pairs = _pairs(messages, self.name)
        if system:
            pieces = [_said(system), _prompt("\n\n")]
        else:
            pieces = [_prompt((self.with_input if any(u.context for u, _ in pairs) else self.plain) + "\n\n")]
        head, eos = len(pieces), self._eos()
        for i, (user, assistant) in enumerate(pairs):
            pieces += [_prompt(("\n\n" if i else "") + "### Instruction:\n"), _said(user.content)]
            if user.context:
                pieces += [_prompt("\n\n### Input:\n"), _said(user.context)]
            pieces += [_prompt(self.response), _answer(assistant.content), _end(eos)]
        return Rendered(pieces, head, self.adds_bos)


class ChatML(_OwnTemplate):
    """``<|im_start|>{role}\\n{content}<|im_end|>\\n`` a message, no default system text. Source: OpenAI's chatml.md."""

    name = "chatml"
    markers = ("<|im_start|>", "<|im_end|>")

    def render(self, messages: Sequence[Message]) -> Rendered:
        pieces: list[Piece] = []
        head = 0
        for i, message in enumerate(messages):
            answer = message.role == "assistant"
            pieces.append(_prompt(f"<|im_start|>{message.role}\n"))
            pieces += (
                [_answer(message.text), _end("<|im_end|>")] if answer else [_said(message.text), _prompt("<|im_end|>")]
            )
            pieces.append(_prompt("\n"))
            if i == 0 and message.role == "system":
                head = len(pieces)
        return Rendered(pieces, head, self.adds_bos)


class Llama2(_OwnTemplate):
    """BOS ``[INST] {user} [/INST] {answer} `` EOS a pair, contents stripped, the system in the first user turn.

    The spaces around the answer are targets: the model writes the first with its first word, and the second before
    EOS. Source: github.com/meta-llama/llama, llama/generation.py chat_completion.
    """

    name = "llama2"

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer)
        self.bos = tokenizer.bos_token or ""

    def warnings(self) -> list[str]:
        return [] if self.bos else ["template 'llama2': the tokenizer has no bos_token; turns start without one"]

    def render(self, messages: Sequence[Message]) -> Rendered:
        system, pairs = _pairs(messages, self.name)
        pieces: list[Piece] = []
        head, eos = 0, self._eos()
        for i, (user, assistant) in enumerate(pairs):
            pieces.append(_prompt(self.bos + "[INST] "))
            if i == 0 and system:
                pieces += [_prompt("<<SYS>>\n"), _said(system), _prompt("\n<</SYS>>\n\n")]
                head = len(pieces)
                pieces.append(_said(user.text.rstrip()))
            else:
                pieces.append(_said(user.text.strip()))
            pieces += [_prompt(" [/INST]"), _end(" "), _answer(assistant.content.strip()), _end(" "), _end(eos)]
        return Rendered(pieces, head)


class Llama3(_OwnTemplate):
    """One BOS, then ``<|start_header_id|>{role}<|end_header_id|>\\n\\n{content}<|eot_id|>``, contents stripped.

    Source: github.com/meta-llama/llama3, llama/tokenizer.py ChatFormat.
    """

    name = "llama3"
    markers = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__(tokenizer)
        known = tokenizer.get_added_vocab()
        self.bos = "<|begin_of_text|>" if "<|begin_of_text|>" in known else tokenizer.bos_token or ""

    def render(self, messages: Sequence[Message]) -> Rendered:
        pieces = [_prompt(self.bos)]
        head = 1
        for i, message in enumerate(messages):
            pieces.append(_prompt(f"<|start_header_id|>{message.role}<|end_header_id|>\n\n"))
            content = message.text.strip()
            if message.role == "assistant":
                pieces += [_answer(content), _end("<|eot_id|>")]
            else:
                pieces += [_said(content), _prompt("<|eot_id|>")]
            if i == 0 and message.role == "system":
                head = len(pieces)
        return Rendered(pieces, head)


def choose_template(
    name: str, data_format: str, tokenizer: PreTrainedTokenizerFast, *, alpaca_response_newline: bool = True
) -> Template:
    """The template of ``dataset.prompt_template``.

    'auto': alpaca rows take alpaca; conversations the tokenizer's own chat template, or chatml when it has none.
    Raises ConfigError when 'chat_template' is asked for and the tokenizer has none.
    """
    from primus_bridge.data.chat_template import ChatTemplate

    if name == "auto":
        name = "alpaca" if data_format == "alpaca" else ("chat_template" if tokenizer.chat_template else "chatml")
    if name == "alpaca":
        return Alpaca(tokenizer, response_newline=alpaca_response_newline)
    kinds: dict[str, Callable[[PreTrainedTokenizerFast], Template]] = {
        "chatml": ChatML,
        "llama2": Llama2,
        "llama3": Llama3,
        "chat_template": ChatTemplate,
    }
    return kinds[name](tokenizer)
