"""``python -m cognexis`` is the command line."""

from cognexis.cli import main

if __name__ == "__main__":
    main()
