"""Faults and extremes: what a user may feed the operators by accident, and what they must make of it: README.md."""
