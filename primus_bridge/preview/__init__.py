"""What the data becomes, to look at: on a terminal, as JSON lines, as one HTML page."""
