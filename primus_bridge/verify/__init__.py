"""The same weights in transformers and in Megatron: every layer's output, logits, loss and gradients side by side."""
