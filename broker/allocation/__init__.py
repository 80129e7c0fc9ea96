"""Allocation: a pure function from a snapshot of the market to its clearing."""
