"""Training: jobs, and what they are made of."""
