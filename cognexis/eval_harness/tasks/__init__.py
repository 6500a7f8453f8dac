"""What is asked and how an answer is scored: one module per kind of task."""
