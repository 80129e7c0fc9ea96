"""Broker: keeps the state of the market, clears it, and serves those who use it."""
