"""Which cached answers a change of the index alters, computed from what each answer was made of."""
