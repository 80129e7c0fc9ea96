"""The links between sites as they are: which to measure when, what both ends saw, and what the market counts with."""
