"""The HTTP island: validates, templates, tokenises, detokenises, streams. Keeps the truth about every request."""
