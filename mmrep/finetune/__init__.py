"""What is done with a trained model: merging, and heads on top of it."""
