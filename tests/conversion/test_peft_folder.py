"""PEFT folders by themselves: what is read, which base is taken for the same, and every refusal with its message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from primus_bridge.conversion.base_model import same_base
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.conversion.peft_folder import PeftFolder
from primus_bridge.errors import ConfigError
from tests import family_models, peft_adapters

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """model/, and adapters of it: plain/ and dora/."""
    root = tmp_path_factory.mktemp("peft")
    family_models.save("llama", root / "model")
    peft_adapters.add("llama, list", str(root / "model"), str(root / "plain"))
    peft_adapters.add("llama, some layers", str(root / "model"), str(root / "dora"))
    return root


class Folder:
    """A copy of an adapter folder to spoil."""

    def __init__(self, source: Path, path: Path, model: Path):
        shutil.copytree(source, path)
        self.path, self.model = path, HFModel.open(str(model), weights=False)

    def config(self, **changes) -> Folder:
        file = self.path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return self

    def tensors(self, change) -> Folder:
        file = self.path / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return self

    def refusal(self, **options) -> str:
        with pytest.raises(ConfigError) as caught:
            PeftFolder.open(str(self.path)).plan(self.model, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def folder(made, tmp_path):
    return lambda kind="plain": Folder(made / kind, tmp_path / "adapter", made / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peft_type="IA3"), "adapter_config.json: peft_type is 'IA3'; only LORA"),
        (dict(peft_type=None), "peft_type is None"),
        (dict(bias="all"), "bias is 'all', which is not supported; merge it into its base with peft"),
        (dict(lora_bias=True), "lora_bias is True"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
        (dict(target_parameters=["experts.gate_up_proj"]), "target_parameters is"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices is [1]"),
        (dict(layer_replication=[[0, 2]]), "layer_replication is"),
        (dict(r=0), "r is 0; expected a whole number above 0"),
        (dict(lora_alpha="much"), "lora_alpha is 'much'"),
        (dict(rank_pattern={"(": 4}), "rank_pattern: '(' is no regular expression"),
        (dict(alpha_pattern={"q_proj": True}), "alpha_pattern is {'q_proj': True}"),
        (dict(target_modules=5), "target_modules is 5; expected a list of names or a pattern"),
        (dict(layers_to_transform="all"), "layers_to_transform is 'all'"),
        (dict(use_dora=True), "lacks lora_magnitude_vector: the adapter is not complete"),
        (dict(target_modules=["q_proj"]), "holds tensors of 8 modules that target_modules of adapter_config.json"),
        (dict(target_modules=None, layers_to_transform=None, base_model_name_or_path="other/base"), "--allow_other"),
        (
            dict(target_modules=["q_proj", "v_proj", "up_proj", "o_proj"]),
            "lacks the tensors of 4 modules that target_modules names: model.layers.0.self_attn.o_proj,",
        ),
        (
            dict(base_model_name_or_path="meta-llama/Llama-2-7b-hf"),
            "was trained on meta-llama/Llama-2-7b-hf, the model here is ",
        ),
    ],
)
def test_refused_by_its_config(folder, changes, message):
    assert message in folder().config(**changes).refusal()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), "model.layers.0.self_attn.q_proj lacks lora_B: the adapter is not"),
        (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(64)}), "has lora_magnitude_vector, though use_"),
        (
            lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(64, 5)}),
            "lora_A [4, 64] and lora_B [64, 5] of model.l",
        ),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32)}),
            "is an adapter for another model (it was trained on ",
        ),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 64, dtype=torch.int32)}), "is torch.int32"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "modules_to_save, or embeddings that"),
        (lambda t: t.update({f"{Q0}.base_layer.bias": torch.ones(2)}), "holds a trained bias"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)}),
            "adapts the embed",
        ),
        (
            lambda t: t.update(
                {
                    f"base_model.model.lm_head.lora_{x}.weight": torch.ones(s)
                    for x, s in (("A", (4, 64)), ("B", (203, 4)))
                }
            ),
            "adapts the output layer (lm_head), which is not supported; merge it",
        ),
        (
            lambda t: t.update(
                {key.replace("layers.0", "layers.9"): v.clone() for key, v in t.items() if "layers.0" in key}
            ),
            "is an adapter for another model (it was trained on ",
        ),
        (lambda t: [t.pop(key) for key in list(t) if "layers.3" in key], "lacks the tensors of 3 modules"),
        (lambda t: t.update({f"{Q0}.lora_A.default.weight": torch.ones(4, 64)}), "are the same one"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_refused_by_its_tensors(folder, change, message):
    text = folder().tensors(change).refusal()
    assert message in text and "adapter" in text


def test_refused_on_another_model(made, tmp_path):
    """By shape, and before that by its name is of no matter."""
    for number, (changes, message) in enumerate(
        (
            ({"hidden_size": 32}, "lora_A.weight is [4, 64], "),
            ({"num_hidden_layers": 2}, "2 layers) has no model.layers.2.mlp.up_proj, "),
            ({"num_hidden_layers": 6}, "is it an adapter for a smaller model"),
        )
    ):
        other = Path(family_models.save("llama", tmp_path / str(number), **changes))
        text = Folder(made / "plain", tmp_path / f"adapter{number}", other).refusal()
        assert message in text and f"trained on {made / 'model'}" in text


def test_not_an_adapter(made, tmp_path):
    for path, message in (
        (tmp_path / "gone", "gone: no such adapter folder"),
        (made / "model", "not a PEFT adapter folder: it has no adapter_config.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            PeftFolder.open(str(path))
    (tmp_path / "empty").mkdir()
    shutil.copy(made / "plain" / "adapter_config.json", tmp_path / "empty")
    with pytest.raises(ConfigError, match="has no adapter_model.safetensors"):
        PeftFolder.open(str(tmp_path / "empty"))


def test_names_that_mean_the_same_base(made):
    model = HFModel.open(str(made / "model"), weights=False)
    for base in (
        None,
        str(made / "model"),
        f"{made}/../{made.name}/model/",
        "acme/Model",
        "/home/me/model",
        "x/model-bnb-4bit",
    ):
        assert same_base(base, model), base
    for base in ("acme/model-2", "/home/me/models", "llama"):
        assert not same_base(base, model), base
    hub = HFModel("meta-llama/Llama-3.2-1B", model.folder, model.family, model.architecture)
    cached = "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/0123abcd"
    for base in (
        "meta-llama/Llama-3.2-1B",
        "unsloth/llama-3.2-1b-unsloth-bnb-4bit",
        cached,
        "D:\\models\\Llama-3.2-1B",
    ):
        assert same_base(base, hub), base
    assert not same_base("meta-llama/Llama-3.2-1B-Instruct", hub)


def test_another_name_is_taken_when_asked(folder):
    one = folder().config(base_model_name_or_path="acme/other")
    assert "add --allow_other_base" in one.refusal()
    assert len(PeftFolder.open(str(one.path)).plan(one.model, allow_other_base=True).adapters) == 12


def test_tensors_say_the_ranks(folder):
    """A config whose pattern does not say the rank that is there is written right again."""
    one = folder().tensors(
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(2, 64), f"{Q0}.lora_B.weight": torch.ones(64, 2)})
    )
    found = PeftFolder.open(str(one.path))
    plan = found.plan(one.model)
    assert plan.modules["model.layers.0.self_attn.q_proj"] == (2, 7.0)
    assert plan.modules["model.layers.1.self_attn.q_proj"] == (4, 7.0)
    assert found.record(plan)["config"]["rank_pattern"] == {r"model\.layers\.0\.self_attn\.q_proj": 2}


def test_pickled_tensors_and_old_names(folder):
    one = folder("dora")
    tensors = load_file(one.path / "adapter_model.safetensors")
    (one.path / "adapter_model.safetensors").unlink()
    renamed = {key.replace("lora_A.weight", "lora_A.default.weight"): value for key, value in tensors.items()}
    torch.save(renamed, one.path / "adapter_model.bin")
    found = PeftFolder.open(str(one.path))
    assert len(found.plan(one.model).adapters) == 3
    name = "model.layers.3.self_attn.q_proj.lora_A.weight"
    assert torch.equal(found.read(name), tensors["base_model.model." + name])


@pytest.mark.parametrize(("start", "notes"), [("pissa_niter_4", 1), ("olora", 1), (True, 0), ("gaussian", 0)])
def test_starts_that_change_the_base_are_noted(folder, start, notes):
    found = PeftFolder.open(str(folder().config(init_lora_weights=start).path))
    assert len(found.config.notes) == notes
    assert all("takes part of the base's weights away" in note for note in found.config.notes)
