"""Data that every process shares: settings, messages, errors, telemetry. No torch, no sockets."""
