"""The distillation loss, fused with the student's frozen output head: docs/loss.md has the formulas and the limits."""
