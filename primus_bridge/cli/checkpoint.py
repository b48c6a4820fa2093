"""``primus checkpoint``: what a save folder holds: list it, verify it, compare two checkpoints, thin it out."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Optional

from primus_bridge.cli.convert import Parser
from primus_bridge.errors import ConfigError, did_you_mean
from primus_bridge.files import check_output_file, write_json, writing

if TYPE_CHECKING:
    from primus_bridge.checkpoint.manifest import Checkpoint

HELP = """\
primus checkpoint: what a save folder holds

usage: primus checkpoint ls DIR [--json FILE]
       primus checkpoint verify DIR [--all]
       primus checkpoint diff DIR OTHER_DIR [--tensors] [--json FILE]
       primus checkpoint prune DIR --keep N [--keep_every STEPS] [--dry_run]

  ls      a row a checkpoint: step, time, size, what it holds, ranks and layout, how many state components, whether
          its files are there; of one iteration: its components, files and arguments
  verify  reads every file against its checksum. Exit code 0: whole; 1: damaged, and what is
  diff    the manifests and the state of two checkpoints; with --tensors every tensor too, of any two layouts.
          Exit code 0: equal; 1: different
  prune   removes all but the newest N, the best, and those of a multiple of STEPS steps; and what killed runs left, and
          what runs found damaged and set aside. The newest are read against their checksums, and one that is damaged
          is not counted among the N; nothing is removed where none is whole

DIR is a run's save folder, where verify and diff take the newest checkpoint, or one iteration (SAVE/iter_0000100).
--json FILE also writes what is printed, in full.

examples:
  primus checkpoint ls out
  primus checkpoint ls out/iter_0000100 --json manifest.json
  primus checkpoint verify out --all
  primus checkpoint diff out/iter_0000100 other/iter_0000100 --tensors
  primus checkpoint prune out --keep 2 --keep_every 1000 --dry_run
"""
DIFFERENT = 1


def main(argv: list[str]) -> int:
    """The command with the words after it; the exit code."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(HELP, end="")
        return 0
    action, words = argv[0], argv[1:]
    if action not in ACTIONS:
        raise ConfigError(
            f"unknown action '{action}'{did_you_mean(action, ACTIONS)}; the actions are {', '.join(ACTIONS)}"
        )
    parser = Parser(prog=f"primus checkpoint {action}", allow_abbrev=False, add_help=False)
    return ACTIONS[action](parser, words)


def _list(parser: Parser, words: list[str]) -> int:
    parser.add_argument("dir", metavar="DIR")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse(words)
    check_output_file(options.json, "--json")
    from primus_bridge.checkpoint.listing import entries, entry
    from primus_bridge.checkpoint.manifest import is_checkpoint
    from primus_bridge.checkpoint.terminal import show_list, show_one

    folder = _folder(options.dir)
    if is_checkpoint(folder):
        one = entry(folder)
        _write(options.json, "the checkpoint", one.to_dict())
        show_one(one)
        return 0
    found = entries(folder)
    if not found:
        raise ConfigError("holds no checkpoints (iter_*)", where=str(folder))
    _write(options.json, "the list", [one.to_dict() for one in found])
    show_list(folder, found)
    return 0


def _verify(parser: Parser, words: list[str]) -> int:
    parser.add_argument("dir", metavar="DIR")
    parser.add_argument("--all", action="store_true")
    options = parser.parse(words)
    from primus_bridge.checkpoint.manifest import candidates

    folders = candidates(_folder(options.dir))
    wrong = [not _is_whole(folder) for folder in (folders[::-1] if options.all else folders[:1])]
    return DIFFERENT if any(wrong) else 0


def _is_whole(folder: Path) -> bool:
    """Read and judge one checkpoint, on the terminal."""
    from primus_bridge.checkpoint.integrity import unlisted
    from primus_bridge.checkpoint.manifest import OLD_FORMAT
    from primus_bridge.checkpoint.terminal import size

    began = time.perf_counter()
    checkpoint, findings = _read(folder)
    seconds = time.perf_counter() - began
    if checkpoint is None or findings:
        print(f"{folder}: DAMAGED", *findings, sep="\n  ")
    elif checkpoint.manifest.format == OLD_FORMAT:
        print(f"{folder}: whole by the sizes of its files: an older checkpoint, without checksums")
    else:
        files = checkpoint.manifest.files
        nbytes = sum(files.values())
        rate = f"{nbytes / seconds / 1e9:.2f} GB/s"
        print(f"{folder}: whole, {len(files)} files, {size(nbytes)} in {seconds:.1f} s, {rate}")
    for name in unlisted(checkpoint) if checkpoint is not None else ():
        print(f"  note: {name} is not in the manifest; nothing reads it")
    return not findings


def _read(folder: Path) -> tuple[Optional[Checkpoint], list[str]]:
    """A checkpoint, unless its manifest is damaged, and what is wrong with it by its checksums."""
    from primus_bridge.checkpoint.integrity import damage
    from primus_bridge.checkpoint.manifest import Checkpoint, read_manifest

    try:
        checkpoint = Checkpoint(folder, read_manifest(folder))
    except ConfigError as error:
        return None, [str(error)]
    with _progress(folder.name, sum(checkpoint.manifest.files.values())) as advance:
        return checkpoint, damage(checkpoint, progress=advance)


def _diff(parser: Parser, words: list[str]) -> int:
    parser.add_argument("left", metavar="DIR")
    parser.add_argument("right", metavar="OTHER_DIR")
    parser.add_argument("--tensors", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse(words)
    check_output_file(options.json, "--json")
    from primus_bridge.checkpoint.compare import Part, compare_manifests, compare_state, compare_tensors, shard_bytes
    from primus_bridge.checkpoint.manifest import find
    from primus_bridge.checkpoint.terminal import show_differences

    left, right = (find(_folder(name)) for name in (options.left, options.right))
    parts = [compare_manifests(left.manifest, right.manifest), compare_state(left, right)]
    if options.tensors:
        with _progress(left.folder.name, shard_bytes(left.manifest)) as advance:
            found = list(compare_tensors(left, right, advance))
        parts.append(Part("tensors", len(found), [change for change in found if change is not None]))
    _write(options.json, "the differences", {part.name: part.to_dict() for part in parts})
    show_differences([str(left.folder), str(right.folder)], parts)
    return DIFFERENT if any(part.changes for part in parts) else 0


def _prune(parser: Parser, words: list[str]) -> int:
    parser.add_argument("dir", metavar="DIR")
    parser.add_argument("--keep", type=int, metavar="N")
    parser.add_argument("--keep_every", type=int, metavar="STEPS")
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse(words)
    if options.keep is None:
        raise ConfigError("how many of the newest are kept? give --keep N")
    for name in ("keep", "keep_every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be above 0, got {getattr(options, name)}")
    save = _folder(options.dir)
    from primus_bridge.checkpoint.manifest import is_checkpoint

    if is_checkpoint(save):
        raise ConfigError(f"is one checkpoint; give its save folder, {save.absolute().parent}", where=options.dir)
    if options.dry_run:
        _remove(save, options)
        return 0
    from primus_bridge.checkpoint.lock import RunLock

    with RunLock.acquire(save):
        _remove(save, options)
    return 0


def _remove(save: Path, options: argparse.Namespace) -> None:
    from primus_bridge.checkpoint.listing import folder_bytes
    from primus_bridge.checkpoint.manifest import committed
    from primus_bridge.checkpoint.pruning import aside, outdated, remove, uncommitted
    from primus_bridge.checkpoint.terminal import size

    if not committed(save):
        raise ConfigError("holds no committed checkpoint (iter_*/manifest.json)", where=str(save))
    read: dict[Path, list[str]] = {}

    def is_whole(folder: Path) -> bool:
        _, read[folder] = _read(folder)
        return not read[folder]

    old = outdated(save, options.keep, options.keep_every, is_whole)
    damaged = {folder: findings[0] for folder, findings in read.items() if findings}
    if len(damaged) == len(read):
        listed = "; ".join(f"{folder.name}: {finding}" for folder, finding in damaged.items())
        raise ConfigError(f"no checkpoint in it is whole, and none is removed: {listed}", where=str(save))
    for folder, finding in damaged.items():
        print(f"damaged  {folder.name}  stays, and is not counted: {finding}")
    kinds = dict.fromkeys(old, "") | dict.fromkeys(uncommitted(save), " (half-written)")
    kinds |= dict.fromkeys(aside(save), " (set aside: damaged)")
    sizes = {folder: folder_bytes(folder) for folder in kinds}
    gone = list(sizes) if options.dry_run else remove(sizes)
    verb = "would go" if options.dry_run else "removed"
    for folder in gone:
        print(f"{verb}  {folder.name}  {size(sizes[folder])}{kinds[folder]}")
    left = len(committed(save)) - (len(old) if options.dry_run else 0)
    freed = size(sum(sizes[folder] for folder in gone))
    print(f"{len(gone)} {verb}, {freed}; {left} {'is' if left == 1 else 'are'} left in {save}")


ACTIONS: dict[str, Callable[[Parser, list[str]], int]] = {
    "ls": _list,
    "verify": _verify,
    "diff": _diff,
    "prune": _prune,
}


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError("no such folder", where=name)
    return folder


def _write(file: Optional[str], what: str, value: Any) -> None:
    # before anything is printed: the terminal may be a pipe that somebody closes
    if file is not None:
        with writing(what, Path(file)):
            write_json(Path(file), value)


@contextmanager
def _progress(name: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr while it is a terminal; gives what is to be told of bytes that were read."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(name, total=nbytes)
        yield lambda count: bar.advance(task, count)


if __name__ == "__main__":
    from primus_bridge.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
