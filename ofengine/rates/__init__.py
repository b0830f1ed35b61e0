"""Learning rates: the parameter groups, the schedule, and the plan that knows every rate."""
