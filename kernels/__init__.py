"""What each operator means: one file an operator, with its declaration, composite, reference and gradient."""
