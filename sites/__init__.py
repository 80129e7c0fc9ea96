"""Sites: the agent that offers a datacenter to the market and runs its leases."""
