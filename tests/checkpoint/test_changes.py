"""Which arguments a resumed run has otherwise, and what of model and vocabulary may differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from primus_bridge.checkpoint.changes import arguments_digest, changed_arguments
from primus_bridge.checkpoint.manifest import Checkpoint, Manifest
from primus_bridge.checkpoint.meaning import check_same_model, other_kind, tokenizer_changes
from primus_bridge.config import schema
from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.errors import ConfigError
from tests import family_models
from tests.cli.example import save_tokenizer


def run(**values) -> BridgeArguments:
    """Arguments with the given values: ``run(train__train_iters=5)``."""
    arguments = BridgeArguments()
    for name, value in values.items():
        schema.put(arguments, name.replace("__", "."), value, "run.yaml:3")
    return arguments


def saved_by(arguments: BridgeArguments, **manifest) -> Manifest:
    arguments = json.loads(json.dumps(arguments.to_dict()))  # as it is read again
    return Manifest(4, "model", True, "float32", "llama", arguments=arguments, **manifest)


BEFORE = {"dataset__sources": [{"path": "a.json"}, {"path": "b.json", "weight": 0.5}], "train__train_iters": 6}


def test_nothing_changed():
    assert changed_arguments(saved_by(run(**BEFORE)), run(**BEFORE)) == []


@pytest.mark.parametrize(
    ("now", "line"),
    [
        ({"train__train_iters": 8}, "train.train_iters: 6 in the checkpoint, 8 now (run.yaml:3)"),
        ({"mixed_precision": "bf16_mixed"}, "mixed_precision: 'fp32' in the checkpoint, 'bf16_mixed' now (run.yaml:3)"),
        (
            {"ddp__grad_reduce_in_fp32": False},
            "ddp.grad_reduce_in_fp32: true in the checkpoint, false now (run.yaml:3)",
        ),
        ({"dataset__languages": ["en"]}, "dataset.languages: not set in the checkpoint, ['en'] now (run.yaml:3)"),
        (
            {"dataset__columns": {"output": "x"}},
            "dataset.columns.output: not set in the checkpoint, 'x' now (run.yaml:3)",
        ),
        (
            {"dataset__sources": [{"path": "a.json"}, {"path": "b.json"}]},
            "dataset.sources[1].weight: 0.5 in the checkpoint, not set now (run.yaml:3)",
        ),
        (
            {"dataset__prompt_template": "chatml"},
            "dataset.prompt_template: 'auto' in the checkpoint, 'chatml' now (run.yaml:3)",
        ),
    ],
)
def test_each_changed_value_is_listed_with_its_source(now, line):
    assert changed_arguments(saved_by(run(**BEFORE)), run(**(BEFORE | now))) == [line]


def test_what_no_number_depends_on_is_not_listed():
    now = BEFORE | {
        "checkpoint__save": "elsewhere",
        "checkpoint__load": "there",
        "logger__log_interval": 7,
        "dist__nproc": 2,
        "dataset__num_workers": 3,
        "tokenizer__tokenizer_model": "moved/tokenizer",
    }
    assert changed_arguments(saved_by(run(**BEFORE)), run(**now)) == []
    assert arguments_digest(run(**BEFORE)) == arguments_digest(run(**now))
    assert arguments_digest(run(**BEFORE)) != arguments_digest(run(**BEFORE, rng__seed=5))


def test_the_digest_alone_says_that_nothing_changed():
    manifest = saved_by(run(rng__seed=5), arguments_digest=arguments_digest(run()))
    assert changed_arguments(manifest, run()) == []


def test_arguments_that_only_one_version_knows():
    manifest = saved_by(run())
    manifest.arguments["train"]["gone"] = 3
    del manifest.arguments["train"]["neftune_noise_alpha"]
    assert changed_arguments(manifest, run()) == ["train.gone: 3 in the checkpoint, not known to this version"]
    assert changed_arguments(manifest, run(train__neftune_noise_alpha=5.0))[0] == (
        "train.neftune_noise_alpha: not set in the checkpoint, 5.0 now (run.yaml:3)"
    )


LORA = {"peft__scheme": "lora", "peft__dim": 4, "peft__alpha": 8.0}


def kind_of(now: dict, adapter: dict | None = None):
    before = run(**LORA, stage="sft")
    manifest = saved_by(before, stage="sft", peft=before.to_dict()["peft"], adapter=adapter)
    return other_kind(Checkpoint(Path("save/iter_0000004"), manifest), run(**({**LORA, "stage": "sft"} | now)))


def test_the_kind_of_a_run():
    assert not kind_of({}).what and not kind_of({"peft__dropout": 0.5}).what
    stage = kind_of({"stage": "pretrain"})
    assert stage.fits and stage.what == ["stage: 'sft' in the checkpoint, 'pretrain' now (run.yaml:3)"]
    assert kind_of({"peft__alpha": 16.0}).fits and kind_of({"peft__use_rslora": True}).fits
    for other in (
        {"peft__scheme": None},
        {"peft__dim": 8},
        {"peft__use_dora": True},
        {"peft__target_modules": ["q_proj"]},
    ):
        assert kind_of(other).what and not kind_of(other).fits
    # each of its modules has an alpha of its own
    assert not kind_of({"peft__alpha": 16.0}, adapter={"modules": {}}).fits


# --- the model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Opens a family's config.json with other values."""
    root = tmp_path_factory.mktemp("models")

    def opened(family: str, **changes) -> HFModel:
        folder = root / f"{family}{len(list(root.iterdir()))}"
        family_models.save(family, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return HFModel.at(folder, "NOW")

    return opened


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llama", {"rms_norm_eps": 1e-3}, "layernorm_epsilon 1e-05 there, 0.001 here"),
        ("llama", {"hidden_act": "gelu"}, "activation 'silu' there, 'gelu' here"),
        ("mixtral", {"num_experts_per_tok": 1}, "moe.top_k 2 there, 1 here"),
        ("llama", {"max_position_embeddings": 512}, "max_position_embeddings 256 there, 512 here"),
    ],
)
def test_numbers_of_a_model_are_refused_unless_forced(models, family, change, said):
    before, now = models(family), models(family, **change)
    with pytest.raises(ConfigError, match="is another model than NOW") as refused:
        check_same_model(before, now, Path("ckpt"), force=False)
    assert said in refused.value.message and "--force_resume" in refused.value.message
    with pytest.raises(ConfigError) as refused:  # where nothing could force it
        check_same_model(before, now, Path("ckpt"))
    assert "--force_resume" not in refused.value.message
    assert f"{said} (NOW)" in check_same_model(before, now, Path("ckpt"), force=True)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llama", {"intermediate_size": 128}, "ffn_hidden_size 96 there, 128 here"),
        ("llama", {"vocab_size": 300}, "vocab_size 203 there, 300 here"),
        ("llama", {"tie_word_embeddings": True}, "tied_embeddings false there, true here"),
        ("gpt2", {"n_positions": 512}, "max_position_embeddings 256 there, 512 here"),
    ],
)
def test_what_changes_a_shape_cannot_be_forced(models, family, change, said):
    with pytest.raises(ConfigError) as refused:
        check_same_model(models(family), models(family, **change), Path("ckpt"), force=True)
    assert said in refused.value.message and "the weights fit no other shape" in refused.value.message


def test_the_same_model_has_nothing_to_force(models):
    assert check_same_model(models("llama"), models("llama"), Path("ckpt"), force=True) == []


# --- the vocabulary


@pytest.fixture
def tokenizers(tmp_path):
    """The folder of a tokenizer as it was, and one to change: (before, now, its tokenizer.json as an object, write)."""
    save_tokenizer(tmp_path / "before")
    save_tokenizer(tmp_path / "now")
    path = tmp_path / "now" / "tokenizer.json"
    values = json.loads(path.read_text())
    return tmp_path / "before", tmp_path / "now", values, lambda: path.write_text(json.dumps(values))


def test_another_vocabulary(tokenizers):
    before, now, values, write = tokenizers
    assert tokenizer_changes(before, now) == (None, [])
    write()  # the same in other bytes
    assert tokenizer_changes(before, now) == (None, [])
    words = values["model"]["vocab"]
    words["7"], words["8"] = words["8"], words["7"]
    write()
    said, others = tokenizer_changes(before, now)
    assert said == "2 tokens differ: '7' is id 9 in the checkpoint, id 10 now; '8' is id 10 in the checkpoint, id 9 now"
    assert others == []


def test_tokens_added_and_made_special(tokenizers):
    before, now, values, write = tokenizers
    token = dict(values["added_tokens"][0], id=202, content="<new>")
    values["added_tokens"].append(token)
    write()
    assert tokenizer_changes(before, now)[0] == "1 tokens differ: '<new>' is unknown in the checkpoint, id 202 now"
    values["added_tokens"][-1:] = [dict(token, id=50, content="48", special=True)]
    write()
    assert tokenizer_changes(before, now)[0] == "its merges or special tokens differ"


def test_another_end_of_text(tokenizers):
    before, now, _, _ = tokenizers
    config = json.loads((now / "tokenizer_config.json").read_text())
    (now / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "7"}))
    assert "eos_token is '</s>' in the checkpoint, '7' now" in tokenizer_changes(before, now)[0]


def test_what_is_around_the_vocabulary_is_only_listed(tokenizers):
    before, now, values, write = tokenizers
    values["normalizer"] = {"type": "Lowercase"}
    write()
    (now / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_changes(before, now) == (None, ["the chat template", "the tokenizer's normalizer"])


def test_merges_belong_to_the_vocabulary(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["</s>", "a", "b", "ab", "ba"])}
    for name, merges in (("before", [("a", "b"), ("b", "a")]), ("now", [("b", "a"), ("a", "b")])):
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / name)
    assert tokenizer_changes(tmp_path / "before", tmp_path / "now")[0] == "its merges or special tokens differ"
