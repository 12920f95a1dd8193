"""`verify --numerics`: inputs that mean something, a reference, and a comparison that is strict."""
