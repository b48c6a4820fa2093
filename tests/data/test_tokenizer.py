"""Loading a tokenizer: from a folder, without its code, and which token pads."""

from __future__ import annotations

import json

import pytest

from primus_bridge.data.tokenizer import load_tokenizer, pad_token_id
from primus_bridge.errors import ConfigError

from . import families


def test_load_tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    families.llama3().save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer("Hello").input_ids == families.llama3()("Hello").input_ids
    assert pad_token_id(tokenizer, 10**6) == tokenizer.eos_token_id
    qwen = families.qwen()
    assert pad_token_id(qwen, 10**6) == qwen.pad_token_id != qwen.eos_token_id
    qwen.add_special_tokens({"pad_token": "[PAD]"})
    assert pad_token_id(qwen, qwen.pad_token_id) == qwen.eos_token_id  # one that the model has no embedding for


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        load_tokenizer(str(tmp_path / "absent"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_no_code_of_a_tokenizer_folder_runs(tmp_path):
    folder = tmp_path / "remote"
    families.qwen().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    try:
        load_tokenizer(str(folder))
    except ConfigError:
        pass
    assert not (tmp_path / "ran").exists()
