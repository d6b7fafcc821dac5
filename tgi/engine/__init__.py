"""The decision island: what runs in each step. Everything but ``loop`` is free of torch."""
