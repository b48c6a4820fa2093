"""Model, parallel groups, optimizer, schedule: the room that names megatron.core.

Importing a module of this room imports megatron.core, so ``primus_bridge.patching.apply_patches()`` comes first;
this package does it, so that no caller can forget.
"""

import logging
import warnings

from primus_bridge.patching import apply_patches

# Megatron-Core warns at import about each optional package and at run time about its own deprecated calls; a user can
# change neither, and `primus doctor` lists what is missing once
warnings.filterwarnings("ignore", module=r"megatron\.core(\..*)?")
for deprecated in (r"torch\.distributed\.c10d_logger", r"torch\.distributed\.checkpoint\..*"):
    warnings.filterwarnings("ignore", module=deprecated, category=FutureWarning)
# it logs a line a layer about an MLP class that is not its own
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
apply_patches()
