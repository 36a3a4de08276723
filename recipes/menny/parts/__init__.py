"""The parts Menny's training text is made of, one module per subject."""
