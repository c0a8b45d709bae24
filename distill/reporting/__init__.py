"""What a run leaves for its report, and the report made of it (distill/report.py)."""
