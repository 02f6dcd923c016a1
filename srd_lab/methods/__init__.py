"""One short file per family of explanation methods; ``srd_lab.registry`` lists them by name."""
