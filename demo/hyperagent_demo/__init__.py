"""Demo: run the whole loop on one machine, with real processes and ports."""
