"""The embedded tiny FLUX: DiffSynth blocks at small width, and what stands in for text."""
