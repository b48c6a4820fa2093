"""Other programs that run our trainers."""
