"""Joining a job: torchrun's variables as they are, Slurm's translated."""

from __future__ import annotations

import re

import pytest

from primus_bridge.errors import ConfigError
from primus_bridge.launch.environment import address, first_host, join_job, tasks_of_node

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "gpu[003-004]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}


def test_no_job():
    variables: dict[str, str] = {}
    assert join_job(variables) is False
    assert variables == {}
    # an sbatch script outside srun is one task: it starts its own ranks
    assert join_job({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "a"}) is False


def test_an_sbatch_script_outside_srun_starts_its_own_ranks():
    batch = {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_GTIDS": "0", "SLURM_TASK_PID": "1"}
    assert join_job(batch) is False
    step = {**batch, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_GTIDS": "0"}
    assert join_job(step) is True
    assert step["WORLD_SIZE"] == "2"  # of the step, not of the job


def test_the_local_rank_of_other_launchers():
    for name in ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
        variables = {"RANK": "9", "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "1", name: "1"}
        assert join_job(variables) is True
        assert variables["LOCAL_RANK"] == "1"


def test_torchrun_is_left_alone():
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    before = dict(variables)
    assert join_job(variables) is True
    assert variables == before


def test_slurm_is_translated():
    variables = dict(SLURM)
    assert join_job(variables) is True
    assert {name: value for name, value in variables.items() if name not in SLURM} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": "24242",
    }


def test_what_the_script_sets_wins_over_slurm():
    variables = {**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    join_job(variables)
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("head", "29500")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"RANK": "5", "WORLD_SIZE": "1"}, "RANK is 5 and WORLD_SIZE 1"),
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999999"}, "ports go to 65535"),
        ({**SLURM, "SLURM_PROCID": "x"}, "RANK is 'x'"),
        ({**SLURM, "SLURM_JOB_NODELIST": "a[1-"}, "cannot read the Slurm node list"),
    ],
)
def test_variables_with_which_ranks_would_never_meet(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        join_job(dict(changes))


def test_a_world_of_one_needs_no_master():
    variables = {"RANK": "0", "WORLD_SIZE": "1"}
    assert join_job(variables) is True
    assert variables["MASTER_ADDR"] == "127.0.0.1"


def test_slurm_with_other_names_for_its_hosts():
    base = {name: value for name, value in SLURM.items() if name != "SLURM_JOB_NODELIST"}
    for more, master in (({"SLURM_NODELIST": "gpu[7-8]"}, "gpu7"), ({"MASTER_ADDR": "head"}, "head")):
        variables = {**base, **more}
        assert join_job(variables) is True
        assert variables["MASTER_ADDR"] == master


def test_slurm_without_its_node_list():
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST is not"):
        join_job({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"})


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-005,9],login", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("gpu[01-02]-ib", "gpu01-ib"),
        ("a-b.c[1-2]", "a-b.c1"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_nodes_with_different_numbers_of_tasks():
    assert [tasks_of_node("4(x2),2", node) for node in range(3)] == [4, 4, 2]
    variables = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4,2(x2)", "SLURM_NODEID": "1", "SLURM_STEP_ID": "3"}
    assert join_job(variables) is True
    assert variables["LOCAL_WORLD_SIZE"] == "2"
    assert variables["MASTER_PORT"] == str(24242 + 7 * 3)  # two steps of a job on one node do not meet


def test_a_host_without_an_address_stays_a_name():
    assert address("localhost") == "localhost"
    assert address("no-such-node.invalid") == "no-such-node.invalid"
