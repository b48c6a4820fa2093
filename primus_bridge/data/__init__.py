"""Rows in, batches out: sources -> formats -> templates -> tokenize -> dataset (cached) -> batches."""
