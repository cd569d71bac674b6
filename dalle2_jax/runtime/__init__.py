"""What everything stands on: devices and processes, files, checkpoints and model directories, logs."""
