"""The command `hansa`: what tenants, operators and admins type. Talks to the broker through its public API alone."""
