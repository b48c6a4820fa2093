"""On a real Slurm of two nodes: the sbatch examples, preemption with requeue and resume, and ``primus submit``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from primus_bridge.cli.main import main
from primus_bridge.launch import sbatch
from tests.cli import example
from tests.cli.command import ROOT, in_rank
from tests.distributed.harness import run_distributed
from tests.launch.slurm import Slurm, slurm  # noqa: F401

EXAMPLES = sorted((ROOT / "examples/slurm").glob("*.sbatch"))
CPU = ("--gpus-per-node=0",)
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with model/, rows.json, run.yaml and waits.yaml (whose step 3 waits for a signal), in which the tests
    stand and the jobs run."""
    with example.workplace(tmp_path_factory.mktemp("jobs")) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")  # this machine's own name may not resolve
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("NEMORUN_HOME", str(folder / "nemo"))
        example.write_rows(folder / "rows.json", example.alpaca_rows(40))
        text = (
            "framework: megatron_bridge\nconvert_from_hf: true\nhf_model_name_or_path: model\ndata_path: rows.json\n"
            f"training: {{train_iters: {STEPS}, global_batch_size: 4, seq_length: 64, lr: 1.0e-3}}\n"
            "logging: {report: false}\n"
        )
        (folder / "run.yaml").write_text(text)
        (folder / "waits.yaml").write_text(f"{text}callbacks: [{{path: tests.launch.jobs.WaitForSignal}}]\n")
        yield folder


def losses(save: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in example.loss_lines(save)]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_the_scripts_are_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.slurm
def test_a_signal_saves_requeues_and_resumes(slurm: Slurm, place: Path):  # noqa: F811
    """sft_single_node.sbatch: two srun tasks. The losses are those of a run that nothing has interrupted."""
    save = place / "requeued"
    job = slurm.sbatch(
        "sft_single_node.sbatch", options=(*CPU, "--ntasks-per-node=2"), CONFIG="waits.yaml", SAVE=str(save)
    )
    slurm.wait_for((save / "waiting").exists, "step 3")
    slurm.said("scancel", "--signal=USR1", job)
    slurm.wait_for(lambda: slurm.requeued(job), "the requeue")
    assert (save / "stopped").read_text() == f"SIGUSR1 received at step 3 of {STEPS}\n"
    assert json.loads((save / "iter_0000003" / "manifest.json").read_text())["step"] == 3

    whole = ["train", "--framework", "megatron_bridge", "--config", "run.yaml", "--save", "unbroken"]
    results = run_distributed(in_rank, 2, whole)
    assert [result.code for result in results] == [0, 0]
    assert slurm.ends(job) == "COMPLETED"
    log = (place / f"sft_{job}.log").read_text()
    assert f"stopped   at step 3 of {STEPS}: SIGUSR1 received; the same command goes on" in log
    assert f"steps 3 to {STEPS} of 4 samples" in log
    assert not (save / "stopped").exists()
    assert losses(save) == losses(place / "unbroken")
    assert [number for number, _ in losses(save)] == list(range(1, STEPS + 1))


@pytest.mark.slurm
def test_torchrun_on_two_nodes_passes_the_signal_on(slurm: Slurm, place: Path):  # noqa: F811
    """sft_multi_node.sbatch: a torchrun a node. Node names that only Slurm knows: MASTER_ADDR is the user's."""
    save = place / "torchrun"
    job = slurm.sbatch(
        "sft_multi_node.sbatch",
        options=CPU,
        CONFIG="waits.yaml",
        SAVE=str(save),
        MASTER_ADDR="127.0.0.1",
        RANKS_PER_NODE="1",
    )
    slurm.wait_for((save / "waiting").exists, "step 3")
    slurm.said("scancel", "--signal=USR1", job)
    slurm.wait_for(lambda: slurm.requeued(job), "the requeue")
    assert (save / "stopped").read_text().startswith("SIGUSR1 received at step 3 ")
    assert "data 2 = 2 ranks" in (place / f"sft_{job}.log").read_text()
    slurm.said("scancel", job)


@pytest.mark.slurm
def test_lora_then_its_conversion(slurm: Slurm, place: Path):  # noqa: F811
    few = ("--train_iters", "2", "--global_batch_size", "4", "--seq_length", "64", "--report", "false")
    lora = slurm.sbatch("lora.sbatch", *few, options=CPU, MODEL="model", DATA="rows.json", SAVE="lora")
    after = ("--ntasks=2", f"--dependency=afterok:{lora}", "--kill-on-invalid-dep=yes")
    convert = slurm.sbatch("convert.sbatch", options=after, LOAD="lora", OUT="adapter")
    assert slurm.ends(lora) == "COMPLETED", (place / f"lora_{lora}.log").read_text()
    assert slurm.ends(convert) == "COMPLETED", (place / f"convert_{convert}.log").read_text()
    name = "adapter_model.safetensors"
    assert (place / "adapter" / name).read_bytes() == (place / "lora/hf" / name).read_bytes()


@pytest.mark.slurm
def test_a_grid_as_an_array(slurm: Slurm, place: Path, capfd, monkeypatch):  # noqa: F811
    """Two points on two nodes each: one is interrupted, requeued and finishes, the other fails, and so the command."""
    first = place / "grid" / "lr=1e-3"

    def interrupt() -> None:
        slurm.wait_for((first / "waiting").exists, "step 3")
        queue = slurm.said("squeue", "--noheader", "--name=grid", "--format=%i")
        (job,) = {line.split("_")[0] for line in queue.split()}
        slurm.said("scancel", "--signal=USR1", f"{job}_0")

    monkeypatch.setattr(sbatch, "POLL_SECONDS", 1.0)
    words = ["submit", "--config", "waits.yaml", "--executor", "slurm", "--nodes", "2", "--ntasks_per_node", "1"]
    words += ["--sweep", "lr=1e-3,1e30", "--save", "grid", "--job_name", "grid", "--env", "NOTE=two words", "--wait"]
    with ThreadPoolExecutor(1) as pool:
        interrupting = pool.submit(interrupt)
        code = main(words)
        interrupting.result()
    out, err = capfd.readouterr()
    assert code == 1
    assert re.search(r"job \d+_0  lr=1e-3  save grid/lr=1e-3  log \S+/log_0.out\n", out)
    assert re.search(r"^lr=1e-3  finished  grid/lr=1e-3$", out, re.MULTILINE)
    assert re.search(r"^lr=1e30  failed with exit code \d+  grid/lr=1e30$", out, re.MULTILINE)
    assert "primus: 1 of 2 not finished; logs are in" in err
    assert [number for number, _ in losses(first)] == list(range(1, STEPS + 1))
    (folder,) = (place / "runs/jobs").iterdir()
    log = (folder / "log_0.out").read_text()  # of before the requeue, and of after it
    assert f"steps 0 to {STEPS}" in log and f"steps 3 to {STEPS}" in log
    assert "training diverged" in (folder / "log_1.out").read_text()


@pytest.mark.slurm
def test_what_slurm_refuses(slurm: Slurm, place: Path, capfd):  # noqa: F811
    before = sorted((place / "runs").rglob("config*"))
    code = main(["submit", "--config", "run.yaml", "--executor", "slurm", "--partition", "nowhere", "--save", "no"])
    assert code == 2
    err = capfd.readouterr().err
    assert "invalid partition specified: nowhere" in err and "Traceback" not in err
    assert sorted((place / "runs").rglob("config*")) == before and not (place / "no").exists()
