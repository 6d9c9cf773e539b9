"""What a step does: one class for each method, made of first-order and zeroth-order levels."""
