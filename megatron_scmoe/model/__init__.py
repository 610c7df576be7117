"""What a ScMoE model is built of: the layer spec and its modules."""
