"""One file per defect or gap of an upstream package; see primus_bridge/patching.py."""
