"""What a run keeps and logs."""
