"""Other people's models and formats."""
