"""The lowest floor: devices and processes, files, checkpoints, model directories and logs."""
