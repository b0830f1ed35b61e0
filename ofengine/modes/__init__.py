"""The two modes a task can run in."""
