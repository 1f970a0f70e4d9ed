"""What depends on this machine alone: device, memory, weight storage, checkpoint files."""
