"""Several processes that train one task: what they exchange, and what they decide together."""
