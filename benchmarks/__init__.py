"""How fast, measured as ratios against named peers in one run: ``python -m benchmarks``."""
