"""primus_bridge: Megatron-Core post-training from one YAML, from a Hugging Face model and back to one."""

__version__ = "0.1.0"
