"""Public functions, fakes and gradients of the three families of ops: attention, select, merge."""
