"""Text from the model: prompts to sampled tokens with their log-probs."""
