"""Two statements that can be proved, what they do not say, and an audit that can refute them."""
