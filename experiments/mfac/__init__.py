"""What the M-FAC paper uses inverse Fisher products for: training networks and pruning them."""
