"""Neural architecture search of multimodal networks with few labels or none."""
