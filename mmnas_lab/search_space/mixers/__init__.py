"""All-MLP encoders of tokens and their fusion, chosen from a vocabulary of yaml nodes (MixMAS)."""
