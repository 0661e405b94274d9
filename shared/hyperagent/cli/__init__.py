"""The `hyperagent` command."""
