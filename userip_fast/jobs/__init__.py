"""What people start: fit, tune, shards, profiles, explain, the estimator."""
