"""What scores the student's tokens."""
