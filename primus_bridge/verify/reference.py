"""transformers' side: one forward and backward pass whose every number is left in files for the ranks to read.

FOLDER/activations.safetensors holds what each stage puts out, FOLDER/summary.json the loss and each stage's largest
number, FOLDER/gradients/ the gradients as a model folder, so under the names that the weights have there.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Iterator, Optional

import torch

from primus_bridge.conversion.architecture import Architecture
from primus_bridge.errors import ConfigError
from primus_bridge.files import write_json

ACTIVATIONS, GRADIENTS, SUMMARY = "activations.safetensors", "gradients", "summary.json"
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "block_sparse_moe")


def record(
    folder: Path, arch: Architecture, batch: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device, to: Path
) -> None:
    """Run the model of ``folder`` on ``batch`` in ``dtype`` and leave its numbers in ``to``.

    Raises ConfigError when transformers cannot build the model.
    """
    from safetensors.torch import save_file

    with _all_cores(), quiet():
        model = _load(folder, arch, dtype).to(device).eval()  # no dropout; gradients are made as in training
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        stages: dict[str, torch.Tensor] = {}
        handles = _watch(model, arch.num_layers, stages)
        logits = model(batch["tokens"], use_cache=False).logits.float()
        for handle in handles:
            handle.remove()
        stages["logits"] = logits.detach().cpu().contiguous()
        save_file(stages, to / ACTIVATIONS)
        largest = {name: stage.abs().max().item() for name, stage in stages.items()}
        stages.clear()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="none"
        ).view_as(batch["loss_mask"])
        loss = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        loss.backward()
        write_json(to / SUMMARY, {"loss": loss.item(), "largest": largest})
        del logits, losses, loss
        _save_gradients(model, to / GRADIENTS)
        del model
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summary(folder: Path) -> dict[str, Any]:
    """{"loss": the loss, "largest": {stage: its largest number}}."""
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))


def _load(folder: Path, arch: Architecture, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    # the other implementations of attention leave a soft cap out
    kind = {"attn_implementation": "eager"} if arch.attention_softcap else {}
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **kind)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"transformers cannot build the model: {line}", where=str(folder)) from error


def _watch(model, num_layers: int, stages: dict[str, torch.Tensor]) -> list[Any]:
    """Hooks that put every stage's output into ``stages``, fp32 on the CPU."""

    def keep(name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        stages[name] = tensor.detach().float().cpu().clone()

    def module(name: str):
        return lambda _module, _inputs, output: keep(name, output)

    def first_input(_module, inputs, keywords) -> None:
        keep("embedding", inputs[0] if inputs else keywords["hidden_states"])

    decoder, layers = decoder_and_layers(model, num_layers)
    handles = [layers[0].register_forward_pre_hook(first_input, with_kwargs=True)]
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_hook(module(f"layer {number}")))
        for part, names in (("attention", ATTENTION_NAMES), ("mlp", MLP_NAMES)):
            child = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
            if child is not None:
                handles.append(child.register_forward_hook(module(f"layer {number} {part}")))
    handles.append(
        decoder.register_forward_hook(lambda _module, _inputs, output: keep("final norm", output.last_hidden_state))
    )
    return handles


def decoder_and_layers(model, num_layers: int) -> tuple[torch.nn.Module, torch.nn.ModuleList]:
    """The decoder under the output layer, and its layers, whatever the family calls them.

    The layers are the outermost list of so many modules.
    """
    lists = [
        (name.count("."), name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    ]
    _, name, layers = min(lists, key=lambda found: found[0])
    return model.get_submodule(name.rpartition(".")[0]), layers


def upstream_deviations(arch: Architecture) -> list[str]:
    """Where the installed transformers itself departs from the model's authors, so that equality is not to be had."""
    from importlib.metadata import version

    if int(version("transformers").partition(".")[0]) >= 5:
        return []
    found = []
    if arch.model_type == "deepseek_v2" and arch.rope is not None and (arch.rope.scaling or {}).get("mscale_all_dim"):
        found.append("transformers 4 leaves YaRN's mscale_all_dim out of DeepSeek-V2's attention")
    if arch.model_type == "gemma" and arch.hf_config.get("hidden_act") == "gelu":
        found.append(
            'transformers 4 takes Gemma\'s hidden_act "gelu" for the exact gelu, its authors mean the tanh one'
        )
    return [f"{text}; transformers 5 does not, and with this one the layers differ" for text in found]


def _save_gradients(model, folder: Path) -> None:
    """Write the gradients where a model's weights would be: save_pretrained knows the names in files.

    transformers 5 holds experts fused in memory, which it takes apart again as it saves.
    """
    for parameter in model.parameters():
        gradient: Optional[torch.Tensor] = parameter.grad
        parameter.grad = None
        parameter.requires_grad_(False)
        # the gradient takes the weight's place, and its memory is free
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    model.save_pretrained(folder)


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """The other ranks of this machine wait meanwhile."""
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(threads, cores))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' bars and advice are about a model in use."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
