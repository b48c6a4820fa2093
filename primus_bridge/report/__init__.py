"""The report of a run: what its save folder holds, as one HTML page; nothing here needs torch."""
