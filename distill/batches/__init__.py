"""From sequences to the rows that a step sees."""
