"""What is done to all layers of a model: adapted, switched, measured, put back."""
