"""The training set through the run's own pipeline, for a plan: how many sequences and tokens, and the longest."""

from __future__ import annotations

from primus_bridge.config.arguments import BridgeArguments
from primus_bridge.conversion.model_folder import HFModel
from primus_bridge.errors import ConfigError
from primus_bridge.plan.steps import Data


def read_data(arguments: BridgeArguments, model: HFModel) -> Data:
    """Reads, tokenises and packs as the run would; what is tokenised stays in the cache for it.

    Raises ConfigError for whatever is wrong with the data, and for a stream, which has no end to count to.
    """
    from primus_bridge.data.dataset import build_datasets
    from primus_bridge.data.stream import Stream
    from primus_bridge.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer.tokenizer_model or str(model.folder))
    train = build_datasets(arguments, tokenizer).train
    if isinstance(train, Stream):
        raise ConfigError("--data counts the data set, and dataset.streaming never has it whole: leave one of them out")
    inputs = [train.inputs(sequence) for sequence in range(train.num_sequences)]
    return Data(train.num_sequences, sum(inputs), max(max(inputs), 1))
