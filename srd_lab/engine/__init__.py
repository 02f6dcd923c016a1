"""One modified backward pass over an unmodified network."""
