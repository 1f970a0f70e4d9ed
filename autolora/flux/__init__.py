"""The base models: layer table, configurations, loading, quantization, portraits."""
