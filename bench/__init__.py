"""Microbenchmarks: every operator against the machine's ceilings and against other libraries.

`transom bench` runs them; `transom.cli.bench` is its command line. models.py has the shapes,
cases.py makes the calls, ceilings.py the machine's limits, peers/ the other libraries, measure.py
takes the times, records.py keeps them and report.py shows them.
"""
