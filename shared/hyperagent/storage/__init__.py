"""Durable files, file locks and SQLite: what every package that writes to disk uses."""
