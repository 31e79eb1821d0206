"""What must hold when things go wrong: killed runs, and files that somebody made to do harm."""
