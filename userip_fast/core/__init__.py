"""What everybody may use: errors, files, keys, settings, progress, interrupts."""
