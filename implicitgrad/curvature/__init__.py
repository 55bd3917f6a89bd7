"""Products with Jacobians and Hessians of user code."""
