"""Linear methods: how a weight is stored and multiplied, apart from which checkpoint format it came in."""
