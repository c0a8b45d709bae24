"""What estimators of a divergence's gradient estimate, judged by the exact gradient."""
