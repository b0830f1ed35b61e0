"""What happens to the process: signals, crashes, restarts."""
