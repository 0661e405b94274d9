"""`python -m hyperagent`, the same as the `hyperagent` command."""

from hyperagent.cli.main import main

if __name__ == "__main__":
    main()
