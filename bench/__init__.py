"""Side-by-side measurements: `python -m bench --help` (or `make bench`).

cases.py     what is measured: one table; scaling.py: series over length, image share and number of keys;
             linear.py: linear attention over length, time and memory (memory.py)
peers.py     the same work written with torch's own attention; layers.py: our layers around it, with their parameters
measure.py   one case: its peers checked, then all of them timed in turn in this process (timing.py)
results.py   what a results file holds; compare.py, readme.py and plots.py read it

Not among the peers: FlexAttention, which on CPUs is compiled for minutes before its first call.
"""
