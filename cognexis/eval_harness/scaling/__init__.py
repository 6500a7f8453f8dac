"""Loop scaling: what a model's quality, cost and state do as it runs more loops, from result rows to a report."""
