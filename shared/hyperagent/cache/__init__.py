"""Content-addressed teacher rows on disk, with Redis as a disposable hot tier."""
