"""Timings of roialign against other implementations, each in a process of its own."""
