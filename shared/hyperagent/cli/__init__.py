"""The `hyperagent` command; a service or the demo adds its own subcommand through an entry point."""
