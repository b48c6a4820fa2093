"""A prompt template of one's own: Jinja text, a Jinja file, or a YAML of prefixes and suffixes."""

from __future__ import annotations

import pytest

from primus_bridge.data.messages import Message, RowError
from primus_bridge.errors import ConfigError

from . import families
from .conversations import CONVERSATIONS, ODD, ONE, TWO, official_text, supervised, text_of
from .encoding import render, template_of

CHATML = """\
bos: false
markers: ["<|im_start|>", "<|im_end|>"]
system: {prefix: "<|im_start|>system\\n", suffix: "<|im_end|>\\n"}
user: {prefix: "<|im_start|>user\\n", suffix: "<|im_end|>\\n"}
assistant: {prefix: "<|im_start|>assistant\\n", suffix: "<|im_end|>\\n"}
"""


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_a_yaml_is_the_same_table(file, shape):
    tokenizer = families.qwen()
    rendered = render(tokenizer, CONVERSATIONS[shape], file(CHATML))
    assert rendered.pieces == render(tokenizer, CONVERSATIONS[shape], "chatml").pieces
    assert text_of(rendered, tokenizer) == official_text(tokenizer, CONVERSATIONS[shape])
    assert template_of(tokenizer, file(CHATML)).control_tokens() == ("<|im_start|>", "<|im_end|>")


def test_every_key_of_a_yaml(file):
    text = """\
bos: "{bos_token}#"
system: {prefix: "(", suffix: ") "}
user: {prefix: "Q: ", suffix: "\\n"}
assistant: {prefix: "A: ", suffix: "{eos_token}\\n"}
tool: {prefix: "T: ", suffix: "\\n"}
default_system: Be brief.
system_in_user: true
strip: true
alternate: false
end: "--"
"""
    turns = [Message("user", " a "), Message("tool", "b"), Message("assistant", " c "), Message("user", "d")]
    turns.append(Message("assistant", "e"))
    for name in ("custom", file(text)):
        options = {"custom_template": file(text)} if name == "custom" else {}
        rendered = render(families.llama3(), turns, name, **options)
        bos, eos = "<|begin_of_text|>", "<|eot_id|>"
        assert text_of(rendered, families.llama3()) == (f"{bos}#Q: (Be brief.) a\nT: b\nA: c{eos}\nQ: d\nA: e{eos}\n--")
        assert supervised(rendered) == f" c{eos} e{eos}"
        assert [piece.turn for piece in rendered.pieces if not piece.literal] == [0, 1, 2, 3, 4]


def test_bos_of_a_yaml(file):
    roles = "user: {prefix: U, suffix: V}\nassistant: {prefix: A, suffix: B}\n"
    for option, bos in (("", True), ("bos: true\n", True), ("bos: false\n", False), ('bos: ""\n', False)):
        assert render(families.llama3(), ONE, file(option + roles)).bos == bos
    assert not render(families.qwen(), ONE, file(roles)).bos  # whose tokenizer adds none


ROLES = "user: {prefix: U, suffix: V}\nassistant: {prefix: A, suffix: B}\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (ROLES + "asistant: {prefix: A}\n", 3, "unknown key 'asistant' - did you mean 'assistant'"),
        ("user: {prefx: U}\nassistant: {suffix: B}\n", 1, "unknown key 'prefx'"),
        ("user:\n  prefix: 3\nassistant: {suffix: B}\n", 2, "'user.prefix' must be text"),
        ("user: U\nassistant: {suffix: B}\n", 1, "must hold the keys prefix and suffix"),
        ("user: {prefix: U}\n", 1, "the role 'assistant' is missing"),
        ("user: {prefix: U}\nassistant: {prefix: A}\n", 2, "never learn to stop"),
        (ROLES + "strip: 3\n", 3, "'strip' must be true or false"),
        (ROLES + "bos: [a]\n", 3, "'bos' must be true or false or text"),
        (ROLES + "markers: [1]\n", 3, "'markers' must be a list of texts"),
        (ROLES + "default_system: a\n", 3, "needs a role 'system'"),
    ],
)
def test_mistakes_in_a_yaml(file, text, line, message):
    path = file(text)
    with pytest.raises(ConfigError, match=message) as caught:
        template_of(families.qwen(), path)
    assert caught.value.where == f"{path}:{line}"


def test_a_role_that_a_yaml_lacks(file):
    with pytest.raises(RowError, match="'mine.yaml' has no place for a system turn"):
        render(families.qwen(), TWO, file(ROLES))


@pytest.mark.parametrize("suffix", [".jinja", ".jinja2", ".j2"])
def test_jinja_as_text_and_as_a_file(file, suffix):
    tokenizer = families.qwen(families.QWEN25)  # its own is not asked
    path = file(families.CHATML, "mine" + suffix)
    expected = render(tokenizer, ODD, "chatml")
    for name, custom in (("custom", families.CHATML), ("custom", path), (path, None), ("auto", path)):
        rendered = render(tokenizer, ODD, name, custom_template=custom)
        assert text_of(rendered, tokenizer) == text_of(expected, tokenizer)
        assert supervised(rendered) == supervised(expected)


def test_mistakes_in_jinja(file, tmp_path):
    with pytest.raises(ConfigError, match="no valid Jinja") as caught:
        template_of(families.qwen(), file("{% for m in messages %}\n{{ m.content }\n{% endfor %}", "mine.jinja"))
    assert caught.value.where.endswith("mine.jinja:2")
    with pytest.raises(ConfigError, match="neither Jinja text nor the path"):
        template_of(families.qwen(), "custom", custom_template="chatml please")
    with pytest.raises(ConfigError, match="cannot read"):
        template_of(families.qwen(), str(tmp_path / "none.jinja"))
    with pytest.raises(ConfigError, match="no such file"):
        template_of(families.qwen(), str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="'custom' needs"):
        template_of(families.qwen(), "custom")
    with pytest.raises(ConfigError, match="remove one of them"):
        template_of(families.qwen(), "chatml", custom_template=families.CHATML)
    with pytest.raises(ConfigError, match="unknown template 'chatlm' - did you mean 'chatml'"):
        template_of(families.qwen(), "chatlm")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
    ],
)
def test_jinja_stays_in_its_sandbox(attack):
    with pytest.raises((RowError, ConfigError)):
        render(families.qwen(), ONE, "custom", custom_template=families.CHATML + attack)


def test_auto_knows_dolly():
    assert template_of(families.qwen(), "auto", "dolly").name == "dolly"
