"""``primus submit`` without a Slurm: what it refuses, the grid, the batch script, and runs on this machine."""

from __future__ import annotations

import re
import subprocess

import pytest

from primus_bridge.cli.main import main
from primus_bridge.config import load_arguments, read_run_yaml
from primus_bridge.errors import ConfigError
from primus_bridge.launch.sweep import points
from tests.cli import example
from tests.cli.command import ROOT

SLURM = ("submit", "--config", "run.yaml", "--executor", "slurm")
TENSOR = ("--tensor_model_parallel_size", "2")
LOCAL = ("submit", "--config", "run.yaml", "--executor", "local")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with example.workplace(tmp_path_factory.mktemp("submit")) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMORUN_HOME", str(folder / "nemo"))
        example.write_rows(folder / "rows.json", example.alpaca_rows(16))
        (folder / "run.yaml").write_text(
            "framework: megatron_bridge\nconvert_from_hf: true\nhf_model_name_or_path: model\ndata_path: rows.json\n"
            "training: {train_iters: 2, global_batch_size: 4, seq_length: 64, lr: 1.0e-3}\n"
            "logging: {report: false}\nsave: out\n"
        )
        yield folder


@pytest.mark.parametrize(
    "words, message",
    [
        (("submit", "--config", "run.yaml"), "--executor is missing: local or slurm"),
        (("submit", "--executor", "slrum"), "--executor is 'slrum': local or slurm - did you mean 'slurm'?"),
        ((*SLURM, "--partitoin", "x"), "unknown option '--partitoin' - did you mean 'partition'?"),
        ((*SLURM, "--lora_rnak", "8"), "unknown key 'lora_rnak' at the top level - did you mean 'lora_rank'?"),
        ((*SLURM, "--nodes", "two"), "argument --nodes: invalid int value: 'two'"),
        ((*SLURM, "--nodes", "0"), "--nodes must be above 0, got 0"),
        ((*SLURM, "--env", "A"), "--env takes NAME=VALUE, not 'A'"),
        ((*SLURM, "--job_name", "a b"), "--job_name 'a b'"),
        ((*SLURM, "--max_parallel", "2"), "--max_parallel is for a grid: give it with --sweep"),
        ((*SLURM, "--container_mounts", "/a:/b"), "give --container_image too"),
        ((*SLURM, "--framework", "other"), "unknown framework 'other'"),
        ((*SLURM, "--sweep", "lr"), "--sweep takes NAME=VALUE,VALUE, not 'lr'"),
        ((*SLURM, "--sweep", "lrr=1,2"), "unknown key 'lrr'"),
        ((*SLURM, "--sweep", "lr=1e-4,1e-4"), "two points of the grid have the folder lr=1e-4"),
        ((*SLURM, "--sweep", "lr=1e-4", "--sweep", "lr=2e-4"), "an argument is swept twice"),
        ((*SLURM, "--sweep", "save=a,b"), "'save' cannot be swept"),
        ((*SLURM, "--sweep", "seed=1,2", "--convert_to_hf", "--hf_save_path", "x"), "hf_save_path is one folder"),
        ((*SLURM, "--sweep", "lr=1e-4,-1"), "lr"),
        ((*SLURM, "--nodes", "3", "--ntasks_per_node", "1"), "1 x 3 = 3"),
        ((*SLURM, "--sweep", "lr=1e-4", "--sweep", "training.lr=2e-4"), "an argument is swept twice"),
        ((*SLURM, "--sweep", "lr=1e-4,0.0001"), "lr=1e-4 and lr=0.0001 are the same run"),
        ((*SLURM, "--gpus_per_node", "8", "--ntasks_per_node", "1"), "a rank takes one GPU; leave --ntasks_per_node"),
        ((*SLURM, "--nproc", "3"), "1 x 3 = 3"),
        ((*SLURM, *TENSOR, "--gpus_per_node", "3"), "a multiple of 2 (--nodes x --gpus_per_node = 4)"),
        ((*SLURM, *TENSOR, "--gpus_per_node", "1"), "a multiple of 2 (--nodes x --gpus_per_node = 2)"),
        ((*SLURM, *TENSOR, "--ntasks_per_node", "3"), "a multiple of 2 (--nodes x --ntasks_per_node = 4)"),
        ((*SLURM, *TENSOR, "--ntasks_per_node", "1", "--nproc", "3"), "a multiple of 2 (--nproc 4)"),
        ((*SLURM, "--time", "2"), "--time 2 is not longer than --grace 120"),
        ((*SLURM, "--time", "00:05:00", "--grace", "300"), "--time 00:05:00 is not longer than --grace 300"),
        ((*SLURM, "--job_dir", "my jobs"), "my jobs/run_"),
        ((*SLURM, "--job_dir", "50%"), "50%/run_"),
        ((*SLURM, "--container_image", "my image.sqsh"), "--container_image is 'my image.sqsh'"),
        ((*SLURM, "--container_image", "a", "--container_mounts", "/a b:/a"), "--container_mounts is '/a b:/a'"),
        # its own checks, of what it cannot take or of its absence
        ((*SLURM, "--engine", "bridge", "--device", "cpu"), "engine bridge"),
        ((*SLURM, "--data_path", "no.json"), "no.json"),
        ((*SLURM, "--hf_model_name_or_path", "./no"), "no"),
        ((*LOCAL, "--nodes", "2", "--wait"), "--nodes, --wait has no meaning with --executor local"),
        ((*LOCAL, "--ntasks_per_node", "2"), "--nproc says how many ranks to start"),
    ],
)
def test_what_is_refused_before_anything_is_written(place, capfd, words, message):
    before = example.tree(place).keys()
    assert main(list(words)) == 2
    err = capfd.readouterr().err
    assert err.startswith("primus: ") and message in err and "Traceback" not in err
    assert example.tree(place).keys() == before


def test_the_points_of_a_grid(place):
    found = points(
        "run.yaml", ["--use_lora"], None, ["lora_rank=8,16", "lora-target-modules=[q_proj,v_proj],all-linear"]
    )
    assert [point.label for point in found] == [
        "lora_rank=8_lora_target_modules=-q_proj,v_proj-",
        "lora_rank=8_lora_target_modules=all-linear",
        "lora_rank=16_lora_target_modules=-q_proj,v_proj-",
        "lora_rank=16_lora_target_modules=all-linear",
    ]
    assert [point.arguments.peft.dim for point in found] == [8, 8, 16, 16]
    assert found[0].arguments.peft.target_modules == ["q_proj", "v_proj"]
    assert [str(point.arguments.save_folder) for point in found] == [f"out/{point.label}" for point in found]
    # the words are the point's command line
    for point in found:
        assert load_arguments("run.yaml", point.words).to_dict() == point.arguments.to_dict()
    assert points("run.yaml", [], None, [])[0].label == ""
    # a folder's name has an end
    listed = ",".join(f"layer_{number}" for number in range(40))
    long = points("run.yaml", ["--use_lora"], None, [f"lora_target_modules=[{listed}],[{listed},more]"])
    assert [len(point.label) for point in long] == [120, 120] and long[0].label != long[1].label
    with pytest.raises(ConfigError, match="takes NAME=VALUE"):
        points("run.yaml", [], None, ["lr=1,,2"])


def test_the_batch_script(place, capfd):
    """Every option in its place; nothing is written."""
    before = example.tree(place).keys()
    options = {
        "account": "acme",
        "partition": "gpu",
        "time": "02:00:00",
        "nodes": "2",
        "gpus_per_node": "2",
        "container_image": "image.sqsh",
        "container_mounts": "/lustre:/lustre,/data:/rows",
        "dependency": "afterok:17",
        "max_parallel": "1",
        "grace": "300",
        "env": "NOTE=it's two words",
        "job_name": "trial",
        "job_dir": "elsewhere",
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert main([*SLURM, *words, "--sweep", "lr=1e-4,2e-4", "--dry_run"]) == 0
    out, err = capfd.readouterr()
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", out, re.MULTILINE))
    output = flags.pop("output")
    assert flags == {
        "account": "acme",
        "array": "0-1%1",
        "dependency": "afterok:17",
        "gpus-per-node": "2",
        "job-name": "trial",
        "kill-on-invalid-dep": "yes",
        "nodes": "2",
        "ntasks-per-node": "2",
        "open-mode": "append",
        "partition": "gpu",
        "signal": "USR1@300",
        "time": "02:00:00",
    }
    assert output.startswith(f"{place}/elsewhere/trial_")
    srun = next(line for line in out.splitlines() if line.startswith("srun --output"))
    assert f"--container-image image.sqsh --container-mounts /lustre:/lustre,/data:/rows,{place}:{place}," in srun
    assert "export NOTE='it'\"'\"'s two words'\n" in out
    assert f"SAVES=({place}/out/lr=1e-4 {place}/out/lr=2e-4)" in out
    task = re.search(
        rf'\n#   cd {place}\n#   exec python -m primus_bridge.cli.main train .*/"config_\$\{{SLURM_ARRAY.*\n$', out
    )
    assert out.startswith("#!/bin/bash\n") and task is not None  # a script as it stands, with nothing of ours to run
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    assert example.tree(place).keys() == before
    # what a run says goes beside the script
    assert main([*SLURM, "--dry_run", "--engine", "bridge", "--no_check"]) == 0
    out, err = capfd.readouterr()
    assert (
        out.startswith("#!/bin/bash\n")
        and "--signal" not in out
        and 'scontrol requeue "$SLURM_JOB_ID"; then' not in out
    )
    assert "note: engine bridge saves at SIGTERM only: there is no signal ahead of the time limit and no requeue" in err
    # data that only the container has
    assert main([*SLURM, "--data_path", "/in/the/container.json", "--no_check", "--dry_run"]) == 0


def test_a_grid_on_this_machine(place, capfd):
    """One point finishes, one fails (its answers diverge), and so does the command."""
    words = [*LOCAL, "--sweep", "lr=1e-3,1e30", "--env", "OMP_NUM_THREADS=1"]
    assert main([*words, "--dry_run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1].startswith("primus train --framework megatron_bridge --config run.yaml ")
    assert "--lr=1e30 --save=out/lr=1e30" in lines[-1]
    assert main(words) == 1
    out, err = capfd.readouterr()
    assert re.search(r"^lr=1e-3  finished  out/lr=1e-3$", out, re.MULTILINE)
    assert re.search(r"^lr=1e30  failed  out/lr=1e30$", out, re.MULTILINE)
    assert "training diverged" in out and "primus: 1 of 2 not finished" in err
    assert len(example.loss_lines(place / "out/lr=1e-3")) == 2
    # a value's place is the one before the job's config, and nothing is said of what nobody set
    written = read_run_yaml(place / "out/lr=1e-3/run.yaml").sources
    assert re.fullmatch(r"run\.yaml:5 \(by .*/config_0\.yaml:\d+\)", written["train.train_iters"])
    assert re.fullmatch(r"command line --lr \(by .*/config_0\.yaml:\d+\)", written["optimizer.lr"])
    assert written["optimizer.clip_grad"] == "default" and "has no effect" not in out


def test_a_signal_stops_the_grid(place, capfd):
    """The point under way saves and ends, the next does not start."""
    words = [*LOCAL, "--sweep", "seed=1,2", "--save", "halted", "--train_iters", "200", "--env", f"PYTHONPATH={ROOT}"]
    assert main([*words, "--callbacks", "[{path: tests.launch.jobs.SignalToSubmit}]"]) == 1
    out = capfd.readouterr().out
    assert re.search(r"^seed=1  stopped: SIGUSR1 received at step [23] of 200  halted/seed=1$", out, re.MULTILINE)
    assert re.search(r"^seed=2  not started  halted/seed=2$", out, re.MULTILINE)
    assert not (place / "halted/seed=2").exists()
