"""The steps of `gpu_check.py`: `record` runs them, the other files are what they do."""
