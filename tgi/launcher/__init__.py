"""Resolves the settings, fetches the weights, draws up the memory ledger and supervises the other processes."""
