"""Megatron's optimizer with states in the host's memory: its checkpoints, and what a test on a CPU needs of it.

To make room for a checkpoint's states it steps with random gradients, which changes the weights that were just loaded;
and it writes classes into checkpoints, which no safe reader takes. It moves only parameters that say they lie on a GPU,
into pinned memory, which torch on a CPU does not have: so nothing of what a GPU's run does could be tried there. (A run
on a CPU takes the ordinary optimizer.)
"""

from __future__ import annotations

from typing import Any

from primus_bridge.patching import Patch


def _apply() -> None:
    import torch
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    HybridDeviceOptimizer.dummy_step = _make_states
    HybridDeviceOptimizer.state_dict = _state_dict
    if not torch.cuda.is_available():
        HybridDeviceOptimizer._get_sub_optimizer_param_groups = _groups


def _make_states(self: Any) -> None:
    """Adam's states as they are before the first step. The weights stay: gradients and learning rate are 0."""
    import torch

    rates = [group["lr"] for group in self.param_groups]
    for group in self.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    self.step()
    self.zero_grad()
    for group, rate in zip(self.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in self.state.values():
        if "step" in state:  # torch's Adam; the number of others lies in the groups, and comes from the checkpoint
            state["step"].zero_()


def _state_dict(self: Any) -> dict[str, Any]:
    """Without what is no number in the groups, such as the classes of its optimizers: a checkpoint has Adam's alone."""
    import torch

    state = torch.optim.Optimizer.state_dict(self)
    own = self.defaults.keys() - self.sub_optimizer_kwargs.keys()
    groups = [{name: value for name, value in group.items() if name not in own} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def _groups(self: Any, offload_fraction: float) -> tuple:
    """(host's groups, device's groups, parameter -> its copy on the host, the reverse, parameter -> its fp32 copy)"""
    host_groups, device_groups = [], []
    copies, originals, masters = {}, {}, {}
    left = offload_fraction * sum(parameter.numel() for group in self.param_groups for parameter in group["params"])
    for group in self.param_groups:
        host, device = [], []
        for parameter in group["params"]:
            inner, moved = parameter, left > 0
            if moved:
                left -= parameter.numel()
                inner = parameter.detach().clone()
            if self.param_update_in_fp32 and inner.dtype.itemsize < 4:
                inner = masters[parameter] = inner.detach().clone().float()
            if moved:
                copies[parameter], originals[inner] = inner, parameter
            (host if moved else device).append(inner)
        host_groups += [{**group, "params": host}] if host else []
        device_groups += [{**group, "params": device}] if device else []
    return host_groups, device_groups, copies, originals, masters


PATCH = Patch(
    id="megatron-core-hybrid-optimizer",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="the optimizer of offloaded states changes weights when it makes room for a checkpoint, and wants a GPU",
    remove_when="HybridDeviceOptimizer makes its states without a step, and takes its device from a setting",
    condition=lambda device: (True, "optimizer_cpu_offload"),
    apply=_apply,
    order=60,
)
