"""Whose memory a plan counts: the GPUs that a process would see, or what is left to it of the host's."""

from __future__ import annotations

import os

import pytest

from primus_bridge.plan.device import available, gpu_memories

GB = 10**9
FREE = 64 * 2**30
NO_LIMIT = 9223372036854771712
"""What version 1 says where there is none."""


@pytest.mark.parametrize(
    ("chosen", "sizes"),
    [
        (None, [80, 40, 24]),
        ("", []),
        ("-1", []),
        ("2,0", [24, 80]),
        ("1,7,0", [40]),  # as CUDA reads it: the first that is none ends it
        ("GPU-bb, GPU-aa-1", [40, 80]),
    ],
)
def test_gpus_that_are_visible(tmp_path, monkeypatch, chosen, sizes):
    tool = tmp_path / "nvidia-smi"
    rows = "".join(f"GPU-{name}-1, {size * 1024}\\n" for name, size in (("aa", 80), ("bb", 40), ("cc", 24)))
    tool.write_text(
        f"#!/bin/sh\n[ \"$*\" = '--query-gpu=uuid,memory.total --format=csv,noheader,nounits' ] && printf '{rows}'"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if chosen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpu_memories() == [size * 2**30 for size in sizes]


def host(root, group: str, limits: dict[str, dict[str, str]]):
    """A host with FREE bytes free. group: of the process, as the kernel lists it. limits: folder -> a group's files."""
    files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {FREE // 1024} kB\n", "proc/self/cgroup": group}
    files |= {f"sys/fs/cgroup/{folder}/{name}": text for folder, of in limits.items() for name, text in of.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def version_2(limit: object, used: int = 0, cached: int = 0) -> dict[str, str]:
    stat = f"anon 1\nactive_file {cached}\ninactive_file 0\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def version_1(limit: int, used: int = 0, cached: int = 0) -> dict[str, str]:
    stat = f"cache 1\ntotal_active_file 0\ntotal_inactive_file {cached}\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


@pytest.mark.parametrize(
    ("group", "limits", "left"),
    [
        ("", {}, FREE),
        ("0::/job/step\n", {"job/step": version_2("max"), "job": version_2(16 * GB, 5 * GB, cached=3 * GB)}, 14 * GB),
        ("0::/job\n", {"job": version_2(500 * GB)}, FREE),
        ("0::/job\n", {"job": version_2(4 * GB, 5 * GB)}, 0),
        # in a container: its own group is the outermost that it sees
        ("0::/\n", {"": version_2(8 * GB, GB)}, 7 * GB),
        ("4:memory:/docker/0ab\n3:cpuset:/\n", {"memory": version_1(8 * GB, 2 * GB, cached=GB)}, 7 * GB),
        ("4:cpu,memory:/a\n0::/\n", {"memory": version_1(NO_LIMIT), "memory/a": version_1(2 * GB)}, 2 * GB),
    ],
)
def test_what_groups_leave_of_the_host(tmp_path, group, limits, left):
    assert available(host(tmp_path, group, limits)) == left


def test_this_host():
    assert 0 < available() < 2**50
