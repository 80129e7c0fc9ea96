"""Links as they are: one site probes another over mutual TLS when the broker asks, and both report what they saw."""
