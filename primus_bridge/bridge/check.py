"""Checks of a run of engine bridge before anything is started or written."""

from __future__ import annotations

from primus_bridge.bridge.engine import installed
from primus_bridge.bridge.fields import check_fields, refusal
from primus_bridge.bridge.start import Start, start_of
from primus_bridge.config.arguments import BridgeArguments


def check_engine(arguments: BridgeArguments, weights: bool = True) -> Start:
    """Raises ConfigError for arguments that the engine cannot take, or checkpoints that are not its own.

    ``validate`` has been here before. Returns where the run starts.
    """
    check_fields(arguments, installed())
    model, dataset = arguments.model, arguments.dataset
    if arguments.stage != "sft":
        raise refusal(arguments, "stage", "what it runs is Megatron-Bridge's finetune; engine: core pretrains")
    if arguments.dist.device == "cpu":
        raise refusal(arguments, "dist.device", "it trains on CUDA devices only; engine: core runs on a CPU")
    if arguments.peft.scheme is not None and arguments.checkpoint.convert_to_hf:
        raise refusal(
            arguments, "checkpoint.convert_to_hf", "it has no export of adapters here; engine: core exports them"
        )
    if dataset.packed_sequence:
        if arguments.train.micro_batch_size > 1:
            raise refusal(arguments, "train.micro_batch_size", "it takes one packed sequence at a time: set it to 1")
        if model.context_parallel_size > 1:
            raise refusal(arguments, "model.context_parallel_size", "packed sequences are not split over ranks here")
        if model.pipeline_model_parallel_size > 2:
            raise refusal(
                arguments,
                "model.pipeline_model_parallel_size",
                "its stages between the first and the last do not see where packed samples begin; pack with at most 2",
            )
    start = start_of(arguments, weights)
    if start.model.architecture.tied_embeddings and model.virtual_pipeline_model_parallel_size:
        raise refusal(
            arguments,
            "model.virtual_pipeline_model_parallel_size",
            "it cannot share the model's tied embeddings between virtual stages",
        )
    if arguments.peft.scheme is not None:
        from primus_bridge.bridge.adapters import adapters

        adapters(arguments, start.model)
    return start
