"""What depends on this machine alone: device, memory, storage, files of checkpoints."""
