"""Megatron weights of tiny models as megatron-bridge and mcore-bridge make them, tensor by tensor beside ours.

    python tests/benchmarks/compare_bridge.py --bridge_python BRIDGE/bin/python       # half a minute on two cores

An environment with both bridges and no CUDA package (1.6 GB; ran with Python 3.11: megatron-bridge 0.3.1, mcore-bridge
1.6.5 of ms-swift, megatron-core 0.16.1, transformers 4.57.6, torch 2.13.0+cpu). The upper bound on torch takes its CPU
build where the index has one; the bridges come without their dependencies, which are Transformer Engine, mamba-ssm and
others that need CUDA to be built. pillow is imported by mcore-bridge, which does not ask for it.

    python3.11 -m venv BRIDGE
    BRIDGE/bin/pip install "torch>=2.7,<2.14" "megatron-core>=0.16,<0.17" "transformers<5" accelerate datasets einops \
        hydra-core modelscope "peft<0.21" pillow rich
    BRIDGE/bin/pip install --no-deps megatron-bridge==0.3.1 mcore-bridge==1.6.5

What is put in place of what such an environment lacks is in bridge_stand_ins.py: Transformer Engine's modules with
their parameters and without their kernels. The layer specs, the building of the model, the reading, the conversion
and the export are the bridge's own.

Each side runs in a process of its own. The models are made by the bridge environment's transformers, because the
bridges read config.json through it and transformers 5 spells it otherwise. A row of the table is one side's Megatron
parameters, or what it exports to Hugging Face from them, compared with ours by name, dtype, shape and every byte.
What is known to differ, and is checked to differ in nothing else:

names       not at all: with Transformer Engine's specs all three sides name the parameters alike
vocabulary  ours is padded with rows of zeros to a multiple of 128, theirs is not ("padded" in the table)
Mixtral     neither bridge knows it (megatron-bridge 0.3.1 to 0.6.2, mcore-bridge 1.6.5). megatron-bridge refuses it;
            mcore-bridge gets it by its own ``converter`` argument, its tensors renamed as in MIXTRAL below.
            Qwen3-MoE has experts that both know.

The exit status is 1 when anything else differs, is missing on one side or failed, 2 when there is no bridge.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
BRIDGES = ("megatron-bridge", "mcore-bridge")
OURS = "primus-bridge"
PARTS = ("Megatron", "HF export")  # folders that each side writes for each model
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama, tied, llama3 rope", {}),
    "qwen3": ("qwen3", {}),
    "qwen3 moe": ("qwen3 moe", {"decoder_sparse_step": 1}),  # neither bridge reads it mixed with dense layers
    "mixtral": ("mixtral", {}),
}
"""Name in the table: case of tests/family_models.py, and changes to it."""

MIXTRAL = (("block_sparse_moe.", "mlp."), (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."))
"""Mixtral's tensor names, and what mcore-bridge calls the same tensors in every family that it knows."""
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


class Refused(Exception):
    """The bridge itself says that it does not convert this model type."""


# --- the sides: each converts a folder and writes the Megatron parameters and their export under target/PARTS


def write(target: Path, part: str, tensors: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    (target / part).mkdir(parents=True)
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, target / part / "model.safetensors")


def one_rank() -> None:
    from tests.benchmarks import bridge_stand_ins

    bridge_stand_ins.install()
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def megatron_bridge() -> Callable[[Path, Path], None]:
    one_rank()
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    def convert(folder: Path, target: Path) -> None:
        architecture = AutoConfig.from_pretrained(folder).architectures[0]
        if architecture not in AutoBridge.list_supported_models():
            raise Refused(f"AutoBridge has no {architecture}")
        bridge = AutoBridge.from_hf_pretrained(folder)
        provider = bridge.to_megatron_provider(load_weights=True)
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        write(target, "Megatron", dict(model[0].named_parameters()))
        write(target, "HF export", dict(bridge.export_hf_weights(model, cpu=True, show_progress=False)))

    return convert


def mcore_bridge() -> Callable[[Path, Path], None]:
    one_rank()
    import torch
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from mcore_bridge.model import get_mcore_model_type
    from transformers import AutoConfig

    def renamed(name: str, tensor: Any, back: bool = False) -> tuple[str, Any]:
        for pair in MIXTRAL:
            name = name.replace(*(reversed(pair) if back else pair))
        return name, tensor

    def convert(folder: Path, target: Path) -> None:
        hf_config = AutoConfig.from_pretrained(folder)
        fields, load, export = hf_to_mcore_config(hf_config), None, None
        if get_mcore_model_type(hf_config.model_type) is None:
            if hf_config.model_type != "mixtral":
                raise Refused(f"no model_type {hf_config.model_type}")
            fields |= {"mcore_model_type": "gpt", "add_qkv_bias": False}
            load, export = renamed, partial(renamed, back=True)
        config = ModelConfig(params_dtype=torch.float32, use_cpu_initialization=True, **fields)
        models = get_mcore_model(config)
        config.bridge.load_weights(models, str(folder), converter=load)
        write(target, "Megatron", dict(models[0].named_parameters()))
        write(target, "HF export", dict(config.bridge.export_weights(models, target_device="cpu", converter=export)))

    return convert


def primus_bridge() -> Callable[[Path, Path], None]:
    from primus_bridge.config.arguments import BridgeArguments
    from primus_bridge.launch.environment import choose_device
    from tests.distributed.rank_functions import Built, export_again

    choose_device("cpu")

    def convert(folder: Path, target: Path) -> None:
        built = Built(str(folder), BridgeArguments(), optimizer=False)
        write(target, "Megatron", built.parameters())
        export_again(built, str(folder), target / "HF export", 10**9)
        built.close()

    return convert


SIDES = {"megatron-bridge": megatron_bridge, "mcore-bridge": mcore_bridge, OURS: primus_bridge}


def run_side(side: str, work: Path) -> None:
    """In a process of its own: convert every model; outcome.json holds a line for each that was not."""
    outcome = {}
    convert = SIDES[side]()
    for name in MODELS:
        try:
            convert(work / "models" / name, work / side / name)
        except Refused as refusal:
            outcome[name] = f"refused: {refusal}"
        except Exception as error:
            traceback.print_exc()
            outcome[name] = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    (work / side).mkdir(exist_ok=True)
    (work / side / "outcome.json").write_text(json.dumps(outcome))


def make_models(work: Path) -> None:
    from tests.family_models import save

    for name, (case, changes) in MODELS.items():
        save(case, work / "models" / name, **changes)


def versions() -> dict[str, str]:
    """Of what is installed among the packages that matter here."""
    wanted = {*BRIDGES, "megatron-core", "transformers", "torch"}
    found = {one.metadata["Name"].replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(wanted & found.keys())}


# --- the comparison


def read(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def difference(theirs: Any, ours: Any) -> str | None:
    import torch

    if (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return f"{theirs.dtype} {tuple(theirs.shape)}, ours {ours.dtype} {tuple(ours.shape)}"
    if torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8)):
        return None
    return f"by up to {(theirs.double() - ours.double()).abs().max():.3g}"


def without_padding(name: str, theirs: Any, ours: Any) -> Any:
    """Ours, less the rows of zeros that pad the vocabulary beyond theirs, if that is what they are."""
    padding = ours[len(theirs) :]
    return ours[: len(theirs)] if name in VOCABULARY and not padding.count_nonzero() else ours


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[list[str], bool]:
    """Cells of a row after its first three, and whether both sides are the same."""
    both = sorted(theirs.keys() & ours.keys())
    cut = {name: without_padding(name, theirs[name], ours[name]) for name in both}
    padded = sum(len(cut[name]) < len(ours[name]) for name in both)
    differences = {name: text for name in both if (text := difference(theirs[name], cut[name]))}
    first = "".join(f"; {name}: {text}" for name, text in list(differences.items())[:1])
    only_ours, only_theirs = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    equal = f"{len(both) - len(differences)}{f', {padded} padded' if padded else ''}"
    cells = [str(len(both)), equal, f"{len(differences)}{first}"]
    cells += [f"{len(names)}{''.join(f'; {name}' for name in names[:1])}" for names in (only_ours, only_theirs)]
    return cells, bool(both) and not (differences or only_ours or only_theirs)


def rows(work: Path, sides: list[str]) -> Iterator[tuple[list[str], bool]]:
    outcomes = {side: json.loads((work / side / "outcome.json").read_text()) for side in (*sides, OURS)}
    for name in MODELS:
        for side in sides:
            text = f"ours {outcomes[OURS][name]}" if name in outcomes[OURS] else outcomes[side].get(name)
            if text:
                yield [name, side, "", "", "", text, "", ""], text.startswith("refused")
                continue
            for part in PARTS:
                cells, same = compare(read(work / side / name / part), read(work / OURS / name / part))
                yield [name, side, part, *cells], same


def print_table(table_rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("model", "bridge", "tensors of", "compared", "equal", "different", "only ours", "only theirs"):
        table.add_column(name, overflow="fold")
    for row in table_rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def child(python: str, task: str, work: Path) -> str:
    """Run this file for one task; what it printed. Raises SystemExit with the end of its errors."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, str(Path(__file__).resolve()), "--task", task, "--work", str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        print("\n".join(done.stderr.splitlines()[-12:]), file=sys.stderr)
        raise SystemExit(f"{task} did not run in {python} (above: the end of its errors)")
    if "Traceback" in done.stderr:
        print(done.stderr[done.stderr.index("Traceback") :], file=sys.stderr)
    return done.stdout


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--bridge_python", default=sys.executable, help="python of an environment with a bridge; default: this one")
    add("--task", help=argparse.SUPPRESS)  # of a child: one of SIDES, "models" or "versions"
    add("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.task:
        sys.path.insert(0, str(ROOT))  # for tests.family_models, and for our side
        if options.task == "versions":
            print(json.dumps(versions()))
        elif options.task == "models":
            make_models(options.work)
        else:
            run_side(options.task, options.work)
        return 0
    with tempfile.TemporaryDirectory(prefix="compare-bridge-") as name:
        work = Path(name)
        installed = json.loads(child(options.bridge_python, "versions", work))
        for whose, packages in (("theirs", installed), ("ours  ", versions())):
            print(whose, ", ".join(f"{package} {version}" for package, version in packages.items()))
        if not (sides := [side for side in BRIDGES if side in installed]):
            print(f"no {' and no '.join(BRIDGES)} in {options.bridge_python}: see the top of {Path(__file__).name}")
            return 2
        child(options.bridge_python, "models", work)
        for side in sides:
            child(options.bridge_python, side, work)
        child(sys.executable, OURS, work)
        results = list(rows(work, sides))
    print_table([row for row, _ in results])
    return 0 if all(same for _, same in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
