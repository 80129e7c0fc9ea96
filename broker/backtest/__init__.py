"""Replays job traces through the product's own market and through other schedulers, and reports what a federation is worth.

`trace`, `throughput` and `sites` read what a run is made from; `workload` turns it into numbers;
`engine` is the simulator, `policies` what is compared; `value`, `coalition` and `misreport` draw the
conclusions and `report` writes them down. README.md states the assumptions.
"""
