"""The digest by which an adapter's base is known again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from primus_bridge.checkpoint.base_digest import SAMPLE_BYTES, SAMPLES, base_digest, other_base, samples
from primus_bridge.checkpoint.manifest import Checkpoint, Manifest
from primus_bridge.conversion.model_folder import HFModel
from tests import family_models, tiny_models


def digest(folder: Path) -> str | None:
    return base_digest(HFModel.open(str(folder), weights=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose embeddings are larger than what is read of them."""
    return Path(tiny_models.save("llama", tmp_path_factory.mktemp("base") / "hf", vocab_size=403))


def test_it_does_not_depend_on_the_files(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    assert max(value.nbytes for value in weights.values()) > SAMPLES * SAMPLE_BYTES
    one = digest(folder)
    assert one is not None and one.startswith("hf:") and len(one) == 3 + 64
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    (moved / "generation_config.json").write_text("{}")
    assert digest(moved) == one
    many = tmp_path / "many"
    tiny_models.build("llama", vocab_size=403).save_pretrained(many, max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 2 and digest(many) == one
    (moved / "model.safetensors").unlink()
    torch.save(weights, moved / "pytorch_model.bin")
    assert digest(moved) == one


def test_it_sees_a_change_of_any_tensor(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    whole = load_file(folder / "model.safetensors")
    seen = {digest(folder)}
    for name in whole:
        # as a fine-tuning at a low rate leaves them: every 100th value is another one
        changed = whole[name].clone().flatten()
        changed[::100] *= 1.01
        save_file(whole | {name: changed.view(whole[name].shape)}, other / "model.safetensors", {"format": "pt"})
        seen.add(digest(other))
    save_file({name: value.bfloat16() for name, value in whole.items()}, other / "model.safetensors", {"format": "pt"})
    seen.add(digest(other))
    assert len(seen) == 1 + len(whole) + 1


@pytest.mark.parametrize("size", [0, 1, SAMPLES * SAMPLE_BYTES, SAMPLES * SAMPLE_BYTES + 1, 10**6 + 1, 2 * 10**9])
def test_what_is_read_of_a_tensor(size):
    spans = samples(size)
    assert spans[0][0] == 0 and spans[-1][1] == size
    assert all(last <= first for (_, last), (first, _) in zip(spans, spans[1:], strict=False))
    assert sum(last - first for first, last in spans) == min(size, SAMPLES * SAMPLE_BYTES)


def test_only_the_decoder_counts(tmp_path):
    folder = Path(family_models.save("gpt2", tmp_path / "hf"))
    one, weights = digest(folder), load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / "model.safetensors", {"format": "pt"})
    assert digest(folder) == one


def checkpoint(step: int, **values) -> Checkpoint:
    return Checkpoint(Path(f"base/iter_{step:07d}"), Manifest(step, "model", step > 0, "float32", "llama", **values))


def test_of_a_checkpoint():
    sums = {"__0_0.distcp": "ab", "common.pt": "cd"}
    one = base_digest(checkpoint(5, checksums=sums))
    assert one is not None and one.startswith("megatron:")
    assert base_digest(checkpoint(5, checksums=dict(reversed(sums.items())))) == one
    assert base_digest(checkpoint(5, checksums=sums | {"common.pt": "ce"})) != one
    # a converted one is its Hugging Face model; what was trained over a base is not the base
    assert base_digest(checkpoint(0, checksums=sums, base_digest="hf:12")) == "hf:12"
    assert base_digest(checkpoint(5, checksums=sums, base_digest="hf:12")) == one
    assert base_digest(checkpoint(5)) is None


def test_what_is_said_of_another_base():
    adapter = checkpoint(5, base="org/model", base_digest="hf:" + "0" * 64)
    assert other_base(adapter, "here", "hf:" + "0" * 64) is None
    other = other_base(adapter, "here", "megatron:" + "1" * 64)
    assert other is not None and other.certain
    assert "here (megatron:111111111111) in place of org/model (hf:000000000000)" in other.what
    for trained, found in ((adapter, None), (checkpoint(5), "hf:12")):
        unknown = other_base(trained, "here", found)
        assert unknown is not None and not unknown.certain and "here is not compared" in unknown.what
        assert "has no digest of the base (an older version's)" in unknown.what
    imported = other_base(checkpoint(0), "here", "hf:12")
    assert imported is not None and "iter_0000000 was imported without its base's weights: here" in imported.what
