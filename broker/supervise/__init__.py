"""The processes of a market on one host, and the private services they need: started in order, ended without a trace."""
