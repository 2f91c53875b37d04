"""What operators ask of the prefix cache, and what they want of it: see the package's modules."""
