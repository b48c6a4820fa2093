"""One rank of ``primus verify``: transformers on the first rank, Megatron on all, then the comparison."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Optional

from primus_bridge.errors import ConfigError
from primus_bridge.files import write_json
from primus_bridge.launch.environment import choose_device
from primus_bridge.verify.plan import Options, Plan, arguments_of, make_plan
from primus_bridge.verify.report import Report, judge

REPORT = "report.json"


def verify(options: Options, work: Optional[Path] = None) -> Report:
    """Compare; the same report on every rank, which stays in the job that it has joined here. Collective.

    work: an empty folder that every rank sees, for the reference's numbers; None: one is made, and removed at the end.
    Raises ConfigError, the same on every rank.
    """
    choose_device(options.device)
    import torch.distributed as dist

    from primus_bridge.megatron import parallel as parallel_module
    from primus_bridge.together import refusing_together

    parallel_module.initialize_distributed(arguments_of(options).dist)
    with refusing_together():
        plan = make_plan(options, dist.get_world_size(), cuda=parallel_module.device().type == "cuda")
    if work is not None:
        return _compare(plan, work)
    made, lead = _shared_folder(), dist.get_rank() == 0
    try:
        return _compare(plan, made)
    finally:
        if lead:
            shutil.rmtree(made, ignore_errors=True)


def _shared_folder() -> Path:
    """A temporary folder of the first rank's. Raises ConfigError where another rank does not see it. Collective."""
    import torch.distributed as dist

    from primus_bridge.together import refusing_together

    payload: list[Any] = [tempfile.mkdtemp(prefix="primus_verify_") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(payload, src=0)
    folder = Path(payload[0])
    with refusing_together():
        if not folder.is_dir():
            raise ConfigError(
                "is not seen on another node: set TMPDIR to a folder on a disk that all nodes share", where=str(folder)
            )
    return folder


def _compare(plan: Plan, work: Path) -> Report:
    import torch.distributed as dist

    from primus_bridge.conversion.hf_folder import check_space
    from primus_bridge.conversion.hf_weights import HFWeights
    from primus_bridge.conversion.model_folder import HFModel
    from primus_bridge.megatron import parallel as parallel_module
    from primus_bridge.megatron.model import params_dtype
    from primus_bridge.megatron.trace import trace
    from primus_bridge.together import refusing_together
    from primus_bridge.verify import reference
    from primus_bridge.verify.batch import random_batch
    from primus_bridge.verify.compare import ActivationComparer, Difference, compare_tensors, over_ranks, tensor_places
    from primus_bridge.verify.shrink import save_random_model

    arguments, arch, family = plan.arguments, plan.architecture, plan.family
    folder = plan.folder or work / "model"
    against = plan.reference or folder
    pad = plan.config.get("pad_token_id")
    batch = random_batch(
        arch.vocab_size, plan.rows, plan.seq_length, plan.options.seed, pad if isinstance(pad, int) else None
    )
    with refusing_together():
        if dist.get_rank() == 0:
            _introduce(plan)
            dtype = params_dtype(arguments)
            check_space(work, plan.parameters * dtype.itemsize, "the reference's gradients (in TMPDIR)")
            if plan.folder is None:
                with reference.quiet():
                    save_random_model(plan.config, folder, plan.options.seed)
            reference_arch = HFModel.at(against, str(against)).architecture
            reference.record(against, reference_arch, batch, dtype, parallel_module.device(), work)
    parallel = parallel_module.initialize(arguments)
    activations = ActivationComparer(work, plan.tolerance)
    traced = trace(
        family, arch, HFModel.at(folder, str(folder)).weights(), arguments, parallel, batch, watch=activations
    )
    gradients = compare_tensors(traced.gradients, HFWeights(work / reference.GRADIENTS), family, arch, parallel.shards)
    weights = None
    if against != folder:
        reader = HFModel.at(against, str(against)).weights()
        weights = over_ranks(compare_tensors(traced.weights, reader, family, arch, parallel.shards))
    loss = reference.summary(work)["loss"]
    report = judge(
        plan,
        over_ranks(activations.differences),
        Difference(abs(traced.loss - loss), abs(loss)),
        over_ranks(gradients),
        weights,
        tensor_places(family, arch),
    )
    dist.barrier()  # every rank has read what it needs of the folder
    parallel_module.destroy_model_parallel()
    return report


def _introduce(plan: Plan) -> None:
    """Print what is compared, and what to know about it."""
    model = plan.arguments.model
    sizes = {"tensor": model.tensor_model_parallel_size, "pipeline": model.pipeline_model_parallel_size}
    sizes["expert"] = model.expert_model_parallel_size
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    if plan.ranks > 1:
        layout += f" on {plan.ranks} ranks"
    shrunk = "shrunk to " if plan.options.shrink else ""
    against = f" against {plan.options.against}" if plan.options.against else ""
    print(
        f"verify {plan.options.hf}{against}: {plan.architecture.model_type}, {shrunk}"
        f"{plan.architecture.num_layers} layers, {_millions(plan.parameters)} parameters\n"
        f"{layout}, {plan.options.dtype}, {plan.rows} x {plan.seq_length} tokens, tolerance {plan.tolerance:.1e}"
    )
    for note in plan.notes + _memory_notes(plan):
        print(f"note: {note}")
    print(flush=True)


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _memory_notes(plan: Plan) -> list[str]:
    """A line where less memory is free than the larger of the two models with its gradients takes."""
    import psutil
    import torch

    # each in turn; Megatron's gradients are fp32 whatever its weights are
    theirs = 2 * (2 if plan.options.dtype == "bf16" else 4)
    ours = 4 + theirs // 2
    logits = 16 * plan.rows * plan.seq_length * plan.architecture.vocab_size  # fp32, with their gradients
    if torch.cuda.is_available():
        available, needed = torch.cuda.mem_get_info()[0], theirs * plan.parameters + logits
    else:
        available, needed = psutil.virtual_memory().available, max(ours, theirs) * plan.parameters + logits
    if available >= needed:
        return []
    return [
        f"it needs about {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} GiB are free: "
        "it may be killed; --dtype bf16 needs less, and --shrink next to nothing"
    ]


def verify_rank(options: dict[str, Any], work: str) -> None:
    """verify as a launcher's entry; the first rank leaves the report in WORK/report.json."""
    from primus_bridge.megatron.parallel import finalize

    report = verify(Options(**options), Path(work))
    if os.environ["RANK"] == "0":
        write_json(Path(work) / REPORT, report.to_json())
    finalize()
