"""Where a run goes on from: the newest whole checkpoint, of a run that means the same, over the same base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from primus_bridge.checkpoint.base_digest import base_digest
from primus_bridge.checkpoint.manifest import MANIFEST, committed, manifest_checksum, open_checkpoint
from primus_bridge.cli.main import main
from primus_bridge.conversion.model_folder import HFModel
from tests.checkpoint.hostile import recommit
from tests.cli.example import alpaca_rows, loss_lines, train_words, workplace, write_rows

SHORT = {"save_interval": 2, "lr_decay_style": "constant", "report": False, "tensorboard": False}
LORA = SHORT | {"use_lora": True, "lora_rank": 2, "lora_alpha": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with model/, rows.json, and the runs full/ and lora/ with their checkpoints of steps 2 and 4."""
    with workplace(tmp_path_factory.mktemp("start")) as root:
        write_rows(root / "rows.json", alpaca_rows(16))
        for save, options in (("full", SHORT), ("lora", LORA)):
            assert main(train_words("model", "rows.json", save, train_iters=4, **options)) == 0
        yield root


@pytest.fixture
def place(saved, tmp_path, monkeypatch):
    """A copy to stand in."""
    place = Path(shutil.copytree(saved, tmp_path / "place"))
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def said(capfd):
    """Runs a command: (exit code, stdout, stderr)."""

    def run(words: list[str]) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(words)
        return code, *capfd.readouterr()

    return run


def words(save: str, model: str = "model", steps: int = 5, **options) -> list[str]:
    kind = LORA if save.startswith("lora") else SHORT
    return train_words(model, "rows.json", save, train_iters=steps, **(kind | options))


def flip(checkpoint: Path) -> Path:
    """Change one bit of a shard."""
    shard = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    return shard


# --- damaged checkpoints


def test_a_flipped_bit_is_passed_over(place, said):
    unbroken = [line["loss"] for line in loss_lines(place / "full")]
    shard = flip(place / "full" / "iter_0000004")
    code, out, err = said(words("full"))
    assert (code, err) == (0, "")
    differs = f"(iter_0000004 is damaged: {shard.name} differs from its checksum)"
    assert f"continuing full/iter_0000002 at step 2 {differs}" in out
    # it is not taken for the newest one again, and stays to be looked at
    assert [path.name for path in committed(place / "full")] == ["iter_0000002", "iter_0000004", "iter_0000005"]
    assert (place / "full" / "damaged_iter_0000004" / MANIFEST).is_file()
    open_checkpoint(place / "full" / "iter_0000004")
    lines = loss_lines(place / "full")
    assert [line["step"] for line in lines[-3:]] == [3, 4, 5]
    assert [line["loss"] for line in lines[-3:-1]] == unbroken[2:]


def test_a_truncated_file_is_passed_over_before_any_rank_starts(place, said):
    shard = next((place / "full" / "iter_0000004").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    code, out, err = said([*words("elsewhere"), "--load", "full", "--dry_run"])
    assert (code, err) == (0, "")
    code, out, err = said([*words("elsewhere", steps=2), "--load", "full"])
    assert code == 0 and "continuing full/iter_0000002 at step 2 (iter_0000004 is damaged: " in out
    assert (place / "full" / "iter_0000004").is_dir()  # another run's folder is left as it is


def test_checksums_that_are_not_wanted(place, said):
    flip(place / "full" / "iter_0000004")
    code, out, _ = said([*words("full", steps=4), "--verify_checksums", "false"])
    assert code == 0 and "continuing full/iter_0000004 at step 4\n" in out


def test_a_checkpoint_named_by_its_folder_is_not_replaced(place, said):
    shard = flip(place / "full" / "iter_0000004")
    code, _, err = said([*words("new"), "--load", "full/iter_0000004"])
    assert code == 2 and f"full/iter_0000004: damaged checkpoint: {shard.name} differs from its checksum" in err


def test_no_checkpoint_is_whole(place, said):
    for folder in committed(place / "full"):
        flip(folder)
    code, _, err = said(words("full"))
    assert code == 2 and "full: every checkpoint in it is damaged (iter_0000004: " in err
    assert len(committed(place / "full")) == 2


def test_a_run_of_an_older_version(place, said):
    for folder in committed(place / "full"):
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in ("checksums", "checksum", "components", "groups", "world_size", "arguments_digest", "base_digest"):
            del manifest[name]
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": "primus_bridge/1", "data": {}}))
    code, _, err = said(words("full"))
    assert code == 2 and "its checkpoint of step 4 was written by an older version, so this run cannot go on" in err
    code, out, _ = said([*words("new", steps=1), "--load", "full"])
    assert code == 0 and "weights of full/iter_0000004 (of an older version, whose runs cannot be continued)" in out


def test_a_copy_under_another_name_is_passed_over(place, said):
    shutil.copytree("full/iter_0000004", "full/iter_0000009")
    code, out, _ = said(words("full", save_total_limit=1))
    finding = "holds step 4, and its folder is named for step 9: give it back its name, iter_0000004"
    assert code == 0 and f"continuing full/iter_0000004 at step 4 (iter_0000009 is damaged: {finding})" in out
    assert [path.name for path in committed(place / "full")] == ["iter_0000005"]


# --- where it saves


@pytest.mark.parametrize("save", ["full/iter_0000004", "full/damaged_iter_0000002", "new/iter_0000001", "copy"])
def test_a_checkpoint_is_no_save_folder(place, said, save):
    shutil.copytree("full/iter_0000004", "copy")
    for command in (words(save), f"convert --convert_from_hf --hf_model_name_or_path model --save {save}".split()):
        code, out, err = said(command)
        assert (code, out) == (2, "") and err == (
            f"primus: {save}: is one checkpoint, or has the name of one: give the save folder that holds it, "
            f"{(place / save).parent}, or another --save (and --load this one, to start from it)\n"
        )


def test_a_save_folder_that_is_a_link_to_nothing(place, said):
    Path("link").symlink_to("nowhere")
    for save in ("link", "link/out"):
        code, out, err = said(words(save))
        assert (code, out) == (2, "") and err == (
            f"primus: {save}: the save folder cannot be: {place / 'link'} is a link to nowhere, which is not there\n"
        )


def test_finetune_over_a_run_that_goes_on(place, said):
    code, out, _ = said([*words("full"), "--load", "full", "--finetune", "true"])
    assert code == 0 and "continuing full/iter_0000004 at step 4" in out
    assert "'convert_from_hf' has no effect here: the weights come from load, or from save where a run goes on\n" in out
    assert (
        "\nnote: command line --finetune: 'finetune' has no effect here: full holds checkpoints of this run, which "
        "goes on; to start a new one give another --save\n"
    ) in out


# --- what a run means


def test_another_vocabulary(place, said):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained("tokenizer")
    other = words("full", tokenizer_model="tokenizer")
    code, _, err = said(other)
    assert code == 2 and err.startswith("primus: full/iter_0000004: was trained with another vocabulary")
    assert "1 tokens differ: 'new' is unknown in the checkpoint, id 202 now" in err and "--force_resume" in err
    code, out, _ = said([*other, "--force_resume"])
    assert code == 0 and "\nforced    the vocabulary, that of tokenizer: 1 tokens differ" in out


def test_another_chat_template_is_listed(place, said):
    (place / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    code, out, _ = said(words("full"))
    assert code == 0 and "\nchanged   the chat template: that of model differs from the checkpoint's\n" in out


def test_another_model(place, said):
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    code, _, err = said(words("full"))
    assert code == 2 and "layernorm_epsilon 1e-06 there, 0.5 here; name the model that it was trained as" in err
    code, out, _ = said([*words("full", lr="2e-3"), "--force_resume"])
    assert code == 0 and "\nforced    layernorm_epsilon 1e-06 there, 0.5 here (model)\n" in out
    assert "\nchanged   optimizer.lr: 0.001 in the checkpoint, 0.002 now (command line --lr)\n" in out
    assert loss_lines(place / "full")[-1]["step"] == 5


def test_the_other_optimizer(place, said):
    """Nor can it be forced: the one's state is no state of the other."""
    assert said(words("whole", steps=2, use_distributed_optimizer=False))[0] == 0
    for save, before, now, options in (
        ("full", "true", "false", {"use_distributed_optimizer": False, "force_resume": True}),
        ("other", "true", "false", {"use_distributed_optimizer": False, "load": "full/iter_0000004"}),
        ("whole", "false", "true", {}),
    ):
        code, _, err = said(words(save, **options))
        where = options.get("load", f"{save}/iter_000000{4 if save == 'full' else 2}")
        source = "default" if now == "true" else "command line --use_distributed_optimizer"
        assert (code, err) == (
            2,
            f"primus: {where}: was saved with ddp.use_distributed_optimizer {before}, this run has {now} ({source}), "
            f"which cannot read its optimizer's state; set it to {before}, or start from its weights: --load {where} "
            "--finetune, with another --save\n",
        )


def test_another_scale_of_an_adapter(place, said):
    code, _, err = said(words("lora", lora_alpha=8))
    assert code == 2 and "lora: holds checkpoints of another kind of run" in err and "--force_resume" in err
    code, out, _ = said([*words("lora", lora_alpha=8), "--force_resume"])
    assert code == 0 and "\nforced    peft.alpha: 4.0 in the checkpoint, 8.0 now (command line --lora_alpha)\n" in out
    assert "changed   peft.alpha" not in out
    code, _, err = said([*words("lora", lora_rank=4), "--force_resume"])
    assert code == 2 and "another kind of run" in err and "--force_resume" not in err


# --- the base under an adapter


@pytest.fixture
def fine_tuned(place) -> str:
    """The model once more, after a training."""
    shutil.copytree("model", "tuned")
    weights = load_file("tuned/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, "tuned/model.safetensors", metadata={"format": "pt"})
    return "tuned"


def test_another_base_is_refused(place, said, fine_tuned):
    known, found = (base_digest(HFModel.open(name, weights=True)) for name in ("model", fine_tuned))
    manifest = open_checkpoint(place / "lora" / "iter_0000004").manifest
    base = manifest.base
    assert manifest.base_digest == known
    code, _, err = said(words("lora", model=fine_tuned))
    assert code == 2 and "lora/iter_0000004: other weights under the adapter than it was trained over: " in err
    assert f"tuned ({found[:15]}) in place of {base} ({known[:15]})" in err and "--force_resume" in err
    code, out, _ = said([*words("lora", model=fine_tuned), "--force_resume"])
    assert code == 0 and "\nforced    other weights under the adapter" in out
    manifest = open_checkpoint(place / "lora" / "iter_0000005").manifest
    assert (manifest.base, manifest.base_digest) == (str(place / fine_tuned), found)


def test_a_base_that_was_moved_or_converted(place, said):
    shutil.copytree("model", "moved")
    code, out, _ = said(words("lora", model="moved"))
    assert code == 0 and "forced" not in out and "note:" not in out
    assert main("convert --convert_from_hf --hf_model_name_or_path model --save ckpt".split()) == 0
    code, out, _ = said([*words("lora", model=None, convert_from_hf=None, steps=6), "--pretrained_checkpoint", "ckpt"])
    assert code == 0 and "forced" not in out and "note:" not in out


def test_a_base_that_is_not_there(place, said):
    recommit(place / "lora" / "iter_0000004", base="/nowhere/ckpt/iter_0000000")
    gone = (
        "lora/iter_0000004: the base under its adapter, /nowhere/ckpt/iter_0000000, is not there (moved?); name where "
        "it is now: --pretrained_checkpoint CKPT, or --hf_model_name_or_path DIR --convert_from_hf\n"
    )
    nothing = {"model": None, "convert_from_hf": None}
    for save in ("lora", "lora_new"):
        assert said([*words(save, **nothing), "--load", "lora"]) == (2, "", f"primus: {gone}")
    code, _, err = said(words("lora", **nothing))
    assert code == 2 and "a run whose checkpoints are in save goes on with --load lora\n" in err
    code, _, err = said("convert --convert_to_hf --merge --load lora --hf_save_path merged".split())
    assert code == 2 and gone.partition("--pre")[0] + "--hf_model_name_or_path DIR\n" in err
    code, out, _ = said(words("lora"))
    assert code == 0 and "continuing lora/iter_0000004 at step 4" in out


def test_an_adapter_is_merged_into_its_own_base(place, said, fine_tuned):
    merge = "convert --convert_to_hf --merge --load lora --hf_save_path".split()
    code, _, err = said([*merge, "merged", "--hf_model_name_or_path", fine_tuned])
    assert (
        code == 2 and "other weights under the adapter than it was trained over" in err and "--allow_other_base" in err
    )
    assert not Path("merged").exists()
    assert said([*merge, "merged", "--hf_model_name_or_path", fine_tuned, "--allow_other_base"])[0] == 0
    assert said([*merge, "right"])[0] == 0
    right, other = (load_file(f"{name}/model.safetensors") for name in ("right", "merged"))
    assert [name for name in right if not torch.equal(right[name], other[name])] == [
        "model.layers.1.mlp.up_proj.weight"
    ]


def test_an_older_adapter_does_not_know_its_base(place, said, fine_tuned):
    path = place / "lora" / "iter_0000004" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["base_digest"] = None
    path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))
    code, out, _ = said(words("lora", model=fine_tuned))
    assert code == 0 and out.count("has no digest of the base") == 1
