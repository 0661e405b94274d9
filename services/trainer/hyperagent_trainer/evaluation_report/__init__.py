"""The report of an evaluation, for readers who do not know the project: a Markdown file and one self-contained HTML page."""
