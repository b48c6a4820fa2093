"""Inside Primus: registry, signatures, lifecycle, command line; in a minimal host, and in a real one if there is one.

PRIMUS_CHECKOUT=/path/to/Primus pytest tests/integrations  runs the same tests in that checkout, on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from primus_bridge.config import load_arguments
from primus_bridge.errors import ConfigError
from primus_bridge.integrations.primus import as_arguments, as_namespace
from tests.cli.command import JOB, MEETING, ROOT, Result, run
from tests.cli.example import alpaca_rows, loss_lines, train_words, workplace, write_rows
from tests.launch.slurm import free_port

MINIMAL = Path(__file__).parent / "host"
CHECKOUT = os.environ.get("PRIMUS_CHECKOUT")
HOSTS = [MINIMAL, *([Path(CHECKOUT).resolve()] if CHECKOUT else [])]

in_every_host = pytest.mark.parametrize("host", HOSTS, ids=[host.name for host in HOSTS])
MODULE = "primus_bridge.integrations.primus"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with workplace(tmp_path_factory.mktemp("primus")) as folder:
        write_rows(folder / "rows.json", alpaca_rows(16))
        yield folder


def experiment(path: Path, framework: str = "megatron_bridge", root: dict | None = None, **overrides) -> str:
    """An experiment file in Primus's dialect; its name."""
    settings = {
        "stage": "sft",
        "enable_primus_turbo": False,
        "hf_path": "model",
        "sft_dataset_name": "rows.json",
        "sft_conversation_format": "alpaca",
        "train_iters": 2,
        "lr_warmup_iters": 0,
        "global_batch_size": 4,
        "seq_length": 64,
        "log_interval": 1,
        "precision_config": "fp32",
        "tensor_model_parallel_size": 1,
        "peft": "none",
        "report": False,
        "cross_entropy_loss_fusion": True,
        **overrides,
    }
    module = {"framework": framework, "config": "sft_trainer.yaml", "model": "qwen3_8b.yaml", "overrides": settings}
    names = {"work_group": "team", "user_name": "me", "exp_name": path.stem, "workspace": "out"}
    path.write_text(yaml.safe_dump({**names, "modules": {"post_trainer": module}, **(root or {})}))
    return path.name


def in_host(host: Path, *words: str, module: str = MODULE, **variables: str) -> Result:
    """``python -m module words`` with the host on PYTHONPATH."""
    return run(*words, module=module, env={"PYTHONPATH": os.pathsep.join([str(host), str(ROOT)]), **variables})


def script(host: Path, code: str) -> dict:
    """What a script in the host prints last, as JSON."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(host), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SIGNATURES = """
import inspect, json, sys
from primus_bridge.integrations.primus import register
ours = register()
from primus.core.backend.backend_adapter import BackendAdapter
from primus.core.backend.backend_registry import BackendRegistry

def shape(cls, name):
    return [[p.name, repr(p.default)] for p in inspect.signature(getattr(cls, name)).parameters.values()]

names = [name for name, value in vars(BackendAdapter).items() if inspect.isfunction(value) and name != "__init__"]
adapter = BackendRegistry.get_adapter("megatron_bridge", backend_path=None)
class Theirs(BackendAdapter):
    pass
BackendRegistry.register_adapter("megatron_bridge", Theirs)
BackendRegistry.register_adapter("theirs", Theirs)
again, once_more = register(), register()
print(json.dumps({
    "names": names,
    "theirs": [shape(BackendAdapter, name) for name in names],
    "ours": [shape(ours, name) for name in names],
    "is_adapter": isinstance(adapter, BackendAdapter) and type(adapter) is ours and not ours.__abstractmethods__,
    "framework": adapter.framework,
    "version": adapter.detect_backend_version(),
    "kept": type(BackendRegistry.get_adapter("megatron_bridge")) is ours is again is once_more,
    "others": BackendRegistry._adapters["theirs"] is Theirs,
    "heavy": [name for name in ("torch", "megatron", "transformers") if name in sys.modules],
}))
"""


@in_every_host
def test_the_adapter_is_the_hosts_own_kind_and_keeps_its_place(host):
    seen = script(host, SIGNATURES)
    assert {"load_trainer_class", "convert_config", "setup_backend_path", "prepare_backend"} <= set(seen["names"])
    assert seen["ours"] == seen["theirs"]
    assert seen["is_adapter"] and seen["kept"] and seen["others"]
    assert (seen["framework"], seen["heavy"]) == ("megatron_bridge", [])
    assert seen["version"].startswith("0.")


def test_importing_primus_s_own_backend_does_not_take_the_place():
    code = (
        "import json\nfrom primus_bridge.integrations.primus import register\nours = register()\n"
        "import primus.backends.megatron_bridge\nfrom primus.core.backend.backend_registry import BackendRegistry\n"
        "print(json.dumps(type(BackendRegistry.get_adapter('megatron_bridge')) is ours))"
    )
    assert script(MINIMAL, code) is True


@in_every_host
def test_the_settings_name_the_engine(host):
    code = (
        "import json\nfrom types import SimpleNamespace\nfrom primus_bridge.errors import ConfigError\n"
        "from primus_bridge.integrations.primus import register\nadapter = register()()\n"
        "try:\n    adapter.prepare_backend(SimpleNamespace(params=SimpleNamespace(engine='bridge', stage='sft')))\n"
        "except ConfigError as error:\n    assert 'megatron-bridge' in str(error).lower(), error\n"
        "print(json.dumps([adapter.ours.framework, adapter.load_trainer_class('sft').__name__]))"
    )
    assert script(host, code) == ["megatron_bridge/bridge", "BridgeSFTTrainer"]


@in_every_host
def test_a_run_in_the_host_s_runtime(host, place):
    config = experiment(place / f"{host.name}_first.yaml")
    words = ["train", "posttrain", "--config", config, "lr=1e-4", "convert_to_hf=true"]
    done = in_host(host, *words, BUILD_ARGS_PATCH_SEED="77", HOST_JOINS="1")
    assert done.code == 0, done.err
    said = done.out + done.err  # Primus logs to stderr
    save = Path("out/team/me") / Path(config).stem
    for line in ("training  sft, all weights, fp32, steps 0 to 2 of 4 samples", "step 2/2  loss", f"saved {save}/iter"):
        assert line in said
    assert "note: Primus module settings: " in said and "'cross_entropy_loss_fusion'" in said
    assert "Primus's own trainer" not in said
    written = yaml.safe_load((place / save / "run.yaml").read_text())
    assert written["optimizer"]["lr"] == 1e-4  # which Primus hands on as text
    assert written["sources"]["optimizer.lr"] == "Primus module settings"
    assert written["sources"]["checkpoint.save"].startswith("Primus experiment")
    assert [line["step"] for line in loss_lines(place / save)] == [1, 2]
    assert (place / save / "hf" / "model.safetensors").is_file()
    if host == MINIMAL:
        phases = [line.split(" of ")[0] for line in done.out.splitlines() if " of SFTTrainer on " in line]
        assert phases == [f"[INFO] {phase}" for phase in ("setup", "init", "train", "cleanup")]
        assert "backend args: checkpoint, dataset, ddp" in done.out
        assert "the group is there: True" in done.out  # which the host made, and not the trainer
        assert written["rng"]["seed"] == 77  # a patch of the host's build_args phase


@pytest.mark.skipif(CHECKOUT is None, reason="PRIMUS_CHECKOUT names no checkout of Primus")
def test_primus_s_launcher_runs_our_script(place):
    """``primus-cli direct --script``, unchanged, with torchrun; it looks for a GPU and ROCm's libraries first, of which
    there are stand-ins: a rocm-smi that names a GPU, and an empty folder."""
    launcher = Path(CHECKOUT or "").resolve() / "runner" / "primus-cli"
    if not launcher.is_file():
        pytest.skip(f"{launcher} is not in the checkout")
    smi = place / "bin" / "rocm-smi"
    (place / "rocm" / "lib").mkdir(parents=True)
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU[0] : Card series: AMD Instinct MI300X'\n")
    smi.chmod(0o755)
    config = experiment(place / "direct.yaml")
    env = {name: value for name, value in os.environ.items() if name not in (*JOB, *MEETING)} | {
        "PATH": os.pathsep.join([str(smi.parent), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "ROCM_HOME": str(place / "rocm"),
        "DATA_PATH": str(place / "data"),
        "GPUS_PER_NODE": "2",
        "MASTER_PORT": str(free_port()),
    }
    words = ["direct", "--script", str(ROOT / "primus_bridge/integrations/primus.py"), "--"]
    words += ["train", "posttrain", "--exp", config, "lr=1e-4"]
    done = subprocess.run(["bash", str(launcher), *words], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "layout    tensor 1 x pipeline 1 x data 2 = 2 ranks" in done.stdout
    assert [line["step"] for line in loss_lines(place / "out/team/me/direct")] == [1, 2]


@in_every_host
def test_what_a_user_can_mend_is_one_message(host, place):
    unknown = in_host(host, "train", "posttrain", "--config", experiment(place / "unknown.yaml", train_itrs=1))
    assert (unknown.code, unknown.err.splitlines()[-1]) == (
        2,
        "primus: Primus module settings: unknown key 'train_itrs' at the top level - did you mean 'train_iters'?",
    )
    beside = in_host(host, "train", "posttrain", "--config", experiment(place / "beside.yaml", root={"peft": "lora"}))
    assert beside.code == 2
    assert beside.err.startswith("primus: beside.yaml:") and beside.err.endswith(
        "'peft' stands beside 'modules', where Primus drops it: put it under modules.NAME.overrides\n"
    )


def test_without_a_primus(place):
    done = run("train", "posttrain", "--config", "exp.yaml", module=MODULE)
    assert (done.code, done.err) == (
        2,
        "primus: no Primus can be imported: install it, or put its checkout on PYTHONPATH\n",
    )
    assert "benchmark" not in run("--help").out


COMMAND = "primus_bridge.cli.main"


def test_our_command_hands_on_what_is_primus_s(place):
    done = in_host(MINIMAL, "benchmark", "gemm", module=COMMAND)
    assert (done.code, done.out) == (0, "Primus's benchmark gemm, debug False\n")
    usage = in_host(MINIMAL, "benchmark", module=COMMAND)
    assert usage.code == 2 and "Traceback" not in usage.err
    assert "debug True" in in_host(MINIMAL, "--debug", "benchmark", "gemm", module=COMMAND).out
    help_text = in_host(MINIMAL, "--help", module=COMMAND).out
    assert f"of the Primus in {MINIMAL / 'primus'}: benchmark;" in help_text
    wrong = in_host(MINIMAL, "benchmrk", module=COMMAND)
    assert wrong.code == 2 and "unknown command 'benchmrk' - did you mean 'benchmark'?" in wrong.err


def test_train_of_another_framework_is_primus_s(place):
    other = experiment(place / "other.yaml", framework="other")
    done = in_host(MINIMAL, "train", "posttrain", "--config", other, module=COMMAND)
    assert done.code == 1 and "Primus's other framework runs" in done.err
    named = in_host(MINIMAL, "train", "posttrain", "--framework", "megatron_bridge", "--config", other, module=COMMAND)
    assert named.code == 2 and "exactly one module with 'framework: megatron_bridge' is needed" in named.err
    ours = experiment(place / "ours.yaml")
    dry = in_host(MINIMAL, "train", "posttrain", "--exp", ours, "--dry_run", module=COMMAND)
    assert dry.code == 0, dry.err
    assert "ours.yaml:" in dry.out


def test_arguments_survive_the_namespace():
    words = train_words("model", "rows.json", "out", use_lora=True, lora_target_modules="q_proj,v_proj")[1:]
    arguments = load_arguments(None, words)
    arguments.notes.append("a note")
    namespace = as_namespace(arguments)
    assert namespace.optimizer.lr == 1e-3 and namespace.stage == "sft"
    back = as_arguments(namespace)
    assert (back.to_dict(), back.sources, back.notes) == (arguments.to_dict(), arguments.sources, ["a note"])
    namespace.optimizer.lr = "fast"
    with pytest.raises(ConfigError, match="'optimizer.lr' must be a number"):
        as_arguments(namespace)
