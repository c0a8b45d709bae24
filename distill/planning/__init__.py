"""What `python -m distill.plan` computes: programs, memory, arithmetic, and what would help."""
