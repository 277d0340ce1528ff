"""What is minimised: a head, a loss and the metric that selects."""
