"""Base models by family."""
