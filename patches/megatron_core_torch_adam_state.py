"""The distributed optimizer over torch's AdamW, which keeps a step number a parameter: saved and loaded rightly.

megatron.core 0.16 asserts a step number where there is none yet (a fresh optimizer about to load) and where there are
no parameters (a data-parallel rank whose part of the buffer is only padding; a pipeline stage whose layers have no
adapters, which may be that of rank 0, who writes the number for all), looks for "step" among the checkpoint's tensors
where it saved none, and loads one tensor shared by all parameters, which the fused step would then count up once a
parameter.
"""

from __future__ import annotations

import functools

from primus_bridge.patches.megatron_core_fused_adamw import _needed

from primus_bridge.patching import Patch


def _apply() -> None:
    import torch
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.state_dict
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def state_dict(self):
        inner = self.optimizer
        owned = [parameter for group in inner.param_groups for parameter in group["params"]]
        if isinstance(inner, HybridDeviceOptimizer) and owned and not inner.state:
            inner.dummy_step()
        for parameter in owned:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        if owned:
            return original(self)
        step = {"step": float(getattr(self, "steps_taken", 0))}
        groups = inner.state_dict()["param_groups"]
        groups = [{k: v for k, v in group.items() if k != "params"} | step for group in groups]
        return {"optimizer": {"param_groups": groups}}

    step_with_ready_grads = DistributedOptimizer.step_with_ready_grads

    @functools.wraps(step_with_ready_grads)
    def counted_step(self):
        done = step_with_ready_grads(self)
        self.steps_taken = getattr(self, "steps_taken", 0) + int(done)
        return done

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(set_states)
    def set_main_param_and_optimizer_states(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        own = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {"step": own["step"], **tensors})

    load = DistributedOptimizer.load_state_dict

    @functools.wraps(load)
    def load_state_dict(self, values):
        load(self, values)
        self.steps_taken = max((group["step"] for group in values["optimizer"]["param_groups"]), default=0)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer.step_with_ready_grads = counted_step


PATCH = Patch(
    id="megatron-core-torch-adam-state",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="without Transformer Engine or apex a fresh distributed optimizer cannot load a checkpoint",
    remove_when="DistributedOptimizer saves and loads torch Adam's step by itself",
    condition=_needed,
    apply=_apply,
    order=60,
)
