"""What our HTML pages have in common: one look, nothing loaded from elsewhere, and data that stays data."""
