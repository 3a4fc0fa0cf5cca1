"""Benchmarks: ours and a peer on the same work in one run. Times are reported as ratios and are never a test."""
