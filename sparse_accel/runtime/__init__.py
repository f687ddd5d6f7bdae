"""A run: options, processes, the loop and what it leaves behind; the only part that knows accelerate."""
