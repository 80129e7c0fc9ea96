"""The broker's HTTP API: thin routes over the services, one error shape, one table of who may do what."""
