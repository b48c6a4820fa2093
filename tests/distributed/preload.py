"""Imported once by the fork server of harness.py, so that each rank starts in milliseconds."""
# ruff: noqa: F401

import gc

import torch._dynamo  # by the first optimizer that is made, at a second a rank
import transformers.models.auto.tokenization_auto  # by the first tokenizer, at another

import primus_bridge.checkpoint.coordinator
import primus_bridge.conversion.adapters
import primus_bridge.conversion.export
import primus_bridge.conversion.load
import primus_bridge.conversion.peft_folder
import primus_bridge.megatron.model
import primus_bridge.megatron.optimizer
import primus_bridge.megatron.step
import primus_bridge.objectives.supervised
import primus_bridge.peft.build
import tests.distributed.harness
import tests.distributed.rank_functions

# the ranks' collector leaves what they share alone: it would copy every page of it
gc.freeze()
