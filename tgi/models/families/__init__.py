"""How each architecture's config.json becomes the data of its dataflow: one rule each. No torch."""
