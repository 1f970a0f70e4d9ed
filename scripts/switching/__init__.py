"""What the benchmark and the check of switching share: adapter files and the programs compared."""
