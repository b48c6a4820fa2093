"""The quickstart's model folder: a tokenizer that sees digits and letters, and a Llama that transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from primus_bridge.data.messages import Conversation, Message
from primus_bridge.data.templates.instructions import Alpaca
from primus_bridge.quickstart import data, model
from primus_bridge.quickstart.evaluate import evaluate


@pytest.fixture(scope="module")
def questions():
    return data.questions(seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, questions):
    path = tmp_path_factory.mktemp("quickstart") / "model"
    model.build(path, questions[0], seed=3)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_text_survives_the_tokenizer(tokenizer, questions):
    texts = [model.prompt(q.instruction, q.input) + q.output for q in questions[1]]
    for text in (*texts, "Grüße, 世界!\n\n  two  spaces ", ""):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_and_letters_are_single_tokens(tokenizer):
    def pieces(text):
        return [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False).input_ids]

    assert pieces("4071") == ["4", "0", "7", "1"]
    assert pieces("XKQ") == ["X", "K", "Q"]


def test_sequences_are_short_and_fit(tokenizer, questions):
    lengths = [
        len(tokenizer(model.prompt(q.instruction, q.input)).input_ids) + len(tokenizer(q.output).input_ids)
        for q in (*questions[0], *questions[1])
    ]
    assert max(lengths) <= 64 and sum(lengths) / len(lengths) < 24


def test_the_prompt_is_the_one_of_training(tokenizer, questions):
    template = Alpaca(tokenizer)
    for question in questions[1]:
        turns = [Message("user", question.instruction, question.input), Message("assistant", question.output)]
        pieces = template.render(Conversation(turns)).pieces
        assert "".join(p.text for p in pieces if not p.supervised) == model.prompt(question.instruction, question.input)


def test_transformers_loads_it(folder, tokenizer):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert 2e6 <= loaded.num_parameters() <= 5e6
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llama" and config.vocab_size == len(tokenizer)
    assert config.num_attention_heads % 2 == 0 and config.num_key_value_heads % 2 == 0  # tensor parallel 2
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    with torch.inference_mode():
        logits = loaded(torch.tensor([tokenizer("What is 11 + 12?").input_ids])).logits
    assert torch.isfinite(logits).all()


def test_the_seed_decides_the_weights(folder, tmp_path, questions):
    for name, seed in (("same", 3), ("other", 4)):
        before = torch.random.get_rng_state()
        model.build(tmp_path / name, questions[0], seed)
        assert torch.equal(before, torch.random.get_rng_state())
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "same" / "model.safetensors").read_bytes()
    assert weights != (tmp_path / "other" / "model.safetensors").read_bytes()


def test_batches_do_not_change_the_answers(folder, tmp_path, questions):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([q.row() for q in questions[1][:100:10]]), encoding="utf-8")
    assert evaluate(folder, file, batch_size=1).answers == evaluate(folder, file, batch_size=7).answers


def test_an_untrained_model_knows_nothing(folder, tmp_path, questions):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([q.row() for q in questions[1]]), encoding="utf-8")
    result = evaluate(folder, file)
    assert result.exact_match < 0.05
    assert list(result.by_skill()) == list(data.SKILLS)
