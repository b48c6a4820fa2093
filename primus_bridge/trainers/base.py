"""BaseTrainer: setup -> init -> train -> cleanup of every stage; a stage adds its objective and its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from primus_bridge.trainers.state import StatefulTrainer

if TYPE_CHECKING:
    from primus_bridge.callbacks.base import RunState
    from primus_bridge.checkpoint.lock import RunLock
    from primus_bridge.launch.signals import Asked
    from primus_bridge.trainers.result import RunResult


class BaseTrainer(StatefulTrainer):
    """One rank of a run: ``run()``.

    stage: which data and objective a subclass trains with. Exceptions of a phase reach the caller after
    ``cleanup(on_error=True)``.
    """

    exported: Optional[Path] = None
    """The folder of the export of the end, once it is written."""
    step = 0
    """Where the run starts: optimizer steps done before."""
    lock: Optional[RunLock] = None
    """Of the save folder, from setup to cleanup."""

    @property
    def save_folder(self) -> Path:
        return self.arguments.save_folder

    def run(self) -> RunResult:
        """The whole run; returns its result, the same on every rank."""
        from primus_bridge.launch.signals import asked_on_any_rank, asked_to_end

        try:
            with asked_to_end() as asked:
                for prepare in (self.setup, self.init):
                    prepare()
                    if reason := asked_on_any_rank(asked):
                        result = self._stopped_before_training(reason)
                        break
                else:
                    result = self.train()
        except BaseException:
            self.cleanup(on_error=True)
            raise
        self.cleanup()
        return result

    def _stopped_before_training(self, reason: str) -> RunResult:
        """A signal came while data and model were made ready: there is nothing new to save."""
        from primus_bridge.callbacks.base import RunState
        from primus_bridge.together import from_rank_0
        from primus_bridge.trainers.result import run_result

        state = RunState(self.arguments, self.step, self.arguments.train.train_iters, self.world_size)
        state.request_stop(reason)
        self._stopped(state, reason)
        return from_rank_0(lambda: run_result(state, 0.0, None))

    def _stopped(self, state: RunState, reason: str) -> None:
        """Say that a signal ended the run, and leave word of it for a batch script."""
        from primus_bridge.files import writing
        from primus_bridge.launch.signals import write_stopped

        where = f"at step {state.step} of {state.train_iters}"
        if self.arguments.checkpoint.save_optim or state.step == self.step:
            self.say(f"stopped   {where}: {reason}; the same command goes on")
        else:
            self.say(f"stopped   {where}: {reason}; it cannot go on: save_optim is false, only weights are saved")
            # not the signal's name, by which batch scripts requeue
            reason = "ended by a signal, without a training state (save_optim is false),"
        if self.rank == 0:
            with writing("the run's files", self.save_folder):
                write_stopped(self.save_folder, where, reason)

    def say(self, *lines: str) -> None:
        """Print on rank 0."""
        if self.rank == 0 and lines:
            print(*lines, sep="\n", flush=True)

    def objective(self):
        """The pure function of log-probabilities that this stage minimises."""
        from primus_bridge.objectives.supervised import supervised

        return supervised

    def setup(self) -> None:
        """Join the job, then find the model, the checkpoint to start from and the data; nothing large is read yet.

        Raises ConfigError, the same on every rank, for whatever a user can have wrong on any of them.
        """
        import torch.distributed as dist

        from primus_bridge.callbacks.base import CallbackList
        from primus_bridge.callbacks.build import build_callbacks
        from primus_bridge.checkpoint.lock import RunLock
        from primus_bridge.config.follow import follow_epochs
        from primus_bridge.config.validate import check_schedule, check_world, validate
        from primus_bridge.conversion.hf_folder import asset_files, resolve
        from primus_bridge.data.dataset import build_datasets, check_vocabulary
        from primus_bridge.data.loader import WholeLoader, open_loader
        from primus_bridge.data.tokenizer import load_tokenizer, pad_token_id
        from primus_bridge.megatron import parallel
        from primus_bridge.together import refusing_together
        from primus_bridge.trainers.beginning import find_start

        arguments = self.arguments
        parallel.initialize_distributed(arguments.dist)
        with refusing_together():
            validate(arguments)
            check_world(arguments, dist.get_world_size())
        self.say(*parallel.fit_to_device(arguments))
        # before the checkpoints in it are looked at: the run that writes them may still be there
        self.lock = RunLock.acquire(self.save_folder)
        self.start = find_start(arguments, self.save_folder)
        with refusing_together(patient=True):
            # made before the data, which may take hours; they are told things on rank 0 only
            self.told = build_callbacks(arguments, self.callbacks) if dist.get_rank() == 0 else CallbackList()
            named = arguments.tokenizer.tokenizer_model
            model_folder, vocab_size = self.start.model.folder, self.start.model.architecture.vocab_size
            self.tokenizer = load_tokenizer(named or str(model_folder))
            tokenizer_folder = resolve(named, weights=False) if named else model_folder
            self.assets = asset_files(model_folder, tokenizer_folder)
            self.pad_id = pad_token_id(self.tokenizer, vocab_size)
            self.data = build_datasets(arguments, self.tokenizer)
            self.loader = open_loader(self.data.train, arguments.rng.seed, arguments.dataset.shuffle)
            moved = self._find_place()
            if isinstance(self.loader, WholeLoader):  # a stream's length is not known
                sequences = self.loader.data.num_sequences
                given = self.loader.epoch * sequences + self.loader.sample - self.progress.nonfinite.passed_over
                follow_epochs(arguments, sequences, given, self.step)
                check_schedule(arguments)
            check_vocabulary(self.data, self.tokenizer, vocab_size, where=str(tokenizer_folder))
        if moved:
            self.say(moved)
        self.parallel = parallel.initialize(arguments)
        self._warn_of_memory()

    def _find_place(self) -> Optional[str]:
        """Where the run goes on, in steps and in the data; a line for the user when the data has changed."""
        from primus_bridge.checkpoint.coordinator import read_state

        resume = self.start.resume
        if resume is None:
            return None
        self.progress.load_state_dict(read_state(resume, "trainer"))
        self.step = self.progress.step
        return self.loader.load(read_state(resume, "dataset"))

    def _warn_of_memory(self) -> None:
        """Before anything large is built: a note when a rank's device is likely to be too small."""
        from primus_bridge.megatron.parallel import gpu_memory_bytes
        from primus_bridge.plan.device import Device
        from primus_bridge.plan.plan import memory_warning

        # MPI's launchers and a Primus without torchrun do not say it
        total, ranks = gpu_memory_bytes(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        device = Device.cpu(ranks) if total is None else Device.gpu(total, "found here")
        model, adapter = self.start.model, self.start.adapter
        warning = memory_warning(self.arguments, model, adapter, self.parallel.world_size, device)
        if warning is not None:
            self.say(f"note: {warning}")

    def init(self) -> None:
        """Build the model with its weights, adapters, optimizer and schedule; continue a checkpoint if any."""
        from primus_bridge.checkpoint.weights import load_weights_only
        from primus_bridge.megatron.model import build_model
        from primus_bridge.megatron.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
        from primus_bridge.together import refusing_together
        from primus_bridge.trainers.checkpoints import RunCheckpoints

        arguments, start = self.arguments, self.start
        chunks = build_model(start.model.architecture, arguments, self.parallel)
        self._load_base_weights(chunks)
        self.lora = None
        if arguments.peft.scheme == "lora":
            with refusing_together():
                self.base_digest = start.base_digest if self.rank == 0 else None
            from primus_bridge.peft.build import add_lora
            from primus_bridge.peft.plan import adapter_plan

            plan = adapter_plan(arguments.peft, start.model, start.adapter)
            # after the base weights: they are looked up by the names the layers have without adapters
            self.lora = add_lora(chunks, arguments.peft, plan, None if start.adapter_weights else arguments.rng.seed)
        if start.adapter_weights is not None:
            load_weights_only(start.adapter_weights, chunks)
        self.chunks = wrap_data_parallel(chunks, arguments)
        self.optimizer = build_optimizer(self.chunks, arguments)
        self.scheduler = build_scheduler(self.optimizer, arguments)
        self.checkpoints = RunCheckpoints(self)
        if start.resume is not None:
            # place and data were read in setup
            lines = self.checkpoints.coordinator.load(start.resume, self.parallel.layout, ("trainer", "dataset"))
            self.say(*lines)

    def _load_base_weights(self, chunks: list) -> None:
        from primus_bridge.checkpoint.weights import load_weights_only
        from primus_bridge.conversion.load import RandomWeights, load_weights
        from primus_bridge.megatron.names import global_parameters

        start, model = self.start, self.start.model
        if start.resume is not None and self.arguments.peft.scheme is None:
            return  # the checkpoint holds every weight
        if start.weights is not None:
            load_weights_only(start.weights, chunks)
            return
        reader = (
            model.weights()
            if start.hf_weights
            else RandomWeights(model.family, model.architecture, self.arguments.rng.seed)
        )
        load_weights(global_parameters(chunks), reader, model.family, model.architecture, self.parallel.shards)

    def train(self) -> RunResult:
        """Announce, run the loop, export."""
        import time

        from primus_bridge.callbacks.base import CallbackList
        from primus_bridge.config import write_run_yaml
        from primus_bridge.files import writing
        from primus_bridge.launch.signals import asked_to_end, clear_stopped
        from primus_bridge.megatron.loop import TrainingRun, batch_shape, run_loop
        from primus_bridge.megatron.measure import Measurements
        from primus_bridge.megatron.parallel import watching_ranks
        from primus_bridge.patient_file import PatientFile
        from primus_bridge.report.notes import LEDGER_FILE, MEMORY_FILE, RUN_FILE
        from primus_bridge.together import from_rank_0
        from primus_bridge.trainers.beginning import announcement
        from primus_bridge.trainers.memory import note_memory
        from primus_bridge.trainers.result import run_result

        shape = batch_shape(self.arguments, self.parallel, self.pad_id)
        self._count_padding(shape)
        self.say(*announcement(self))
        if self.rank == 0:
            with writing("the run's files", self.save_folder):
                self.save_folder.mkdir(parents=True, exist_ok=True)
                clear_stopped(self.save_folder)
                write_run_yaml(self.arguments, self.save_folder / RUN_FILE)
        self.own_files = {name: PatientFile(self.save_folder / name) for name in (LEDGER_FILE, MEMORY_FILE)}
        self._write_ledger(must=True)
        measured = Measurements(self.arguments, self.rank, self.progress.step, self.chunks, self.optimizer)
        self.say(*measured.profiler.moved())
        added = [callback for callback in self.callbacks if callback not in self.told.callbacks]  # since setup
        began = time.monotonic()
        with asked_to_end() as interrupted, watching_ranks(self.arguments.dist):
            state = run_loop(
                TrainingRun(
                    arguments=self.arguments,
                    parallel=self.parallel,
                    chunks=self.chunks,
                    optimizer=self.optimizer,
                    scheduler=self.scheduler,
                    loader=self.loader,
                    validation_data=self.data.validation,
                    objective=self.objective(),
                    batch_shape=shape,
                    callbacks=CallbackList([*self.told.callbacks, *added]),
                    checkpoints=self.checkpoints,
                    measured=measured,
                    note_memory=lambda step: note_memory(self, measured.memory, step),
                    start_step=self.progress.step,
                    consumed_samples=self.progress.consumed_samples,
                    nonfinite=self.progress.nonfinite,
                    rollback=self._rollback,
                    interrupted=interrupted,
                    finish=lambda state: self._finish(state, interrupted),
                )
            )
        seconds = time.monotonic() - began
        self.say(*measured.profiler.written())
        return from_rank_0(lambda: run_result(state, seconds, self.exported))

    def _finish(self, state: RunState, interrupted: Asked) -> None:
        """Say why the run stopped early; export what is done: all of it, or as much as a callback held to be enough."""
        from primus_bridge.callbacks.report import note_export
        from primus_bridge.launch.signals import asked_on_any_rank
        from primus_bridge.preflight import export_folder

        early = state.step < state.train_iters
        if early and state.interrupted:
            self._stopped(state, asked_on_any_rank(interrupted) or "a signal received")
        elif early and state.stop_requested:
            self.say(f"stopped   at step {state.step} of {state.train_iters}: {state.stop_reason}")
        done = not early or (state.stop_requested and not state.interrupted)
        if done and self.arguments.checkpoint.convert_to_hf:
            self.exported = self.export(export_folder(self.arguments))
            if self.rank == 0 and self.arguments.logger.report:
                note_export(self.arguments, state.step, self.exported)
        for file in self.own_files.values():
            file.retry(must=True)

    def _count_padding(self, shape) -> None:
        """Tell the ledger what an unpacked epoch's batches take at this layout."""
        from primus_bridge.data.batches import epoch_places
        from primus_bridge.data.loader import WholeLoader

        if isinstance(self.loader, WholeLoader) and not self.loader.data.packed:
            lengths = self.loader.epoch_inputs()
            places = epoch_places(lengths, shape, self.arguments.train.global_batch_size)
            self.data.ledger.sequences.places = places

    def _write_ledger(self, must: bool = False) -> None:
        """On rank 0; of a stream again with every checkpoint, with what has been read by then."""
        from primus_bridge.files import write_json
        from primus_bridge.report.notes import LEDGER_FILE

        if self.rank == 0:
            ledger, file = self.data.ledger.to_dict(), self.own_files[LEDGER_FILE]
            file.write(lambda: write_json(file.path, ledger), must)

    def export_beside(self, step: int) -> None:
        """What goes with the checkpoint of ``step``: a stream's ledger, and the export of hf_save_interval if due."""
        from primus_bridge.checkpoint.manifest import iteration_folder
        from primus_bridge.preflight import export_folder

        if self.data.ledger.streaming:
            self._write_ledger()
        checkpoint = self.arguments.checkpoint
        if checkpoint.convert_to_hf and checkpoint.hf_save_interval and not step % checkpoint.hf_save_interval:
            folder = export_folder(self.arguments)
            self.export(folder.with_name(f"{folder.name}_{iteration_folder(folder, step).name}"))

    def _rollback(self) -> Optional[int]:
        """Go back to the newest whole checkpoint in all but the place in the data; its step, None without any.

        Collective. Newer ones, which are damaged, are set aside.
        """
        from primus_bridge.checkpoint.integrity import find_whole
        from primus_bridge.checkpoint.manifest import committed, step_of
        from primus_bridge.checkpoint.pruning import set_aside
        from primus_bridge.files import writing
        from primus_bridge.together import from_rank_0, refusing_together

        if not from_rank_0(lambda: len(committed(self.save_folder))):
            return None
        with refusing_together():
            found = find_whole(self.save_folder, self.arguments.checkpoint.verify_checksums)
        with refusing_together():
            if self.rank == 0:
                with writing("the run's files", self.save_folder):
                    newer = [one for one in committed(self.save_folder) if step_of(one) > step_of(found.folder)]
                    set_aside(self.save_folder, newer)
        self.say(*self.checkpoints.coordinator.load(found, self.parallel.layout, ("trainer", "dataset")))
        return found.manifest.step

    def export(self, folder: Path) -> Path:
        """Write the model or adapter as it is now to a Hugging Face folder. Collective."""
        from primus_bridge.trainers.export import export_run

        export_run(self, folder)
        self.say(f"exported  {folder}")
        return folder

    def cleanup(self, on_error: bool = False) -> None:
        """Leave the job. After an error the other ranks may be gone, so nothing collective is tried."""
        import torch.distributed as dist

        self._let_go()
        if self.lock is not None:
            self.lock.release()
        if on_error or not dist.is_initialized():
            return
        from primus_bridge.megatron.parallel import finalize

        finalize()

    def _let_go(self) -> None:
        """Of the model and what belongs to it: a Python program may train again, in this process."""
        if hasattr(self, "checkpoints"):
            self.checkpoints.coordinator.abandon()  # after an error one may be under way
        if hasattr(self, "chunks"):
            from primus_bridge.megatron.optimizer import release

            release(self.chunks)
            for name in ("checkpoints", "chunks", "optimizer", "scheduler", "lora"):
                self.__dict__.pop(name, None)
