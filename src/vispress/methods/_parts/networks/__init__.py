"""Networks that methods with parameters are built of."""
