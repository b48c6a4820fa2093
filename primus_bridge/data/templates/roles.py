"""Templates that are a table: for each role a prefix and a suffix around the content. The custom YAML is one too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from primus_bridge.data.messages import Conversation, RowError
from primus_bridge.data.templates.base import Piece
from primus_bridge.data.templates.own import OwnTemplate, alternating, answer, end, prompt, said

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Role:
    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True)
class RoleTable:
    """A template as a table. Texts may hold ``{bos_token}`` and ``{eos_token}``, which stand for the tokenizer's.

    Of the assistant's suffix the model writes all but the white space at its end (or all of it, when it is nothing
    else); of its prefix one space at the end, which is one token with the first word.
    """

    user: Role
    assistant: Role
    system: Role | None = None
    """None: a system message is an error."""
    tool: Role | None = None
    """A tool's answer; None: an error."""
    bos: bool | str = True
    """True: as the tokenizer itself adds it; False: none; else this text at the start."""
    default_system: str = ""
    """The system text of a conversation without one; '': no system turn then."""
    system_in_user: bool = False
    """The system stands within the first user turn, between its prefix and its content."""
    strip: bool = False
    """Contents lose their outer white space (a system within the user turn keeps it)."""
    alternate: bool = False
    """User and assistant must alternate."""
    end: str = ""
    """After the last turn, not supervised."""
    markers: tuple[str, ...] = ()
    """Texts that should be tokens of the tokenizer."""


def _roles(before: str, after: str, suffix: str, *names: str) -> list[Role]:
    return [Role(before + name + after, suffix) for name in names]


_IM = _roles("<|im_start|>", "\n", "<|im_end|>\n", "system", "user", "assistant")
_ZEPHYR = _roles("<|", "|>\n", "{eos_token}\n", "system", "user", "assistant")
_PHI3 = _roles("<|", "|>\n", "<|end|>\n", "system", "user", "assistant")
_LLAMA3 = _roles("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "system", "user", "assistant")
_GEMMA = _roles("<start_of_turn>", "\n", "<end_of_turn>\n", "user", "model")

TABLES = {
    # OpenAI's chatml.md; no default system text
    "chatml": RoleTable(system=_IM[0], user=_IM[1], assistant=_IM[2], markers=("<|im_start|>", "<|im_end|>")),
    # HuggingFaceH4/zephyr-7b-beta, tokenizer_config.json
    "zephyr": RoleTable(system=_ZEPHYR[0], user=_ZEPHYR[1], assistant=_ZEPHYR[2]),
    # microsoft/Phi-3-mini-4k-instruct, tokenizer_config.json
    "phi3": RoleTable(
        system=_PHI3[0],
        user=_PHI3[1],
        assistant=_PHI3[2],
        end="{eos_token}",
        markers=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    # github.com/meta-llama/llama3, llama/tokenizer.py ChatFormat
    "llama3": RoleTable(
        system=_LLAMA3[0],
        user=_LLAMA3[1],
        assistant=_LLAMA3[2],
        bos="{bos_token}",
        strip=True,
        markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # google/gemma-2-2b-it and gemma-3-1b-it, tokenizer_config.json; Gemma 2 itself knows no system text
    "gemma": RoleTable(
        system=Role("", "\n\n"),
        user=_GEMMA[0],
        assistant=_GEMMA[1],
        bos="{bos_token}",
        system_in_user=True,
        strip=True,
        alternate=True,
        markers=("<start_of_turn>", "<end_of_turn>"),
    ),
    # github.com/lm-sys/FastChat, fastchat/conversation.py vicuna_v1.1
    "vicuna": RoleTable(
        system=Role("", " "),
        user=Role("USER: ", " "),
        assistant=Role("ASSISTANT: ", "{eos_token}"),
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
}


class RoleTemplate(OwnTemplate):
    """Renders by a RoleTable."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str, table: RoleTable):
        super().__init__(tokenizer)
        self.name = name
        self.table = table
        self.markers = table.markers
        by_role = {"system": table.system, "user": table.user, "assistant": table.assistant, "tool": table.tool}
        self.affixes = {
            role: Role(self._filled(affixes.prefix), self._filled(affixes.suffix))
            for role, affixes in by_role.items()
            if affixes
        }
        self.roles = tuple(self.affixes)
        suffix = self.affixes["assistant"].suffix
        self.stop = suffix.rstrip() or suffix
        self.after_stop = suffix[len(self.stop) :]

    def _filled(self, text: str) -> str:
        if "{eos_token}" in text:
            text = text.replace("{eos_token}", self._eos())
        return text.replace("{bos_token}", self._bos())

    def _prepends_bos(self) -> bool:
        return self.table.bos is True and self.adds_bos

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        table, messages = self.table, conversation.messages
        if table.alternate:
            alternating(messages, self.name)
        pieces = [prompt(self._filled(table.bos))] if isinstance(table.bos, str) else []
        inside: list[Piece] = []
        if messages[0].role != "system" and table.default_system:
            inside = self._system(table.default_system, -1)
        elif messages[0].role == "system" and table.system_in_user:
            inside = self._system(messages[0].text, 0)
        if not table.system_in_user:
            pieces, inside = pieces + inside, []
        for i, message in enumerate(messages):
            if message.role == "system" and table.system_in_user:
                if i:
                    raise RowError("role", f"template '{self.name}' has a place for a system turn at the start only")
                continue
            affixes, content = self.affixes[message.role], message.text.strip() if table.strip else message.text
            if message.role == "assistant":
                header = affixes.prefix.removesuffix(" ")
                pieces += [prompt(header, i), end(affixes.prefix[len(header) :], i), answer(content, i)]
                pieces += [end(self.stop, i), prompt(self.after_stop, i)]
                continue
            pieces.append(prompt(affixes.prefix, i))
            if message.role == "user":
                pieces, inside = pieces + inside, []
            pieces += [said(content, i), prompt(affixes.suffix, i)]
        return [*pieces, prompt(self._filled(table.end), len(messages) - 1)]

    def _system(self, text: str, turn: int) -> list[Piece]:
        affixes = self.affixes["system"]
        content = said(text, turn) if turn >= 0 else prompt(text)
        return [prompt(affixes.prefix, turn), content, prompt(affixes.suffix, turn)]


def llama3(tokenizer: PreTrainedTokenizerFast) -> RoleTemplate:
    """Llama 3's table, with its own BOS even where the tokenizer does not call it so."""
    table, own = TABLES["llama3"], "<|begin_of_text|>"
    return RoleTemplate(tokenizer, "llama3", replace(table, bos=own) if own in tokenizer.get_added_vocab() else table)
