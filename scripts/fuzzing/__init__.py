"""Broken LoRA files by the million, for scripts/fuzz_reader.py."""
