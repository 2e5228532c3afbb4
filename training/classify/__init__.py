"""A classifier of whole pictures: what a backbone is trained as before it learns to detect."""
