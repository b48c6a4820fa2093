"""Sections as Megatron-Bridge prints its ConfigContainer: unset fields pass, others are refused by their own name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from primus_bridge.config import load_arguments
from primus_bridge.config.container_keys import _values
from primus_bridge.errors import ConfigError

PRINTED = """\
checkpoint:
  _target_: megatron.bridge.training.config.CheckpointConfig
  fully_parallel_load: false
  most_recent_k: -1
comm_overlap: null
dataset:
  persistent_workers: false
  seed: 1234
ddp:
  average_in_collective: false
  data_parallel_sharding_strategy: no_shard
env_vars: {}
mixed_precision:
  bf16: true
  fp32: false
  grad_reduce_in_fp32: false
  params_dtype: null
optimizer:
  bf16: false
  exp_avg_dtype:
    _call_: false
    _target_: torch.float32
  grad_norm_skip_threshold: .inf
  use_distributed_optimizer: false
peft:
  _target_: megatron.bridge.peft.lora.LoRA
  dim: 4
  exclude_modules: []
  lora_dtype: null
rerun_state_machine:
  error_injection_rate: 0
  spiky_loss_factor: 10.0
scheduler:
  end_weight_decay: 0.2
  start_weight_decay: 0.2
tokenizer:
  hf_tokenizer_kwargs: {}
train:
  iterations_to_skip: []
validation:
  eval_interval: 7
  eval_iters: 3
"""


def test_a_printed_part_is_a_configuration(write):
    arguments = load_arguments(write(PRINTED), [])
    assert (arguments.train.eval_interval, arguments.train.eval_iters) == (7, 3)
    assert (arguments.mixed_precision, arguments.peft.dim, arguments.optimizer.weight_decay) == ("bf16_mixed", 4, 0.2)
    assert not arguments.ddp.use_distributed_optimizer and not arguments.ddp.grad_reduce_in_fp32
    assert not [note for note in arguments.notes if "config.yaml" in note]


OWN = "it is a field of Megatron-Bridge's own, which this project does not set"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "peft:\n  exclude_modules: [q]\n",
            f"'peft.exclude_modules' cannot be ['q']: {OWN} (leave it out, or write [])",
        ),
        ("dataset:\n  seed: 5\n", f"'dataset.seed' cannot be 5: {OWN} (leave it out, or write 1234)"),
        ("optimizer:\n  bf16: true\n", f"'optimizer.bf16' cannot be true: {OWN} (leave it out, or write false)"),
        ("comm_overlap:\n  data_parallel_size: 2\n", f"'comm_overlap.data_parallel_size' cannot be 2: {OWN}"),
        (
            "straggler:\n  enable_straggler_on_startup: false\n",
            f"'straggler.enable_straggler_on_startup' cannot be false: {OWN}",
        ),
        ("train:\n  iterations_to_skip: [3]\n", "'train.iterations_to_skip' cannot be [3]: every step is trained"),
        ("dataset:\n  samples: {data_path: x}\n", "put its keys there (leave it out)"),
        ("_target_: megatron.bridge.training.config.ConfigContainer\n", "is printed to be read: give the file"),
        ("peft:\n  exclude_modulse: []\n", "unknown key 'exclude_modulse' in section 'peft'"),
        ("comm_overlap:\n  tp_comm_overlpa: true\n", "unknown key 'tp_comm_overlpa' in section 'comm_overlap'"),
    ],
)
def test_what_asks_for_something_is_refused_by_its_name(write, text, message):
    with pytest.raises(ConfigError) as error:
        load_arguments(write(text), [])
    assert message in str(error.value)


def test_on_the_command_line():
    load_arguments(None, ["--peft.lora_dtype", "null", "--validation.eval_iters", "3"])
    with pytest.raises(ConfigError, match="^command line --dist.disable_jit_fuser: 'dist.disable_jit_fuser' cannot be"):
        load_arguments(None, ["--dist.disable_jit_fuser", "true"])


def test_the_table_is_read_when_it_is_asked_only():
    code = (
        "from primus_bridge.config import container_keys, load_arguments\n"
        "load_arguments(None, ['--lr', '1e-4', '--bf16', '--lora.rank', '8', '--use_lora'])\n"
        "assert container_keys._values.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(_values()) > 20
