"""Whole networks on this machine beside what could be run instead: what `mvit3 bench` and the scripts in benchmarks/
share."""
