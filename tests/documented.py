"""The two configs that the backend's documentation shows, word for word."""

SFT_YAML = """\
framework: megatron_bridge

# Load pretrained model
model:
  load: /path/to/pretrained/checkpoint

# Post-training hyperparameters
training:
  micro_batch_size: 1
  global_batch_size: 128
  train_iters: 5000
  lr: 5.0e-6
  min_lr: 5.0e-7

# LoRA configuration (optional)
lora:
  use_lora: true
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.05

# Instruction dataset
data:
  data_path: /path/to/instruction/data
  dataset_format: "alpaca"
  prompt_template: "alpaca"

# Checkpointing
checkpointing:
  save: /path/to/finetuned/checkpoints
  save_interval: 500
"""

LORA_YAML = """\
framework: megatron_bridge

# Load from HuggingFace
convert_from_hf: true
hf_model_name_or_path: "meta-llama/Llama-3-8B"

# LoRA parameters
lora:
  use_lora: true
  lora_rank: 16
  lora_alpha: 32
  lora_dropout: 0.05
  lora_target_modules:
    - q_proj
    - v_proj
    - k_proj
    - o_proj

# Training
training:
  micro_batch_size: 2
  global_batch_size: 64
  train_iters: 3000
  lr: 2.0e-4

# Data
data:
  data_path: /path/to/instruction/data
  dataset_format: "alpaca"
"""
