"""Ranks that meet where one of them may come much later than any collective would wait."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from tests.distributed.harness import run_distributed


def meet(refuse: bool) -> str:
    """Rank 1 needs longer than the job's time limit; what each rank is told in the end."""
    import torch.distributed as dist

    from primus_bridge.errors import ConfigError
    from primus_bridge.together import refusing_together

    dist.init_process_group("gloo")
    dist.barrier()
    # now that both are here
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1.5))
    with refusing_together(patient=True):  # of those who came to this one none is counted again
        pass
    try:
        with refusing_together(patient=True):
            if dist.get_rank() == 1:
                time.sleep(3)
                if refuse:
                    raise ConfigError("no such file")
    except ConfigError as error:
        return str(error)
    return "met"


@pytest.mark.parametrize(("refuse", "told"), [(False, "met"), (True, "no such file (seen by rank 1)")])
def test_a_rank_that_prepares_longer_than_a_collective_waits(refuse, told):
    assert run_distributed(meet, 2, refuse) == [told, told]


def look_at(places: list[list[str]]) -> str:
    """What is said to a rank that found places[rank]."""
    import torch.distributed as dist

    from primus_bridge.together import SharedError, same_on_all

    dist.init_process_group("gloo")
    try:
        same_on_all("start from", places[dist.get_rank()])
    except SharedError as error:
        return str(error)
    return ""


def test_ranks_that_see_other_folders_do_not_go_on_together():
    assert run_distributed(look_at, 2, [["a/iter_0000002"]] * 2) == ["", ""]
    told = run_distributed(look_at, 2, [["a/iter_0000002"], []])
    assert told[0] == told[1] and told[0].startswith("rank 0 would start from a/iter_0000002, rank 1 no checkpoint: ")
