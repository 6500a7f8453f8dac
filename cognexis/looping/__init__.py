"""How often the core runs: request options and the record of what was run."""
