"""What an explanation is worth: every method by every metric on the same images."""
