"""``python -m cognexis`` is the command line."""

from cognexis.cli import main

main()
