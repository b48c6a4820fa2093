"""Run by test_memory.py in a process of its own: one rank of eight loads and exports its shard of a model that is
several times larger than what the process's address space may grow by.

argv: the folder of the model (its weights a sparse file), the folder to export to.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from primus_bridge.conversion.export import ExportOptions, export_bytes, export_model
from primus_bridge.conversion.load import load_weights
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.conversion.rules import Placed, placed_rules
from primus_bridge.megatron import parallel as parallel_module
from primus_bridge.megatron.parallel import Parallel

RANKS, SLACK = 8, 2**29


def shard_shapes(placed: Placed, arch, ranks: int) -> tuple[int, ...]:
    """The shape of the first rank's parameter, whose tensors are split over ``ranks``."""
    rule = placed.rule
    split = getattr(rule, "split", 0)  # the fused ones are split along their rows
    shapes = list(placed.hf_tensors(arch).values())
    whole = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
    if split is not None:
        whole[split if isinstance(split, int) else 0] //= ranks
    return tuple(whole)


def main(folder: Path, target: Path) -> None:
    from primus_bridge.config.arguments import BridgeArguments

    torch.set_num_threads(1)
    parallel_module.initialize(BridgeArguments())
    model = HFModel.open(str(folder), weights=True)
    arch, rules = model.architecture, model.family.rules
    weights = model.weights()
    parallel = Parallel(0, RANKS, 0, 1, 1, 0, 1, 0, 1, etp_size=RANKS)
    shapes = {p.megatron: shard_shapes(p, arch, RANKS) for p in placed_rules(rules, arch)}
    shard = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + shard + SLACK, -1))

    parameters = {name: torch.full(shape, torch.nan, dtype=torch.bfloat16) for name, shape in shapes.items()}
    load_weights(parameters, weights, model.family, arch, parallel.shards)
    assert not any(tensor.isnan().any() for tensor in parameters.values())
    last = parameters["decoder.final_layernorm.weight"]
    assert last[-1] == 2.5  # what the test wrote at the end of the file
    export_model(parameters, model.family, arch, parallel, target, ExportOptions((), torch.bfloat16, 10**12))
    try:
        torch.empty(2 * SLACK, dtype=torch.uint8)
    except RuntimeError:
        whole = export_bytes(model.family, arch, ExportOptions((), torch.bfloat16, 0))
        print("done", shard, whole)
    else:
        raise SystemExit("the limit does not hold")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
