"""Our trainers inside other programs."""
