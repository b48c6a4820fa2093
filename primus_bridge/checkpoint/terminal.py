"""Checkpoints on the terminal, 80 columns: the list of a save folder, one checkpoint in full, what differs in two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from primus_bridge.checkpoint.changes import flat
from primus_bridge.checkpoint.compare import Change, Part
from primus_bridge.checkpoint.listing import Entry
from primus_bridge.checkpoint.manifest import ASIDE, OLD_FORMAT, Manifest
from primus_bridge.config import schema

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

SHORT = {"tensor": "TP", "pipeline": "PP", "virtual": "VPP", "context": "CP", "expert": "EP", "data": "DP"}
"""Sizes of a layout that are told when they are above 1."""
COLOURS = {"whole": "green", "damaged": "bold red", "half-written": "yellow", "set aside": "red", "foreign": "dim"}
SHOWN = 40
"""Differences of a part that are printed; --json has them all."""


def console() -> Console:
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def size(nbytes: float) -> str:
    """1.2 GB, 340 MB, 12 kB, 120 B"""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.3g} {name}"
    return f"{nbytes:.0f} B"


def show_list(save: Path, entries: Sequence[Entry]) -> None:
    """A row a checkpoint, the newest last, and below what is wrong with which. parts: state components."""
    out, table = (
        console(),
        _table("step", "saved", "size", "holds", "ranks", "parts", "state", right=("step", "size", "parts")),
    )
    for one in entries:
        manifest, name = one.manifest, one.folder.name.removeprefix(ASIDE)
        table.add_row(
            str(manifest.step if manifest else int(name.removeprefix("iter_"))) if _has_step(name) else name,
            when(one),
            size(one.nbytes),
            holds(manifest) if manifest else "",
            ranks(manifest) if manifest else "",
            str(len(manifest.components)) if manifest and manifest.components else "",
            _verdict(one),
        )
    out.print(table)
    for one in entries:
        for finding in one.findings:
            out.print(_line(one.folder.name, finding, "red"), soft_wrap=True)
    total = size(sum(one.nbytes for one in entries))
    out.print(f"{len(entries)} in {save}, {total}", soft_wrap=True, style="dim")


def _has_step(name: str) -> bool:
    return name.removeprefix("iter_").isdecimal()


def _verdict(one: Entry) -> Text:
    from rich.text import Text

    return Text.assemble((one.state, COLOURS[one.state]), (" best", "bold green") if one.best else "")


def when(one: Entry) -> str:
    """In this machine's time zone."""
    return one.saved.astimezone().strftime("%Y-%m-%d %H:%M") if one.saved else ""


def holds(manifest: Manifest) -> str:
    """``model, sft run``: weights and the state of a run that can go on; ``adapter of sft``: weights alone."""
    if manifest.training_state:
        return f"{manifest.contents}, {manifest.stage or 'training'} run"
    return manifest.contents + (f" of {manifest.stage}" if manifest.stage else "")


def ranks(manifest: Manifest) -> str:
    """``8 TP2 PP2 DP2``"""
    sizes = [f"{SHORT[name]}{n}" for name, n in manifest.layout.items() if name in SHORT and n > 1]
    return " ".join([str(manifest.world_size)] * (manifest.format != OLD_FORMAT) + sizes)


def show_one(one: Entry) -> None:
    """All that a manifest says: what it holds, components, files, arguments."""
    out, manifest = console(), one.manifest
    for line in _facts(one):
        out.print(line, soft_wrap=True)
    for finding in one.findings:
        out.print(_line("damaged", finding, "red"), soft_wrap=True)
    if manifest is None:
        return
    if manifest.components:
        out.print()
        out.print(_components(manifest))
    out.print()
    table = _table("file", "size", "SHA-256", right=("size",))
    for name, nbytes in manifest.files.items():
        table.add_row(name, size(nbytes), manifest.checksums.get(name, "")[:16])
    out.print(table)
    out.print()
    out.print(_line("arguments", ""))
    for name, value in flat(manifest.arguments).items():
        out.print(f"  {name}  {schema.shown(value)}", soft_wrap=True)


def _facts(one: Entry) -> Iterator[Text]:
    yield _line("checkpoint", str(one.folder))
    yield _line("state", f"{one.state}{', the best of its run' if one.best else ''}", COLOURS[one.state])
    manifest = one.manifest
    if manifest is None:
        yield _line("size", size(one.nbytes))
        return
    yield _line("saved", f"{when(one)}, {size(one.nbytes)}, files: {len(manifest.files)}")
    yield _line("step", f"{manifest.step}, after {manifest.consumed_samples:,} samples")
    yield _line("holds", f"{holds(manifest)}; {manifest.model_type}, {manifest.params_dtype}")
    if manifest.base is not None:
        digest = f" ({manifest.base_digest[:20]})" if manifest.base_digest else ""
        yield _line("base", manifest.base + digest)
    yield _line("ranks", ranks(manifest))
    for name, groups in manifest.groups.items():
        yield _line(f"  {name}", " ".join(str(group) for group in groups))
    yield _line("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    yield _line("format", manifest.format)


def _components(manifest: Manifest) -> Table:
    table = _table("component", "shared", "copies", "size", "files", right=("copies", "size"))
    for component in manifest.components:
        shared = component["group"] or component["pattern"]
        files = component["files"]
        table.add_row(
            component["key"] + ("" if component["required"] else " (not required)"),
            f"per {shared}" if component["group"] else shared.replace("_", " "),
            str(len(component["ranks"])),
            size(component["bytes"]) if files else "",
            f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}" if files else "shards, *.distcp",
        )
    return table


def show_differences(names: Sequence[str], parts: Sequence[Part]) -> None:
    """Of each part how much differs and what, then the verdict."""
    out = console()
    for label, name in zip(("left", "right"), names, strict=True):
        out.print(_line(label, name), soft_wrap=True)
    for part in parts:
        unlike = len(part.changes)
        said = f"{unlike} differences" if unlike else f"all {part.compared} equal"
        out.print(_line(part.name, said, "red" if unlike else "green"), soft_wrap=True)
        for change in part.changes[:SHOWN]:
            out.print(f"  {change.name}: {_said(change)}", soft_wrap=True)
        if unlike > SHOWN:
            out.print(f"  ... and {unlike - SHOWN} more: --json FILE has them all")


def _said(change: Change) -> str:
    if change.left == change.right:
        return f"{change.left}, {change.how}" if change.left else change.how
    return f"{change.left} -> {change.right}" + (f", {change.how}" if change.how else "")


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        side: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=side, overflow="fold", no_wrap=column == "saved")
    return table


def _line(name: str, text: str, colour: str = "") -> Text:
    from rich.text import Text

    return Text.assemble((f"{name:<10} ", "bold"), (text, colour))
