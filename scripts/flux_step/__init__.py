"""Parts of ``scripts/bench_flux_step.py``."""
