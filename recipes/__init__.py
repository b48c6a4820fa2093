"""Presets for `model:` and `config:`, and whole recipes, one per model and method: YAML only."""
