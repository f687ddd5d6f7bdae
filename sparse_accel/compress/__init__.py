"""What is done to weights and activations: masks, fake quantization, ranges. Knows no recipe, epoch or backend."""
