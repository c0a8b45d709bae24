"""When on-policy distillation pays: what is run, how, and what is made of it."""
