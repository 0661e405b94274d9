"""The demo: the whole loop on one machine, through real processes and ports."""
