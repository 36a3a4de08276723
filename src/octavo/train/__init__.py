"""Training from scratch: router and experts jointly, in plain torch."""
