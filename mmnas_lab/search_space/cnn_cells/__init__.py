"""The cell search space of DARTS and its relatives: convolutional cells on pixels."""
