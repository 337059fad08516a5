"""What each operator means: one file an operator, with declaration, composite, reference,
gradient."""
