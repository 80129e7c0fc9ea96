"""The round log: one chain of sealed sync rounds per job, between sites, over mutual TLS."""
