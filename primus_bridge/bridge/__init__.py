"""Megatron-Bridge as a second engine, ``engine: bridge``: the arguments as its ConfigContainer, run by its finetune.

The only room that names megatron.bridge; what imports it is imported when the engine runs.
"""
