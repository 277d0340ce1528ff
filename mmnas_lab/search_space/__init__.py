"""What may be chosen: hypernets, genotypes and found networks, one folder a space."""
