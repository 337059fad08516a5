"""Models that are small enough for tests, with weights that make every branch matter."""
