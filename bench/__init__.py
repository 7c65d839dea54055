"""Side-by-side measurements: `python -m bench` (or `make bench`).

cases.py    what is measured: one table
peers.py    the same work written with torch's own attention
timing.py   interleaved runs in one process, medians of pairwise ratios
"""
