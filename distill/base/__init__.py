"""What everything else may use: errors, files, devices, processes."""
