"""The C headers that a vendor compiles against; `transom.include` tells where they are."""
