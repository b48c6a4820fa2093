"""Imported once by the fork server of harness.py, so that each rank starts in milliseconds."""

import primus_bridge.megatron.model
import primus_bridge.megatron.optimizer
import primus_bridge.megatron.step  # noqa: F401
