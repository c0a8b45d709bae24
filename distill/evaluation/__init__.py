"""How good a model is: accuracy, divergences, responses token by token."""
