"""The paper's experiments, each as one command: what it printed beside what is measured here."""
