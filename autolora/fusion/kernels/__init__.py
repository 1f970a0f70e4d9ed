"""Gated fusion in one layer, once per kind of device; `dispatch` chooses."""
