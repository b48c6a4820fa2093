"""Run by test_hf_weights.py in a process of its own, whose address space may grow by 512 MiB: slices of a large file.

The folder holds a sparse model.safetensors of one [768, 4194304] bf16 tensor (6 GiB); a sparse file like it is
written beside it.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from primus_bridge.conversion.hf_weights import HFWeights
from primus_bridge.conversion.safetensors_file import SafetensorsFile

torch.set_num_threads(1)
torch.ones(1000, 1000).to(torch.bfloat16).t().contiguous()  # what torch loads with its first operation
folder = Path(sys.argv[1])
status = Path("/proc/self/status").read_text()
used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize:")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 512 * 2**20, -1))

weights = HFWeights(folder)
rows, columns = weights.tensors["w"].shape
part = weights.read("w", rows=slice(rows - 25, rows))  # 200 MiB at the far end
assert part.shape == (25, columns) and part[-1, -1] == 2.5 and not part[0].any()
del part
part = weights.read("w", columns=slice(columns - 1024, columns))  # every row is wider than the buffer
assert part.shape == (rows, 1024) and part[-1, -1] == 2.5 and not part[:-1].any()
part = weights.read("narrow", columns=slice(0, 16))
assert part.shape == (2**20, 16) and not part.any()
del part
try:
    torch.empty(2**30, dtype=torch.uint8)
except RuntimeError:
    pass
else:
    raise SystemExit("the limit does not hold")

entries = {name: (info.dtype, info.shape) for name, info in weights.tensors.items()}
with SafetensorsFile(folder / "out.safetensors", entries) as file:
    file.write("w", torch.ones(8, columns), rows=slice(rows - 8, rows))  # cast: 128 MiB -> 64 MiB
    turned = torch.arange(rows, dtype=torch.bfloat16).expand(8, rows).t()
    file.write("w", turned, columns=slice(8, 16))
print("done")
