"""The tokenizer's own chat template: rendered whole, once, and the assistant's spans found in the rendered text."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from primus_bridge.data.formats import Message, RowError
from primus_bridge.data.templates import Piece, Rendered
from primus_bridge.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ESCAPE, OPEN, CLOSE = "\ufdd1", "\ufdd2", "\ufdd3"
MARK = re.compile(f"([{OPEN}{CLOSE}])(\\d+)\\.(\\d+)\\1")

THINK_TAG = re.compile(r"(\s*(?:</?think(?:ing)?>|\[/?THINK\])\s*)")

# an end-of-turn marker that the tokenizer does not know as a token
TEXT_END = re.compile(r"<\|[^<>|\s]+\|>|</s>|<eos>|<end_of_turn>")

# Llama 3 templates print today's date; a run must give the same tokens tomorrow. This is their own default.
FIXED_DATE = datetime.datetime(2024, 7, 26)


DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class ChatTemplate:
    """``tokenizer.apply_chat_template`` (Jinja in transformers' sandbox) with a mask from spans.

    The conversation is rendered as it is, and once more with marks inside the assistant's contents; where the marked
    text without its marks equals the real one, the marks say where each answer lies. No prefix is rendered or
    tokenised again, so templates that drop earlier thoughts (Qwen3) or strip contents are handled. Supervised: from
    the first to the last character of the answer, and the end-of-turn token after it.
    """

    name = "chat_template"

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        if not tokenizer.chat_template:
            raise ConfigError(
                "prompt_template 'chat_template': the tokenizer has no chat template; "
                "use prompt_template: chatml, llama2 or llama3, or a tokenizer with one"
            )
        self.tokenizer = tokenizer
        # as text: transformers gives a template no function of ours to call
        self.source, self.dates = DATE_CALL.subn(
            lambda call: json.dumps(FIXED_DATE.strftime(call[2])), tokenizer.get_chat_template()
        )
        control = sorted(control_tokens(tokenizer, self.control_tokens()), key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        # asked once: whether the last answer of a conversation is followed by an end-of-turn token
        probe = [Message("user", "a"), Message("assistant", "b")]
        try:
            self.ended = self._end_of_turn(*self._last_end(probe)) is not None
        except RowError:
            self.ended = True
        if not self.ended and tokenizer.eos_token is None:
            raise ConfigError(
                "the chat template ends an answer with no token and the tokenizer has no eos_token: the model could "
                "not learn to stop; use prompt_template: chatml"
            )

    def control_tokens(self) -> Sequence[str]:
        # added tokens shaped like <|...|> that the template prints are control tokens, marked special or not
        return [t for t in self.tokenizer.get_added_vocab() if t in self.source and re.fullmatch(r"<\|.*\|>", t)]

    def warnings(self) -> list[str]:
        warnings = []
        if self.dates:
            warnings.append(
                f"the chat template prints the date; {FIXED_DATE:%d %b %Y} is used, so that data is the same every day"
            )
        if not self.ended:
            warnings.append(
                "the chat template puts no end-of-turn token after the last answer; "
                f"{self.tokenizer.eos_token} is appended and supervised, or the model would never stop"
            )
        return warnings

    def render(self, messages: Sequence[Message]) -> Rendered:
        said = [control_escaped(message, self.control) for message in messages]
        messages, escaped = [message for message, _ in said], any(flag for _, flag in said)
        text = self._real(messages)
        spans = self._spans(messages, text)
        cuts: list[tuple[int, int]] = []
        for start, end in spans:
            # with one space before the answer the model writes that space, in one token with the first word
            if start > 0 and text[start - 1] == " ":
                start -= 1
            stop = self._end_of_turn(text, end)
            cuts.append((start, end if stop is None else stop))
        if not self.ended:
            text = text[: cuts[-1][1]] + self.tokenizer.eos_token
            cuts[-1] = (cuts[-1][0], len(text))
        head_end = self._head_end(text, messages, cuts[0][0])
        pieces, head, position = [], 0, 0
        for start, end, supervised in _intervals(cuts, head_end, len(text)):
            pieces += (
                self._pieces(text[start:end], supervised) if escaped else [Piece(text[start:end], supervised, True)]
            )
            position = end
            if position <= head_end:
                head = len(pieces)
        return Rendered(pieces, head)

    def _real(self, messages: Sequence[Message]) -> str:
        turns = [{"role": message.role, "content": message.text} for message in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, chat_template=self.source)
            assert isinstance(rendered, str)
            return rendered
        except Exception as error:  # a template may do anything that its sandbox does not forbid
            raise RowError("role", f"the tokenizer's chat template refuses these turns: {error}") from error

    def _last_end(self, messages: Sequence[Message]) -> tuple[str, int]:
        text = self._real(messages)
        return text, self._spans(messages, text)[-1][1]

    def _spans(self, messages: Sequence[Message], real: str) -> list[tuple[int, int]]:
        """(start, end) in the rendered text ``real`` of every assistant content that the template prints, in order."""
        for mark in (_mark_outside, _mark_inside, _mark_thoughts):
            marked_messages = [
                message._replace(content=mark(message.text, i), context="") if message.role == "assistant" else message
                for i, message in enumerate(messages)
            ]
            marked = self._real(marked_messages)
            if MARK.sub("", marked) != real:
                continue
            names = [(match[2], match[3], match[1]) for match in MARK.finditer(marked)]
            # each mark once, and its partner next: else the template took this content apart
            if len(set(names)) != len(names) or any(
                opened[:2] != closed[:2] for opened, closed in zip_longest(names[::2], names[1::2], fillvalue=())
            ):
                continue
            found: dict[int, list[int]] = {}  # message -> [start, end, segment at the start]
            removed = 0
            for match in MARK.finditer(marked):
                position, which, segment = match.start() - removed, int(match[2]), int(match[3])
                removed += len(match[0])
                found.setdefault(which, [position, position, segment])[1] = position
            if max(found, default=-1) != len(messages) - 1:
                break  # the template does not print the last answer
            if mark is _mark_thoughts:
                for which, span in found.items():
                    # the tag before a thought is the model's to write when the template printed it from the content
                    before = "".join(THINK_TAG.split(messages[which].text)[: span[2]][-1:]).lstrip()
                    if before and real.endswith(before, 0, span[0]):
                        span[0] -= len(before)
            return [(start, end) for start, end, _ in found.values()]
        raise RowError(
            "content",
            "cannot find the answer in what the tokenizer's chat template prints; use prompt_template: chatml",
        )

    def _end_of_turn(self, text: str, position: int) -> int | None:
        """Where the end-of-turn token that follows ``position`` ends, white space before it included."""
        start = position + len(text[position:]) - len(text[position:].lstrip())
        match = self.control.match(text, start) or TEXT_END.match(text, start)
        return match.end() if match else None

    def _head_end(self, text: str, messages: Sequence[Message], limit: int) -> int:
        """End of BOS and of the system message with its end-of-turn token, never past the first answer."""
        bos, end = self.tokenizer.bos_token, 0
        if bos and text.startswith(bos):
            end = len(bos)
        if messages[0].role == "system" and messages[0].text.strip():
            content = messages[0].text.strip()
            at = text.find(content)
            if at >= 0:
                end = at + len(content)
                end = self._end_of_turn(text, end) or end
                end += len(text[end:limit]) - len(text[end:limit].lstrip())
        return min(end, limit)

    def _pieces(self, text: str, supervised: bool) -> list[Piece]:
        """Splits at escaped control tokens, which are user text."""
        parts = text.split(ESCAPE)  # literal, escaped, literal, ...
        return [
            Piece(bytes.fromhex(part).decode() if i % 2 else part, supervised, i % 2 == 0)
            for i, part in enumerate(parts)
            if part
        ]


def control_tokens(tokenizer: PreTrainedTokenizerFast, also: Sequence[str] = ()) -> list[str]:
    """The added tokens that must never be read in user text: the special ones, BOS, EOS, and ``also`` where known."""
    known = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    asked = {*also, tokenizer.bos_token, tokenizer.eos_token}
    return [token for token, special in known.items() if token and (special or token in asked)]


def control_escaped(message: Message, control: re.Pattern) -> tuple[Message, bool]:
    """The message with control tokens in its text written as hex between escapes, and whether there were any."""
    text, count = control.subn(lambda match: ESCAPE + match[0].encode().hex() + ESCAPE, message.text)
    return message._replace(content=text, context=""), bool(count)


def _mark_outside(text: str, which: int, segment: int = 0) -> str:
    name = f"{which}.{segment}"
    return f"{OPEN}{name}{OPEN}{text}{CLOSE}{name}{CLOSE}"


def _mark_inside(text: str, which: int, segment: int = 0) -> str:
    """Marks within the outer white space: for templates that strip."""
    core = text.strip()
    start = text.find(core)
    return text[:start] + _mark_outside(core, which, segment) + text[start + len(core) :]


def _mark_thoughts(text: str, which: int) -> str:
    """Marks each part between thinking tags, which the template may take apart and put together again."""
    parts = THINK_TAG.split(text)
    return "".join(part if i % 2 or not part.strip() else _mark_inside(part, which, i) for i, part in enumerate(parts))


def _intervals(cuts: list[tuple[int, int]], head_end: int, length: int) -> list[tuple[int, int, bool]]:
    """The text's intervals in order: unsupervised up to ``head_end``, then supervised and not, by turns."""
    out, position = [], 0
    for start, end in [(head_end, head_end), *cuts, (length, length)]:
        if position < start:
            out.append((position, start, False))
        if start < end:
            out.append((start, end, True))
        position = max(position, end)
    return out
