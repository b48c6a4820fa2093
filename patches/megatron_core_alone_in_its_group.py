"""The distributed optimizer's collectives in a data-parallel group of one rank: nothing to do, yet gloo copies all.

Gradients are reduced and parameters gathered in place. gloo does not see that with one rank nothing changes: three
copies of the model a step, a seventh of a step of a small model.
"""

from __future__ import annotations

from primus_bridge.patching import Patch


def _unless_alone(collective):
    """``collective`` (output, input, group=...), left out where the one rank's output is its input."""

    def maybe(output, input, *args, group=None, **options):
        if group is not None and group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, *args, group=group, **options)

    maybe.collective = collective
    return maybe


def _apply() -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        collective = getattr(buffers, name)
        if not hasattr(collective, "collective"):
            setattr(buffers, name, _unless_alone(collective))


PATCH = Patch(
    id="megatron-core-alone-in-its-group",
    package="megatron-core",
    versions=">=0.16,<0.17",
    reason="gloo copies the model's gradients and parameters for a group of one rank",
    remove_when="megatron.core leaves collectives out for groups of one rank",
    condition=lambda device: (device == "cpu", "NCCL knows a collective in place of one rank"),
    apply=_apply,
    order=65,
)
