"""Mutation tests: guards taken away one by one, each to be missed by a test."""
