"""Training: what a job is, how fast it would run, and the runtime that runs it across sites."""
