"""Training of all lanes (seeds, learning rates) of an arm in one vmapped step."""
