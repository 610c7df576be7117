"""Loss, perplexity and logits of a trained model."""
