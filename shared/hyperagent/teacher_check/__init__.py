"""Whether a teacher uses the condition at all, measured before anything is distilled."""
