"""Pricing: pure economics of the market. No I/O, no clock, no randomness."""
