"""YAML with lines: numbers, duplicate keys, malformed text, tags, anchors."""

from __future__ import annotations

import pytest

from primus_bridge.config.yaml_file import load_yaml, parse_scalar, plain
from primus_bridge.errors import ConfigError


def test_values_carry_the_line_of_their_key(write):
    tree = load_yaml(write("a: 1\n\nb:\n  c: x\n  d:\n    - p\n    - q\n"))
    assert plain(tree) == {"a": 1, "b": {"c": "x", "d": ["p", "q"]}}
    assert tree.value["b"].where == "config.yaml:3"
    assert tree.value["b"].value["d"].where == "config.yaml:5"


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("5e-6", 5e-6),
        ("5.0e-6", 5e-6),
        ("1E3", 1000.0),
        ("-2.5", -2.5),
        (".5", 0.5),
        ("12", 12),
        ("-1", -1),
        ("0", 0),
        ("true", True),
        ("null", None),
        ("~", None),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1-2", "1-2"),
        ("e5", "e5"),
        ("5GB", "5GB"),
    ],
)
def test_scalars(write, text, value):
    from_file = plain(load_yaml(write(f"x: {text}\n")))["x"]
    assert (from_file, type(from_file)) == (value, type(value))
    assert (parse_scalar(text), type(parse_scalar(text))) == (value, type(value))


def test_anchors_and_merge_keys(write):
    tree = load_yaml(write("base: &base {a: 1, b: 2}\nx:\n  <<: *base\n  b: 3\n"))
    assert plain(tree)["x"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: 2\na: 3\n", "config.yaml:3: duplicate key 'a' (first in line 1)"),
        ("a:\n  b: 1\n  b: 1\n", "config.yaml:3: duplicate key 'b'"),
        ("a: [1, 2\nb: 3\n", "config.yaml:2: malformed YAML"),
        ("a: 1\n\tb: 2\n", "config.yaml:2: malformed YAML"),
        ("a: 'x\n", "config.yaml:2: malformed YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "config.yaml:1"),
        ("a: !!python/name:os.system\n", "config.yaml:1: malformed YAML"),
        ("a: !Thing {b: 1}\n", "config.yaml:1"),
        ("- a\n- b\n", "config.yaml:1: the file must hold 'key: value' lines"),
        ("just words\n", "config.yaml:1: the file must hold 'key: value' lines"),
        ("a: &x\n  b: *x\n", "an anchor contains itself"),
        ("a: 1\n---\nb: 2\n", "malformed YAML"),
        ("a: \x01\n", "config.yaml: not a text file that YAML allows"),
        ("? [a, b]\n: 1\n", "config.yaml:1: a key must be one word"),
    ],
)
def test_malformed_files_are_errors_with_their_line(write, text, message):
    with pytest.raises(ConfigError) as caught:
        load_yaml(write(text))
    assert message in str(caught.value)


def test_no_object_is_ever_built(write, tmp_path):
    with pytest.raises(ConfigError):
        load_yaml(write(f"a: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n"))
    assert not (tmp_path / "made").exists()


def test_an_alias_bomb_is_refused_soon(write):
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="more than 100000 values"):
        load_yaml(write("\n".join(lines)))


def test_missing_unreadable_and_empty_files(write, tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        load_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="this is a folder"):
        load_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not a UTF-8 text file"):
        load_yaml(tmp_path / "binary.yaml")
    assert plain(load_yaml(write("# nothing\n"))) == {}
