"""Imported once by the fork server of lives.py: what a rank imports, so that a life starts at once."""
# ruff: noqa: F401

import gc

import transformers.models.auto.tokenization_auto

import primus_bridge.adapter
import primus_bridge.callbacks.build
import primus_bridge.data.dataset
import primus_bridge.data.loader
import primus_bridge.launch.entry
import primus_bridge.launch.rank
import primus_bridge.megatron.loop
import primus_bridge.plan.plan
import primus_bridge.trainers.posttrain
import primus_bridge.trainers.result
import tests.distributed.preload
import tests.reliability.rounds

gc.freeze()
