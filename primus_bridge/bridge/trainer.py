"""BridgeSFTTrainer: a run of Megatron-Bridge's finetune on our samples."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Optional

from primus_bridge.trainers.rank import RankTrainer

if TYPE_CHECKING:
    from primus_bridge.checkpoint.lock import RunLock
    from primus_bridge.trainers.result import RunResult


class BridgeSFTTrainer(RankTrainer):
    """One rank of a run: ``run()``. The engine has no place for a caller's callbacks, and ``setup`` says so."""

    stage = "sft"
    lock: Optional[RunLock] = None
    """Of the save folder, from setup to cleanup; rank 0's, which there is no process group to share with."""

    def run(self) -> RunResult:
        """The whole run; returns its result, without what only the core engine measures."""
        try:
            self.setup()
            self.init()
            result = self.train()
        finally:
            self.cleanup()
        return result

    def setup(self) -> None:
        """Find the model and the data, and make the checkpoint of the model's weights that the engine starts from.

        Every rank by itself, there is no process group yet: the data's cache and the weights have their locks.
        Raises ConfigError for whatever a user can have wrong.
        """
        import torch

        from primus_bridge.bridge.engine import imported
        from primus_bridge.bridge.samples import Samples, check_whole_weights, cut_of
        from primus_bridge.bridge.weights import import_weights
        from primus_bridge.checkpoint.lock import RunLock
        from primus_bridge.config import schema
        from primus_bridge.config.follow import follow_epochs
        from primus_bridge.config.validate import check_schedule, check_world, validate
        from primus_bridge.data.dataset import build_datasets, check_vocabulary
        from primus_bridge.data.store import TokenizedDataset
        from primus_bridge.data.tokenizer import load_tokenizer, pad_token_id
        from primus_bridge.errors import ConfigError
        from primus_bridge.preflight import check_bridge

        arguments = self.arguments
        if self.callbacks:
            raise ConfigError("callbacks watch the loop of engine core, and engine bridge has its own: leave them out")
        validate(arguments)
        check_world(arguments, self.world_size)
        self.lock = RunLock.acquire(arguments.save_folder)
        self.start = check_bridge(arguments)
        imported("megatron.bridge.training.finetune")
        if not torch.cuda.is_available():
            raise ConfigError("engine bridge trains on CUDA devices, and there is none; engine: core runs on a CPU")
        model = self.start.model
        tokenizer = load_tokenizer(arguments.tokenizer.tokenizer_model or str(model.folder))
        self.data = build_datasets(arguments, tokenizer)
        vocab_size = model.architecture.vocab_size
        check_vocabulary(self.data, tokenizer, vocab_size, where=str(model.folder))
        assert isinstance(self.data.train, TokenizedDataset), "streaming is refused"
        samples = Samples(self.data.train, self.data.validation)
        check_whole_weights(samples.train, "training")
        if samples.validation is not None:
            check_whole_weights(samples.validation, "validation")
        follow_epochs(arguments, samples.train.num_sequences)
        check_schedule(arguments)
        cut = cut_of(arguments, self.world_size, pad_token_id(tokenizer, vocab_size))
        self.rows = samples.rows(cut, arguments)
        if self.rows[1] is not None:
            schema.put(arguments, "train.eval_iters", self.rows[1].steps, "follows the validation set")
        import_weights(arguments, self.start)

    def init(self) -> None:
        """Build the container; rank 0 writes it beside the run's arguments."""
        from primus_bridge.bridge.container import build_container, container_yaml
        from primus_bridge.config import write_run_yaml
        from primus_bridge.files import write_json, write_text, writing
        from primus_bridge.report.notes import LEDGER_FILE, RUN_FILE

        arguments = self.arguments
        self.container = build_container(arguments, self.start)
        self.container.dataset.give(*self.rows)
        if arguments.logger.wandb_mode is not None:
            os.environ["WANDB_MODE"] = arguments.logger.wandb_mode
        if self.rank == 0:
            print(*self.data.ledger.lines(), sep="\n", flush=True)
            with writing("the run's files", arguments.save_folder):
                arguments.save_folder.mkdir(parents=True, exist_ok=True)
                write_run_yaml(arguments, arguments.save_folder / RUN_FILE)
                write_json(arguments.save_folder / LEDGER_FILE, self.data.ledger.to_dict())
                write_text(arguments.save_folder / "container.yaml", container_yaml(self.container))

    def train(self) -> RunResult:
        """Run finetune, then export."""
        import time

        from primus_bridge.bridge.engine import imported
        from primus_bridge.bridge.start import find
        from primus_bridge.bridge.weights import export_weights
        from primus_bridge.callbacks.base import RunState
        from primus_bridge.checkpoint.manifest import iteration_folder
        from primus_bridge.preflight import export_folder
        from primus_bridge.trainers.result import run_result

        began = time.monotonic()
        finetune = imported("megatron.bridge.training.finetune").finetune
        forward_step = imported("megatron.bridge.training.gpt_step").forward_step
        finetune(self.container, forward_step)
        arguments, save = self.arguments, self.arguments.save_folder
        saved = find(save)
        step, folder = saved.step if saved is not None else 0, None
        if arguments.checkpoint.convert_to_hf and step == arguments.train.train_iters:
            folder = export_folder(arguments)
            if self.rank == 0:
                export_weights(self.start, save, folder)
                print(f"exported  {folder}", flush=True)
        # what a core run measures stays empty: losses are in the engine's own log and TensorBoard
        state = RunState(arguments, step, arguments.train.train_iters, self.world_size)
        result = run_result(state, time.monotonic() - began, folder)
        result["checkpoint"] = str(iteration_folder(save, step)) if saved is not None else None
        return result

    def cleanup(self, on_error: bool = False) -> None:
        """Only the lock is left: finetune ends the process group that it began."""
        if self.lock is not None:
            self.lock.release()
