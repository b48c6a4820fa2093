"""CheckpointCoordinator: saves and loads a run's declared state; the one place that asks which rank does what."""

from __future__ import annotations

import io
import os
import shutil
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Container, Mapping, Optional, Sequence

import torch
import torch.distributed as dist

from primus_bridge.checkpoint.components import ReshapedStateful, SharingPattern, StateComponent
from primus_bridge.checkpoint.failures import WHAT, asking, failing, write_failure
from primus_bridge.checkpoint.manifest import HF_ASSETS, Checkpoint, Manifest, commit, iteration_folder
from primus_bridge.checkpoint.pruning import prune
from primus_bridge.checkpoint.safe_load import load_plain
from primus_bridge.checkpoint.sharing import STATE, Ranking, copies, file_name, own_copy
from primus_bridge.checkpoint.writer import Writer, Written
from primus_bridge.errors import ConfigError
from primus_bridge.files import existing_parent, write_json
from primus_bridge.hashing_file import write_hashed
from primus_bridge.together import SharedError, gather, refusing_together

if TYPE_CHECKING:
    from primus_bridge.checkpoint.replication import Replica
    from primus_bridge.megatron.sharded_save import ShardedSave


@dataclass(frozen=True)
class SaveOptions:
    """How checkpoints are saved: CheckpointArguments says what each means."""

    asynchronous: bool = False
    save_total_limit: Optional[int] = None
    keep_every: Optional[int] = None
    weights_only: bool = False
    """Only the model is saved; what is loaded is all there is."""
    validation_level: Optional[str] = None


@dataclass(frozen=True)
class Assets:
    """What lies beside the shards, so that a checkpoint exports by itself: the model's config and its other files."""

    files: Sequence[Path]
    config: dict[str, Any]

    def write(self, folder: Path) -> None:
        from primus_bridge.conversion.hf_folder import copy_assets

        folder.mkdir()
        write_json(folder / "config.json", self.config)
        copy_assets(self.files, folder)


@dataclass
class _Save:
    """A save that has begun."""

    folder: Path
    manifest: Manifest
    sharded: ShardedSave
    writer: Writer


class CheckpointCoordinator:
    """The checkpoints of one run in ``save``. Made, and each method called, by all ranks together.

    components: the same keys on every rank, one of them "model". groups: this rank's process groups by name, which
    PER_GROUP components name. Raises SharedError when ranks declare different state, or the one that writes a piece
    has none.
    """

    def __init__(
        self,
        save: Path,
        components: Sequence[StateComponent],
        groups: Mapping[str, Any],
        options: SaveOptions = SaveOptions(),
    ):
        self.save = save
        self.components = list(components)
        self.groups = dict(groups)
        self.options = options
        self.rank = dist.get_rank()
        self._saved = [c for c in self.components if c.key == "model" or not options.weights_only]
        self._plain = [component for component in self.components if not component.sharded]
        self._sharded = {component.key: component.stateful for component in self.components if component.sharded}
        self.ranking = self._meet()
        self._buffers: dict[Any, torch.Tensor] = {}
        self._checked = False
        self._pending: Optional[_Save] = None

    def _meet(self) -> Ranking:
        """Compare what ranks declare, and learn who shares groups and machines with whom."""
        declared = [(c.key, c.sharing_pattern.value, c.process_group_name) for c in self.components]
        groups = {name: tuple(dist.get_process_group_ranks(group)) for name, group in self.groups.items()}
        node = (socket.gethostname(), os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID"))
        given = [component.stateful is not None for component in self.components]
        everybody = gather((declared, groups, node, given))
        for rank, (theirs, *_) in enumerate(everybody):
            if theirs != everybody[0][0]:
                odd = sorted({key for key, *_ in set(theirs) ^ set(everybody[0][0])}) or ["their order"]
                raise SharedError(f"ranks 0 and {rank} declare different state components: {', '.join(odd)}")
        keys = [key for key, *_ in declared]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise SharedError(f"two state components have the same key: {', '.join(twice)}")
        nodes: dict[Any, list[int]] = {}
        for rank, (_, _, where, _) in enumerate(everybody):
            nodes.setdefault(where, []).append(rank)
        ranking = Ranking(
            len(everybody),
            {name: sorted({theirs[name] for _, theirs, _, _ in everybody}) for name in groups},
            [tuple(ranks) for ranks in nodes.values()],
        )
        for number, component in enumerate(self.components):
            for writer, *_ in copies(component, ranking):
                if not everybody[writer][-1][number]:
                    raise SharedError(
                        f"its pattern is {component.sharing_pattern.value}, so rank {writer} writes it, and has none "
                        "(stateful is None there): give it to that rank, or leave the component out on all",
                        where=f"state component {component.key!r}",
                    )
        return ranking

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not committed; the same on every rank."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self._pending is not None and self._pending.writer.busy

    def begin(self, manifest: Manifest, assets: Assets) -> None:
        """Take the run's state and write it to SAVE/iter_<step>: in the background, when saves are asynchronous.

        Then training may change the state at once. Raises SaveFailed when there is no room, and SharedError naming
        ranks and tensors when copies that should be equal differ.
        """
        from primus_bridge.megatron.parallel import wait_for_queued

        assert self._pending is None, "the save before is not finished"
        wait_for_queued()
        self._validate()
        folder = iteration_folder(self.save, manifest.step)
        with failing(folder, removes=False):  # nothing is prepared yet
            plain = self._plain_state()
        with failing(folder):
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)  # what a killed run left half-written
                (folder / STATE).mkdir(parents=True)
        sharded = self._plan(folder)
        sizes = gather(({name: len(data) for name, data in plain.items()}, sharded.nbytes))
        with failing(folder):
            if self.rank == 0:
                self._check_space(sum(sum([*files.values(), *nbytes.values()]) for files, nbytes in sizes))
            background = self.options.asynchronous and self._has_memory(sum(sharded.nbytes.values()))
            if background:
                sharded.stage(self._buffers)
        self._describe(manifest, sizes)
        lead = self.rank == 0

        def work(stopped: Callable[[], bool]) -> Written:
            checksums = {name: write_hashed(folder / name, data) for name, data in plain.items()}
            if lead:
                assets.write(folder / HF_ASSETS)
            results, of_shards = sharded.write(stopped)
            return Written(checksums | of_shards, results)

        self._pending = _Save(folder, manifest, sharded, Writer(work, background))

    def finish(self) -> Path:
        """Wait until all ranks have written, commit the checkpoint, and thin the older ones; its folder.

        Raises SaveFailed when a rank could not write: nothing of it is left then.
        """
        save, self._pending = self._pending, None
        assert save is not None
        written = save.writer.result()
        with failing(save.folder):
            if written.error is not None:
                raise write_failure(written.error, save.folder)
        gathered = _gather_on_lead((written.results, written.checksums))
        with failing(save.folder):
            if gathered is not None:
                checksums = {name: of for _, sums in gathered for name, of in sums.items()}
                for name in checksums:  # those of other machines too
                    if not (save.folder / name).is_file():
                        raise ConfigError(f"{name} is written and not to be seen by rank 0", where=str(save.folder))
                save.sharded.finish([results for results, _ in gathered])
                commit(save.folder, save.manifest, checksums)
        if self.rank == 0 and self.options.save_total_limit:
            with suppress(OSError):  # the checkpoint stands, whatever becomes of older ones
                prune(self.save, self.options.save_total_limit, self.options.keep_every, save.manifest.step)
        return save.folder

    def abandon(self) -> None:
        """Stop what is being written, without asking other ranks: the run has failed."""
        if self._pending is not None:
            self._pending.writer.stop()
            self._pending = None
        self._buffers.clear()

    def _plan(self, folder: Path) -> ShardedSave:
        from primus_bridge.megatron.sharded_save import ShardedSave

        optimizer = None if self.options.weights_only else self._sharded.get("optimizer")
        sharded = ShardedSave(folder, self._sharded["model"], optimizer, check=not self._checked)
        self._checked = True  # the parts of tensors are the same at each save
        return sharded

    def _plain_state(self) -> dict[str, bytes]:
        """The files of components that this rank writes itself, and what is in them."""
        files = {}
        for component in self._saved:
            if component.sharded:
                continue
            ranks = own_copy(component, self.ranking, self.rank)
            if ranks[0] == self.rank:
                stream = io.BytesIO()
                with asking(component, "state_dict"):
                    torch.save(component.stateful.state_dict(), stream)
                stream.seek(0)
                load_plain(stream, f"what {type(component.stateful).__name__}.state_dict() returns")
                files[file_name(component, self.ranking, ranks)] = stream.getvalue()
        return files

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(existing_parent(self.save)).free
        if free < needed:
            raise ConfigError(
                f"cannot write {WHAT}: No space left on device: it takes {needed / 1e6:.3g} MB and {free / 1e6:.3g} MB "
                "are free; free space, keep fewer (--save_total_limit) or give another folder",
                where=str(self.save),
            )

    def _has_memory(self, nbytes: int) -> bool:
        """Whether a copy of what this rank saves fits into the memory that is left to it; else it writes at once."""
        import psutil

        if self._buffers:
            return True
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return nbytes < psutil.virtual_memory().available / ranks

    def _describe(self, manifest: Manifest, sizes: list[tuple[dict[str, int], dict[str, int]]]) -> None:
        """Put the components into the manifest. sizes: each rank's, of its files and of its parts of sharded state."""
        of_files = {name: size for files, _ in sizes for name, size in files.items()}
        manifest.world_size = self.ranking.world_size
        manifest.groups = {name: [list(ranks) for ranks in groups] for name, groups in self.ranking.groups.items()}
        manifest.components = []
        for component in self._saved:
            owners = copies(component, self.ranking)
            files = [] if component.sharded else [file_name(component, self.ranking, ranks) for ranks in owners]
            nbytes = sum(of_files[name] for name in files)
            if component.sharded:
                nbytes = sum(parts.get(component.key, 0) for _, parts in sizes)
            manifest.components.append(
                {
                    "key": component.key,
                    "pattern": component.sharing_pattern.value,
                    "group": component.process_group_name,
                    "required": component.required,
                    "ranks": [list(ranks) for ranks in owners],
                    "files": files,
                    "bytes": nbytes,
                    "metadata": component.metadata,
                }
            )

    def _validate(self) -> None:
        """Compare the copies that should be equal."""
        if self.ranking.world_size == 1:
            return
        from primus_bridge.checkpoint.replication import check_replicas

        with refusing_together():
            replicas = self._replicas()
        check_replicas(replicas)

    def _replicas(self) -> list[Replica]:
        from primus_bridge.checkpoint.replication import Replica

        replicas = []
        for component in self._saved:
            level = self.options.validation_level or component.validation_level
            shared = component.sharing_pattern in (SharingPattern.REPLICATED, SharingPattern.PER_GROUP)
            if not (component.validate_replication and shared) or level == "none":
                continue
            if component.sharded:
                states = component.stateful.replicas()
                replicas += [Replica(component.key, state, self.groups[name], level) for name, state in states.items()]
            else:
                group = self.groups.get(component.process_group_name or "")
                with asking(component, "state_dict"):
                    state = component.stateful.state_dict() if component.stateful is not None else None
                replicas.append(Replica(component.key, state, group, level))
        return replicas

    def load(self, checkpoint: Checkpoint, layout: Mapping[str, int], without: Container[str] = ()) -> list[str]:
        """Put a checkpoint's state into the components, but those of the keys ``without``; lines for the user.

        layout: of this run. Learning rates, betas and the schedule's length stay those of this run's arguments. State
        of ranks, groups or machines that the checkpoint's layout had otherwise goes by its own rule
        (ReshapedStateful), or not at all. Raises ConfigError when the checkpoint lacks a required component.
        """
        from primus_bridge.megatron.dist_checkpoint import load_sharded
        from primus_bridge.megatron.optimizer import keep_hyperparameters

        manifest, saved = checkpoint.manifest, {entry["key"]: entry for entry in checkpoint.manifest.components}
        missing = [c.key for c in self.components if c.required and c.key not in saved]
        if missing:
            raise ConfigError(
                f"has no {', '.join(missing)}, which this run continues with; declare it required=False, or start "
                "from its weights: --finetune",
                where=str(checkpoint.folder),
            )
        optimizer = self._sharded["optimizer"].optimizer
        with keep_hyperparameters(optimizer):
            model = self._sharded["model"]
            load_sharded(checkpoint.folder, model.chunks, optimizer, trainable_only=model.trainable_only)
        same_layout = {"context": 1} | manifest.layout == layout  # older manifests do not name it
        lines = [
            f"note: state component {key} of the checkpoint is not this run's" for key in saved if not self._has(key)
        ]
        with refusing_together():
            for component in self._plain:
                if component.key in without or component.stateful is None:
                    continue
                if component.key not in saved:
                    lines.append(f"note: the checkpoint has no state component {component.key}; it starts anew")
                    continue
                line = self._load_plain(component, saved[component.key], checkpoint, same_layout)
                lines += [line] if line else []
        return lines

    def _has(self, key: str) -> bool:
        return any(component.key == key for component in self.components)

    def _load_plain(
        self, component: StateComponent, saved: dict[str, Any], checkpoint: Checkpoint, same_layout: bool
    ) -> Optional[str]:
        where = f"state component {component.key!r} in {checkpoint.folder}"
        pattern = component.sharing_pattern
        before, now = (saved["pattern"], saved["group"]), (pattern.value, component.process_group_name)
        if before != now:
            was, has = (" of ".join(filter(None, names)) for names in (before, now))
            what = f"was saved as {was}, this run has it {has}"
            if component.required:
                raise ConfigError(f"{what}: declare it as before, or required=False", where=where)
            return f"note: state component {component.key} {what}; it starts anew"
        whole = pattern in (SharingPattern.GLOBAL, SharingPattern.REPLICATED)
        owners = [list(ranks) for ranks in copies(component, self.ranking)]
        if whole or (same_layout and saved["ranks"] == owners):
            name = file_name(component, self.ranking, own_copy(component, self.ranking, self.rank))
            state = load_plain(checkpoint.folder / name, str(checkpoint.folder / name))
            with asking(component, "load_state_dict"):
                component.stateful.load_state_dict(state)
            return None
        if isinstance(component.stateful, ReshapedStateful):
            with asking(component, "layout_changed"):
                component.stateful.layout_changed(checkpoint.manifest.step)
            return None
        if component.required:
            raise ConfigError(
                f"belongs to the ranks {saved['ranks']} of another layout, and has no rule for this one: go on with "
                "that layout, give it a layout_changed(step), or declare it required=False",
                where=where,
            )
        return f"note: state component {component.key} belongs to another layout's ranks; it starts anew"


def read_state(checkpoint: Checkpoint, key: str) -> Any:
    """The state of a component that is one for the whole job. Raises ConfigError when it is not there."""
    path = checkpoint.folder / STATE / f"{key}.pt"
    try:
        return load_plain(path, str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"has no state component {key}: it was written by an older version; start from its weights: --load "
            f"{checkpoint.folder} --finetune, with another --save",
            where=str(checkpoint.folder),
        ) from None


def _gather_on_lead(value: Any) -> Optional[list[Any]]:
    """The value of each rank on rank 0, None on the others. Collective."""
    lead = dist.get_rank() == 0
    values: Optional[list[Any]] = [None] * dist.get_world_size() if lead else None
    dist.gather_object(value, values)
    return values
