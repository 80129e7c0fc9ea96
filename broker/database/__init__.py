"""The database: the one truth of the market."""
