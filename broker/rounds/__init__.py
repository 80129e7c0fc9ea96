"""Step 2: rounds. A snapshot is read, cleared with no transaction open, and committed with guards."""
