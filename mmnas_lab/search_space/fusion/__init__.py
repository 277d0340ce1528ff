"""The fusion search space of BM-NAS: cells that fuse backbone features."""
