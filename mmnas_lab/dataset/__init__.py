"""The data: raw samples of each modality, their splits, and label-free views of them."""
