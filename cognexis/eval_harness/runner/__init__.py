"""``cognexis eval``: tasks at every depth and in every loop mode, as result rows."""
